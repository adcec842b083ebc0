//! How often each distinct chunk occurs, counted by several threads.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::key;
use crate::split::Splitter;
use crate::texts::Texts;

/// The counts lie in this many tables, by hash, so that threads seldom wait for each other.
const PARTS: usize = 64;

/// A thread hands its counts over when they take about this many bytes: the memory for all threads is that of the
/// distinct chunks, plus this for each.
const LOCAL_BYTES: usize = 16 << 20;

/// A thread counts the short chunks it met last in this many places, which fit into the processor's cache.
const RECENT_BITS: u32 = 13;

#[derive(Clone, Copy)]
struct Entry {
    start: u64,
    count: u64,
    len: u32,
    hash: u32,
}

impl Entry {
    /// Spreads the bits: the table uses the top and the bottom ones.
    fn table_hash(hash: u32) -> u64 {
        u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// A multiset of byte strings. The strings lie one after the other in one buffer: most are a few bytes long, and an
/// allocation for each would cost more than the text itself.
#[derive(Default)]
pub struct ChunkCounts {
    bytes: Vec<u8>,
    table: HashTable<Entry>,
}

impl ChunkCounts {
    fn add(&mut self, chunk: &[u8], hash: u32, count: u64) {
        let Self { bytes, table } = self;
        let table_hash = Entry::table_hash(hash);
        let text = |entry: &Entry| entry.start as usize..entry.start as usize + entry.len as usize;
        if let Some(entry) = table.find_mut(table_hash, |entry| entry.hash == hash && &bytes[text(entry)] == chunk) {
            entry.count += count;
            return;
        }
        let entry = Entry { start: bytes.len() as u64, count, len: chunk.len() as u32, hash };
        bytes.extend_from_slice(chunk);
        table.insert_unique(table_hash, entry, |entry| Entry::table_hash(entry.hash));
    }

    fn entries(&self) -> impl Iterator<Item = (&[u8], &Entry)> {
        self.table.iter().map(|entry| (&self.bytes[entry.start as usize..][..entry.len as usize], entry))
    }

    /// Every distinct chunk with its count, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.entries().map(|(chunk, entry)| (chunk, entry.count))
    }

    /// Moves all counts to `shared`.
    fn drain_into(&mut self, shared: &mut ChunkCounts) {
        self.entries().for_each(|(chunk, entry)| shared.add(chunk, entry.hash, entry.count));
        self.bytes.clear();
        self.table.clear();
    }

    /// The number of distinct chunks and of their bytes.
    pub fn len(&self) -> (usize, usize) {
        (self.table.len(), self.bytes.len())
    }

    fn size(&self) -> usize {
        self.bytes.len() + self.table.len() * size_of::<Entry>()
    }
}

/// Counts the chunks of the texts that `produce` sends, by `threads` threads. The result is a partition by hash: no
/// chunk is in two of its parts. `produce` gets the channel and a flag that says a thread has failed and more is
/// pointless.
pub fn count_chunks<E: From<String>>(
    splitter: &Splitter,
    threads: usize,
    produce: impl FnOnce(SyncSender<Texts>, &AtomicBool) -> Result<(), E>,
) -> Result<Vec<ChunkCounts>, E> {
    let shared: Vec<_> = (0..PARTS).map(|_| Mutex::new(ChunkCounts::default())).collect();
    let (sender, receiver) = std::sync::mpsc::sync_channel(2 * threads);
    // Owned by the workers alone: when the last one is gone, however it went, sending fails instead of blocking.
    let receiver = Arc::new(Mutex::new(receiver));
    let failed = AtomicBool::new(false);
    let hasher = DefaultHashBuilder::default();
    thread::scope(|scope| -> Result<(), E> {
        let workers: Vec<_> = (0..threads)
            .map(|index| {
                let worker = Worker::new(index, splitter.clone(), hasher.clone(), &shared);
                let (receiver, failed) = (Arc::clone(&receiver), &failed);
                scope.spawn(move || {
                    let result = worker.run(&receiver);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    result
                })
            })
            .collect();
        drop(receiver);
        let produced = produce(sender, &failed);
        let counted = workers.into_iter().map(|worker| worker.join().unwrap()).fold(Ok(()), Result::and);
        produced?;
        Ok(counted?)
    })?;
    Ok(shared.into_iter().map(|part| part.into_inner().unwrap()).collect())
}

struct Worker<'a> {
    index: usize,
    splitter: Splitter,
    local: Local,
    shared: &'a [Mutex<ChunkCounts>],
}

/// The counts of one thread.
struct Local {
    hasher: DefaultHashBuilder,
    /// Keys of short chunks and how often they came; a newcomer drives out the one before it.
    recent: Vec<(u128, u64)>,
    parts: Vec<ChunkCounts>,
}

impl<'a> Worker<'a> {
    fn new(index: usize, splitter: Splitter, hasher: DefaultHashBuilder, shared: &'a [Mutex<ChunkCounts>]) -> Self {
        let parts = shared.iter().map(|_| ChunkCounts::default()).collect();
        Self { index, splitter, local: Local { hasher, recent: vec![(0, 0); 1 << RECENT_BITS], parts }, shared }
    }

    fn run(mut self, receiver: &Mutex<Receiver<Texts>>) -> Result<(), String> {
        loop {
            let received = receiver.lock().unwrap().recv();
            let Ok(texts) = received else { break };
            let Self { splitter, local, .. } = &mut self;
            for text in texts.iter() {
                splitter.for_each(text, |chunk| match key::of(text.as_bytes(), chunk.start, chunk.end) {
                    Some(key) => local.add_short(key),
                    None => local.add(&text.as_bytes()[chunk], 1),
                })?;
            }
            if self.local.parts.iter().map(ChunkCounts::size).sum::<usize>() > LOCAL_BYTES {
                self.hand_over();
            }
        }
        self.local.forget_recent();
        self.hand_over();
        Ok(())
    }

    fn hand_over(&mut self) {
        for part in 0..PARTS {
            let part = (self.index + part) % PARTS; // each thread starts elsewhere
            self.local.parts[part].drain_into(&mut self.shared[part].lock().unwrap());
        }
    }
}

impl Local {
    #[inline]
    fn add_short(&mut self, key: u128) {
        let place = &mut self.recent[(key::hash(key) >> (64 - RECENT_BITS)) as usize];
        if place.0 == key {
            place.1 += 1;
            return;
        }
        let (old, count) = std::mem::replace(place, (key, 1));
        self.add_key(old, count);
    }

    fn add_key(&mut self, key: u128, count: u64) {
        if count > 0 {
            let (bytes, len) = key::bytes(key);
            self.add(&bytes[..len], count);
        }
    }

    fn add(&mut self, chunk: &[u8], count: u64) {
        let hash = self.hasher.hash_one(chunk);
        self.parts[(hash >> 32) as usize % PARTS].add(chunk, hash as u32, count);
    }

    fn forget_recent(&mut self) {
        for (key, count) in std::mem::take(&mut self.recent) {
            self.add_key(key, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn counts_are_exact_over_threads_and_hand_overs() {
        let splitter = Splitter::new(r"\S+").unwrap();
        let words: Vec<String> = (0..400_000u64).map(|index| format!("{:x}", index * index * 7919 % 300_007)).collect();
        let mut expected = HashMap::new();
        for word in words.iter().chain(&words) {
            *expected.entry(word.repeat(5).into_bytes()).or_insert(0) += 1;
            *expected.entry(word.clone().into_bytes()).or_insert(0) += 1;
        }
        for threads in [1, 3] {
            let counts = count_chunks(&splitter, threads, |sender, _| {
                for texts in words.chunks(5000).chain(words.chunks(5000)) {
                    let mut batch = Texts::default();
                    texts.iter().for_each(|word| batch.push(&format!("{word} {}", word.repeat(5))));
                    sender.send(batch).unwrap();
                }
                Ok::<(), String>(())
            });
            let counts = counts.unwrap();
            let counted: Vec<(&[u8], u64)> = counts.iter().flat_map(ChunkCounts::iter).collect();
            assert_eq!(counted.len(), expected.len());
            assert!(counted.iter().all(|&(chunk, count)| expected[chunk] == count));
        }
    }
}
