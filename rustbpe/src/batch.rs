//! Many texts encoded by several threads into one flat array.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::Mutex;
use std::thread;

use crate::encode::{Encoder, Scratch};
use crate::processor::{huge, prefetch};
use crate::texts::Text;

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

/// The number of a job, and its texts.
type Job<T> = (usize, Vec<T>);

/// What one thread has encoded: the ids of its jobs, and how many ids each text has.
#[derive(Default)]
struct Share {
    ids: Vec<i32>,
    lens: Vec<usize>,
    /// The number of each job, and where its part of `ids` and of `lens` ends.
    jobs: Vec<(usize, usize, usize)>,
}

/// The ids of all `texts`, each after `prepend` if that is given. Other threads start to encode while this one still
/// takes texts from the iterator, which may need the GIL. What needs no GIL runs in `without_gil`: this thread encodes
/// too, with `check` before each job, and at last all threads copy the ids together. An error ends all work.
pub fn encode_batch<T: Text, E: From<String> + Send>(
    encoder: &Encoder,
    pool: &Pool,
    texts: impl Iterator<Item = Result<T, E>>,
    prepend: Option<i32>,
    num_threads: usize,
    without_gil: impl FnOnce(&mut (dyn FnMut() + Send)),
    mut check: impl FnMut() -> Result<(), E> + Send,
) -> Result<Encoded, E> {
    let (sender, receiver) = std::sync::mpsc::channel::<Job<T>>();
    let (receiver, stop, text_bytes) = (Mutex::new(receiver), AtomicBool::new(false), AtomicUsize::new(0));
    let work = |check: &mut (dyn FnMut() -> Result<(), E> + Send)| {
        let share = pool.with(encoder, |scratch| {
            let ids = huge(text_bytes.load(Ordering::Relaxed) / 4 / num_threads.max(1)); // a guess
            let mut share = Share { ids, ..Share::default() };
            while !stop.load(Ordering::Relaxed) {
                check()?;
                let received = receiver.lock().unwrap().recv();
                let Ok((number, texts)) = received else { break };
                encode_job(encoder, scratch, &texts, prepend, &mut share)?;
                share.jobs.push((number, share.ids.len(), share.lens.len()));
            }
            Ok(share)
        });
        stop.fetch_or(share.is_err(), Ordering::Relaxed);
        share
    };
    thread::scope(|scope| {
        let mut workers = Vec::new();
        let sent = send_jobs(texts, sender, |number, bytes| {
            text_bytes.fetch_add(bytes, Ordering::Relaxed);
            if number > 0 && workers.len() + 1 < num_threads {
                workers.push(scope.spawn(|| work(&mut || Ok(()))));
            }
        });
        stop.fetch_or(sent.is_err(), Ordering::Relaxed);
        let mut result = sent.map(|()| Encoded { ids: Vec::new(), offsets: Vec::new() });
        without_gil(&mut || {
            let mine = work(&mut check);
            let others = workers.drain(..).map(|worker| worker.join().unwrap());
            let shares = std::iter::once(mine).chain(others).collect::<Vec<_>>().into_iter().collect::<Result<_, E>>();
            match (&result, shares) {
                (Ok(_), Ok(shares)) => result = Ok(join(shares)),
                (Ok(_), Err(error)) => result = Err(error),
                (Err(_), _) => {}
            }
        });
        result
    })
}

/// Sends the texts in jobs of about `JOB_BYTES`, and calls `after` with the number and the bytes of each.
fn send_jobs<T: Text, E>(
    texts: impl Iterator<Item = Result<T, E>>,
    sender: Sender<Job<T>>,
    mut after: impl FnMut(usize, usize),
) -> Result<(), E> {
    let (mut texts, mut number) = (texts.peekable(), 0);
    while texts.peek().is_some() {
        let (mut job, mut size) = (Vec::new(), 0);
        while let Some(text) = texts.next_if(|_| size < JOB_BYTES) {
            job.push(text?);
            size += job[job.len() - 1].bytes().len();
        }
        let _ = sender.send((number, job)); // the receiver lives as long as the caller
        after(number, size);
        number += 1;
    }
    Ok(())
}

fn encode_job(
    encoder: &Encoder,
    scratch: &mut Scratch,
    texts: &[impl Text],
    prepend: Option<i32>,
    share: &mut Share,
) -> Result<(), String> {
    let mut buffer = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        if let Some(next) = texts.get(index + 1) {
            // The processor loads ahead inside of a text only.
            next.bytes().chunks(64).take(8).for_each(prefetch);
        }
        let (text, start) = (text.read(&mut buffer)?, share.ids.len());
        share.ids.extend(prepend);
        encoder.encode(text, scratch, &mut share.ids)?;
        share.lens.push(share.ids.len() - start);
    }
    Ok(())
}

/// All shares in the order of the jobs. What a single thread has encoded is not copied.
fn join(mut shares: Vec<Share>) -> Encoded {
    shares.retain(|share| !share.jobs.is_empty());
    let mut parts = Vec::new();
    for share in &shares {
        let (mut ids, mut lens) = (0, 0);
        for &(number, ids_end, lens_end) in &share.jobs {
            parts.push((number, &share.ids[ids..ids_end], &share.lens[lens..lens_end]));
            (ids, lens) = (ids_end, lens_end);
        }
    }
    parts.sort_unstable_by_key(|part| part.0);
    let mut offsets = vec![0];
    for &len in parts.iter().flat_map(|part| part.2) {
        offsets.push(offsets[offsets.len() - 1] + len as i64);
    }
    if shares.len() == 1 {
        return Encoded { ids: shares.remove(0).ids, offsets };
    }
    let parts: Vec<&[i32]> = parts.iter().map(|part| part.1).collect();
    Encoded { ids: concat(&parts, shares.len()), offsets }
}

/// The parts one after the other, copied by several threads, because most of the time goes into getting the memory.
fn concat(parts: &[&[i32]], num_threads: usize) -> Vec<i32> {
    let total = parts.iter().map(|part| part.len()).sum();
    let mut joined: Vec<i32> = huge(total);
    let mut rest = &mut joined.spare_capacity_mut()[..total];
    thread::scope(|scope| {
        for parts in parts.chunks(parts.len().div_ceil(num_threads.max(1)).max(1)) {
            let (places, after) = std::mem::take(&mut rest).split_at_mut(parts.iter().map(|part| part.len()).sum());
            rest = after;
            scope.spawn(move || {
                let mut places = places;
                for part in parts {
                    let (here, after) = std::mem::take(&mut places).split_at_mut(part.len());
                    here.iter_mut().zip(*part).for_each(|(place, &id)| _ = place.write(id));
                    places = after;
                }
            });
        }
    });
    // SAFETY: the parts have `total` ids together, and each was written to a place of its own.
    unsafe { joined.set_len(total) };
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::Vocabulary;
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
            let texts = texts.iter().map(|&text| Ok(text));
            encode_batch(&encoder, &Pool::default(), texts, Some(9), threads, |work| work(), || Ok::<(), String>(()))
                .unwrap()
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
        let texts = || [text.as_str(); 9].into_iter().map(Ok);
        let (encoder, pool) = (encoder(), Pool::default());
        let stopped = encode_batch(&encoder, &pool, texts(), None, 2, |work| work(), || Err("stop".to_owned()));
        assert_eq!(stopped.err().unwrap(), "stop");
        let broken = texts().chain([Err("broken".to_owned())]);
        let stopped = encode_batch(&encoder, &pool, broken, None, 2, |work| work(), || Ok(()));
        assert_eq!(stopped.err().unwrap(), "broken");
    }
}
