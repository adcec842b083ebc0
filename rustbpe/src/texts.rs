//! Several texts in one allocation, and how they come from Python.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyString;

#[derive(Default)]
pub struct Texts {
    text: String,
    /// Where each text ends.
    ends: Vec<usize>,
}

impl Texts {
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn num_bytes(&self) -> usize {
        self.text.len()
    }
}

/// The strings of an Arrow array where they lie: nothing is copied or checked before a thread reads them.
#[derive(Default)]
pub struct ArrowStrings {
    /// The offsets of the strings of each chunk, and the buffer that they point into.
    chunks: Vec<(Vec<usize>, Option<PyBuffer<i8>>)>,
}

impl ArrowStrings {
    /// Of a pyarrow Array or ChunkedArray, without its nulls.
    pub fn new(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let kind = array.getattr("type")?.str()?.to_string();
        if !["string", "large_string", "string_view"].contains(&kind.as_str()) {
            return Err(PyTypeError::new_err(format!("expected strings, got an Arrow array of {kind}")));
        }
        let array = array.call_method0("drop_null")?.call_method1("cast", ("large_string",))?;
        let mut strings = Self::default();
        match array.getattr_opt("chunks")? {
            Some(chunks) => chunks.try_iter()?.try_for_each(|chunk| strings.push_chunk(&chunk?))?,
            None => strings.push_chunk(&array)?,
        }
        Ok(strings)
    }

    /// `chunk` is a pyarrow LargeStringArray without nulls.
    fn push_chunk(&mut self, chunk: &Bound<'_, PyAny>) -> PyResult<()> {
        let (first, len): (usize, usize) = (chunk.getattr("offset")?.extract()?, chunk.len()?);
        if len > 0 {
            let buffers = chunk.call_method0("buffers")?;
            let offsets = buffers.get_item(1)?.call_method1("slice", (first * 8, (len + 1) * 8))?;
            let offsets: Vec<u8> =
                PyBuffer::<i8>::get(&offsets)?.to_vec(chunk.py())?.into_iter().map(|byte| byte as u8).collect();
            let offsets = offsets.chunks_exact(8).map(|bytes| i64::from_ne_bytes(bytes.try_into().expect("8 bytes")));
            let bytes = buffers.get_item(2)?;
            let bytes = if bytes.is_none() { None } else { Some(PyBuffer::get(&bytes)?) };
            self.chunks.push((offsets.map(|offset| offset as usize).collect(), bytes));
        }
        Ok(())
    }

    pub fn iter(&self) -> impl Iterator<Item = Unchecked<'_>> {
        self.chunks.iter().flat_map(|(offsets, buffer)| {
            let bytes: &[u8] = match buffer {
                // SAFETY: the buffer holds this many bytes as long as `self` lives, and Arrow forbids to change the
                // bytes of an array. Whoever does so nevertheless garbles text: UTF-8 is checked in a copy.
                Some(buffer) => unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.len_bytes()) },
                None => &[],
            };
            offsets.windows(2).map(|pair| Unchecked(bytes.get(pair[0]..pair[1])))
        })
    }
}

/// A text that threads can read.
pub trait Text: Copy + Send {
    fn bytes(&self) -> &[u8];

    /// The text, in `buffer` if it has to be copied.
    fn read<'a>(&'a self, buffer: &'a mut Vec<u8>) -> Result<&'a str, String>;
}

impl Text for &str {
    fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    fn read<'a>(&'a self, _: &'a mut Vec<u8>) -> Result<&'a str, String> {
        Ok(self)
    }
}

/// Bytes that should be UTF-8; None if they are not in their buffer.
#[derive(Clone, Copy)]
pub struct Unchecked<'t>(Option<&'t [u8]>);

impl Text for Unchecked<'_> {
    fn bytes(&self) -> &[u8] {
        self.0.unwrap_or(&[])
    }

    fn read<'a>(&'a self, buffer: &'a mut Vec<u8>) -> Result<&'a str, String> {
        let bad_text = |reason: &str| format!("the Arrow array has a string that is not UTF-8: {reason}");
        buffer.clear();
        buffer.extend_from_slice(self.0.ok_or_else(|| bad_text("its offsets are wrong"))?);
        simdutf8::basic::from_utf8(buffer).map_err(|error| bad_text(&error.to_string()))
    }
}

/// `item` as a str, or an error that says which one is none.
pub fn as_string<'py>(item: Bound<'py, PyAny>, index: usize) -> PyResult<Bound<'py, PyString>> {
    item.cast_into::<PyString>().map_err(|error| {
        let kind = error.into_inner().get_type();
        let kind = kind.name().map_or_else(|_| "object".to_owned(), |name| name.to_string());
        PyTypeError::new_err(format!("expected str, but item {index} is {kind}"))
    })
}
