//! Learning merges: the most frequent pair of adjacent tokens becomes a token, again and again.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashMap;

/// Left and right token id.
pub type Pair = (u32, u32);

/// The distinct chunks of the training text as token ids, in one buffer: for each its length, its count in two halves,
/// then its ids. A word is known by where it starts. Words only shrink, so a merge rewrites a word where it lies.
#[derive(Default)]
pub struct Words {
    buffer: Vec<u32>,
    /// Where each word starts. Dropped once the pairs know their words.
    starts: Vec<u32>,
}

const HEADER: usize = 3;

impl Words {
    /// Space for `words` words of `bytes` bytes together, or an error if they are too many to number.
    pub fn with_capacity(words: usize, bytes: usize) -> Result<Self, String> {
        let size = bytes + HEADER * words;
        if u32::try_from(size).is_err() {
            return Err(format!("{words} distinct chunks of {bytes} bytes are too much text: train on less"));
        }
        Ok(Self { buffer: Vec::with_capacity(size), starts: Vec::with_capacity(words) })
    }

    /// Adds a chunk that occurs `count` times. A single byte has no pair and is left out.
    pub fn push(&mut self, chunk: &[u8], count: u64) {
        if chunk.len() > 1 {
            self.starts.push(self.buffer.len() as u32);
            self.buffer.extend([chunk.len() as u32, count as u32, (count >> 32) as u32]);
            self.buffer.extend(chunk.iter().map(|&byte| u32::from(byte)));
        }
    }

    fn count(&self, word: u32) -> i64 {
        let word = word as usize;
        (u64::from(self.buffer[word + 2]) << 32 | u64::from(self.buffer[word + 1])) as i64
    }

    fn ids(&mut self, word: u32) -> &mut [u32] {
        let word = word as usize;
        let len = self.buffer[word] as usize;
        &mut self.buffer[word + HEADER..][..len]
    }
}

#[derive(Default)]
struct PairInfo {
    count: i64,
    /// The words the pair was seen in, each once; a word may have lost it since.
    words: Vec<u32>,
}

impl PairInfo {
    fn add(&mut self, word: u32, count: i64) {
        self.count += count;
        // A pair gains words during one pass only, in which equal words are neighbours.
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

/// Learns up to `num_merges` merges, fewer if no pair is left; merge `i` makes token `256 + i`. Ties go to the smallest
/// pair. `check` runs before every merge, gets how many there are, and can stop the training.
pub fn learn_merges<E>(
    mut words: Words,
    num_merges: usize,
    mut check: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut pairs = initial_pairs(&mut words);
    let mut heap: BinaryHeap<_> = pairs.iter().map(|(&pair, info)| (info.count, Reverse(pair))).collect();
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        check(merges.len())?;
        let Some((count, Reverse(pair))) = heap.pop() else { break };
        let current = pairs[&pair].count;
        if current != count {
            // Counts of known pairs only fall, so an outdated entry sits too high: put it where it belongs.
            if current > 0 {
                heap.push((current, Reverse(pair)));
            } else {
                pairs.remove(&pair);
            }
            continue;
        }
        let merged = pairs.remove(&pair).expect("a pair on the heap is in the table");
        let new_id = 256 + merges.len() as u32;
        merges.push(pair);
        let mut created = HashMap::new();
        for &word in &merged.words {
            merge_in_word(&mut words, word, pair, new_id, &mut pairs, &mut created);
        }
        for (pair, info) in created {
            if info.count > 0 {
                heap.push((info.count, Reverse(pair)));
                pairs.insert(pair, info);
            }
        }
    }
    Ok(merges)
}

/// Every pair of bytes that occurs, with its count and words.
fn initial_pairs(words: &mut Words) -> HashMap<Pair, PairInfo> {
    let starts = std::mem::take(&mut words.starts);
    let mut table: Vec<PairInfo> = Vec::new();
    table.resize_with(1 << 16, PairInfo::default);
    // First only the sizes of the lists: growing them would take twice the memory.
    let mut sizes = vec![(0usize, u32::MAX); 1 << 16]; // and the last word
    for &word in &starts {
        for pair in words.ids(word).windows(2) {
            let size = &mut sizes[(pair[0] << 8 | pair[1]) as usize];
            *size = (size.0 + usize::from(size.1 != word), word);
        }
    }
    for (info, (size, _)) in table.iter_mut().zip(sizes) {
        info.words.reserve_exact(size);
    }
    for &word in &starts {
        let count = words.count(word);
        for pair in words.ids(word).windows(2) {
            table[(pair[0] << 8 | pair[1]) as usize].add(word, count);
        }
    }
    let seen = table.into_iter().enumerate().filter(|(_, info)| info.count > 0);
    seen.map(|(key, info)| (((key >> 8) as u32, (key & 255) as u32), info)).collect()
}

/// Replaces `pair` by `new_id` in one word, left to right without overlap, and moves the counts of the pairs that the
/// replacement breaks (in `pairs`) or makes (in `created`, the pairs that contain `new_id`).
fn merge_in_word(
    words: &mut Words,
    word: u32,
    pair: Pair,
    new_id: u32,
    pairs: &mut HashMap<Pair, PairInfo>,
    created: &mut HashMap<Pair, PairInfo>,
) {
    let count = words.count(word);
    let ids = words.ids(word);
    let mut lose = |lost: Pair, created: &mut HashMap<Pair, PairInfo>| {
        let table = if lost.0 == new_id { created } else { &mut *pairs };
        if let Some(info) = table.get_mut(&lost) {
            info.count -= count; // absent only when `lost` is the merged pair itself, as in "aaa"
        }
    };
    let (mut read, mut write) = (0, 0);
    while read < ids.len() {
        if read + 1 == ids.len() || (ids[read], ids[read + 1]) != pair {
            ids[write] = ids[read];
            (read, write) = (read + 1, write + 1);
            continue;
        }
        if write > 0 {
            let left = ids[write - 1];
            lose((left, pair.0), created);
            created.entry((left, new_id)).or_default().add(word, count);
        }
        if read + 2 < ids.len() {
            let right = ids[read + 2];
            lose((pair.1, right), created);
            created.entry((new_id, right)).or_default().add(word, count);
        }
        ids[write] = new_id;
        (read, write) = (read + 2, write + 1);
    }
    words.buffer[word as usize] = write as u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learn(chunks: &[(&str, u64)], num_merges: usize) -> Vec<Pair> {
        let mut words = Words::default();
        chunks.iter().for_each(|(chunk, count)| words.push(chunk.as_bytes(), *count));
        learn_merges(words, num_merges, |_| Ok::<(), ()>(())).unwrap()
    }

    #[test]
    fn ties_go_to_the_smallest_pair_and_training_stops_without_pairs() {
        assert_eq!(learn(&[("ba", 3), ("ab", 3), ("x", 9)], 10), [(97, 98), (98, 97)]);
    }

    #[test]
    fn runs_of_one_letter_merge_without_overlap() {
        // aaaaa: (a a) x4 -> N N a: (N N) x1 and (N a) x1, the tie to the smaller (N, a)? 97 < 256, so (N a).
        assert_eq!(learn(&[("aaaaa", 1)], 10), [(97, 97), (256, 97), (256, 257)]);
    }

    #[test]
    fn counts_stay_exact_against_recounting_from_scratch() {
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        for _ in 0..50 {
            let chunks: Vec<(String, u64)> = (0..20)
                .map(|_| {
                    ((0..1 + random() % 12).map(|_| ["a", "b", "c"][random() % 3]).collect(), 1 + random() as u64 % 4)
                })
                .collect();
            let borrowed: Vec<(&str, u64)> = chunks.iter().map(|(chunk, count)| (chunk.as_str(), *count)).collect();
            assert_eq!(learn(&borrowed, 30), learn_slowly(&borrowed, 30));
        }
    }

    /// The definition: count all pairs anew before every merge.
    fn learn_slowly(chunks: &[(&str, u64)], num_merges: usize) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, u64)> =
            chunks.iter().map(|(chunk, count)| (chunk.bytes().map(u32::from).collect(), *count)).collect();
        let mut merges = Vec::new();
        while merges.len() < num_merges {
            let mut counts: HashMap<Pair, u64> = HashMap::new();
            for (ids, count) in &words {
                ids.windows(2).for_each(|pair| *counts.entry((pair[0], pair[1])).or_default() += count);
            }
            let Some((&best, _)) = counts.iter().max_by_key(|(&pair, &count)| (count, Reverse(pair))) else { break };
            for (ids, _) in &mut words {
                let mut index = 0;
                while index + 1 < ids.len() {
                    if (ids[index], ids[index + 1]) == best {
                        ids.splice(index..index + 2, [256 + merges.len() as u32]);
                    }
                    index += 1;
                }
            }
            merges.push(best);
        }
        merges
    }
}
