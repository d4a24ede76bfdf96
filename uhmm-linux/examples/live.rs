//! A hundred megabytes of this very process move to a device, again and again, while two threads of
//! it work on them and know nothing of it.
//!
//! `cargo run --release -p uhmm-linux --example live`

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uhmm::{DevicePagemap, PAGE_SIZE, PageRange};
use uhmm_linux::{Allocator, Options, Process, movable};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator::new();

const WORDS: usize = (100 << 20) / 8;
const LASTS: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let process = match Process::attach(Options::new()) {
        Ok(process) => process,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let words: Vec<AtomicU64> = movable(|| (0..WORDS).map(|_| AtomicU64::new(0)).collect());
    let first = (words.as_ptr().addr() as u64).next_multiple_of(PAGE_SIZE as u64);
    let bytes = (WORDS * 8 - 2 * PAGE_SIZE) as u64 / PAGE_SIZE as u64 * PAGE_SIZE as u64;
    let range = PageRange::new(first, bytes).expect("the words are pages");
    let memory = DevicePagemap::register(process.host_memory(range.pages()));

    let over = AtomicBool::new(false);
    let (words, over) = (&words[..], &over);
    let (moved, added) = std::thread::scope(|scope| {
        let adders: Vec<_> =
            [1, 2].map(|adder| scope.spawn(move || add(words, over, number_of(adder)))).into();
        let began = Instant::now();
        let mut moved = 0;
        while began.elapsed() < LASTS {
            moved += process.migrate(range, &memory).run().moved;
        }
        // SeqCst: the threads stop at some time after this, and are joined.
        over.store(true, Ordering::SeqCst);
        let added: u64 =
            adders.into_iter().map(|adder| adder.join().expect("an adder does not panic")).sum();
        (moved, added)
    });

    let sum: u64 = words.iter().map(|word| word.load(Ordering::SeqCst)).sum();
    let statistics = process.statistics();
    println!("{moved:>12} pages moved to the device");
    println!("{:>12} faults brought them home", statistics.faults);
    println!("{added:>12} additions were made, and {sum} are there");
    match sum == added {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Returns a starting point for the walk of an adder.
fn number_of(adder: u64) -> u64 {
    adder.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Adds one to words all over the place until it is over, and returns how often it did.
fn add(words: &[AtomicU64], over: &AtomicBool, mut at: u64) -> u64 {
    let mut added = 0;
    while !over.load(Ordering::SeqCst) {
        // A linear congruential generator: any walk will do.
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        words[(at >> 33) as usize % words.len()].fetch_add(1, Ordering::SeqCst);
        added += 1;
    }
    added
}
