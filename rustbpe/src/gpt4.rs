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

/// How many ends of chunks a batch has at most.
pub const BATCH: usize = 256;

/// The bytes that are classified together: a bit for each in the masks below.
const BLOCK: usize = u64::BITS as usize;

/// The chunks of a text, left to right.
pub struct Chunks<'a> {
    text: &'a str,
    classes: &'a [Class],
    max_digits: usize,
    /// Where the next chunk starts.
    at: usize,
}

/// The bytes of a block by class. All bytes of a character have its class.
#[derive(Default)]
struct Masks {
    letter: u64,
    number: u64,
    newline: u64,
    blank: u64, // white space except newlines
    space: u64, // the ASCII one
    quote: u64, // the ASCII apostrophe
    wide: u64,  // bytes of non-ASCII characters ...
    inner: u64, // ... except the first of each
}

impl<'a> Chunks<'a> {
    pub fn new(text: &'a str, max_digits: usize) -> Self {
        Self { text, classes: &CLASSES, max_digits, at: 0 }
    }

    /// Where the next chunks end, which lie one after the other. Empty at the end of the text.
    pub fn next_ends<'b>(&mut self, ends: &'b mut [usize; BATCH]) -> &'b [usize] {
        let mut count = 0;
        while count <= BATCH - BLOCK && self.at < self.text.len() {
            let mut starts = self.starts();
            if starts == 0 {
                self.at = self.chunk_end();
                ends[count] = self.at;
                count += 1;
            } else {
                let base = self.at;
                while starts != 0 {
                    self.at = base + starts.trailing_zeros() as usize;
                    ends[count] = self.at;
                    count += 1;
                    starts &= starts - 1;
                }
            }
        }
        &ends[..count]
    }

    /// The places in the next block where chunks start, except the first place, where one does. Left out are those that
    /// depend on what is after the block. The end of the text is such a place.
    #[inline]
    fn starts(&self) -> u64 {
        let rest = &self.text.as_bytes()[self.at..];
        let mut masks = match rest.first_chunk() {
            Some(block) => ascii_masks(block),
            None => {
                let mut block = [b' '; BLOCK];
                block[..rest.len()].copy_from_slice(rest);
                ascii_masks(&block)
            }
        };
        if masks.wide != 0 {
            self.add_wide(&mut masks);
        }
        let Masks { letter, number, newline, blank, space, quote, wide, inner } = masks;
        let white = blank | newline;
        let other = !(letter | number | white);

        // Punctuation starts a chunk where it does not go on and has no space before it. A letter starts one unless the
        // character before is a letter, is white space, or starts a chunk of punctuation.
        let other_start = other & !((other | space) << 1);
        let prefix = with_inner(other_start, inner) | blank;
        let mut starts = other_start | letter & !((letter | prefix) << 1);

        // White space starts a chunk where it starts, but for newlines that belong to the punctuation before ...
        let absorbed = newline & !newline.wrapping_add(newline & other << 1);
        let white_start = white & !absorbed & !((white & !absorbed) << 1);
        // ... at its last character, if that is no newline, and after its last newline.
        let last = blank & !(white >> 1);
        let indent = blank & newline << 1;
        let blank_lines = blank.wrapping_add(indent) & newline;
        let to_know = if white >> 63 == 1 { !0 << (BLOCK as u32 - white.leading_ones()) } else { 0 };
        let inside = if blank_lines == 0 {
            first_bytes(last, inner) | indent
        } else {
            first_bytes(last, inner) | with_text_after(indent, blank, newline)
        };
        starts |= white_start | inside & !to_know;

        if number != 0 {
            starts |= number_starts(number, wide, inner, self.max_digits);
        }
        if quote & other_start != 0 {
            starts |= self.contraction_ends(quote & other_start);
        }
        starts & !1
    }

    /// Gives the non-ASCII characters of the block their classes.
    #[cold]
    fn add_wide(&self, masks: &mut Masks) {
        let rest = &self.text[self.at..];
        let mut left = masks.wide;
        while left != 0 {
            let first = left.trailing_zeros();
            let Some(character) = rest[first as usize..].chars().next() else { break };
            let bytes = ((1 << character.len_utf8()) - 1) << first;
            left &= !bytes;
            masks.inner |= bytes & bytes << 1;
            match self.classes[character as usize] {
                Class::Letter => masks.letter |= bytes,
                Class::Number => masks.number |= bytes,
                Class::Space => masks.blank |= bytes,
                Class::Newline | Class::Other => {}
            }
        }
    }

    /// What follows the contractions among the apostrophes at `quotes`.
    #[inline]
    fn contraction_ends(&self, mut quotes: u64) -> u64 {
        let mut ends = 0;
        while quotes != 0 {
            let at = quotes.trailing_zeros();
            if let Some(end) = contraction(&self.text.as_bytes()[self.at + at as usize..]) {
                ends |= 1u64.checked_shl(at + end as u32).unwrap_or(0);
            }
            quotes &= quotes - 1;
        }
        ends
    }
}

/// The ASCII characters by class.
#[cfg(target_arch = "x86_64")]
#[inline]
fn ascii_masks(block: &[u8; BLOCK]) -> Masks {
    use std::arch::x86_64::*;
    let mut masks = Masks::default();
    for (shift, part) in (0..).step_by(16).zip(block.chunks_exact(16)) {
        // SAFETY: every x86-64 processor has SSE2, and 16 bytes are read from a slice of 16.
        unsafe {
            let bytes = _mm_loadu_si128(part.as_ptr().cast());
            let all = |byte: u8| _mm_set1_epi8(byte as i8);
            let equal = |byte| _mm_cmpeq_epi8(bytes, all(byte));
            // Bytes compare as signed numbers, so the range is moved to where these begin.
            let range =
                |bytes, first: u8, count: u8| _mm_cmplt_epi8(_mm_add_epi8(bytes, all(128 - first)), all(128 + count));
            let add = |mask: &mut u64, found| *mask |= u64::from(_mm_movemask_epi8(found) as u32) << shift;
            let newline = _mm_or_si128(equal(b'\n'), equal(b'\r'));
            let space = equal(b' ');
            add(&mut masks.letter, range(_mm_or_si128(bytes, all(0x20)), b'a', 26));
            add(&mut masks.number, range(bytes, b'0', 10));
            add(&mut masks.newline, newline);
            add(&mut masks.blank, _mm_or_si128(space, _mm_andnot_si128(newline, range(bytes, b'\t', 5))));
            add(&mut masks.space, space);
            add(&mut masks.quote, equal(b'\''));
            add(&mut masks.wide, bytes);
        }
    }
    masks
}

#[cfg(any(test, not(target_arch = "x86_64")))]
fn portable_ascii_masks(block: &[u8; BLOCK]) -> Masks {
    let mask = |class: fn(u8) -> bool| (0..BLOCK).fold(0, |mask, at| mask | u64::from(class(block[at])) << at);
    Masks {
        letter: mask(|byte| byte.is_ascii_alphabetic()),
        number: mask(|byte| byte.is_ascii_digit()),
        newline: mask(|byte| byte == b'\r' || byte == b'\n'),
        blank: mask(|byte| matches!(byte, b' ' | b'\t' | 0x0b | 0x0c)),
        space: mask(|byte| byte == b' '),
        quote: mask(|byte| byte == b'\''),
        wide: mask(|byte| byte >= 128),
        inner: 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
use portable_ascii_masks as ascii_masks;

/// `firsts` with the other bytes of the characters that start there.
#[inline]
fn with_inner(mut firsts: u64, inner: u64) -> u64 {
    if inner != 0 {
        for _ in 0..3 {
            firsts |= firsts << 1 & inner;
        }
    }
    firsts
}

/// The first bytes of the characters whose last ones are `lasts`.
#[inline]
fn first_bytes(mut lasts: u64, inner: u64) -> u64 {
    if inner != 0 {
        for _ in 0..3 {
            lasts = lasts & !inner | (lasts & inner) >> 1;
        }
    }
    lasts
}

/// Those of the runs of `blank` starting at `indents` that no newline ends.
#[cold]
fn with_text_after(mut indents: u64, blank: u64, newline: u64) -> u64 {
    let mut found = 0;
    while indents != 0 {
        let indent = indents & indents.wrapping_neg();
        if blank.wrapping_add(indent) & !blank & newline == 0 {
            found |= indent;
        }
        indents &= !indent;
    }
    found
}

/// Where groups of up to `max_digits` digits start.
#[inline]
fn number_starts(number: u64, wide: u64, inner: u64, max_digits: usize) -> u64 {
    let mut starts = number & !(number << 1);
    if number & wide == 0 {
        let full = (1..=max_digits).fold(number, |full, digit| full & number << digit);
        let mut group = starts;
        while group != 0 {
            group = group << max_digits & full;
            starts |= group;
        }
    } else {
        let (mut left, mut count) = (number & !inner, 0);
        while left != 0 {
            let digit = left & left.wrapping_neg();
            count = if starts & digit != 0 { 0 } else { count + 1 };
            if count % max_digits == 0 {
                starts |= digit;
            }
            left &= !digit;
        }
    }
    starts
}

/// The length of the contraction that `text` starts with, whose first byte is an apostrophe.
fn contraction(text: &[u8]) -> Option<usize> {
    match text.get(1)? | 0x20 {
        b's' | b'd' | b'm' | b't' => Some(2),
        // Case folding in Unicode makes the long s an s.
        _ if text[1..].starts_with("ſ".as_bytes()) => Some(3),
        first => {
            let pair = [first, text.get(2)? | 0x20];
            [b"ll", b"ve", b"re"].contains(&&pair).then_some(3)
        }
    }
}

/// A chunk that needs more than a block of text to be known.
impl Chunks<'_> {
    /// The class of the character at byte `at` and where the next one starts; None at the end of the text.
    #[inline]
    fn character(&self, at: usize) -> Option<(Class, usize)> {
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
            match self.character(at) {
                Some((found, next)) if found == class => at = next,
                _ => break,
            }
        }
        at
    }

    /// Where the next chunk ends.
    #[cold]
    fn chunk_end(&self) -> usize {
        let start = self.at;
        let Some((class, next)) = self.character(start) else { return start };
        match class {
            Class::Letter => self.run(next, Class::Letter, usize::MAX),
            Class::Number => self.run(next, Class::Number, self.max_digits - 1),
            Class::Newline => self.white_space(),
            Class::Space | Class::Other => {
                let rest = &self.text.as_bytes()[start..];
                if let Some(end) = contraction(rest).filter(|_| rest[0] == b'\'') {
                    return start + end;
                }
                match self.character(next) {
                    Some((Class::Letter, after)) => self.run(after, Class::Letter, usize::MAX),
                    Some((Class::Other, after)) if rest[0] == b' ' => self.punctuation(after),
                    _ if class == Class::Other => self.punctuation(next),
                    _ => self.white_space(),
                }
            }
        }
    }

    /// The end of punctuation that goes on at `at`, and of the newlines after it.
    fn punctuation(&self, at: usize) -> usize {
        self.run(self.run(at, Class::Other, usize::MAX), Class::Newline, usize::MAX)
    }

    fn white_space(&self) -> usize {
        let (mut end, mut last, mut after_newline) = (self.at, self.at, None);
        while let Some((class @ (Class::Space | Class::Newline), next)) = self.character(end) {
            (last, end) = (end, next);
            if class == Class::Newline {
                after_newline = Some(end);
            }
        }
        match after_newline {
            Some(after) => after,
            None if end == self.text.len() || last == self.at => end,
            None => last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;

    fn split(text: &str, max_digits: usize) -> Vec<String> {
        let (mut chunks, mut ends, mut found, mut start) = (Chunks::new(text, max_digits), [0; BATCH], Vec::new(), 0);
        loop {
            let ends = chunks.next_ends(&mut ends);
            if ends.is_empty() {
                assert_eq!(start, text.len());
                return found;
            }
            for &end in ends {
                found.push(text[start..end].to_owned());
                start = end;
            }
        }
    }

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
                let text: String =
                    (0..random(if pool == 50 { 300 } else { 24 })).map(|_| samples[random(pool)]).collect();
                let chunks = split(&text, digits);
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
            let chunks = split(&text, 3);
            let expected: Vec<_> = regex.find_iter(&text).map(|found| found.unwrap().as_str().to_owned()).collect();
            assert_eq!(chunks, expected, "{text:?}");
        }
    }

    #[test]
    fn every_byte_has_the_same_class_without_simd() {
        let fields = |masks: Masks| {
            let Masks { letter, number, newline, blank, space, quote, wide, inner } = masks;
            [letter, number, newline, blank, space, quote, wide, inner]
        };
        for byte in 0..=u8::MAX {
            let block = std::array::from_fn(|at| byte.wrapping_add(at as u8));
            assert_eq!(fields(ascii_masks(&block)), fields(portable_ascii_masks(&block)), "{byte}");
        }
    }

    #[test]
    fn other_patterns_are_left_to_the_engine() {
        assert_eq!(max_digits(r"\S+|\s+"), None);
        assert_eq!(max_digits(&crate::split::DEFAULT_PATTERN.replace("{1,3}", "{1,}")), None);
    }
}
