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
    /// The ids of the tokens that pairs make, NONE where a place is free: a pair is at the first free place from its hash
    /// on when it comes. More than one pair may spell a token, but merging arrives at
    /// no more than one of them: what happens within the token's bytes does not depend on what is around them.
    merges: Vec<(Pair, u32)>,
    /// Bits by the hash of a pair: if its bit is not set, the pair makes no token. Most pairs are told apart by this,
    /// which is a fraction of the table's size.
    filter: Vec<u64>,
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
            merges: table((size + size / 4).next_power_of_two(), ((NONE, NONE), NONE)),
            filter: table(size.next_power_of_two() / 4, 0),
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
                    let hash = hash_pair((left, right));
                    let (word, bit) = self.filter_bit(hash);
                    self.filter[word] |= bit;
                    let place = self.place((left, right), hash);
                    self.merges[place] = ((left, right), id);
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
        let hash = hash_pair((left, right));
        let (word, bit) = self.filter_bit(hash);
        if self.filter[word] & bit == 0 {
            return NONE;
        }
        self.merges[self.place((left, right), hash)].1
    }

    /// What `id` makes with the one before it and the one after it.
    #[inline]
    fn two_products(&self, left: u32, id: u32, right: u32) -> (u32, u32) {
        let pairs = [(left, id), (id, right)];
        let hashes = pairs.map(hash_pair);
        let may_be = hashes.map(|hash| {
            let (word, bit) = self.filter_bit(hash);
            prefetch(&self.merges[(hash >> 32) as usize & (self.merges.len() - 1)]);
            self.filter[word] & bit != 0
        });
        let product = |at: usize| if may_be[at] { self.merges[self.place(pairs[at], hashes[at])].1 } else { NONE };
        (product(0), product(1))
    }

    /// Where the pair is, or would be.
    fn place(&self, pair: Pair, hash: u64) -> usize {
        let mask = self.merges.len() - 1;
        let mut place = (hash >> 32) as usize & mask;
        while self.merges[place].0 != pair && self.merges[place].1 != NONE {
            place = (place + 1) & mask;
        }
        place
    }

    #[inline]
    fn filter_bit(&self, hash: u64) -> (usize, u64) {
        ((hash >> 6) as usize & (self.filter.len() - 1), 1 << (hash & 63))
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
        products.push(NONE); // nothing follows the last
        if ids.len() <= SHORT_CHUNK {
            self.merge_short(ids, products);
        } else {
            self.merge_long(ids, products);
        }
        ids.retain(|&id| id != NONE);
    }

    /// Merged-away ids become NONE.
    fn merge_short(&self, ids: &mut [u32], products: &mut [u32]) {
        let len = ids.len();
        let (mut next, mut previous) = ([0; SHORT_CHUNK], [0; SHORT_CHUNK]);
        for (at, (next, previous)) in next.iter_mut().zip(&mut previous).take(len).enumerate() {
            (*next, *previous) = (at + 1, at.wrapping_sub(1));
        }
        loop {
            let places = products.iter().zip(0..).map(|(&product, at)| u64::from(product) << 32 | at);
            let lowest = places.min().unwrap_or(u64::MAX);
            let (best, at) = ((lowest >> 32) as u32, lowest as u32 as usize);
            if best == NONE {
                return;
            }
            let right = next[at];
            let (before, after) = (previous[at], next[right]);
            (ids[at], ids[right]) = (best, NONE);
            (products[at], products[right]) = (NONE, NONE);
            next[at] = after;
            // Both at once, so that their loads do not wait for each other. There is no token NONE.
            let id = |at: usize| ids.get(at).copied().unwrap_or(NONE);
            let (with_left, with_right) = self.two_products(id(before), best, id(after));
            products[at] = with_right;
            if after < len {
                previous[after] = at;
            }
            if before < len {
                products[before] = with_left;
            }
        }
    }

    /// The same in near-linear time: places wait in a list for each product, and a whole list is merged at once, left to
    /// right.
    fn merge_long(&self, ids: &mut [u32], products: &mut [u32]) {
        let len = ids.len() as u32;
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

/// The key of no chunk, where a place in a table is free.
const NO_KEY: u128 = u128::MAX;

/// Tokens that are short enough for a key, by the hashes of their keys. A token whose bucket is full of tokens of lower
/// ids is left out.
struct Words {
    buckets: Vec<Bucket>,
    shift: u32,
}

/// One cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Bucket {
    keys: [u128; 3],
    ids: [i32; 4], // the last is not used
}

impl Words {
    fn new(tokens: &[Vec<u8>]) -> Self {
        let bits = tokens.len().max(2).ilog2();
        let empty = Bucket { keys: [NO_KEY; 3], ids: [0; 4] };
        let mut words = Self { buckets: table(1 << bits, empty), shift: 64 - bits };
        for (id, token) in (0..).zip(tokens) {
            let Some(key) = key::of(token, 0, token.len()) else { continue };
            let bucket = &mut words.buckets[(key::hash(key) >> words.shift) as usize];
            if let Some(free) = bucket.keys.iter().position(|&key| key == NO_KEY) {
                (bucket.keys[free], bucket.ids[free]) = (key, id);
            }
        }
        words
    }

    #[inline(always)]
    fn bucket(&self, hash: u64) -> &Bucket {
        // SAFETY: `new` made two to the power of `64 - shift` buckets, and no more bits of the hash are left.
        unsafe { self.buckets.get_unchecked((hash >> self.shift) as usize) }
    }

    /// Whether the key is here, and its id if it is.
    #[inline(always)]
    fn get(&self, key: u128, hash: u64) -> (bool, i32) {
        let bucket = self.bucket(hash);
        let [first, second, third] = bucket.keys.map(|other| other == key);
        (first | second | third, bucket.ids[usize::from(second) | usize::from(third) << 1])
    }
}

/// An empty vector for `len` entries, on huge pages where the system has them: with small ones, much of the time of a
/// look-up goes into finding where the page is, and much of that of writing into getting it.
pub fn huge<T>(len: usize) -> Vec<T> {
    let vector: Vec<T> = Vec::with_capacity(len);
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096; // where the kernel's are larger it refuses, which does no harm
        let start = vector.as_ptr().cast::<u8>().cast_mut();
        let size = len * size_of::<T>();
        let skip = start.align_offset(PAGE).min(size);
        // SAFETY: the range is within the vector's memory, and the advice does not change what is in it.
        unsafe { libc::madvise(start.add(skip).cast(), size - skip, libc::MADV_HUGEPAGE) };
    }
    vector
}

fn table<T: Copy>(len: usize, entry: T) -> Vec<T> {
    let mut table = huge(len);
    table.resize(len, entry);
    table
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

/// What a thread remembers of chunks that are no tokens: 4 MiB of short ones, in pairs, and 1 MiB of others.
struct Cache {
    /// The two chunks that last fell on each place, the latest first.
    short: Vec<[Short; 2]>,
    long: Vec<Long>,
}

const SHORT_BITS: u32 = 16;
const LONG_BITS: u32 = 13;

const CACHED_IDS: usize = 4;
const LONG_IDS: usize = 16;
const LONG_BYTES: usize = 62;

#[derive(Clone, Copy)]
struct Short {
    key: u128,
    ids: [i32; CACHED_IDS], // -1 after the last
}

/// A chunk that has no key or more ids. It is not empty, so `len` is 0 where there is none.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Long {
    len: u8,
    count: u8,
    bytes: [u8; LONG_BYTES],
    ids: [i32; LONG_IDS],
}

impl Cache {
    fn new() -> Self {
        let long = Long { len: 0, count: 0, bytes: [0; LONG_BYTES], ids: [0; LONG_IDS] };
        Self { short: table(1 << SHORT_BITS, [Short::new(NO_KEY, &[]); 2]), long: table(1 << LONG_BITS, long) }
    }

    #[inline]
    fn place(hash: u64) -> usize {
        (hash >> (64 - SHORT_BITS)) as usize
    }

    #[inline]
    fn get(&self, key: u128, hash: u64) -> Option<&Short> {
        self.short[Self::place(hash)].iter().find(|short| short.key == key)
    }
}

impl Short {
    /// `ids` are no more than fit.
    fn new(key: u128, ids: &[i32]) -> Self {
        let mut short = Self { key, ids: [-1; CACHED_IDS] };
        short.ids[..ids.len()].copy_from_slice(ids);
        short
    }
}

/// What one thread remembers and reuses from chunk to chunk.
pub struct Scratch {
    splitter: Splitter,
    run: Run,
    cache: Cache,
    buffers: Buffers,
}

/// Adjacent chunks.
struct Run {
    keys: [u128; BATCH], // 0 for a chunk that is too long
    hashes: [u64; BATCH],
    ids: [i32; BATCH],
    /// The chunks that `Words` does not have.
    others: [usize; BATCH],
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
        let run = Run { keys: [0; BATCH], hashes: [0; BATCH], ids: [0; BATCH], others: [0; BATCH] };
        Scratch { splitter: self.splitter.clone(), run, cache: Cache::new(), buffers: Buffers::default() }
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<i32>) -> Result<(), String> {
        let Scratch { splitter, run, cache, buffers } = scratch;
        if u32::try_from(text.len()).is_err() {
            return Err(format!("a text of {} bytes is too long: cut it below 4 GiB", text.len()));
        }
        splitter.for_each_run(text, &mut |first, ends| {
            self.make_keys(text.as_bytes(), first, ends, run);
            let missing = self.find_words(ends.len(), run);
            let others = &run.others[..missing];
            others.iter().for_each(|&at| prefetch(&cache.short[Cache::place(run.hashes[at])]));
            let mut done = 0;
            for &at in others {
                out.extend_from_slice(&run.ids[done..at]);
                done = at + 1;
                match cache.get(run.keys[at], run.hashes[at]) {
                    Some(short) => out.extend(short.ids.iter().take_while(|&&id| id >= 0)),
                    None => {
                        let start = if at == 0 { first } else { ends[at - 1] };
                        let chunk = &text.as_bytes()[start..ends[at]];
                        self.encode_other(chunk, run.keys[at], run.hashes[at], cache, buffers, out);
                    }
                }
            }
            out.extend_from_slice(&run.ids[done..ends.len()]);
        })
    }

    /// Gives the chunks keys and starts to load where `find_words` will look.
    #[inline(never)] // so that it has the processor's registers for itself; it runs once for many chunks
    fn make_keys(&self, text: &[u8], mut start: usize, ends: &[usize], run: &mut Run) {
        for (&end, (key, hash)) in ends.iter().zip(run.keys.iter_mut().zip(&mut run.hashes)) {
            *key = key::of(text, start, end).unwrap_or(0);
            *hash = key::hash(*key);
            prefetch(self.words.bucket(*hash));
            start = end;
        }
    }

    /// Looks the first `count` chunks up in `Words`. Returns how many are not there. No branch depends on the text.
    #[inline(never)]
    fn find_words(&self, count: usize, run: &mut Run) -> usize {
        let Run { keys, hashes, ids, others } = run;
        let mut missing = 0;
        for at in 0..count.min(BATCH) {
            let found;
            (found, ids[at]) = self.words.get(keys[at], hashes[at]);
            others[missing % BATCH] = at;
            missing += usize::from(!found);
        }
        missing
    }

    /// Appends the ids of a chunk that is neither in `Words` nor among the short ones of the cache.
    #[cold]
    fn encode_other(
        &self,
        chunk: &[u8],
        key: u128,
        hash: u64,
        cache: &mut Cache,
        buffers: &mut Buffers,
        out: &mut Vec<i32>,
    ) {
        let long_hash = self.vocabulary.hasher.hash_one(chunk);
        let long = &mut cache.long[(long_hash >> (64 - LONG_BITS)) as usize];
        if long.bytes.get(..usize::from(long.len)) == Some(chunk) {
            return out.extend(&long.ids[..usize::from(long.count)]);
        }
        // A bucket has no free place if a token had to be left out.
        let may_be_token = key == 0 || !self.words.bucket(hash).keys.contains(&NO_KEY);
        match may_be_token.then(|| self.vocabulary.id(chunk)).flatten() {
            Some(id) => buffers.ids.splice(.., [id]).for_each(drop),
            None => self.vocabulary.merge(chunk, buffers),
        }
        let start = out.len();
        out.extend(buffers.ids.iter().map(|&id| id as i32));
        let ids = &out[start..];
        if key != 0 && ids.len() <= CACHED_IDS {
            let places = &mut cache.short[Cache::place(hash)];
            *places = [Short::new(key, ids), places[0]];
        } else if chunk.len() <= LONG_BYTES && ids.len() <= LONG_IDS {
            (long.len, long.count) = (chunk.len() as u8, ids.len() as u8);
            long.bytes[..chunk.len()].copy_from_slice(chunk);
            long.ids[..ids.len()].copy_from_slice(ids);
        }
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
