//! A vocabulary, and how the bytes of a chunk merge to its tokens.
//!
//! The rule is tiktoken's: of all neighbours that together spell a token, the pair with the lowest id merges, the leftmost
//! first, until none is left. Merges inside a part of a chunk happen in the same order as in that part alone, as long as
//! no merge crosses its ends. So a token can come from one pair only: the two parts that its own bytes merge to.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashMap;

use crate::processor::{huge, prefetch};
use crate::train::Pair;

/// No token. Greater than any id, also with the place of a pair in the low bits, and as a signed number.
const NONE: u32 = i32::MAX as u32;

/// The number of bits of an id.
const ID_BITS: u32 = 21;

/// The most tokens of a vocabulary. The last id is left free: it stands for the ends of a chunk.
pub const MAX_TOKENS: usize = (1 << ID_BITS) - 1;
const EDGE: u32 = MAX_TOKENS as u32;

/// Chunks of up to this many bytes are merged with one bit for each byte and two for the ends.
const SHORT: usize = 62;

/// The number of bits of a place in a short chunk.
const PLACE_BITS: u32 = 6;
const PLACES: usize = 1 << PLACE_BITS;

/// The tokens of a vocabulary and their ids.
pub struct Vocabulary {
    tokens: Vec<Vec<u8>>,
    /// The ids of the bytes.
    bytes: [u32; 256],
    /// What two bytes make, or NONE, by the number that they are.
    byte_pairs: Vec<u32>,
    pairs: PairTable,
    /// The ids of tokens that merging cannot make.
    unreachable: HashMap<Vec<u8>, u32>,
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
        if tokens.len() > MAX_TOKENS {
            return Err(format!("{} tokens are too many: at most {MAX_TOKENS}", tokens.len()));
        }
        let bytes = byte_ids(&tokens)?;
        let (pairs, byte_pairs) = (PairTable::new(tokens.len()), vec![NONE; 1 << 16]);
        let mut vocabulary = Self { tokens: Vec::new(), bytes, byte_pairs, pairs, unreachable: HashMap::new() };
        // The parts of a token are shorter than it.
        let mut by_length: Vec<u32> = (0..tokens.len() as u32).collect();
        by_length.sort_by_key(|&id| tokens[id as usize].len());
        let mut parts = Vec::new();
        for id in by_length {
            let token = &tokens[id as usize];
            parts.clear();
            vocabulary.merge(token, &mut parts);
            match parts[..] {
                [_] => {}
                [left, right] => {
                    vocabulary.pairs.insert(left as u32, right as u32, id);
                    if let [first, second] = token[..] {
                        vocabulary.byte_pairs[usize::from(first) << 8 | usize::from(second)] = id;
                    }
                }
                _ => _ = vocabulary.unreachable.insert(token.clone(), id),
            }
        }
        Ok(Self { tokens, ..vocabulary })
    }

    /// The bytes of every token, by id.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
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

    /// Appends the ids of a chunk: its own if it is a token, else those of what its bytes merge to.
    pub fn encode(&self, chunk: &[u8], ids: &mut Vec<i32>) {
        match self.unreachable.get(chunk) {
            Some(&id) => ids.push(id as i32),
            None => self.merge(chunk, ids),
        }
    }

    fn merge(&self, chunk: &[u8], ids: &mut Vec<i32>) {
        if chunk.len() > SHORT {
            return self.merge_long(chunk, ids);
        }
        let mut merging = Merging::new(self, chunk);
        while merging.step(self) {}
        ids.extend(merging.ids());
    }

    fn byte_pair(&self, pair: &[u8]) -> u32 {
        self.byte_pairs[usize::from(pair[0]) << 8 | usize::from(pair[1])]
    }

    /// Whether merging makes the ids of the chunk.
    #[inline(always)]
    pub fn is_merged(&self, chunk: &[u8]) -> bool {
        !self.unreachable.contains_key(chunk)
    }

    /// Merges a chunk in near-linear time: places wait in a list for each product, and a whole list is merged at once,
    /// left to right.
    fn merge_long(&self, chunk: &[u8], ids: &mut Vec<i32>) {
        let len = chunk.len();
        let mut next: Vec<u32> = (1..=len as u32).collect();
        let mut previous: Vec<u32> = (0..len as u32).map(|at| at.wrapping_sub(1)).collect();
        let mut parts: Vec<u32> = chunk.iter().map(|&byte| self.bytes[usize::from(byte)]).collect();
        let mut products: Vec<u32> = chunk.windows(2).map(|pair| self.byte_pair(pair)).chain([NONE]).collect();
        let mut waiting = Waiting::default();
        for (at, &product) in products.iter().enumerate() {
            waiting.push(product, at);
        }
        while let Some(Reverse(best)) = waiting.products.pop() {
            let mut places = waiting.places.remove(&best).unwrap_or_default();
            places.sort_unstable_by_key(|&at| Reverse(at));
            while let Some(at) = places.pop().map(|at| at as usize) {
                if products[at] != best {
                    continue; // a neighbour was merged since
                }
                let right = next[at] as usize;
                let (before, after) = (previous[at] as usize, next[right] as usize);
                (parts[at], next[at], products[right], products[at]) = (best, after as u32, NONE, NONE);
                if after < len {
                    previous[after] = at as u32;
                    products[at] = self.pairs.get(best, parts[after]);
                    waiting.push(products[at], at);
                }
                if before < len {
                    products[before] = self.pairs.get(parts[before], best);
                    waiting.push(products[before], before);
                }
                if waiting.products.peek().is_some_and(|&Reverse(lowest)| lowest < best) {
                    // Cannot happen in a trained vocabulary, where a token is younger than its parts. No merge makes a
                    // pair with its own product, so nobody has started another list for `best`.
                    waiting.products.push(Reverse(best));
                    waiting.places.insert(best, places);
                    break;
                }
            }
        }
        let mut at = 0;
        while at < len {
            ids.push(parts[at] as i32);
            at = next[at] as usize;
        }
    }
}

/// The places that wait for each product, and the products of which there are any, the lowest first.
#[derive(Default)]
struct Waiting {
    places: HashMap<u32, Vec<u32>>,
    products: BinaryHeap<Reverse<u32>>,
}

impl Waiting {
    fn push(&mut self, product: u32, at: usize) {
        if product != NONE {
            let places = self.places.entry(product).or_insert_with(|| {
                self.products.push(Reverse(product));
                Vec::new()
            });
            places.push(at as u32);
        }
    }
}

/// The ids of the bytes. Fails if one is missing or a token is there twice.
fn byte_ids(tokens: &[Vec<u8>]) -> Result<[u32; 256], String> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in (0..).zip(tokens) {
        if let Some(twin) = ids.insert(token.as_slice(), id) {
            return Err(format!("tokens {twin} and {id} are the same: {:?}", String::from_utf8_lossy(token)));
        }
    }
    let mut bytes = [NONE; 256];
    for (byte, id) in (0..=255).zip(&mut bytes) {
        *id = *ids.get([byte].as_slice()).ok_or_else(|| format!("byte {byte} is not in the vocabulary"))?;
    }
    Ok(bytes)
}

/// A short chunk while it is merged, looking at all pairs before each merge. Places are counted from 1: at 0 and behind the
/// chunk are the ends, which merge with nothing.
#[derive(Clone, Copy)]
pub struct Merging {
    parts: [u32; PLACES],
    /// What the part at a place makes with the next part: its id, and in the low bits the place.
    products: [u32; PLACES],
    /// The places of parts and of the ends.
    starts: u64,
    /// The place behind the chunk.
    end: usize,
    /// The place of the last merge, and the parts before and after it.
    last: [usize; 3],
}

impl Merging {
    #[inline(always)]
    pub fn new(vocabulary: &Vocabulary, chunk: &[u8]) -> Self {
        let end = chunk.len() + 1;
        let (mut parts, mut products) = ([EDGE; PLACES], [NONE; PLACES]);
        for (part, &byte) in parts[1..].iter_mut().zip(chunk) {
            *part = vocabulary.bytes[usize::from(byte)];
        }
        for (at, pair) in (1..PLACES).zip(chunk.windows(2)) {
            products[at] = product(vocabulary.byte_pair(pair), at);
        }
        Self { parts, products, starts: u64::MAX >> (PLACES - 1 - end), end, last: [0; 3] }
    }

    /// Merges one pair. False if none is left. What the new part makes with its neighbours is looked up at the next step,
    /// so that the processor can load it in the meantime, while other chunks make a step.
    #[inline(always)]
    pub fn step(&mut self, vocabulary: &Vocabulary) -> bool {
        let Self { parts, products, starts, end, last } = self;
        let [before, at, after] = last.map(|place| place % PLACES);
        products[at] = product(vocabulary.pairs.get(parts[at], parts[after]), at);
        products[before] = product(vocabulary.pairs.get(parts[before], parts[at]), before);
        // 16 places at a time, which takes no branches.
        let groups = products.chunks_exact(16).take(end.div_ceil(16));
        let best = groups.map(|group| group.iter().fold(NONE as i32, |low, &product| low.min(product as i32)));
        let best = best.fold(NONE as i32, i32::min) as u32;
        if best == NONE {
            return false;
        }
        let next = |at: usize| (at + 1 + (*starts >> at >> 1).trailing_zeros() as usize) % PLACES;
        let at = best as usize % PLACES;
        let (before, right) = (at - 1 - (*starts << (PLACES - at)).leading_zeros() as usize, next(at));
        let after = next(right);
        *starts &= !(1 << right);
        (parts[at], products[right]) = (best >> PLACE_BITS, NONE);
        vocabulary.pairs.prefetch(parts[at], parts[after]);
        vocabulary.pairs.prefetch(parts[before % PLACES], parts[at]);
        *last = [before, at, after];
        true
    }

    #[inline(always)]
    pub fn ids(&self) -> impl Iterator<Item = i32> + '_ {
        let mut left = self.starts & !(1 | 1 << self.end);
        std::iter::from_fn(move || {
            let at = left.trailing_zeros() as usize;
            left &= left.wrapping_sub(1);
            self.parts.get(at).map(|&part| part as i32)
        })
    }
}

#[inline(always)]
fn product(id: u32, at: usize) -> u32 {
    if id == NONE {
        NONE
    } else {
        id << PLACE_BITS | at as u32
    }
}

/// The token that two tokens make. Each entry is one number: left id, right id, product; 0 if free. That is little, because
/// most of the time goes into waiting for them.
struct PairTable(Vec<u64>);

impl PairTable {
    fn new(num_pairs: usize) -> Self {
        let len = (2 * num_pairs).next_power_of_two();
        let mut entries = huge(len);
        entries.resize(len, 0);
        Self(entries)
    }

    fn key(left: u32, right: u32) -> u64 {
        u64::from(left) << ID_BITS | u64::from(right)
    }

    #[inline(always)]
    fn place(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & (self.0.len() - 1)
    }

    /// The entry of the key, or the free one where it belongs. At least half of the entries are free.
    #[inline(always)]
    fn find(&self, key: u64) -> usize {
        let mut at = self.place(key);
        // A product differs from its parts, so 0 is no entry.
        while self.0[at] != 0 && self.0[at] >> ID_BITS != key {
            at = (at + 1) & (self.0.len() - 1);
        }
        at
    }

    fn insert(&mut self, left: u32, right: u32, product: u32) {
        let key = Self::key(left, right);
        let at = self.find(key);
        self.0[at] = key << ID_BITS | u64::from(product);
    }

    #[inline(always)]
    fn get(&self, left: u32, right: u32) -> u32 {
        match self.0[self.find(Self::key(left, right))] {
            0 => NONE,
            entry => entry as u32 & EDGE,
        }
    }

    #[inline(always)]
    fn prefetch(&self, left: u32, right: u32) {
        prefetch(&self.0[self.place(Self::key(left, right))]);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A generator of random numbers below a limit.
    pub fn random(seed: u64) -> impl FnMut(usize) -> usize {
        let mut state = seed;
        move |limit| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % limit
        }
    }

    /// Not a trained vocabulary: tokens that merging cannot reach, ids in any order.
    pub fn any_vocabulary(random: &mut impl FnMut(usize) -> usize) -> Vocabulary {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for _ in 0..random(40) {
            let token: Vec<u8> = (0..2 + random(6)).map(|_| b"aab"[random(3)]).collect();
            if !tokens.contains(&token) {
                tokens.insert(random(tokens.len()), token);
            }
        }
        Vocabulary::from_tokens(tokens).unwrap()
    }

    /// tiktoken's definition: any two neighbours that together spell a token may merge.
    pub fn merge_by_spelling(vocabulary: &Vocabulary, chunk: &[u8]) -> Vec<i32> {
        let id = |token: &[u8]| vocabulary.tokens().iter().position(|known| known == token).map(|id| id as i32);
        if let Some(id) = id(chunk) {
            return vec![id];
        }
        let mut parts: Vec<Vec<u8>> = chunk.iter().map(|&byte| vec![byte]).collect();
        loop {
            let pairs = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((id(&pair.concat())?, at)));
            let Some((_, at)) = pairs.min() else { break };
            let right = parts.remove(at + 1);
            parts[at].extend(right);
        }
        parts.iter().map(|part| id(part).unwrap()).collect()
    }

    #[test]
    fn the_earliest_merge_goes_first_and_decoding_inverts() {
        let vocabulary = Vocabulary::from_merges(&[(98, 99), (97, 98), (256, 256)]); // bc, ab, bcbc
        for (chunk, expected) in [("abcbc", vec![97, 258]), ("abb", vec![257, 98]), ("", vec![])] {
            let mut ids = Vec::new();
            vocabulary.encode(chunk.as_bytes(), &mut ids);
            assert_eq!(ids, expected);
        }
        assert_eq!(vocabulary.decode(&[97, 258]).unwrap(), b"abcbc");
        assert_eq!(vocabulary.decode(&[259]), Err(259));
    }

    #[test]
    fn merging_equals_the_definition_in_any_vocabulary_and_length() {
        let mut random = random(3);
        for _ in 0..300 {
            let vocabulary = any_vocabulary(&mut random);
            for length in [1, 2, 3, 4, 5, 7, 20, SHORT, SHORT + 1, 300] {
                let chunk: Vec<u8> = (0..length).map(|_| b"aaabc"[random(5)]).collect();
                let mut ids = Vec::new();
                vocabulary.encode(&chunk, &mut ids);
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
