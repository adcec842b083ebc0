//! Short chunks as numbers, which are compared and hashed in a few instructions.

/// Longer chunks have no key.
pub const MAX_LEN: usize = 15;

/// No chunk's key: a length of 0 below other bytes than none.
pub const NONE: u128 = 1;

/// Keeps the bytes of a chunk by its length, from 0 to 15.
static MASKS: [u128; MAX_LEN + 1] = {
    let (mut masks, mut len) = ([0; MAX_LEN + 1], 1);
    while len <= MAX_LEN {
        masks[len] = u128::MAX >> (128 - 8 * len);
        len += 1;
    }
    masks
};

/// The key of the chunk `text[start..end]`: its bytes, with its length above them. It is 0 for an empty chunk only.
#[inline(always)]
pub fn of(text: &[u8], start: usize, end: usize) -> Option<u128> {
    let len = end - start;
    let mask = MASKS.get(len)?;
    let window = match text.get(start..start + MAX_LEN + 1).map(TryFrom::try_from) {
        Some(Ok(window)) => window,
        _ => window_at_end(&text[start..end]),
    };
    Some(u128::from_le_bytes(window) & mask | (len as u128) << (8 * MAX_LEN))
}

#[cold]
#[inline(never)]
fn window_at_end(chunk: &[u8]) -> [u8; MAX_LEN + 1] {
    let mut window = [0; MAX_LEN + 1];
    window[..chunk.len()].copy_from_slice(chunk);
    window
}

/// The chunk of a key, in an array and with its length.
pub fn bytes(key: u128) -> ([u8; MAX_LEN + 1], usize) {
    (key.to_le_bytes(), (key >> (8 * MAX_LEN)) as usize)
}

/// A hash of the key. The upper bits are the better ones.
#[inline(always)]
pub fn hash(key: u128) -> u64 {
    let (low, high) = (key as u64, (key >> 64) as u64);
    (low ^ high.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd1b5_4a32_d192_ed03)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_tells_chunks_apart_and_gives_them_back() {
        let text = b"abcdefghijklmnopq\0\0\0";
        let mut seen = std::collections::HashSet::new();
        for start in 0..text.len() {
            for end in start + 1..=text.len().min(start + MAX_LEN) {
                let key = of(text, start, end).unwrap();
                let (bytes, length) = bytes(key);
                assert_eq!(&bytes[..length], &text[start..end]);
                assert!(seen.insert(key) || text[start] == 0);
            }
        }
        assert_eq!(of(text, 0, 16), None);
    }
}
