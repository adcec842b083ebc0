//! What the processor and the system offer: wide vectors, loading ahead, huge pages.

/// A table on huge pages that is full of `entry`.
pub fn table<T: Copy, const LEN: usize>(entry: T) -> Box<[T; LEN]> {
    let mut table = huge(LEN);
    table.resize(LEN, entry);
    table.into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!("it has this length"))
}

/// An empty vector for `len` entries, on huge pages where the system has them: with small ones, much of the time of
/// writing goes into getting them.
pub fn huge<T>(len: usize) -> Vec<T> {
    let vector: Vec<T> = Vec::with_capacity(len);
    #[cfg(target_os = "linux")]
    {
        extern "C" {
            fn madvise(start: *mut u8, len: usize, advice: i32) -> i32;
        }
        const PAGE: usize = 4096; // where the kernel's are larger it refuses, which does no harm
        const HUGE_PAGES: i32 = 14;
        let start = vector.as_ptr().cast::<u8>().cast_mut();
        let size = len * size_of::<T>();
        let skip = start.align_offset(PAGE).min(size);
        // SAFETY: this is the C library's signature on Linux. The range is within the vector's memory, and the advice
        // does not change what is in it.
        unsafe { madvise(start.add(skip), size - skip, HUGE_PAGES) };
    }
    vector
}

/// Starts to load a cache line that will be needed soon.
#[inline(always)]
pub fn prefetch<T: ?Sized>(line: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a prefetch reads nothing that the program sees, and the address is that of a live reference.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Runs `work`, compiled for wide vectors and instructions on bits if the processor has them. What it calls must be
/// inlined.
#[inline(always)]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        use std::sync::LazyLock;
        #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
        fn wide<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        static HAS: LazyLock<bool> = LazyLock::new(|| {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt")
        });
        if *HAS {
            // SAFETY: the processor has what the function is compiled for.
            return unsafe { wide(work) };
        }
    }
    work()
}
