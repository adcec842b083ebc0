//! GPT-4's split pattern by hand: an order of magnitude faster than a regular expression engine, and indifferent to
//! how long a run of white space is.
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re)              contraction
//! [^\r\n\p{L}\p{N}]?+\p{L}+          word, with at most one character before it that is no letter, digit or newline
//! \p{N}{1,D}                         up to D digits
//!  ?[^\s\p{L}\p{N}]++[\r\n]*         punctuation, with a space before and newlines after
//! \s*[\r\n]                          white space up to the last newline
//! \s+(?!\S)                          white space but for its last character, which goes with what follows
//! \s+
//! ```
//!
//! The first alternative that matches wins. Every character is in some chunk.

use std::ops::Range;
use std::sync::LazyLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Newline,
    Space, // white space but newlines
    Other,
}

/// The class of every code point, from the same Unicode tables that the regular expressions use.
static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let mut classes = vec![Class::Other; char::MAX as usize + 1];
    for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)] {
        let hir = regex_syntax::parse(pattern).expect("a constant pattern");
        let HirKind::Class(HirClass::Unicode(members)) = hir.kind() else { unreachable!("{pattern} is a class") };
        for range in members.iter() {
            classes[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    classes['\r' as usize] = Class::Newline;
    classes['\n' as usize] = Class::Newline;
    classes
});

/// `Some(D)` if `pattern` is GPT-4's with numbers in groups of up to D digits.
pub fn max_digits(pattern: &str) -> Option<usize> {
    let digits = pattern
        .strip_prefix(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,")?
        .strip_suffix(r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")?;
    match digits.as_bytes() {
        [digit @ b'1'..=b'9'] => Some(usize::from(digit - b'0')),
        _ => None,
    }
}

/// Calls `visit` with where each chunk of `text` lies, left to right.
pub fn for_each_chunk(text: &str, max_digits: usize, mut visit: impl FnMut(Range<usize>)) {
    let scanner = Scanner { text, classes: &CLASSES };
    let mut start = 0;
    while let Some((class, next)) = scanner.at(start) {
        let end = scanner.chunk_end(start, class, next, max_digits);
        visit(start..end);
        start = end;
    }
}

struct Scanner<'a> {
    text: &'a str,
    classes: &'a [Class],
}

impl Scanner<'_> {
    /// The class of the character at byte `at` and where the next one starts; None at the end of the text.
    #[inline]
    fn at(&self, at: usize) -> Option<(Class, usize)> {
        let first = *self.text.as_bytes().get(at)?;
        if first < 128 {
            return Some((self.classes[usize::from(first)], at + 1));
        }
        let character = self.text[at..].chars().next()?;
        Some((self.classes[character as usize], at + character.len_utf8()))
    }

    /// Where the run of `class` that starts at `at`, and has at most `limit` characters, ends.
    #[inline]
    fn run(&self, mut at: usize, class: Class, limit: usize) -> usize {
        for _ in 0..limit {
            match self.at(at) {
                Some((found, next)) if found == class => at = next,
                _ => break,
            }
        }
        at
    }

    /// Where the chunk ends that starts with the `class` character from `start` to `next`.
    fn chunk_end(&self, start: usize, class: Class, next: usize, max_digits: usize) -> usize {
        match class {
            Class::Letter => self.run(next, Class::Letter, usize::MAX),
            Class::Number => self.run(next, Class::Number, max_digits - 1),
            Class::Newline => self.white_space(start),
            Class::Space | Class::Other => {
                if let Some(end) = self.contraction(start) {
                    return end;
                }
                match self.at(next) {
                    Some((Class::Letter, after)) => self.run(after, Class::Letter, usize::MAX),
                    Some((Class::Other, after)) if self.text.as_bytes()[start] == b' ' => self.punctuation(after),
                    _ if class == Class::Other => self.punctuation(next),
                    _ => self.white_space(start),
                }
            }
        }
    }

    fn contraction(&self, start: usize) -> Option<usize> {
        let rest = self.text[start..].strip_prefix('\'')?;
        let end = start + 1;
        match rest.chars().next()? {
            // Case folding in Unicode makes the long s an s.
            letter @ ('s' | 'd' | 'm' | 't' | 'S' | 'D' | 'M' | 'T' | 'ſ') => Some(end + letter.len_utf8()),
            _ => {
                let pair = rest.as_bytes().get(..2)?.to_ascii_lowercase();
                [b"ll", b"ve", b"re"].iter().any(|suffix| pair == **suffix).then_some(end + 2)
            }
        }
    }

    /// The end of punctuation that goes on at `at`, and of the newlines after it.
    fn punctuation(&self, at: usize) -> usize {
        self.run(self.run(at, Class::Other, usize::MAX), Class::Newline, usize::MAX)
    }

    fn white_space(&self, start: usize) -> usize {
        let (mut end, mut last, mut after_newline) = (start, start, None);
        while let Some((class @ (Class::Space | Class::Newline), next)) = self.at(end) {
            (last, end) = (end, next);
            if class == Class::Newline {
                after_newline = Some(end);
            }
        }
        match after_newline {
            Some(after) => after,
            None if end == self.text.len() || last == start => end,
            None => last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;

    #[test]
    fn chunks_equal_those_of_the_regular_expression() {
        let samples: Vec<char> =
            "sdmtlvreSDMTLVRE''''ſKabé日ß\u{301}🙂½Ⅷ０123 \t\u{a0}\u{3000}\u{b}\u{85}\r\n.,!?-_#\0  \n\n"
                .chars()
                .chain((0..3000).filter_map(|code| char::from_u32(code * 47)))
                .collect();
        let mut state = 7u64;
        let mut random = |limit: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % limit
        };
        for digits in 1..=3 {
            let pattern = crate::split::DEFAULT_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}"));
            assert_eq!(max_digits(&pattern), Some(digits));
            let regex = Regex::new(&pattern).unwrap();
            for _ in 0..5000 {
                let pool = if random(3) == 0 { samples.len() } else { 50 };
                let text: String = (0..random(24)).map(|_| samples[random(pool)]).collect();
                let mut chunks = Vec::new();
                for_each_chunk(&text, digits, |chunk| chunks.push(text[chunk].to_owned()));
                let expected: Vec<_> = regex.find_iter(&text).map(|found| found.unwrap().as_str().to_owned()).collect();
                assert_eq!(chunks, expected, "{text:?}");
            }
        }
    }

    #[test]
    fn every_code_point_is_classed_as_the_regular_expression_does() {
        let regex = Regex::new(crate::split::DEFAULT_PATTERN).unwrap();
        for character in (0..=char::MAX as u32).filter_map(char::from_u32) {
            let text = format!("a{character}a 1{character}.");
            let mut chunks = Vec::new();
            for_each_chunk(&text, 3, |chunk| chunks.push(text[chunk].to_owned()));
            let expected: Vec<_> = regex.find_iter(&text).map(|found| found.unwrap().as_str().to_owned()).collect();
            assert_eq!(chunks, expected, "{text:?}");
        }
    }

    #[test]
    fn other_patterns_are_left_to_the_engine() {
        assert_eq!(max_digits(r"\S+|\s+"), None);
        assert_eq!(max_digits(&crate::split::DEFAULT_PATTERN.replace("{1,3}", "{1,}")), None);
    }
}
