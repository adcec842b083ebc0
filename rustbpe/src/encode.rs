//! A vocabulary, and from text to ids and back.
//!
//! Encoding is what tiktoken defines: a chunk that is a token gets that token's id; in any other, of all neighbours
//! that together are a token the pair of the lowest id merges, the leftmost first, until none is left.

use std::collections::BTreeMap;
use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashMap, HashSet, HashTable};

use crate::key;
use crate::split::Splitter;
use crate::train::Pair;

/// No token.
const NONE: u32 = u32::MAX;

/// The tokens of a vocabulary and which pairs of them make another.
pub struct Vocabulary {
    tokens: Vec<Vec<u8>>,
    ids: HashTable<u32>,
    hasher: DefaultHashBuilder,
    merges: HashMap<Pair, u32>,
    byte_ids: [u32; 256],
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
        let ids = HashTable::with_capacity(tokens.len());
        let mut vocabulary =
            Self { tokens, ids, hasher: Default::default(), merges: HashMap::new(), byte_ids: [NONE; 256] };
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            if let Some(twin) = vocabulary.id(token) {
                return Err(format!("tokens {twin} and {id} are the same: {:?}", String::from_utf8_lossy(token)));
            }
            let rehash = |&id: &u32| vocabulary.hasher.hash_one(vocabulary.tokens[id as usize].as_slice());
            vocabulary.ids.insert_unique(vocabulary.hasher.hash_one(token.as_slice()), id as u32, rehash);
        }
        for byte in 0..=255 {
            let id = vocabulary.id(&[byte]).ok_or_else(|| format!("byte {byte} is not in the vocabulary"))?;
            vocabulary.byte_ids[usize::from(byte)] = id;
        }
        // Only parts as long as some token need a look, which matters where tokens are very long.
        let lengths: HashSet<usize> = vocabulary.tokens.iter().map(Vec::len).collect();
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            for cut in (1..token.len()).filter(|&cut| lengths.contains(&cut) && lengths.contains(&(token.len() - cut)))
            {
                if let (Some(left), Some(right)) = (vocabulary.id(&token[..cut]), vocabulary.id(&token[cut..])) {
                    vocabulary.merges.insert((left, right), id as u32);
                }
            }
        }
        Ok(vocabulary)
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
    fn merge(&self, left: u32, right: u32) -> u32 {
        self.merges.get(&(left, right)).copied().unwrap_or(NONE)
    }

    /// The bytes of `ids` joined, or the first id that is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, u32> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.tokens.get(id as usize).ok_or(id)?);
        }
        Ok(bytes)
    }
}

/// How many chunks a thread remembers, as a power of two, and of how many ids at most.
const CACHE_BITS: u32 = 15;
const CACHED_IDS: usize = 4;

/// Chunks up to this long are merged by searching the best pair over and over, which is fast because it needs no more
/// than two small arrays; longer ones by `merge_long`, whose time does not grow with the square of the length.
const SHORT_CHUNK: usize = 128;

#[derive(Clone, Copy)]
struct Cached {
    key: u128,
    ids: [i32; CACHED_IDS], // -1 after the last
}

/// What one thread remembers and reuses from chunk to chunk.
pub struct Scratch {
    splitter: Splitter,
    /// The chunk that last fell on each place, with its ids. Most text consists of few words.
    cache: Box<[Cached]>,
    ids: Vec<u32>,
    ranks: Vec<u32>,
}

/// Splits and encodes text.
pub struct Encoder {
    pub vocabulary: Vocabulary,
    pub splitter: Splitter,
}

impl Encoder {
    pub fn scratch(&self) -> Scratch {
        let empty = Cached { key: 0, ids: [-1; CACHED_IDS] };
        Scratch {
            splitter: self.splitter.clone(),
            cache: vec![empty; 1 << CACHE_BITS].into_boxed_slice(),
            ids: Vec::new(),
            ranks: Vec::new(),
        }
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<i32>) -> Result<(), String> {
        let Scratch { splitter, cache, ids, ranks } = scratch;
        let bytes = text.as_bytes();
        splitter.for_each(text, |chunk| {
            let Some(key) = key::of(bytes, &chunk) else { return self.encode_chunk(&bytes[chunk], ids, ranks, out) };
            let cached = &mut cache[key::index(key, CACHE_BITS)];
            if cached.key != key {
                let start = out.len();
                self.encode_chunk(&bytes[chunk], ids, ranks, out);
                let fresh = &out[start..];
                if fresh.len() <= CACHED_IDS {
                    *cached = Cached { key, ids: [-1; CACHED_IDS] };
                    cached.ids[..fresh.len()].copy_from_slice(fresh);
                }
                return;
            }
            out.push(cached.ids[0]);
            out.extend(cached.ids[1..].iter().take_while(|&&id| id >= 0));
        })
    }

    fn encode_chunk(&self, chunk: &[u8], ids: &mut Vec<u32>, ranks: &mut Vec<u32>, out: &mut Vec<i32>) {
        if let Some(id) = self.vocabulary.id(chunk) {
            return out.push(id as i32);
        }
        ids.clear();
        ids.extend(chunk.iter().map(|&byte| self.vocabulary.byte_ids[usize::from(byte)]));
        ranks.clear();
        ranks.extend(ids.windows(2).map(|pair| self.vocabulary.merge(pair[0], pair[1])));
        if ids.len() <= SHORT_CHUNK {
            self.vocabulary.merge_short(ids, ranks);
            out.extend(ids.iter().map(|&id| id as i32));
        } else {
            self.vocabulary.merge_long(ids, ranks);
            out.extend(ids.iter().filter(|&&id| id != NONE).map(|&id| id as i32));
        }
    }
}

impl Vocabulary {
    /// Merges in place; `ranks[i]` is the id that `ids[i]` and `ids[i + 1]` make.
    fn merge_short(&self, ids: &mut Vec<u32>, ranks: &mut Vec<u32>) {
        loop {
            let Some((at, &rank)) = ranks.iter().enumerate().min_by_key(|&(_, &rank)| rank) else { return };
            if rank == NONE {
                return;
            }
            ids[at] = rank;
            ids.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = self.merge(ids[at - 1], rank);
            }
            if at < ranks.len() {
                ranks[at] = self.merge(rank, ids[at + 1]);
            }
        }
    }

    /// The same in near-linear time: places wait in a list for each rank, and a whole list is merged at once, left to
    /// right. What a merge makes new has another rank than its own. Ids that are merged away become NONE.
    fn merge_long(&self, ids: &mut [u32], ranks: &mut Vec<u32>) {
        let len = ids.len();
        ranks.push(NONE); // nothing follows the last
        let mut next: Vec<usize> = (1..=len).collect();
        let mut previous: Vec<usize> = (0..len).map(|at| at.wrapping_sub(1)).collect();
        let mut waiting = BTreeMap::<u32, Vec<usize>>::new();
        for (at, &rank) in ranks.iter().enumerate().filter(|(_, &rank)| rank != NONE) {
            waiting.entry(rank).or_default().push(at);
        }
        while let Some((rank, mut places)) = waiting.pop_first() {
            places.sort_unstable();
            for at in places {
                if ranks[at] != rank {
                    continue; // a neighbour was merged since
                }
                let right = next[at];
                let after = next[right];
                (ids[at], ids[right]) = (rank, NONE);
                ranks[right] = NONE;
                next[at] = after;
                ranks[at] = NONE;
                if after < len {
                    previous[after] = at;
                    ranks[at] = self.merge(rank, ids[after]);
                    if ranks[at] != NONE {
                        waiting.entry(ranks[at]).or_default().push(at);
                    }
                }
                if at > 0 {
                    let before = previous[at];
                    ranks[before] = self.merge(ids[before], rank);
                    if ranks[before] != NONE {
                        waiting.entry(ranks[before]).or_default().push(before);
                    }
                }
            }
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
        Encoder { vocabulary: Vocabulary::from_merges(merges), splitter: Splitter::new(pattern).unwrap() }
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

    #[test]
    fn merging_is_the_same_for_short_and_long_chunks() {
        let vocabulary = Vocabulary::from_merges(&[(97, 97), (97, 98), (256, 97), (98, 257), (256, 256), (259, 257)]);
        let mut state = 3u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        for length in (0..200).chain([1000]) {
            let bytes: Vec<u32> = (0..length).map(|_| [97, 97, 98][random() % 3]).collect();
            let mut ranks: Vec<u32> = bytes.windows(2).map(|pair| vocabulary.merge(pair[0], pair[1])).collect();
            let (mut short, mut long) = (bytes.clone(), bytes);
            vocabulary.merge_short(&mut short, &mut ranks.clone());
            vocabulary.merge_long(&mut long, &mut ranks);
            long.retain(|&id| id != NONE);
            assert_eq!(short, long);
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
