//! A vocabulary, and from text to ids and back.
//!
//! Encoding is what tiktoken defines: a chunk that is a token gets that token's id. In any other chunk, of all neighbours
//! that together spell a token, the pair with the lowest id merges, the leftmost first, until none is left.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::hash::BuildHasher;
use std::ops::Range;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};

use crate::gpt4::BATCH;
use crate::key;
use crate::split::Splitter;
use crate::train::Pair;

/// No token.
const NONE: u32 = u32::MAX;

/// Chunks of up to this many bytes are merged with one bit for each byte; longer ones by `merge_long`.
const SHORT: usize = 63;

/// The number of bits of a position in a short chunk.
const PLACE_BITS: u32 = 6;

/// The tokens of a vocabulary and their ids.
pub struct Vocabulary {
    tokens: Vec<Vec<u8>>,
    /// The ids of tokens that are short enough for a key.
    short: HashTable<(u128, u32)>,
    /// The ids of the others, and the length of the longest.
    long: HashMap<Vec<u8>, u32>,
    longest: usize,
    /// The ids of tokens of two bytes, or NONE, by the number that the bytes are.
    pairs: Vec<u32>,
}

impl Vocabulary {
    /// The bytes as tokens 0..=255, then what each of `merges` makes.
    pub fn from_merges(merges: &[Pair]) -> Self {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in merges {
            tokens.push([tokens[left as usize].as_slice(), &tokens[right as usize]].concat());
        }
        Self::from_tokens(tokens).expect("merges make distinct tokens of all bytes")
    }

    /// Token `i` gets the id `i`. Fails if a token is there twice, one of the 256 bytes is missing, or there are too
    /// many tokens.
    pub fn from_tokens(tokens: Vec<Vec<u8>>) -> Result<Self, String> {
        if tokens.len() > (NONE >> PLACE_BITS) as usize {
            return Err(format!("{} tokens are too many: at most {}", tokens.len(), NONE >> PLACE_BITS));
        }
        let (short, longest) = (HashTable::with_capacity(tokens.len()), tokens.iter().map(Vec::len).max().unwrap_or(0));
        let mut vocabulary = Self { tokens, short, long: HashMap::new(), longest, pairs: vec![NONE; 1 << 16] };
        for (id, token) in (0..).zip(&vocabulary.tokens) {
            let twin = vocabulary.id(token, 0, token.len());
            if twin != NONE {
                return Err(format!("tokens {twin} and {id} are the same: {:?}", String::from_utf8_lossy(token)));
            }
            if let Some(key) = key::of(token, 0, token.len()) {
                vocabulary.short.insert_unique(key::hash(key), (key, id), |&(key, _)| key::hash(key));
                if let [first, second] = token[..] {
                    vocabulary.pairs[usize::from(first) << 8 | usize::from(second)] = id;
                }
            } else {
                vocabulary.long.insert(token.clone(), id);
            }
        }
        match (0..=255).find(|&byte| vocabulary.id(&[byte], 0, 1) == NONE) {
            Some(byte) => Err(format!("byte {byte} is not in the vocabulary")),
            None => Ok(vocabulary),
        }
    }

    /// The bytes of every token, by id.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
    }

    /// The id of the token `text[start..end]`, or NONE. Inside a longer text this is faster than with a copy.
    #[inline]
    fn id(&self, text: &[u8], start: usize, end: usize) -> u32 {
        match key::of(text, start, end) {
            Some(key) => self.short.find(key::hash(key), |entry| entry.0 == key).map_or(NONE, |entry| entry.1),
            None if end - start > self.longest => NONE,
            None => self.long.get(&text[start..end]).copied().unwrap_or(NONE),
        }
    }

    /// The bytes of `ids` joined, or the first id that is not in the vocabulary.
    pub fn decode(&self, ids: &[i64]) -> Result<Vec<u8>, i64> {
        let mut bytes = Vec::new();
        for &id in ids {
            let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
            bytes.extend_from_slice(token.ok_or(id)?);
        }
        Ok(bytes)
    }

    /// Merges the bytes of the chunk `text[start..end]` and appends the ids of what is left.
    fn merge(&self, text: &[u8], start: usize, end: usize, ids: &mut Vec<i32>) {
        if end - start <= SHORT {
            self.merge_short(text, start, end, ids);
        } else {
            self.merge_long(&text[start..end], ids);
        }
    }

    fn merge_short(&self, text: &[u8], start: usize, end: usize, ids: &mut Vec<i32>) {
        let len = end - start;
        let id = |from: usize, to: usize| self.id(text, start + from, start + to);
        // What the part that starts at a place makes with the next part: its id, and in the low bits the place.
        let mut products = [NONE; SHORT + 1];
        let product = |at: usize, end: usize| match id(at, end) {
            NONE => NONE,
            id => id << PLACE_BITS | at as u32,
        };
        let mut merged = [NONE; SHORT + 1]; // the ids of parts of more than one byte
        let mut starts = u64::MAX >> (SHORT - len); // of parts, and the end of the chunk
        let next = |starts: u64, at: usize| at + 1 + (starts >> at >> 1).trailing_zeros() as usize;
        for (at, pair) in text[start..end].windows(2).enumerate() {
            let id = self.pairs[usize::from(pair[0]) << 8 | usize::from(pair[1])];
            products[at] = if id == NONE { NONE } else { id << PLACE_BITS | at as u32 };
        }
        loop {
            // 16 places at a time, which takes no branches.
            let groups = products.chunks_exact(16).take(len.div_ceil(16));
            let best =
                groups.map(|group| group.iter().fold(NONE, |low, &product| low.min(product))).fold(NONE, u32::min);
            if best == NONE {
                break;
            }
            let at = best as usize % (1 << PLACE_BITS);
            let right = next(starts, at);
            starts &= !(1 << right);
            (merged[at], products[right]) = (best >> PLACE_BITS, NONE);
            let after = next(starts, at);
            products[at] = if after < len { product(at, next(starts, after)) } else { NONE };
            if at > 0 {
                let before = (starts << (64 - at)).leading_zeros() as usize;
                products[at - 1 - before] = product(at - 1 - before, after);
            }
        }
        let mut at = 0;
        while at < len {
            let part = if merged[at] == NONE { id(at, at + 1) } else { merged[at] };
            ids.push(part as i32);
            at = next(starts, at);
        }
    }

    /// The same in near-linear time: places wait in a list for each product, and a whole list is merged at once, left to
    /// right.
    fn merge_long(&self, chunk: &[u8], ids: &mut Vec<i32>) {
        let len = chunk.len();
        let mut next: Vec<u32> = (1..=len as u32).collect();
        let mut previous: Vec<u32> = (0..len as u32).map(|at| at.wrapping_sub(1)).collect();
        let product = |at: usize, end: usize| if end <= len { self.id(chunk, at, end) } else { NONE };
        let mut products: Vec<u32> = (0..len).map(|at| product(at, at + 2)).collect();
        let mut waiting = BTreeMap::<u32, Vec<u32>>::new();
        for (at, &product) in (0..).zip(&products).filter(|(_, &product)| product != NONE) {
            waiting.entry(product).or_default().push(at);
        }
        while let Some((best, mut places)) = waiting.pop_first() {
            places.sort_unstable_by_key(|&at| Reverse(at));
            while let Some(at) = places.pop().map(|at| at as usize) {
                if products[at] != best {
                    continue; // a neighbour was merged since
                }
                let right = next[at] as usize;
                let (before, after) = (previous[at] as usize, next[right] as usize);
                (next[at], products[right], products[at]) = (after as u32, NONE, NONE);
                if after < len {
                    previous[after] = at as u32;
                    products[at] = product(at, next[after] as usize);
                }
                if before < len {
                    products[before] = product(before, after);
                }
                let mut lowest = NONE;
                for at in [before, at].into_iter().filter(|&at| at < len && products[at] != NONE) {
                    waiting.entry(products[at]).or_default().push(at as u32);
                    lowest = lowest.min(products[at]);
                }
                if lowest < best {
                    // Cannot happen in a trained vocabulary, where a token is younger than its parts. No merge makes a
                    // pair with its own product, so nobody has started another list for `best`.
                    waiting.insert(best, places);
                    break;
                }
            }
        }
        let mut at = 0;
        while at < len {
            ids.push(self.id(chunk, at, next[at] as usize) as i32);
            at = next[at] as usize;
        }
    }
}

/// What a thread remembers of chunks: 16 MiB of short ones and 2 MiB of others, however much text it encodes.
struct Cache {
    short: Box<[Line; 1 << LINE_BITS]>,
    long: Box<[Long; 1 << LONG_BITS]>,
}

const LINE_BITS: u32 = 18;
const LONG_BITS: u32 = 14;

/// The most ids of a chunk in a line.
const LINE_IDS: usize = 4;

/// Two chunks that fall on the same place, the one used last first, in one line of the processor's cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    /// The keys of the chunks, with the number of their ids in the upper half of the last byte.
    keys: [u128; 2],
    ids: [[i32; LINE_IDS]; 2],
}

/// A chunk that has no key or more ids. It is not empty, so `len` is 0 where there is none.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Long {
    len: u8,
    count: u8,
    bytes: [u8; SHORT - 1],
    ids: [i32; 16],
}

impl Line {
    /// The ids of the chunk that was used last and their number, if that has the key.
    #[inline(always)]
    fn get(&self, key: u128) -> Option<(&[i32; LINE_IDS], usize)> {
        // What is left of a key that is the same is the number of ids.
        let difference = self.keys[0] ^ key;
        (difference << 4 == 0).then_some((&self.ids[0], (difference >> 124) as usize))
    }

    fn swap(&mut self) {
        self.keys.swap(0, 1);
        self.ids.swap(0, 1);
    }
}

/// What one thread remembers and reuses from chunk to chunk.
pub struct Scratch {
    splitter: Splitter,
    cache: Cache,
    hasher: DefaultHashBuilder,
    keys: [Key; BATCH],
    ids: [i32; BATCH * LINE_IDS],
}

/// The key of a chunk and its place among the lines of the cache.
#[derive(Clone, Copy, Default)]
struct Key {
    key: u128,
    place: u32,
}

/// Splits and encodes text.
pub struct Encoder {
    pub vocabulary: Vocabulary,
    pub splitter: Splitter,
}

impl Encoder {
    pub fn new(vocabulary: Vocabulary, splitter: Splitter) -> Self {
        Self { vocabulary, splitter }
    }

    pub fn scratch(&self) -> Scratch {
        let line = Line { keys: [0; 2], ids: [[0; LINE_IDS]; 2] };
        let long = Long { len: 0, count: 0, bytes: [0; SHORT - 1], ids: [0; 16] };
        Scratch {
            splitter: self.splitter.clone(),
            cache: Cache { short: table(line), long: table(long) },
            hasher: DefaultHashBuilder::default(),
            keys: [Key::default(); BATCH],
            ids: [0; BATCH * LINE_IDS],
        }
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<i32>) -> Result<(), String> {
        let Scratch { splitter, cache, hasher, keys, ids } = scratch;
        if u32::try_from(text.len()).is_err() {
            return Err(format!("a text of {} bytes is too long: cut it below 4 GiB", text.len()));
        }
        splitter.for_each_run(text, &mut |first, ends| {
            make_keys(text.as_bytes(), first, ends, cache, keys);
            let mut count = 0;
            for (index, &Key { key, place }) in keys.iter().enumerate().take(ends.len()) {
                if let Some((chunk_ids, new)) = cache.short[place as usize % (1 << LINE_BITS)].get(key) {
                    ids[count..count + LINE_IDS].copy_from_slice(chunk_ids);
                    count += new;
                } else {
                    out.extend_from_slice(&ids[..std::mem::take(&mut count)]);
                    let start = index.checked_sub(1).map_or(first, |previous| ends[previous] as usize);
                    self.encode_other(text.as_bytes(), start..ends[index] as usize, keys[index], hasher, cache, out);
                }
            }
            out.extend_from_slice(&ids[..count]);
        })
    }

    /// Appends the ids of a chunk that is not the first in its line.
    #[cold]
    fn encode_other(
        &self,
        text: &[u8],
        chunk: Range<usize>,
        Key { key, place }: Key,
        hasher: &DefaultHashBuilder,
        cache: &mut Cache,
        out: &mut Vec<i32>,
    ) {
        let line = &mut cache.short[place as usize];
        line.swap();
        if let Some((ids, count)) = line.get(key) {
            return out.extend_from_slice(&ids[..count]);
        }
        let bytes = &text[chunk.clone()];
        let hash = if key == key::NONE { hasher.hash_one(bytes) } else { key::hash(key) };
        let long = &mut cache.long[(hash >> (64 - LONG_BITS)) as usize];
        if long.bytes.get(..usize::from(long.len)) == Some(bytes) {
            line.swap();
            return out.extend_from_slice(&long.ids[..usize::from(long.count)]);
        }
        let first = out.len();
        match self.vocabulary.id(text, chunk.start, chunk.end) {
            NONE => self.vocabulary.merge(text, chunk.start, chunk.end, out),
            id => out.push(id as i32),
        }
        let ids = &out[first..];
        if key != key::NONE && ids.len() <= LINE_IDS {
            line.keys[0] = key | (ids.len() as u128) << 124;
            line.ids[0][..ids.len()].copy_from_slice(ids);
            return;
        }
        line.swap();
        if bytes.len() <= long.bytes.len() && ids.len() <= long.ids.len() {
            (long.len, long.count) = (bytes.len() as u8, ids.len() as u8);
            long.bytes[..bytes.len()].copy_from_slice(bytes);
            long.ids[..ids.len()].copy_from_slice(ids);
        }
    }
}

/// Gives the chunks keys and places in the cache, and starts to load these.
#[inline(never)] // so that it has the processor's registers for itself; it runs once for many chunks
fn make_keys(text: &[u8], first: usize, ends: &[u32], cache: &Cache, keys: &mut [Key; BATCH]) {
    let mut start = first as u32;
    for (&end, place) in ends.iter().zip(keys) {
        let key = key::of(text, start as usize, end as usize).unwrap_or(key::NONE);
        *place = Key { key, place: (key::hash(key) >> (64 - LINE_BITS)) as u32 };
        prefetch(&cache.short[place.place as usize % (1 << LINE_BITS)]);
        start = end;
    }
}

/// Starts to load a cache line that will be needed soon.
#[inline(always)]
fn prefetch<T>(line: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a prefetch reads nothing that the program sees, and the address is that of a live reference.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

fn table<T: Copy, const LEN: usize>(entry: T) -> Box<[T; LEN]> {
    let mut table = huge(LEN);
    table.resize(LEN, entry);
    table.into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!("it has this length"))
}

/// An empty vector for `len` entries, on huge pages where the system has them: with small ones, much of the time of
/// writing goes into getting them.
pub fn huge<T>(len: usize) -> Vec<T> {
    let vector: Vec<T> = Vec::with_capacity(len);
    #[cfg(target_os = "linux")]
    {
        extern "C" {
            fn madvise(start: *mut u8, len: usize, advice: i32) -> i32;
        }
        const PAGE: usize = 4096; // where the kernel's are larger it refuses, which does no harm
        const HUGE_PAGES: i32 = 14;
        let start = vector.as_ptr().cast::<u8>().cast_mut();
        let size = len * size_of::<T>();
        let skip = start.align_offset(PAGE).min(size);
        // SAFETY: this is the C library's signature on Linux. The range is within the vector's memory, and the advice
        // does not change what is in it.
        unsafe { madvise(start.add(skip), size - skip, HUGE_PAGES) };
    }
    vector
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(encoder: &Encoder, text: &str) -> Vec<i32> {
        let mut ids = Vec::new();
        encoder.encode(text, &mut encoder.scratch(), &mut ids).unwrap();
        ids
    }

    fn encoder(merges: &[Pair], pattern: &str) -> Encoder {
        Encoder::new(Vocabulary::from_merges(merges), Splitter::new(pattern).unwrap())
    }

    #[test]
    fn the_earliest_merge_goes_first_and_decoding_inverts() {
        let encoder = encoder(&[(98, 99), (97, 98), (256, 256)], "(?s).+"); // bc, ab, bcbc
        assert_eq!(encode(&encoder, "abcbc"), [97, 258]);
        assert_eq!(encode(&encoder, "abb"), [257, 98]);
        assert!(encode(&encoder, "").is_empty());
        assert_eq!(encoder.vocabulary.decode(&[97, 258]).unwrap(), b"abcbc");
        assert_eq!(encoder.vocabulary.decode(&[259]), Err(259));
    }

    /// tiktoken's definition: any two neighbours that together spell a token may merge.
    fn merge_by_spelling(vocabulary: &Vocabulary, chunk: &[u8]) -> Vec<i32> {
        let id = |token: &[u8]| vocabulary.id(token, 0, token.len());
        let mut parts: Vec<Vec<u8>> = chunk.iter().map(|&byte| vec![byte]).collect();
        loop {
            let pairs = parts.windows(2).map(|pair| id(&pair.concat())).enumerate();
            match pairs.min_by_key(|&(_, id)| id) {
                Some((at, id)) if id != NONE => {
                    let right = parts.remove(at + 1);
                    parts[at].extend(right);
                }
                _ => return parts.iter().map(|part| id(part) as i32).collect(),
            }
        }
    }

    #[test]
    fn merging_equals_the_definition_in_any_vocabulary_and_length() {
        let mut state = 3u64;
        let mut random = move |limit: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % limit
        };
        for _ in 0..300 {
            // Not a trained vocabulary: tokens that merging cannot reach, ids in any order.
            let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
            for _ in 0..random(40) {
                let token: Vec<u8> = (0..2 + random(6)).map(|_| b"aab"[random(3)]).collect();
                if !tokens.contains(&token) {
                    tokens.insert(random(tokens.len()), token);
                }
            }
            let vocabulary = Vocabulary::from_tokens(tokens).unwrap();
            for length in [1, 2, 5, 20, SHORT, SHORT + 1, 300] {
                let chunk: Vec<u8> = (0..length).map(|_| b"aaabc"[random(5)]).collect();
                let mut ids = Vec::new();
                vocabulary.merge(&chunk, 0, length, &mut ids);
                assert_eq!(ids, merge_by_spelling(&vocabulary, &chunk));
            }
        }
    }

    #[test]
    fn a_vocabulary_has_every_byte_and_no_token_twice() {
        let bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let error = |tokens| Vocabulary::from_tokens(tokens).err().unwrap();
        assert!(error([bytes.clone(), vec![vec![7]]].concat()).contains("7 and 256"));
        assert!(error(bytes[1..].to_vec()).contains("byte 0 "));
    }
}
