//! A learned vocabulary: from text to ids and back.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashMap;

use crate::train::Pair;

/// Ids 0..=255 are bytes, 256.. the merges in the order they were learned.
#[derive(Debug)]
pub struct Vocabulary {
    tokens: Vec<Vec<u8>>,
    merges: HashMap<Pair, u32>,
}

impl Vocabulary {
    pub fn new(merges: &[Pair]) -> Self {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in merges {
            tokens.push([tokens[left as usize].as_slice(), &tokens[right as usize]].concat());
        }
        let ids = merges.iter().zip(256..);
        Self { tokens, merges: ids.map(|(&pair, id)| (pair, id)).collect() }
    }

    /// The bytes of every token, by id.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
    }

    /// Appends the ids of one chunk: of all pairs that have a merge the earliest learned goes first, leftmost first.
    pub fn encode_chunk(&self, chunk: &[u8], out: &mut Vec<u32>) {
        const NONE: usize = usize::MAX;
        let len = chunk.len();
        let mut ids: Vec<u32> = chunk.iter().map(|&byte| u32::from(byte)).collect();
        // Positions form a linked list, so that a merge costs the same in a chunk of any length.
        let mut next: Vec<usize> = (1..=len).collect();
        let mut previous: Vec<usize> = (0..len).map(|at| at.wrapping_sub(1)).collect();
        let mut alive = vec![true; len];
        let merge_at = |ids: &[u32], at: usize, right: usize| self.merges.get(&(ids[at], ids[right])).copied();
        let first = (1..len).filter_map(|right| Some(Reverse((merge_at(&ids, right - 1, right)?, right - 1))));
        let mut heap: BinaryHeap<_> = first.collect();
        while let Some(Reverse((id, at))) = heap.pop() {
            if !alive[at] || next[at] == len || merge_at(&ids, at, next[at]) != Some(id) {
                continue; // a neighbour was merged since
            }
            let right = next[at];
            ids[at] = id;
            alive[right] = false;
            next[at] = next[right];
            if next[at] < len {
                previous[next[at]] = at;
                heap.extend(merge_at(&ids, at, next[at]).map(|id| Reverse((id, at))));
            }
            if previous[at] != NONE {
                heap.extend(merge_at(&ids, previous[at], at).map(|id| Reverse((id, previous[at]))));
            }
        }
        out.extend((0..len).filter(|&at| alive[at]).map(|at| ids[at]));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(vocabulary: &Vocabulary, chunk: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        vocabulary.encode_chunk(chunk.as_bytes(), &mut ids);
        ids
    }

    #[test]
    fn the_earliest_merge_goes_first_and_decoding_inverts() {
        let vocabulary = Vocabulary::new(&[(98, 99), (97, 98), (256, 256)]); // bc, ab, bcbc
        assert_eq!(encode(&vocabulary, "abcbc"), [97, 258]);
        assert_eq!(encode(&vocabulary, "abb"), [257, 98]);
        assert!(encode(&vocabulary, "").is_empty());
        assert_eq!(vocabulary.decode(&[97, 258]).unwrap(), b"abcbc");
        assert_eq!(vocabulary.decode(&[259]), Err(259));
    }
}
