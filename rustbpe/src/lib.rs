//! Byte-pair encoding for Python: train a vocabulary quickly, deterministically, on all cores.

mod batch;
mod counts;
mod encode;
mod gpt4;
mod split;
mod train;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator, PyString};

use batch::{encode_batch, Pool};
use counts::{count_chunks, Batch, ChunkCounts};
use encode::{Encoder, Vocabulary};
use split::{Splitter, DEFAULT_PATTERN};
use train::{learn_merges, Words};

/// A batch goes to a worker when it has this many bytes, or `buffer_size` documents.
const BATCH_BYTES: usize = 1 << 22;

/// How often long work looks for Ctrl-C.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// A byte-level BPE tokenizer: ids 0..=255 are bytes, then come the learned merges.
#[pyclass]
struct Tokenizer {
    encoder: Encoder,
    pool: Pool,
}

/// Ids of several texts one after the other (int32), and where each text's begin and the last one's end (int64).
type Arrays<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i64>>);

struct Failure(PyErr);

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self(PyValueError::new_err(message))
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let splitter = Splitter::new(DEFAULT_PATTERN).map_err(PyValueError::new_err)?;
        Ok(Self::of(Vocabulary::from_merges(&[]), splitter))
    }

    /// A tokenizer of known tokens: token `i` has the id `i`. ValueError if a byte is missing, a token is there twice
    /// or `pattern` is not a regular expression.
    #[staticmethod]
    fn from_tokens(py: Python<'_>, tokens: Vec<Vec<u8>>, pattern: &str) -> PyResult<Self> {
        let splitter = Splitter::new(pattern).map_err(PyValueError::new_err)?;
        let vocabulary = py.detach(|| Vocabulary::from_tokens(tokens)).map_err(PyValueError::new_err)?;
        Ok(Self::of(vocabulary, splitter))
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
            learn(counts.map_err(|Failure(error)| error)?, num_merges)
        })?;
        *self = Self::of(vocabulary, splitter);
        Ok(())
    }

    /// The split pattern that training used and encoding uses.
    fn get_pattern(&self) -> &str {
        self.encoder.splitter.pattern()
    }

    /// `(bytes, rank)` of every token, by rank.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let tokens = self.encoder.vocabulary.tokens().iter().zip(0..);
        tokens.map(|(token, rank)| (PyBytes::new(py, token), rank)).collect()
    }

    /// The ids of `text`.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<i32>> {
        py.detach(|| {
            let mut ids = Vec::new();
            self.pool.with(&self.encoder, |scratch| self.encoder.encode(text, scratch, &mut ids))?;
            Ok(ids)
        })
        .map_err(|message: String| PyValueError::new_err(message))
    }

    /// The ids of each of `texts`, after the id `prepend` if one is given, encoded by up to `num_threads` threads
    /// without the GIL: all ids (int32 [N]) and offsets (int64 [len(texts) + 1]).
    #[pyo3(signature = (texts, prepend=None, num_threads=8))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        prepend: Option<i32>,
        num_threads: usize,
    ) -> PyResult<Arrays<'py>> {
        let texts: Vec<&str> = texts.iter().map(|text| text.to_str()).collect::<PyResult<_>>()?;
        self.encode_texts(py, &texts, prepend, num_threads)
    }

    /// The same for texts that lie in one buffer of UTF-8: text `i` from byte `offsets[i]` to byte `offsets[i + 1]`.
    /// ValueError if the offsets do not fit or the bytes are not UTF-8.
    #[pyo3(signature = (data, offsets, prepend=None, num_threads=8))]
    fn encode_utf8<'py>(
        &self,
        py: Python<'py>,
        data: PyBuffer<u8>,
        offsets: PyReadonlyArray1<'py, i64>,
        prepend: Option<i32>,
        num_threads: usize,
    ) -> PyResult<Arrays<'py>> {
        let data = data.to_vec(py)?; // costs little, and nobody can change it while we read without the GIL
        let texts = texts_of(&data, offsets.as_slice()?)?;
        self.encode_texts(py, &texts, prepend, num_threads)
    }

    /// The bytes that `ids` stand for, which need not be whole UTF-8 characters.
    fn decode<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        match self.encoder.vocabulary.decode(&ids) {
            Ok(bytes) => Ok(PyBytes::new(py, &bytes)),
            Err(id) => {
                let size = self.encoder.vocabulary.tokens().len();
                Err(PyValueError::new_err(format!("no token has id {id}: the vocabulary has {size}")))
            }
        }
    }
}

impl Tokenizer {
    fn of(vocabulary: Vocabulary, splitter: Splitter) -> Self {
        Self { encoder: Encoder { vocabulary, splitter }, pool: Pool::default() }
    }

    fn encode_texts<'py>(
        &self,
        py: Python<'py>,
        texts: &[&str],
        prepend: Option<i32>,
        num_threads: usize,
    ) -> PyResult<Arrays<'py>> {
        let mut signals = Signals::new();
        let encoded = py.detach(|| {
            encode_batch(&self.encoder, &self.pool, texts, prepend, num_threads, || signals.check().map_err(Failure))
        });
        let encoded = encoded.map_err(|Failure(error)| error)?;
        Ok((encoded.ids.into_pyarray(py), encoded.offsets.into_pyarray(py)))
    }
}

fn texts_of<'a>(data: &'a [u8], offsets: &[i64]) -> PyResult<Vec<&'a str>> {
    let text = |bounds: &[i64]| {
        let range = usize::try_from(bounds[0]).ok()?..usize::try_from(bounds[1]).ok()?;
        data.get(range).and_then(|bytes| std::str::from_utf8(bytes).ok())
    };
    let texts = offsets.windows(2).enumerate();
    texts
        .map(|(index, bounds)| {
            text(bounds).ok_or_else(|| {
                let [start, end] = bounds else { unreachable!("windows of two") };
                PyValueError::new_err(format!("text {index}, bytes {start} to {end} of {}, is no UTF-8", data.len()))
            })
        })
        .collect()
}

/// Looks for Ctrl-C now and then, from threads that do not hold the GIL.
struct Signals(Instant);

impl Signals {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn check(&mut self) -> PyResult<()> {
        if self.0.elapsed() < SIGNAL_INTERVAL {
            return Ok(());
        }
        self.0 = Instant::now();
        Python::attach(|py| py.check_signals())
    }
}

/// Reads the iterator under the GIL and hands its text to the workers, waiting for them without the GIL.
fn send(
    iterator: &Bound<'_, PyIterator>,
    buffer_size: usize,
    sender: SyncSender<Batch>,
    failed: &AtomicBool,
) -> Result<(), Failure> {
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
    let mut signals = Signals::new();
    Ok(Vocabulary::from_merges(&learn_merges(words, num_merges, || signals.check())?))
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
