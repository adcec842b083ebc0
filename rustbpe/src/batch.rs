//! Many texts encoded by several threads into one flat array.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread;

use crate::encode::{Encoder, Scratch};

/// Threads take the texts in runs of about this many bytes: enough to make the taking cheap, and so few that all
/// threads finish at about the same time.
const JOB_BYTES: usize = 1 << 16;

/// Scratch space that outlives a call, so that the next one finds the caches warm.
#[derive(Default)]
pub struct Pool(Mutex<Vec<Scratch>>);

impl Pool {
    pub fn with<R>(&self, encoder: &Encoder, work: impl FnOnce(&mut Scratch) -> R) -> R {
        let pooled = self.0.lock().unwrap().pop();
        let mut scratch = pooled.unwrap_or_else(|| encoder.scratch());
        let result = work(&mut scratch);
        self.0.lock().unwrap().push(scratch);
        result
    }
}

/// The ids of several texts, one after the other: those of text `i` are `ids[offsets[i]..offsets[i + 1]]`.
pub struct Encoded {
    pub ids: Vec<i32>,
    pub offsets: Vec<i64>,
}

/// The ids of all `texts`, each after `prepend` if that is given. The calling thread works too and runs `check`
/// between its jobs; an error ends all of them.
pub fn encode_batch<E: From<String> + Send>(
    encoder: &Encoder,
    pool: &Pool,
    texts: &[&str],
    prepend: Option<i32>,
    num_threads: usize,
    mut check: impl FnMut() -> Result<(), E>,
) -> Result<Encoded, E> {
    let jobs = make_jobs(texts);
    let results: Vec<OnceLock<Encoded>> = jobs.iter().map(|_| OnceLock::new()).collect();
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = |check: &mut dyn FnMut() -> Result<(), E>| -> Result<(), E> {
        let result = pool.with(encoder, |scratch| {
            while !stop.load(Ordering::Relaxed) {
                let job = next.fetch_add(1, Ordering::Relaxed);
                let Some(texts) = jobs.get(job) else { break };
                let _ = results[job].set(encode_job(encoder, scratch, texts, prepend)?); // nobody else has this job
                check()?;
            }
            Ok(())
        });
        stop.fetch_or(result.is_err(), Ordering::Relaxed);
        result
    };
    thread::scope(|scope| {
        let others = num_threads.min(jobs.len()).saturating_sub(1);
        let workers: Vec<_> = (0..others).map(|_| scope.spawn(|| work(&mut || Ok(())))).collect();
        let mine = work(&mut check);
        workers.into_iter().map(|worker| worker.join().unwrap()).fold(mine, Result::and)
    })?;
    Ok(join(results.into_iter().filter_map(OnceLock::into_inner), texts.len()))
}

fn make_jobs<'a>(texts: &'a [&'a str]) -> Vec<&'a [&'a str]> {
    let (mut jobs, mut start, mut size) = (Vec::new(), 0, 0);
    for (index, text) in texts.iter().enumerate() {
        size += text.len();
        if size >= JOB_BYTES || index + 1 == texts.len() {
            jobs.push(&texts[start..=index]);
            (start, size) = (index + 1, 0);
        }
    }
    jobs
}

fn encode_job(
    encoder: &Encoder,
    scratch: &mut Scratch,
    texts: &[&str],
    prepend: Option<i32>,
) -> Result<Encoded, String> {
    let size: usize = texts.iter().map(|text| text.len()).sum();
    let mut encoded = Encoded { ids: Vec::with_capacity(size / 3), offsets: vec![0] };
    for text in texts {
        encoded.ids.extend(prepend);
        encoder.encode(text, scratch, &mut encoded.ids)?;
        encoded.offsets.push(encoded.ids.len() as i64);
    }
    Ok(encoded)
}

fn join(mut parts: impl Iterator<Item = Encoded>, num_texts: usize) -> Encoded {
    let Some(mut joined) = parts.next() else { return Encoded { ids: Vec::new(), offsets: vec![0] } };
    let parts: Vec<Encoded> = parts.collect();
    joined.ids.reserve_exact(parts.iter().map(|part| part.ids.len()).sum());
    joined.offsets.reserve_exact(num_texts + 1 - joined.offsets.len());
    for part in parts {
        let start = joined.ids.len() as i64;
        joined.ids.extend(part.ids);
        joined.offsets.extend(part.offsets[1..].iter().map(|offset| start + offset));
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode::Vocabulary;
    use crate::split::{Splitter, DEFAULT_PATTERN};

    fn encoder() -> Encoder {
        let vocabulary = Vocabulary::from_merges(&[(97, 98), (256, 97)]);
        Encoder::new(vocabulary, Splitter::new(DEFAULT_PATTERN).unwrap())
    }

    #[test]
    fn any_number_of_threads_gives_the_same_ids_in_the_order_of_the_texts() {
        let encoder = encoder();
        let texts: Vec<String> = (0..200).map(|index| format!("abab {index} ").repeat(index * 7 % 300)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let encode = |threads| {
            encode_batch(&encoder, &Pool::default(), &texts, Some(9), threads, || Ok::<(), String>(())).unwrap()
        };
        let one = encode(1);
        for (text, bounds) in texts.iter().zip(one.offsets.windows(2)) {
            let mut expected = vec![9];
            encoder.encode(text, &mut encoder.scratch(), &mut expected).unwrap();
            assert_eq!(one.ids[bounds[0] as usize..bounds[1] as usize], expected);
        }
        for threads in [0, 2, 5] {
            let many = encode(threads);
            assert_eq!((many.ids, many.offsets), (one.ids.clone(), one.offsets.clone()));
        }
    }

    #[test]
    fn an_error_of_the_check_ends_the_work() {
        let text = "ab ".repeat(JOB_BYTES);
        let texts = [text.as_str(); 9];
        let stopped = encode_batch(&encoder(), &Pool::default(), &texts, None, 2, || Err("stop".to_owned()));
        assert_eq!(stopped.err().unwrap(), "stop");
    }
}
