//! Byte-pair encoding for Python: train a vocabulary and encode with it, quickly, exactly, on all cores.

mod batch;
mod counts;
mod encode;
mod feed;
mod gpt4;
mod key;
mod merge;
mod processor;
mod split;
mod texts;
mod train;

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::SyncSender;
use std::sync::LazyLock;
use std::thread;

use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use batch::{encode_batch, Pool};
use counts::{count_chunks, ChunkCounts};
use encode::Encoder;
use feed::{Feed, Limits, Progress};
use merge::{Vocabulary, MAX_TOKENS};
use split::{Splitter, DEFAULT_PATTERN};
use texts::{as_string, ArrowStrings, Text, Texts};
use train::{learn_merges, Words};

/// More threads than any machine has cores would only cost memory, and at some number none can be started.
const MAX_THREADS: usize = 1024;

/// More threads than this would share cores and each need a cache.
static CORES: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, |count| count.get()));

/// A byte-level BPE tokenizer: ids 0..=255 are bytes, then come the learned merges.
#[pyclass]
struct Tokenizer {
    encoder: Encoder,
    pool: Pool,
}

/// Ids of several texts one after the other (int32 [N]), and where each text's begin and the last one's end (int64).
type Arrays<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i64>>);

/// A Python exception, which any message of ours can become.
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

impl From<Failure> for PyErr {
    fn from(Failure(error): Failure) -> Self {
        error
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let splitter = Splitter::new(DEFAULT_PATTERN).map_err(Failure::from)?;
        Ok(Self::of(Vocabulary::from_merges(&[]), splitter))
    }

    /// A tokenizer of known tokens: token `i` has the id `i`. ValueError if a byte is missing, a token is there twice
    /// or `pattern` is not a regular expression.
    #[staticmethod]
    fn from_tokens(py: Python<'_>, tokens: Vec<Vec<u8>>, pattern: &str) -> PyResult<Self> {
        let splitter = Splitter::new(pattern).map_err(Failure::from)?;
        let vocabulary = py.detach(|| Vocabulary::from_tokens(tokens)).map_err(Failure::from)?;
        Ok(Self::of(vocabulary, splitter))
    }

    /// Learn a vocabulary of up to `vocab_size` tokens (at least 256, the bytes) from an iterable of str. Chunks of
    /// `pattern` are never merged across. On any exception the tokenizer stays as it was.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, *, progress=None, num_threads=None))]
    #[allow(clippy::too_many_arguments)] // they are Python's keywords
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
        num_threads: Option<usize>,
    ) -> PyResult<()> {
        let batch_size = at_least_one("buffer_size", buffer_size)?;
        let limits = Limits { document: u64::MAX, total: None };
        let iterator = iterator.try_iter()?.unbind();
        self.train(py, vocab_size, pattern, progress, num_threads, |sender, failed, progress| {
            Python::attach(|py| Feed::new(sender, failed, progress, batch_size, limits).iterator(iterator.bind(py)))
        })
    }

    /// The same from a column of strings of Parquet files: the first `doc_cap` characters of each document, until they
    /// are more than `max_chars` together.
    #[pyo3(signature = (
        paths, vocab_size, pattern=None, *, column="text", max_chars=None, doc_cap=None, progress=None, num_threads=None
    ))]
    #[allow(clippy::too_many_arguments)]
    fn train_from_parquet(
        &mut self,
        py: Python<'_>,
        paths: Vec<Py<PyAny>>,
        vocab_size: i64,
        pattern: Option<&str>,
        column: &str,
        max_chars: Option<i64>,
        doc_cap: Option<i64>,
        progress: Option<Py<PyAny>>,
        num_threads: Option<usize>,
    ) -> PyResult<()> {
        let limit = |name, value: Option<i64>| value.map(|value| at_least_one(name, value)).transpose();
        let document = limit("doc_cap", doc_cap)?.map_or(u64::MAX, |chars| chars as u64);
        let limits = Limits { document, total: limit("max_chars", max_chars)?.map(|chars| chars as u64) };
        self.train(py, vocab_size, pattern, progress, num_threads, |sender, failed, progress| {
            Python::attach(|py| {
                let paths: Vec<_> = paths.iter().map(|path| path.bind(py).clone()).collect();
                Feed::new(sender, failed, progress, usize::MAX, limits).parquet(py, &paths, column)
            })
        })
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
        let result = py.detach(|| {
            let mut ids = Vec::new();
            self.pool.with(&self.encoder, |scratch| self.encoder.encode(text, scratch, &mut ids)).map(|()| ids)
        });
        Ok(result.map_err(Failure::from)?)
    }

    /// The ids of each of `texts`, an iterable of str, after the id `prepend` if one is given, encoded by up to
    /// `num_threads` threads without the GIL: all ids (int32 [N]) and offsets (int64 [len(texts) + 1]).
    #[pyo3(signature = (texts, prepend=None, num_threads=8))]
    fn encode_batch<'py>(
        &self,
        texts: &Bound<'py, PyAny>,
        prepend: Option<i32>,
        num_threads: usize,
    ) -> PyResult<Arrays<'py>> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("expected a list of str, got a str"));
        }
        let strings = texts.try_iter()?.enumerate().map(|(index, item)| as_string(item?, index));
        let strings = strings.collect::<PyResult<Vec<_>>>()?;
        let strings = strings.iter().map(|string| Ok(string.to_str()?));
        self.encode_texts(texts.py(), strings, prepend, num_threads)
    }

    /// The same for the strings of a pyarrow Array or ChunkedArray, without its nulls.
    #[pyo3(signature = (array, prepend=None, num_threads=8))]
    fn encode_arrow<'py>(
        &self,
        array: &Bound<'py, PyAny>,
        prepend: Option<i32>,
        num_threads: usize,
    ) -> PyResult<Arrays<'py>> {
        let strings = ArrowStrings::new(array)?;
        self.encode_texts(array.py(), strings.iter().map(Ok), prepend, num_threads)
    }

    /// The bytes that `ids` stand for, which need not be whole UTF-8 characters.
    fn decode<'py>(&self, py: Python<'py>, ids: Vec<i64>) -> PyResult<Bound<'py, PyBytes>> {
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
        Self { encoder: Encoder::new(vocabulary, splitter), pool: Pool::default() }
    }

    /// Counts what `feed` sends and learns from it.
    fn train(
        &mut self,
        py: Python<'_>,
        vocab_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
        num_threads: Option<usize>,
        feed: impl FnOnce(SyncSender<Texts>, &AtomicBool, &mut Progress) -> PyResult<()> + Send,
    ) -> PyResult<()> {
        let num_merges = match vocab_size {
            ..256 => Err(format!("vocab_size must be at least 256, got {vocab_size}")),
            _ if vocab_size > MAX_TOKENS as i64 => {
                Err(format!("vocab_size must be at most {MAX_TOKENS}, got {vocab_size}"))
            }
            _ => Ok(vocab_size as usize - 256),
        };
        let num_merges = num_merges.map_err(Failure::from)?;
        let threads = num_threads.unwrap_or(*CORES).clamp(1, MAX_THREADS);
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN)).map_err(Failure::from)?;
        let mut progress = Progress::new(progress);
        let vocabulary = py.detach(|| -> Result<_, Failure> {
            let counts = count_chunks(&splitter, threads, |sender, failed| {
                feed(sender, failed, &mut progress).map_err(Failure::from)
            })?;
            learn(counts, num_merges, &mut progress)
        })?;
        *self = Self::of(vocabulary, splitter);
        Ok(())
    }

    fn encode_texts<'py>(
        &self,
        py: Python<'py>,
        texts: impl Iterator<Item = Result<impl Text, Failure>>,
        prepend: Option<i32>,
        num_threads: usize,
    ) -> PyResult<Arrays<'py>> {
        let (mut signals, threads) = (Progress::new(None), num_threads.min(*CORES));
        let check = || signals.update("", 0, None).map_err(Failure::from);
        let without_gil = |work: &mut (dyn FnMut() + Send)| py.detach(work);
        let encoded = encode_batch(&self.encoder, &self.pool, texts, prepend, threads, without_gil, check)?;
        Ok((encoded.ids.into_pyarray(py), encoded.offsets.into_pyarray(py)))
    }
}

fn learn(counts: Vec<ChunkCounts>, num_merges: usize, progress: &mut Progress) -> Result<Vocabulary, Failure> {
    let (num_words, num_bytes) =
        counts.iter().map(ChunkCounts::len).fold((0, 0), |sum, len| (sum.0 + len.0, sum.1 + len.1));
    let mut words = Words::with_capacity(num_words, num_bytes)?;
    for part in counts {
        part.iter().for_each(|(chunk, count)| words.push(chunk, count));
    }
    let merges =
        learn_merges(words, num_merges, |done| progress.update("merge", done as u64, Some(num_merges as u64)))?;
    progress.report("merge", merges.len() as u64, Some(merges.len() as u64))?;
    Ok(Vocabulary::from_merges(&merges))
}

fn at_least_one(name: &str, value: i64) -> PyResult<usize> {
    match usize::try_from(value) {
        Ok(value @ 1..) => Ok(value),
        _ => Err(PyValueError::new_err(format!("{name} must be at least 1, got {value}"))),
    }
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
