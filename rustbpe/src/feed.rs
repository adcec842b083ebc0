//! How training text gets from Python to the counting threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyIterator;

use crate::texts::{as_string, ArrowStrings, Text, Texts};

/// Texts go to a thread when they have this many bytes, or there are as many as the caller said.
const BATCH_BYTES: usize = 1 << 20;

/// How often long work looks for Ctrl-C and reports its progress.
const INTERVAL: Duration = Duration::from_millis(100);

/// Tells Python how far the work is, and asks it whether to go on.
pub struct Progress {
    callback: Option<Py<PyAny>>,
    last: Instant,
}

impl Progress {
    pub fn new(callback: Option<Py<PyAny>>) -> Self {
        Self { callback, last: Instant::now() }
    }

    /// Calls the callback with the name of the stage, how much is done and, if known, of how much. An exception, from
    /// the callback or of a signal, ends the work. Does nothing if the last call was a moment ago.
    pub fn update(&mut self, stage: &str, done: u64, total: Option<u64>) -> PyResult<()> {
        if self.last.elapsed() < INTERVAL {
            return Ok(());
        }
        self.report(stage, done, total)
    }

    /// The same, however short ago the last call was.
    pub fn report(&mut self, stage: &str, done: u64, total: Option<u64>) -> PyResult<()> {
        self.last = Instant::now();
        Python::attach(|py| {
            py.check_signals()?;
            self.callback.as_ref().map_or(Ok(()), |callback| callback.call1(py, (stage, done, total)).map(drop))
        })
    }
}

/// How much of the text to take, in characters.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Of one document.
    pub document: u64,
    /// In all: the document that goes beyond is the last.
    pub total: Option<u64>,
}

/// Collects documents and sends them to the counting threads.
pub struct Feed<'a> {
    pub sender: SyncSender<Texts>,
    pub failed: &'a AtomicBool,
    pub progress: &'a mut Progress,
    pub batch_size: usize,
    pub limits: Limits,
    batch: Texts,
    chars: u64,
}

impl<'a> Feed<'a> {
    pub fn new(
        sender: SyncSender<Texts>,
        failed: &'a AtomicBool,
        progress: &'a mut Progress,
        batch_size: usize,
        limits: Limits,
    ) -> Self {
        Self { sender, failed, progress, batch_size, limits, batch: Texts::default(), chars: 0 }
    }

    /// All strings of an iterator.
    pub fn iterator(mut self, iterator: &Bound<'_, PyIterator>) -> PyResult<()> {
        for (index, item) in iterator.clone().enumerate() {
            if !self.push(iterator.py(), as_string(item?, index)?.to_str()?)? {
                break;
            }
        }
        self.finish(iterator.py())
    }

    /// A column of strings of Parquet files, through pyarrow, a row group at a time.
    pub fn parquet(mut self, py: Python<'_>, paths: &[Bound<'_, PyAny>], column: &str) -> PyResult<()> {
        let pyarrow = py.import("pyarrow.parquet")?;
        'files: for path in paths {
            let noted = |error: PyErr| add_note(py, error, &format!("while reading {path}"));
            let file = pyarrow.call_method1("ParquetFile", (path,)).map_err(noted)?;
            for group in 0..file.getattr("num_row_groups")?.extract()? {
                let mut buffer = Vec::new();
                for text in read_column(&file, group, column).map_err(noted)?.iter() {
                    let text = text.read(&mut buffer).map_err(|error| noted(PyValueError::new_err(error)))?;
                    if !self.push(py, text)? {
                        break 'files;
                    }
                }
            }
        }
        self.finish(py)
    }

    /// Whether more is wanted.
    fn push(&mut self, py: Python<'_>, mut text: &str) -> PyResult<bool> {
        if text.len() > u32::MAX as usize {
            return Err(PyValueError::new_err(format!(
                "a text of {} bytes is too long: cut it below 4 GiB",
                text.len()
            )));
        }
        if text.len() as u64 > self.limits.document {
            if let Some((end, _)) = text.char_indices().nth(self.limits.document as usize) {
                text = &text[..end];
            }
        }
        self.batch.push(text);
        self.chars += text.chars().count() as u64;
        if self.batch.len() >= self.batch_size || self.batch.num_bytes() >= BATCH_BYTES {
            self.flush(py)?;
        }
        Ok(self.limits.total.is_none_or(|total| self.chars <= total) && !self.failed.load(Ordering::Relaxed))
    }

    fn flush(&mut self, py: Python<'_>) -> PyResult<()> {
        let batch = std::mem::take(&mut self.batch);
        let _ = py.detach(|| self.sender.send(batch)); // fails when every thread has: joining them tells why
        self.progress.update("count", self.chars, self.limits.total)
    }

    fn finish(mut self, py: Python<'_>) -> PyResult<()> {
        self.flush(py)?;
        self.progress.report("count", self.chars, Some(self.chars))
    }
}

fn read_column(file: &Bound<'_, PyAny>, group: usize, column: &str) -> PyResult<ArrowStrings> {
    let names: Vec<String> = file.getattr("schema_arrow")?.getattr("names")?.extract()?;
    if !names.iter().any(|name| name == column) {
        return Err(PyValueError::new_err(format!("no column {column:?}, only {}", names.join(", "))));
    }
    ArrowStrings::new(&file.call_method1("read_row_group", (group, [column]))?.call_method1("column", (0,))?)
}

fn add_note(py: Python<'_>, error: PyErr, note: &str) -> PyErr {
    match error.value(py).call_method1("add_note", (note,)) {
        Ok(_) => error,
        Err(other) => other,
    }
}
