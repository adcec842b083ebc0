//! A vocabulary, and from text to ids and back.
//!
//! Encoding is what tiktoken defines: a chunk that is a token gets that token's id; in any other, of all neighbours
//! that together are a token the pair of the lowest id merges, the leftmost first, until none is left.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::gpt4::BATCH;
use crate::key;
use crate::split::Splitter;
use crate::train::Pair;

/// No token.
const NONE: u32 = u32::MAX;

/// The tokens of a vocabulary and which pairs of them make another.
pub struct Vocabulary {
    tokens: Vec<Vec<u8>>,
    hasher: DefaultHashBuilder,
    /// Ids by the hash of the token's bytes.
    ids: HashTable<u32>,
    /// Ids by the hash of the pair that makes the token. More than one pair may spell a token, but merging arrives at
    /// no more than one of them: what happens within the token's bytes does not depend on what is around them.
    merges: HashTable<(Pair, u32)>,
    byte_ids: [u32; 256],
    /// What two bytes make, by the number that they are.
    byte_merges: Vec<u32>,
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

    /// Token `i` gets the id `i`. Fails if a token is there twice or one of the 256 bytes is not.
    pub fn from_tokens(tokens: Vec<Vec<u8>>) -> Result<Self, String> {
        let size = tokens.len();
        let mut vocabulary = Self {
            tokens,
            hasher: DefaultHashBuilder::default(),
            ids: HashTable::with_capacity(size),
            merges: HashTable::with_capacity(size),
            byte_ids: [NONE; 256],
            byte_merges: vec![NONE; 1 << 16],
        };
        for (id, token) in (0..).zip(&vocabulary.tokens) {
            if let Some(twin) = vocabulary.id(token) {
                return Err(format!("tokens {twin} and {id} are the same: {:?}", String::from_utf8_lossy(token)));
            }
            let hash = |&id: &u32| vocabulary.hasher.hash_one(vocabulary.tokens[id as usize].as_slice());
            vocabulary.ids.insert_unique(hash(&id), id, hash);
        }
        for byte in 0..=255 {
            let id = vocabulary.id(&[byte]).ok_or_else(|| format!("byte {byte} is not in the vocabulary"))?;
            vocabulary.byte_ids[usize::from(byte)] = id;
        }
        vocabulary.find_merges();
        Ok(vocabulary)
    }

    /// Merges the bytes of each token, the shorter ones first, as far as the merges found so far go: if two parts are
    /// left, they are the pair that makes the token. If more are left, only a chunk that is the token gets it.
    fn find_merges(&mut self) {
        let mut by_length: Vec<u32> = (0..self.tokens.len() as u32).collect();
        by_length.sort_by_key(|&id| self.tokens[id as usize].len());
        let mut buffers = Buffers::default();
        for id in by_length {
            let token = &self.tokens[id as usize];
            if token.len() > 1 {
                self.merge(token, &mut buffers);
                if let [left, right] = buffers.ids[..] {
                    self.merges
                        .insert_unique(hash_pair((left, right)), ((left, right), id), |entry| hash_pair(entry.0));
                    if let [first, second] = token[..] {
                        self.byte_merges[usize::from(first) << 8 | usize::from(second)] = id;
                    }
                }
            }
        }
    }

    /// The bytes of every token, by id.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
    }

    fn id(&self, token: &[u8]) -> Option<u32> {
        let hash = self.hasher.hash_one(token);
        self.ids.find(hash, |&id| self.tokens[id as usize] == token).copied()
    }

    /// The id of the token that two tokens make together, or NONE.
    #[inline]
    fn product(&self, left: u32, right: u32) -> u32 {
        self.merges.find(hash_pair((left, right)), |entry| entry.0 == (left, right)).map_or(NONE, |entry| entry.1)
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
}

#[inline]
fn hash_pair(pair: Pair) -> u64 {
    let product = u128::from(u64::from(pair.0) << 32 | u64::from(pair.1)).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c);
    product as u64 ^ (product >> 64) as u64
}

/// Chunks up to this long are merged by searching the best pair over and over, which is fast because it needs no more
/// than two small arrays; longer ones by `merge_long`, whose time does not grow with the square of the length.
const SHORT_CHUNK: usize = 128;

/// Space for merging a chunk.
#[derive(Default)]
struct Buffers {
    ids: Vec<u32>,
    /// What each id and the next one make.
    products: Vec<u32>,
}

impl Vocabulary {
    /// Merges a chunk as far as it goes and leaves the result in `buffers.ids`.
    fn merge(&self, chunk: &[u8], Buffers { ids, products }: &mut Buffers) {
        ids.clear();
        ids.extend(chunk.iter().map(|&byte| self.byte_ids[usize::from(byte)]));
        products.clear();
        let pairs = chunk.windows(2).map(|pair| usize::from(pair[0]) << 8 | usize::from(pair[1]));
        products.extend(pairs.map(|pair| self.byte_merges[pair]));
        if ids.len() <= SHORT_CHUNK {
            self.merge_short(ids, products);
        } else {
            self.merge_long(ids, products);
            ids.retain(|&id| id != NONE);
        }
    }

    fn merge_short(&self, ids: &mut Vec<u32>, products: &mut Vec<u32>) {
        while let Some((at, &best)) = products.iter().enumerate().min_by_key(|&(_, &product)| product) {
            if best == NONE {
                return;
            }
            ids[at] = best;
            ids.remove(at + 1);
            products.remove(at);
            if at > 0 {
                products[at - 1] = self.product(ids[at - 1], best);
            }
            if at < products.len() {
                products[at] = self.product(best, ids[at + 1]);
            }
        }
    }

    /// The same in near-linear time: places wait in a list for each product, and a whole list is merged at once, left to
    /// right. Ids that are merged away become NONE.
    fn merge_long(&self, ids: &mut [u32], products: &mut Vec<u32>) {
        let len = ids.len() as u32;
        products.push(NONE); // nothing follows the last
        let mut next: Vec<u32> = (1..=len).collect();
        let mut previous: Vec<u32> = (0..len).map(|at| at.wrapping_sub(1)).collect();
        let mut waiting = BTreeMap::<u32, Vec<u32>>::new();
        for (at, &product) in (0..).zip(products.iter()).filter(|(_, &product)| product != NONE) {
            waiting.entry(product).or_default().push(at);
        }
        while let Some((best, mut places)) = waiting.pop_first() {
            places.sort_unstable_by_key(|&at| Reverse(at));
            while let Some(at) = places.pop() {
                if products[at as usize] != best {
                    continue; // a neighbour was merged since
                }
                let right = next[at as usize];
                let (before, after) = (previous[at as usize], next[right as usize]);
                (ids[at as usize], ids[right as usize]) = (best, NONE);
                (products[at as usize], products[right as usize]) = (NONE, NONE);
                next[at as usize] = after;
                if after < len {
                    previous[after as usize] = at;
                    products[at as usize] = self.product(best, ids[after as usize]);
                }
                if before < len {
                    products[before as usize] = self.product(ids[before as usize], best);
                }
                let mut lowest = NONE;
                for place in [before, at].into_iter().filter(|&place| place < len) {
                    let product = products[place as usize];
                    if product != NONE {
                        waiting.entry(product).or_default().push(place);
                        lowest = lowest.min(product);
                    }
                }
                if lowest < best {
                    // Cannot happen in a trained vocabulary, where a token is younger than its parts. No merge makes a
                    // pair with its own product, so nobody has started another list for `best`.
                    waiting.insert(best, places);
                    break;
                }
            }
        }
    }
}

/// The tokens that are short enough for a key, by their keys' hashes. A token whose bucket is full of tokens with lower
/// ids is left out.
struct Words {
    buckets: Vec<Bucket>,
    shift: u32,
}

/// One cache line.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Bucket {
    keys: [u128; 2],
    ids: [i32; 2],
}

impl Words {
    fn new(tokens: &[Vec<u8>]) -> Self {
        let bits = tokens.len().max(4).ilog2();
        let mut words = Self { buckets: vec![Bucket::default(); 1 << bits], shift: 64 - bits };
        for (id, token) in (0..).zip(tokens) {
            let Some(key) = key::of(token, 0, token.len()) else { continue };
            let bucket = &mut words.buckets[(key::hash(key) >> words.shift) as usize];
            if let Some(free) = bucket.keys.iter().position(|&key| key == 0) {
                (bucket.keys[free], bucket.ids[free]) = (key, id);
            }
        }
        words
    }

    /// Fetches what `get` will read for the hash, so that it need not wait.
    #[inline(always)]
    fn prefetch(&self, hash: u64) {
        let bucket = &self.buckets[(hash >> self.shift) as usize];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            // SAFETY: fetching changes no memory, and the address is that of a live reference.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(bucket).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        std::hint::black_box(bucket);
    }

    #[inline(always)]
    fn get(&self, key: u128, hash: u64) -> Option<i32> {
        let bucket = &self.buckets[(hash >> self.shift) as usize];
        let second = bucket.keys[1] == key;
        let id = bucket.ids[usize::from(second)];
        (second | (bucket.keys[0] == key)).then_some(id)
    }
}

/// How many pairs of short chunks a thread remembers, as a power of two, and of how many ids each at most: 2 MiB.
const CACHE_BITS: u32 = 15;
const CACHED_IDS: usize = 4;

#[derive(Clone, Copy)]
struct Cached {
    key: u128,
    ids: [i32; CACHED_IDS], // -1 after the last
}

/// What one thread remembers and reuses from chunk to chunk.
pub struct Scratch {
    splitter: Splitter,
    /// The keys of the chunks at work, 0 for long ones, and their hashes.
    keys: [(u128, u64); BATCH],
    /// Chunks that are no tokens, with their ids: the two that last fell on each place, the latest first.
    cache: Vec<[Cached; 2]>,
    buffers: Buffers,
}

/// Splits and encodes text.
pub struct Encoder {
    pub vocabulary: Vocabulary,
    pub splitter: Splitter,
    words: Words,
}

impl Encoder {
    pub fn new(vocabulary: Vocabulary, splitter: Splitter) -> Self {
        let words = Words::new(vocabulary.tokens());
        Self { vocabulary, splitter, words }
    }

    pub fn scratch(&self) -> Scratch {
        let empty = Cached { key: 0, ids: [-1; CACHED_IDS] };
        let cache = vec![[empty; 2]; 1 << CACHE_BITS];
        Scratch { splitter: self.splitter.clone(), keys: [(0, 0); BATCH], cache, buffers: Buffers::default() }
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<i32>) -> Result<(), String> {
        let Scratch { splitter, keys, cache, buffers } = scratch;
        let bytes = text.as_bytes();
        if u32::try_from(bytes.len()).is_err() {
            return Err(format!("a text of {} bytes is too long: cut it below 4 GiB", bytes.len()));
        }
        splitter.for_each_run(text, &mut |start, ends| {
            let mut next = start;
            for (&end, (key, hash)) in ends.iter().zip(keys.iter_mut()) {
                *key = key::of(bytes, std::mem::replace(&mut next, end), end).unwrap_or(0);
                *hash = key::hash(*key);
                self.words.prefetch(*hash);
            }
            self.encode_run(bytes, start, ends, keys, cache, buffers, out);
        })
    }

    /// Appends the ids of the adjacent chunks that begin at `start`.
    fn encode_run(
        &self,
        text: &[u8],
        mut start: usize,
        ends: &[usize],
        keys: &[(u128, u64)],
        cache: &mut [[Cached; 2]],
        buffers: &mut Buffers,
        out: &mut Vec<i32>,
    ) {
        let mut len = out.len();
        out.resize(len + CACHED_IDS * ends.len(), 0);
        for (index, (&end, &(key, hash))) in ends.iter().zip(keys).enumerate() {
            'known: {
                if key != 0 {
                    if let Some(id) = self.words.get(key, hash) {
                        out[len] = id;
                        len += 1;
                        break 'known;
                    }
                    let set = &cache[(hash >> (64 - CACHE_BITS)) as usize];
                    if let Some(cached) = set.iter().find(|cached| cached.key == key) {
                        out[len..len + CACHED_IDS].copy_from_slice(&cached.ids);
                        len += cached.ids.iter().filter(|&&id| id >= 0).count();
                        break 'known;
                    }
                }
                let ids = self.encode_chunk(&text[start..end], cache, buffers);
                let needed = len + ids.len() + CACHED_IDS * (ends.len() - index);
                if needed > out.len() {
                    out.resize(needed, 0);
                }
                for (place, &id) in out[len..].iter_mut().zip(ids) {
                    *place = id as i32;
                }
                len += ids.len();
            }
            start = end;
        }
        out.truncate(len);
    }

    /// The ids of a chunk, which are remembered if it is short and they are few.
    #[cold]
    fn encode_chunk<'b>(&self, chunk: &[u8], cache: &mut [[Cached; 2]], buffers: &'b mut Buffers) -> &'b [u32] {
        match self.vocabulary.id(chunk) {
            Some(id) => buffers.ids.splice(.., [id]).for_each(drop),
            None => self.vocabulary.merge(chunk, buffers),
        }
        if let (Some(key), true) = (key::of(chunk, 0, chunk.len()), buffers.ids.len() <= CACHED_IDS) {
            let set = &mut cache[(key::hash(key) >> (64 - CACHE_BITS)) as usize];
            set[1] = set[0];
            set[0] = Cached { key, ids: [-1; CACHED_IDS] };
            for (cached, &id) in set[0].ids.iter_mut().zip(&buffers.ids) {
                *cached = id as i32;
            }
        }
        &buffers.ids
    }
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
    fn merge_by_spelling(vocabulary: &Vocabulary, chunk: &[u8]) -> Vec<u32> {
        let mut parts: Vec<Vec<u8>> = chunk.iter().map(|&byte| vec![byte]).collect();
        loop {
            let pairs = parts.windows(2).map(|pair| vocabulary.id(&pair.concat()).unwrap_or(NONE)).enumerate();
            match pairs.min_by_key(|&(_, id)| id) {
                Some((at, id)) if id != NONE => {
                    let right = parts.remove(at + 1);
                    parts[at].extend(right);
                }
                _ => return parts.iter().map(|part| vocabulary.id(part).unwrap()).collect(),
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
            let mut buffers = Buffers::default();
            for length in [1, 2, 5, 20, 60, SHORT_CHUNK + 1, 300] {
                let chunk: Vec<u8> = (0..length).map(|_| b"aaabc"[random(5)]).collect();
                vocabulary.merge(&chunk, &mut buffers);
                assert_eq!(buffers.ids, merge_by_spelling(&vocabulary, &chunk));
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
