//! From text to ids. Chunks are looked up in a cache, in batches; those that are not in it are merged.

use std::hash::BuildHasher;

use hashbrown::DefaultHashBuilder;

use crate::gpt4::BATCH;
use crate::key;
use crate::merge::{Merging, Vocabulary};
use crate::processor::{prefetch, table, widest};
use crate::split::Splitter;

const LINE_BITS: u32 = 18;
const LONG_BITS: u32 = 14;

/// The most ids of a chunk in a line.
const LINE_IDS: usize = 4;

/// The most bytes and ids of a long chunk. The ids are no fewer than the bytes of a chunk that has a key.
const LONG_BYTES: usize = 62;
const LONG_IDS: usize = 16;

/// What a thread remembers of chunks: 16 MiB of short ones and 2 MiB of others, however much text it encodes.
struct Cache {
    short: Box<[Line; 1 << LINE_BITS]>,
    long: Box<[Long; 1 << LONG_BITS]>,
    hasher: DefaultHashBuilder,
}

/// Two chunks that fall on the same place, the one used last first, in one line of the processor's cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    /// The keys of the chunks, with the number of their ids in the three highest bits. The next bit is set if the ids are
    /// too many and may be found among the long chunks.
    keys: [u128; 2],
    ids: [[i32; LINE_IDS]; 2],
}

const COUNT_BIT: u32 = 125;
const TOO_MANY: u128 = 1 << 124;

/// A chunk that has no key or more ids. It is not empty, so `len` is 0 where there is none.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Long {
    len: u8,
    count: u8,
    bytes: [u8; LONG_BYTES],
    ids: [i32; LONG_IDS],
}

impl Line {
    /// The place of the chunk in this line, if it is here.
    fn find(&self, key: u128) -> Option<usize> {
        self.keys.iter().position(|&known| (known ^ key) << 4 == 0)
    }

    /// Makes the chunk the first.
    fn insert(&mut self, key: u128, ids: &[i32]) {
        if self.find(key) != Some(0) {
            self.swap();
        }
        if ids.len() <= LINE_IDS {
            self.keys[0] = key | (ids.len() as u128) << COUNT_BIT;
            self.ids[0][..ids.len()].copy_from_slice(ids);
        } else {
            self.keys[0] = key | TOO_MANY;
        }
    }

    fn swap(&mut self) {
        self.keys.swap(0, 1);
        self.ids.swap(0, 1);
    }
}

/// Chunks that are merged at the same time, so that they wait for memory together.
const LANES: usize = 8;

/// A batch of adjacent chunks.
struct Batch {
    chunks: [Chunk; BATCH],
    /// The ids of the chunks that were found, one after the other.
    ids: [i32; LINE_IDS * BATCH],
    /// The chunks that were not the first in their line: which one, and in the upper half where its ids belong among
    /// those that were found.
    missed: [u32; BATCH],
    results: [Missed; BATCH],
    /// What is merged at the moment, and the places of the results.
    lanes: [(usize, Merging); LANES],
}

/// The key of a chunk and its place among the lines of the cache.
#[derive(Clone, Copy)]
struct Chunk {
    key: u128,
    place: u32,
}

/// The ids of a chunk that was missed, or none if they are not known yet.
#[derive(Clone, Copy)]
struct Missed {
    count: usize,
    ids: [i32; LONG_IDS],
}

/// What one thread remembers and reuses from chunk to chunk.
pub struct Scratch {
    splitter: Splitter,
    cache: Cache,
    batch: Batch,
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
        let long = Long { len: 0, count: 0, bytes: [0; LONG_BYTES], ids: [0; LONG_IDS] };
        let batch = Batch {
            chunks: [Chunk { key: key::NONE, place: 0 }; BATCH],
            ids: [0; LINE_IDS * BATCH],
            missed: [0; BATCH],
            results: [Missed { count: 0, ids: [0; LONG_IDS] }; BATCH],
            lanes: [(0, Merging::new(&self.vocabulary, &[])); LANES],
        };
        let mut cache = Cache { short: table(line), long: table(long), hasher: DefaultHashBuilder::default() };
        // Tokens are words that are not new. The most frequent ones come last, and so first in their lines.
        for (id, token) in self.vocabulary.tokens().iter().enumerate().rev() {
            if let Some(key @ 1..) = key::of(token, 0, token.len()) {
                cache.short[(key::hash(key) >> (64 - LINE_BITS)) as usize].insert(key, &[id as i32]);
            }
        }
        Scratch { splitter: self.splitter.clone(), cache, batch }
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<i32>) -> Result<(), String> {
        let Scratch { splitter, cache, batch } = scratch;
        if u32::try_from(text.len()).is_err() {
            return Err(format!("a text of {} bytes is too long: cut it below 4 GiB", text.len()));
        }
        splitter
            .for_each_run(text, &mut |first, ends| self.encode_batch(text.as_bytes(), first, ends, cache, batch, out))
    }

    /// Appends the ids of adjacent chunks: those of chunks that were found, and between them those of the others.
    fn encode_batch(
        &self,
        text: &[u8],
        first: usize,
        ends: &[u32],
        cache: &mut Cache,
        batch: &mut Batch,
        out: &mut Vec<i32>,
    ) {
        widest(|| batch.make_keys(text, first, ends, cache));
        let (num_missed, num_ids) = widest(|| batch.look_up(ends.len(), cache));
        let bytes = |index: usize| {
            let start = if index == 0 { first } else { ends[index - 1] as usize };
            &text[start..ends[index] as usize]
        };
        widest(|| self.merge_missed(bytes, num_missed, cache, batch));
        let mut start = 0;
        for (&missed, &Missed { count, ids }) in batch.missed[..num_missed].iter().zip(&batch.results) {
            let (index, at) = (missed as usize % BATCH, missed as usize >> 16);
            out.extend_from_slice(&batch.ids[std::mem::replace(&mut start, at)..at]);
            match count {
                0 => self.encode_other(bytes(index), batch.chunks[index].key, cache, out),
                _ => out.extend_from_slice(&ids[..count]),
            }
        }
        out.extend_from_slice(&batch.ids[start..num_ids]);
    }

    /// Finds the ids of chunks that were missed, except of those that may be among the long ones.
    #[inline(always)]
    fn merge_missed<'t>(
        &self,
        bytes: impl Fn(usize) -> &'t [u8],
        num_missed: usize,
        cache: &mut Cache,
        batch: &mut Batch,
    ) {
        let mut used = 0;
        for at in 0..num_missed {
            let index = batch.missed[at] as usize % BATCH;
            let Chunk { key, place } = batch.chunks[index];
            let (line, result) = (&mut cache.short[place as usize], &mut batch.results[at]);
            result.count = 0;
            match line.find(key) {
                Some(place) if line.keys[place] & TOO_MANY == 0 => {
                    if place == 1 {
                        line.swap();
                    }
                    result.ids[..LINE_IDS].copy_from_slice(&line.ids[0]);
                    result.count = (line.keys[0] >> COUNT_BIT) as usize;
                }
                None if key != key::NONE && self.vocabulary.is_merged(bytes(index)) => {
                    batch.lanes[used] = (at, Merging::new(&self.vocabulary, bytes(index)));
                    used += 1;
                }
                _ => {}
            }
            if used == LANES || at + 1 == num_missed {
                self.merge_lanes(&bytes, std::mem::take(&mut used), cache, batch);
            }
        }
    }

    /// Merges the chunks in the first lanes and remembers their ids.
    #[inline(always)]
    fn merge_lanes<'t>(&self, bytes: impl Fn(usize) -> &'t [u8], used: usize, cache: &mut Cache, batch: &mut Batch) {
        let mut merged = used > 0;
        while std::mem::take(&mut merged) {
            for (_, lane) in &mut batch.lanes[..used] {
                merged |= lane.step(&self.vocabulary);
            }
        }
        for (at, lane) in &batch.lanes[..used] {
            let (index, result) = (batch.missed[*at] as usize % BATCH, &mut batch.results[*at]);
            for (id, place) in lane.ids().zip(&mut result.ids) {
                *place = id;
                result.count += 1;
            }
            let (ids, Chunk { key, place }) = (&result.ids[..result.count], batch.chunks[index]);
            cache.short[place as usize].insert(key, ids);
            if ids.len() > LINE_IDS {
                cache.long(bytes(index), key).insert(bytes(index), ids);
            }
        }
    }

    /// Appends the ids of a chunk that no line has.
    #[cold]
    fn encode_other(&self, chunk: &[u8], key: u128, cache: &mut Cache, out: &mut Vec<i32>) {
        let long = cache.long(chunk, key);
        if long.bytes.get(..usize::from(long.len)) == Some(chunk) {
            return out.extend_from_slice(&long.ids[..usize::from(long.count)]);
        }
        let first = out.len();
        self.vocabulary.encode(chunk, out);
        long.insert(chunk, &out[first..]);
    }
}

impl Cache {
    /// The place of a chunk among the long ones.
    fn long(&mut self, chunk: &[u8], key: u128) -> &mut Long {
        let hash = if key == key::NONE { self.hasher.hash_one(chunk) } else { key::hash(key) };
        &mut self.long[(hash >> (64 - LONG_BITS)) as usize]
    }
}

impl Long {
    fn insert(&mut self, chunk: &[u8], ids: &[i32]) {
        if chunk.len() <= self.bytes.len() && ids.len() <= LONG_IDS {
            (self.len, self.count) = (chunk.len() as u8, ids.len() as u8);
            self.bytes[..chunk.len()].copy_from_slice(chunk);
            self.ids[..ids.len()].copy_from_slice(ids);
        }
    }
}

impl Batch {
    /// Gives the chunks keys and places in the cache, and starts to load these.
    #[inline(always)]
    fn make_keys(&mut self, text: &[u8], first: usize, ends: &[u32], cache: &Cache) {
        let (lines, mut start) = (&*cache.short, first as u32);
        for (&end, chunk) in ends.iter().zip(&mut self.chunks) {
            chunk.key = key::of(text, start as usize, end as usize).unwrap_or(key::NONE);
            chunk.place = (key::hash(chunk.key) >> (64 - LINE_BITS)) as u32;
            prefetch(&lines[chunk.place as usize % (1 << LINE_BITS)]);
            start = end;
        }
    }

    /// Finds the ids of chunks that are first in their line. Returns the number of other chunks, and that of ids.
    #[inline(always)]
    fn look_up(&mut self, len: usize, cache: &Cache) -> (usize, usize) {
        let (mut num_missed, mut at) = (0, 0);
        for (index, &Chunk { key, place }) in (0..).zip(&self.chunks[..len]) {
            let line = &cache.short[place as usize % (1 << LINE_BITS)];
            // What is left of a key that is the same is the number of ids.
            let difference = line.keys[0] ^ key;
            if difference << (128 - COUNT_BIT) == 0 {
                self.ids[at..at + LINE_IDS].copy_from_slice(&line.ids[0]);
                at += (difference >> COUNT_BIT) as usize;
            } else {
                self.missed[num_missed % BATCH] = index | (at as u32) << 16;
                num_missed += 1;
            }
        }
        (num_missed, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tests::{any_vocabulary, merge_by_spelling, random};
    use crate::split::DEFAULT_PATTERN;

    #[test]
    fn ids_equal_the_definition_whatever_the_cache_knows() {
        let mut random = random(5);
        for _ in 0..40 {
            let encoder = Encoder::new(any_vocabulary(&mut random), Splitter::new(DEFAULT_PATTERN).unwrap());
            let mut scratch = encoder.scratch();
            for _ in 0..3 {
                let mut text = String::new();
                for _ in 0..700 {
                    let length = [1, 2, 3, 4, 8, 14, 15, 16, 40, 70][random(10)];
                    (0..random(length) + 1).for_each(|_| text.push(['a', 'a', 'b', 'c', 'ß'][random(5)]));
                    text.push_str(["  ", " ", ".", "12 "][random(4)]);
                }
                let (mut ids, mut expected) = (Vec::new(), Vec::new());
                encoder.encode(&text, &mut scratch, &mut ids).unwrap();
                let chunk = |chunk| expected.extend(merge_by_spelling(&encoder.vocabulary, &text.as_bytes()[chunk]));
                encoder.splitter.for_each(&text, chunk).unwrap();
                assert_eq!(ids, expected);
            }
        }
    }
}
