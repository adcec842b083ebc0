//! GPT-4's split pattern, 64 bytes at a time instead of by a regular expression engine. Time is linear in the text.
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re)              contraction
//! [^\r\n\p{L}\p{N}]?+\p{L}+          word, after at most one character that is no letter, digit or newline
//! \p{N}{1,D}                         up to D digits
//!  ?[^\s\p{L}\p{N}]++[\r\n]*         punctuation, with a space before and newlines after
//! \s*[\r\n]                          white space up to its last newline
//! \s+(?!\S)                          white space except its last character, which goes with what follows
//! \s+
//! ```
//!
//! The first alternative that matches wins. Every character is in some chunk.

use std::sync::LazyLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

use crate::processor::widest;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Number,
    Newline,
    Blank, // white space except newlines
    Other,
}

/// The class of every code point, from the Unicode tables that the regular expressions use.
static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let mut classes = vec![Class::Other; char::MAX as usize + 1];
    for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Blank)] {
        let hir = regex_syntax::parse(pattern).expect("a constant pattern");
        let HirKind::Class(HirClass::Unicode(members)) = hir.kind() else { unreachable!("{pattern} is a class") };
        members.iter().for_each(|range| classes[range.start() as usize..=range.end() as usize].fill(class));
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
    digits.parse().ok().filter(|digits| (1..=9).contains(digits))
}

/// The maximum number of chunks in a batch.
pub const BATCH: usize = 256;

/// The number of bytes that are classified together. Each is one bit of a mask.
const BLOCK: usize = u64::BITS as usize;

/// The chunks of a text, left to right.
pub struct Chunks<'a> {
    text: &'a str,
    classes: &'a [Class],
    max_digits: usize,
    /// Where the next chunk starts.
    at: usize,
}

impl<'a> Chunks<'a> {
    pub fn new(text: &'a str, max_digits: usize) -> Self {
        Self { text, classes: &CLASSES, max_digits, at: 0 }
    }

    /// The ends of the next chunks, which are adjacent. Empty at the end of the text.
    pub fn next_ends<'b>(&mut self, ends: &'b mut [u32; BATCH]) -> &'b [u32] {
        let count = widest(|| self.find_ends(ends));
        &ends[..count]
    }

    #[inline(always)]
    fn find_ends(&mut self, ends: &mut [u32; BATCH]) -> usize {
        let mut count = 0;
        while count <= BATCH - BLOCK && self.at < self.text.len() {
            let (base, mut starts) = (self.at, self.starts());
            if starts == 0 {
                self.at = self.long_chunk_end();
                ends[count] = self.at as u32;
                count += 1;
                continue;
            }
            let (number, last) = (starts.count_ones() as usize, u64::BITS - 1 - starts.leading_zeros());
            // Eight at a time, although there may be fewer: fewer branches are hard to predict.
            for group in ends[count..count + BLOCK].chunks_exact_mut(8) {
                for end in group {
                    *end = base as u32 + starts.trailing_zeros();
                    starts &= starts.wrapping_sub(1);
                }
                if starts == 0 {
                    break;
                }
            }
            count += number;
            self.at = base + last as usize;
        }
        count
    }

    /// The starts of chunks in the next block, except the first byte, which is one. Starts that depend on text after the
    /// block are left out. The end of the text counts as a start.
    #[inline(always)]
    fn starts(&self) -> u64 {
        let rest = &self.text.as_bytes()[self.at..];
        let mut padded = [b' '; BLOCK];
        let block = rest.first_chunk().unwrap_or_else(|| {
            padded[..rest.len()].copy_from_slice(rest);
            &padded
        });
        let wide = mask(block, |byte| byte >= 128);
        let mut inner = 0; // bytes of non-ASCII characters except the first of each
        let mut classes = [
            mask(block, |byte| (byte | 0x20).wrapping_sub(b'a') < 26),
            mask(block, |byte| byte.wrapping_sub(b'0') < 10),
            mask(block, |byte| byte == b'\n' || byte == b'\r'),
            mask(block, |byte| byte == b' ' || byte.wrapping_sub(b'\t') < 5),
            0,
        ];
        let mut known = !0;
        if wide != 0 {
            inner = self.add_wide(wide, &mut classes);
            let number = classes[Class::Number as usize] & wide;
            known = if number == 0 { !0 } else { (number & number.wrapping_neg()) - 1 };
        }
        let [letter, number, newline, white, _] = classes;
        let (space, quote) = (mask(block, |byte| byte == b' '), mask(block, |byte| byte == b'\''));
        let blank = white & !newline;
        let other = !(letter | number | white);

        // Punctuation starts a chunk unless punctuation or a space is before it. A letter starts one unless the character
        // before it is a letter, white space or punctuation that starts a chunk.
        let other_start = other & !((other | space) << 1);
        let prefix = with_inner(other_start, inner) | blank;
        let mut starts = other_start | letter & !((letter | prefix) << 1);

        // A run of white space starts a chunk, after the newlines that belong to the punctuation before it, ...
        let absorbed = newline & !newline.wrapping_add(newline & other << 1);
        let white_start = white & !absorbed & !((white & !absorbed) << 1);
        // ... and so do its last character, if that is no newline, and the blanks after its last newline. Nothing is known
        // of a run that reaches the end of the block.
        let last = first_bytes(blank & !(white >> 1), inner);
        let indent = blank & newline << 1 & !before_newline(blank, newline);
        let open = if white >> 63 == 1 { !0 << (BLOCK as u32 - white.leading_ones()) } else { 0 };
        starts |= white_start | (last | indent) & !open;

        if number != 0 {
            starts |= number_starts(number, self.max_digits);
        }
        if quote & other_start != 0 {
            starts |= self.contraction_ends(quote & other_start);
        }
        starts & known & !1
    }

    /// Adds the non-ASCII characters of the block to the masks of their classes. Returns their bytes except the first
    /// of each.
    #[cold]
    fn add_wide(&self, mut wide: u64, classes: &mut [u64; 5]) -> u64 {
        let (block, mut inner) = (&self.text[self.at..], 0);
        while wide != 0 {
            let first = wide.trailing_zeros();
            let Some(character) = block[first as usize..].chars().next() else { break };
            let bytes = ((1 << character.len_utf8()) - 1) << first;
            wide &= !bytes;
            inner |= bytes & bytes << 1;
            classes[self.classes[character as usize] as usize] |= bytes;
        }
        inner
    }

    /// The bytes after the contractions among the apostrophes at `quotes`.
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

    /// The end of a chunk that may reach beyond the block.
    #[cold]
    fn long_chunk_end(&self) -> usize {
        let rest = &self.text[self.at..];
        let class = |character: char| self.classes[character as usize];
        let class_at = |at: usize| rest[at..].chars().next().map(class);
        let run = |at: usize, of: Class, limit: usize| {
            let same = rest[at..].chars().take(limit).take_while(|&character| class(character) == of);
            at + same.map(char::len_utf8).sum::<usize>()
        };
        let letters = |at| run(at, Class::Letter, usize::MAX);
        let punctuation = |at| run(run(at, Class::Other, usize::MAX), Class::Newline, usize::MAX);
        let second = rest.chars().next().map_or(0, char::len_utf8);
        let contraction = contraction(rest.as_bytes()).filter(|_| rest.starts_with('\''));
        self.at
            + match (class_at(0), class_at(second)) {
                (Some(Class::Letter), _) => letters(0),
                (Some(Class::Number), _) => run(0, Class::Number, self.max_digits),
                _ if contraction.is_some() => contraction.unwrap_or(second),
                (Some(Class::Blank | Class::Other), Some(Class::Letter)) => letters(second),
                (Some(Class::Other), _) => punctuation(0),
                (_, Some(Class::Other)) if rest.starts_with(' ') => punctuation(second),
                _ => {
                    let white =
                        rest.trim_start_matches(|character| matches!(class(character), Class::Blank | Class::Newline));
                    let white = &rest[..rest.len() - white.len()];
                    let last = white.chars().next_back().map_or(0, char::len_utf8);
                    match white.rfind(['\r', '\n']) {
                        Some(newline) => newline + 1,
                        None if white.len() == rest.len() || white.len() == last => white.len(),
                        None => white.len() - last,
                    }
                }
            }
    }
}

/// The bytes of the block that pass the test. The loop compiles to vector instructions on every processor that has them.
#[inline(always)]
fn mask(block: &[u8; BLOCK], test: impl Fn(u8) -> bool) -> u64 {
    let mut passed = [0u8; BLOCK];
    passed.iter_mut().zip(block).for_each(|(passed, &byte)| *passed = if test(byte) { 0xff } else { 0 });
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_movemask_epi8};
        let top_bits = |at: usize| {
            // SAFETY: every x86-64 processor has SSE2, and `at` is at most 16 below the length of `passed`.
            unsafe { _mm_movemask_epi8(_mm_loadu_si128(passed.as_ptr().add(at).cast())) as u32 }
        };
        u64::from(top_bits(0) | top_bits(16) << 16) | u64::from(top_bits(32) | top_bits(48) << 16) << 32
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        // Keeps bit i of byte i in each group of eight bytes, and adds the bytes up in the topmost one.
        let bits = |group: &[u8]| {
            let group = u64::from_le_bytes(group.try_into().expect("8 bytes")) & 0x8040_2010_0804_0201;
            group.wrapping_mul(0x0101_0101_0101_0101) >> 56
        };
        passed.chunks_exact(8).rev().fold(0, |mask, group| mask << 8 | bits(group))
    }
}

/// `firsts` with the other bytes of the characters that start there.
#[inline(always)]
fn with_inner(firsts: u64, inner: u64) -> u64 {
    (0..if inner == 0 { 0 } else { 3 }).fold(firsts, |firsts, _| firsts | firsts << 1 & inner)
}

/// The first bytes of the characters whose last ones are `lasts`.
#[inline(always)]
fn first_bytes(lasts: u64, inner: u64) -> u64 {
    (0..if inner == 0 { 0 } else { 3 }).fold(lasts, |lasts, _| lasts & !inner | (lasts & inner) >> 1)
}

/// The first bytes of the runs of `blank` that a newline ends.
#[inline(always)]
fn before_newline(blank: u64, newline: u64) -> u64 {
    let ends = blank & newline >> 1;
    if ends == 0 {
        return 0;
    }
    // A carry runs from the end of each run to the byte before its start.
    let (blank, ends) = (blank.reverse_bits(), ends.reverse_bits());
    (blank.wrapping_add(ends) & !blank).reverse_bits() << 1
}

/// The starts of groups of up to `max_digits` digits.
#[inline(always)]
fn number_starts(number: u64, max_digits: usize) -> u64 {
    let full = (1..=max_digits).fold(number, |full, digit| full & number << digit);
    let mut group = number & !(number << 1);
    let mut starts = group;
    while group != 0 {
        group = group << max_digits & full;
        starts |= group;
    }
    starts
}

/// The length of the contraction that `text` starts with, if its first byte is an apostrophe.
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
                found.push(text[start..end as usize].to_owned());
                start = end as usize;
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
    fn other_patterns_are_left_to_the_engine() {
        assert_eq!(max_digits(r"\S+|\s+"), None);
        assert_eq!(max_digits(&crate::split::DEFAULT_PATTERN.replace("{1,3}", "{1,}")), None);
    }
}
