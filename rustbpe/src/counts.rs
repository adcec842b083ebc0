//! How often each distinct chunk occurs, counted by several threads.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::split::Splitter;

/// Several documents in one allocation; `ends[i]` is where document `i` ends in `text`.
#[derive(Default)]
pub struct Batch {
    pub text: String,
    pub ends: Vec<usize>,
}

impl Batch {
    pub fn push(&mut self, document: &str) {
        self.text.push_str(document);
        self.ends.push(self.text.len());
    }

    fn documents(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

struct Entry {
    start: usize,
    len: usize,
    hash: u64,
    count: u64,
}

/// A multiset of byte strings. The strings lie one after the other in one buffer: most are a few bytes long, and an
/// allocation for each would cost more than the text itself.
#[derive(Default)]
pub struct ChunkCounts {
    bytes: Vec<u8>,
    table: HashTable<Entry>,
}

impl ChunkCounts {
    fn add(&mut self, chunk: &[u8], hash: u64, count: u64) {
        let Self { bytes, table } = self;
        let equal = |entry: &Entry| entry.hash == hash && &bytes[entry.start..entry.start + entry.len] == chunk;
        if let Some(entry) = table.find_mut(hash, equal) {
            entry.count += count;
            return;
        }
        let entry = Entry { start: bytes.len(), len: chunk.len(), hash, count };
        bytes.extend_from_slice(chunk);
        table.insert_unique(hash, entry, |entry| entry.hash);
    }

    fn absorb(&mut self, other: &ChunkCounts) {
        for entry in &other.table {
            self.add(&other.bytes[entry.start..entry.start + entry.len], entry.hash, entry.count);
        }
    }

    /// Every distinct chunk with its count, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.table.iter().map(|entry| (&self.bytes[entry.start..entry.start + entry.len], entry.count))
    }
}

/// Counts the chunks of the batches that `produce` sends, on all cores. The result is a partition by hash: no chunk is
/// in two of its parts. `produce` gets the channel and a flag that says a worker has failed and more is pointless.
pub fn count_chunks<E: From<String>>(
    splitter: &Splitter,
    produce: impl FnOnce(SyncSender<Batch>, &AtomicBool) -> Result<(), E>,
) -> Result<Vec<ChunkCounts>, E> {
    let threads = thread::available_parallelism().map_or(1, |count| count.get());
    let (sender, receiver) = std::sync::mpsc::sync_channel(2 * threads);
    // Owned by the workers alone: when the last one is gone, however it went, sending fails instead of blocking.
    let receiver = Arc::new(Mutex::new(receiver));
    let failed = AtomicBool::new(false);
    let hasher = DefaultHashBuilder::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (receiver, splitter, hasher) = (Arc::clone(&receiver), splitter.clone(), hasher.clone());
                let failed = &failed;
                scope.spawn(move || {
                    let counts = count_received(&receiver, &splitter, hasher, threads);
                    failed.fetch_or(counts.is_err(), Ordering::Relaxed);
                    counts
                })
            })
            .collect();
        drop(receiver);
        let produced = produce(sender, &failed);
        let counted: Result<Vec<_>, _> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        produced?;
        Ok(merge_partitions(counted?))
    })
}

fn count_received(
    receiver: &Mutex<Receiver<Batch>>,
    splitter: &Splitter,
    hasher: DefaultHashBuilder,
    parts: usize,
) -> Result<Vec<ChunkCounts>, String> {
    let mut counts: Vec<_> = (0..parts).map(|_| ChunkCounts::default()).collect();
    loop {
        let received = receiver.lock().unwrap().recv();
        let Ok(batch) = received else { return Ok(counts) };
        for document in batch.documents() {
            splitter.for_each(document, |chunk| {
                let chunk = &document.as_bytes()[chunk];
                let hash = hasher.hash_one(chunk);
                // The table uses the top and the bottom bits, so the part comes from the middle.
                counts[(hash >> 24) as usize % parts].add(chunk, hash, 1);
            })?;
        }
    }
}

/// `counted[worker][part]` -> one table for each part.
fn merge_partitions(counted: Vec<Vec<ChunkCounts>>) -> Vec<ChunkCounts> {
    let mut by_part: Vec<Vec<ChunkCounts>> = Vec::new();
    by_part.resize_with(counted.len(), Vec::new);
    for worker in counted {
        for (part, counts) in by_part.iter_mut().zip(worker) {
            part.push(counts);
        }
    }
    let merge = |tables: Vec<ChunkCounts>| {
        let mut tables = tables.into_iter();
        let mut merged = tables.next().unwrap_or_default();
        tables.for_each(|table| merged.absorb(&table));
        merged
    };
    thread::scope(|scope| {
        let threads: Vec<_> = by_part.into_iter().map(|tables| scope.spawn(move || merge(tables))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
