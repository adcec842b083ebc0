//! Several texts in one allocation, and how they come from Python.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
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

    /// The strings of a pyarrow Array or ChunkedArray, which never become Python strings; nulls are left out.
    pub fn from_arrow(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let kind = array.getattr("type")?.str()?.to_string();
        if !["string", "large_string", "string_view"].contains(&kind.as_str()) {
            return Err(PyTypeError::new_err(format!("expected strings, got an Arrow array of {kind}")));
        }
        let array = array.call_method0("drop_null")?.call_method1("cast", ("large_string",))?;
        let mut texts = Self::default();
        match array.getattr_opt("chunks")? {
            Some(chunks) => chunks.try_iter()?.try_for_each(|chunk| texts.push_arrow_chunk(&chunk?))?,
            None => texts.push_arrow_chunk(&array)?,
        }
        Ok(texts)
    }

    /// `chunk` is a pyarrow LargeStringArray without nulls.
    fn push_arrow_chunk(&mut self, chunk: &Bound<'_, PyAny>) -> PyResult<()> {
        let (first, len): (usize, usize) = (chunk.getattr("offset")?.extract()?, chunk.len()?);
        if len == 0 {
            return Ok(());
        }
        let buffers = chunk.call_method0("buffers")?;
        let offsets = bytes_of(&buffers.get_item(1)?, first * 8, (len + 1) * 8)?;
        let offsets = offsets.chunks_exact(8).map(|bytes| i64::from_ne_bytes(bytes.try_into().expect("8 bytes")));
        let offsets: Vec<usize> = offsets.map(|offset| offset as usize).collect();
        let (start, end) = (offsets[0], offsets[len]);
        if end == start {
            self.ends.extend(std::iter::repeat_n(self.text.len(), len));
            return Ok(());
        }
        let bytes = bytes_of(&buffers.get_item(2)?, start, end.saturating_sub(start))?;
        let text = String::from_utf8(bytes).map_err(|error| bad_text(&error.to_string()))?;
        if let Some(pair) = offsets.windows(2).find(|pair| text.get(pair[0] - start..pair[1] - start).is_none()) {
            return Err(bad_text(&format!("bytes {} to {} are not whole characters", pair[0], pair[1])));
        }
        let shift = self.text.len();
        if shift == 0 {
            self.text = text;
        } else {
            self.text.push_str(&text);
        }
        self.ends.extend(offsets[1..].iter().map(|offset| offset - start + shift));
        Ok(())
    }
}

fn bad_text(reason: &str) -> PyErr {
    PyValueError::new_err(format!("the Arrow array has a string that is not UTF-8: {reason}"))
}

/// A copy of a part of a pyarrow Buffer. Copying is quick, and what is copied nobody can change while we read it.
fn bytes_of(buffer: &Bound<'_, PyAny>, start: usize, len: usize) -> PyResult<Vec<u8>> {
    let part = buffer.call_method1("slice", (start, len))?;
    let bytes = PyBuffer::<i8>::get(&part)?.to_vec(buffer.py())?;
    Ok(bytes.into_iter().map(|byte| byte as u8).collect())
}

/// `item` as a str, or an error that says which one is none.
pub fn as_string<'py>(item: Bound<'py, PyAny>, index: usize) -> PyResult<Bound<'py, PyString>> {
    item.cast_into::<PyString>().map_err(|error| {
        let kind = error.into_inner().get_type();
        let kind = kind.name().map_or_else(|_| "object".to_owned(), |name| name.to_string());
        PyTypeError::new_err(format!("expected str, but item {index} is {kind}"))
    })
}
