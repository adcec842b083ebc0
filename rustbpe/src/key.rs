//! Short chunks as numbers, which are compared and hashed in a few instructions.

use std::ops::Range;

/// Longer chunks have no key.
pub const MAX_LEN: usize = 15;

/// The bytes of a chunk, 1 to 15, and its length in one number, which is never 0.
#[inline]
pub fn of(text: &[u8], chunk: &Range<usize>) -> Option<u128> {
    let len = chunk.len();
    if len > MAX_LEN {
        return None;
    }
    let mut window = [0; 16];
    match text.get(chunk.start..chunk.start + 16) {
        Some(bytes) => window.copy_from_slice(bytes), // a copy of fixed size is a single load
        None => window[..len].copy_from_slice(&text[chunk.clone()]),
    }
    Some(u128::from_le_bytes(window) << (128 - 8 * len) | len as u128)
}

/// The chunk of a key, in an array and with its length.
pub fn bytes(key: u128) -> ([u8; 16], usize) {
    let len = (key & 15) as usize;
    ((key >> (128 - 8 * len)).to_le_bytes(), len)
}

/// A place for the key in a table of `1 << bits` places.
#[inline]
pub fn index(key: u128, bits: u32) -> usize {
    // Half the key times the other half, folded, after XOR with two arbitrary constants so that neither factor is 0.
    let (low, high) = (key as u64 ^ 0x9e37_79b9_7f4a_7c15, (key >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03);
    let product = u128::from(low) * u128::from(high);
    ((product as u64 ^ (product >> 64) as u64) >> (64 - bits)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_chunks_apart_and_gives_them_back() {
        let text = b"abcdefghijklmnopq\0\0\0";
        let mut seen = std::collections::HashSet::new();
        for start in 0..text.len() {
            for len in 1..=MAX_LEN.min(text.len() - start) {
                let key = of(text, &(start..start + len)).unwrap();
                let (bytes, length) = bytes(key);
                assert_eq!(&bytes[..length], &text[start..start + len]);
                assert!(seen.insert(key) || text[start] == 0);
            }
        }
        assert_eq!(of(text, &(0..16)), None);
    }
}
