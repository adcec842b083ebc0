//! Byte-pair encoding for Python: train a vocabulary quickly, deterministically, on all cores.

mod counts;
mod encode;
mod gpt4;
mod split;
mod train;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator, PyString};

use counts::{count_chunks, Batch, ChunkCounts};
use encode::Vocabulary;
use split::{Splitter, DEFAULT_PATTERN};
use train::{learn_merges, Words};

/// A batch goes to a worker when it has this many bytes, or `buffer_size` documents.
const BATCH_BYTES: usize = 1 << 22;

/// How often a running training looks for Ctrl-C.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// A byte-level BPE tokenizer: ids 0..=255 are bytes, then come the learned merges.
#[pyclass]
struct Tokenizer {
    splitter: Splitter,
    vocabulary: Vocabulary,
}

struct TrainError(PyErr);

impl From<String> for TrainError {
    fn from(message: String) -> Self {
        Self(PyValueError::new_err(message))
    }
}

impl From<PyErr> for TrainError {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let splitter = Splitter::new(DEFAULT_PATTERN).map_err(PyValueError::new_err)?;
        Ok(Self { splitter, vocabulary: Vocabulary::new(&[]) })
    }

    /// Learn a vocabulary of up to `vocab_size` tokens (at least 256, the bytes) from an iterable of str. Chunks of
    /// `pattern` are never merged across. On any exception the tokenizer stays as it was.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        let num_merges = match u32::try_from(vocab_size) {
            Ok(size) if size >= 256 => size as usize - 256,
            _ => return Err(PyValueError::new_err(format!("vocab_size must be at least 256, got {vocab_size}"))),
        };
        let buffer_size = usize::try_from(buffer_size).unwrap_or(0);
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size must be at least 1"));
        }
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN)).map_err(PyValueError::new_err)?;
        let iterator = iterator.try_iter()?.unbind();
        let vocabulary = py.detach(|| {
            let counts = count_chunks(&splitter, |sender, failed| {
                Python::attach(|py| send(iterator.bind(py), buffer_size, sender, failed))
            });
            learn(counts.map_err(|TrainError(error)| error)?, num_merges)
        })?;
        (self.splitter, self.vocabulary) = (splitter, vocabulary);
        Ok(())
    }

    /// The split pattern that training used and encoding uses.
    fn get_pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// `(bytes, rank)` of every token, by rank.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.vocabulary.tokens().iter().zip(0..).map(|(token, rank)| (PyBytes::new(py, token), rank)).collect()
    }

    /// The ids of `text`.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        py.detach(|| {
            let mut ids = Vec::new();
            self.splitter.for_each(text, |chunk| self.vocabulary.encode_chunk(chunk.as_bytes(), &mut ids))?;
            Ok(ids)
        })
        .map_err(|message: String| PyValueError::new_err(message))
    }

    /// The bytes that `ids` stand for, which need not be whole UTF-8 characters.
    fn decode<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        match self.vocabulary.decode(&ids) {
            Ok(bytes) => Ok(PyBytes::new(py, &bytes)),
            Err(id) => {
                let size = self.vocabulary.tokens().len();
                Err(PyValueError::new_err(format!("no token has id {id}: the vocabulary has {size}")))
            }
        }
    }
}

/// Reads the iterator under the GIL and hands its text to the workers, waiting for them without the GIL.
fn send(
    iterator: &Bound<'_, PyIterator>,
    buffer_size: usize,
    sender: SyncSender<Batch>,
    failed: &AtomicBool,
) -> Result<(), TrainError> {
    let py = iterator.py();
    let flush = |batch: &mut Batch| {
        let batch = std::mem::take(batch);
        let _ = py.detach(|| sender.send(batch)); // fails when every worker has: joining them tells why
        py.check_signals()
    };
    let mut batch = Batch::default();
    for (index, item) in iterator.clone().enumerate() {
        let item = item?;
        let text = item.cast::<PyString>().map_err(|_| {
            let kind = item.get_type().name().map_or_else(|_| "object".to_owned(), |name| name.to_string());
            PyTypeError::new_err(format!("expected an iterable of str, but item {index} is {kind}"))
        })?;
        batch.push(text.to_str()?);
        if batch.ends.len() >= buffer_size || batch.text.len() >= BATCH_BYTES {
            flush(&mut batch)?;
            if failed.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    Ok(flush(&mut batch)?)
}

fn learn(counts: Vec<ChunkCounts>, num_merges: usize) -> PyResult<Vocabulary> {
    let mut words = Words::default();
    for part in counts {
        part.iter().for_each(|(chunk, count)| words.push(chunk, count));
    }
    let mut last_check = Instant::now();
    let merges = learn_merges(words, num_merges, || {
        if last_check.elapsed() < SIGNAL_INTERVAL {
            return Ok(());
        }
        last_check = Instant::now();
        Python::attach(|py| py.check_signals())
    })?;
    Ok(Vocabulary::new(&merges))
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
