//! Cutting text into the chunks that merges never cross.

use std::ops::Range;

use fancy_regex::Regex;

use crate::gpt4;

/// GPT-4's split pattern, the default when none is given.
pub const DEFAULT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// A compiled split pattern. Clones do not share scratch space, so give each thread its own.
#[derive(Clone, Debug)]
pub struct Splitter {
    regex: Regex,
    /// Set if the pattern is one that `gpt4` implements.
    max_digits: Option<usize>,
}

impl Splitter {
    /// Fails with a message that names the pattern when it is not a regular expression or can match nothing.
    pub fn new(pattern: &str) -> Result<Self, String> {
        let regex = Regex::new(pattern).map_err(|error| format!("bad split pattern {pattern:?}: {error}"))?;
        if regex.is_match("").unwrap_or(false) {
            return Err(format!("bad split pattern {pattern:?}: it matches the empty string, and would skip text"));
        }
        Ok(Self { regex, max_digits: gpt4::max_digits(pattern) })
    }

    pub fn pattern(&self) -> &str {
        self.regex.as_str()
    }

    /// Calls `visit` for runs of adjacent chunks, left to right, with the start of the first and the ends of all. Text
    /// between matches of the pattern is skipped. Fails if matching needs more backtracking than the engine allows.
    pub fn for_each_run(&self, text: &str, visit: &mut dyn FnMut(usize, &[u32])) -> Result<(), String> {
        if let Some(max_digits) = self.max_digits {
            let (mut chunks, mut ends, mut start) = (gpt4::Chunks::new(text, max_digits), [0; gpt4::BATCH], 0);
            while let ends @ [.., last] = chunks.next_ends(&mut ends) {
                visit(start, ends);
                start = *last as usize;
            }
            return Ok(());
        }
        for found in self.regex.find_iter(text) {
            let found = found.map_err(|error| format!("split pattern {:?}: {error}", self.pattern()))?;
            if !found.range().is_empty() {
                visit(found.start(), &[found.end() as u32]); // a pattern may match nothing between two chunks
            }
        }
        Ok(())
    }

    /// Calls `visit` with the range of each chunk.
    pub fn for_each(&self, text: &str, mut visit: impl FnMut(Range<usize>)) -> Result<(), String> {
        self.for_each_run(text, &mut |mut start, ends| {
            for &end in ends {
                visit(std::mem::replace(&mut start, end as usize)..end as usize);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<String> {
        let mut chunks = Vec::new();
        Splitter::new(DEFAULT_PATTERN).unwrap().for_each(text, |chunk| chunks.push(text[chunk].to_owned())).unwrap();
        chunks
    }

    #[test]
    fn words_keep_one_leading_space_and_numbers_come_in_groups() {
        assert_eq!(split("I'll pay  12345 euro!\n"), ["I", "'ll", " pay", " ", " ", "123", "45", " euro", "!\n"]);
    }

    #[test]
    fn a_broken_pattern_is_an_error_that_names_it() {
        assert!(Splitter::new("(").unwrap_err().contains("\"(\""));
    }
}
