//! What the mirror device costs for each page: a table. The program opens the node and knows nothing
//! else, so it says the same of the kernel's device (`test_hmm`) and of that of `uhmm dmirror`.
//!
//! ```text
//! uhmm dmirror -- target/release/examples/dmirror_speed [NODE [ROUNDS]]
//! ```
//!
//! Each figure is the median of the rounds, in nanoseconds a page of 4 KiB, over memory of 8 MiB. The
//! commands of a round are measured one after the other; what one needs of another is not counted.

use core::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::time::Instant;

/// The commands of the device (`lib/test_hmm_uapi.h`).
const READ: u64 = 0xc028_4800;
const WRITE: u64 = READ + 1;
const TO_DEV: u64 = READ + 2;
const TO_SYS: u64 = READ + 3;
const SNAPSHOT: u64 = READ + 4;

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;

/// How much memory is worked on.
const BYTES: usize = 8 << 20;

/// The pages touched one by one, far from each other.
const SINGLE: usize = 16;

/// Memory of this program's.
struct Memory {
    start: *mut u8,
}

impl Memory {
    /// Maps memory at a multiple of the size of huge pages, full of ones, which is of such or not.
    fn new(huge: bool) -> Memory {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses where.
        let start =
            unsafe { libc::mmap(core::ptr::null_mut(), BYTES + HUGE, access, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let start: *mut u8 = start.cast();
        let start = start.wrapping_add(start.align_offset(HUGE));
        let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: within what was mapped; it changes no contents.
        let advised = unsafe { libc::madvise(start.cast(), BYTES, advice) };
        assert_eq!(advised, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: within what was mapped, and nobody else's.
        unsafe { start.write_bytes(1, BYTES) };
        Memory { start }
    }

    /// Loads from pages that are so far apart.
    fn touch(&self, count: usize, apart: usize) {
        for page in 0..count {
            // SAFETY: within the memory, which was written.
            unsafe { self.start.wrapping_add(page * apart).read_volatile() };
        }
    }
}

/// Has the device do something to the first pages.
fn ask(node: &File, number: u64, memory: &Memory, pages: usize, buffer: &mut [u8]) {
    assert!(pages * PAGE <= buffer.len());
    let addr = memory.start.expose_provenance() as u64;
    let ptr = buffer.as_mut_ptr().expose_provenance() as u64;
    let mut request = [addr, ptr, pages as u64, 0, 0];
    let request: *mut c_void = (&raw mut request).cast();
    // SAFETY: the structure that the device takes, with a buffer of as many pages.
    let done = unsafe { libc::ioctl(node.as_raw_fd(), number, request) };
    assert_eq!(done, 0, "{number:#x}: {}", std::io::Error::last_os_error());
}

/// Nanoseconds for each of so many pages.
fn timed(pages: usize, what: impl FnOnce()) -> f64 {
    let began = Instant::now();
    what();
    began.elapsed().as_nanos() as f64 / pages as f64
}

/// What is measured, in the order of the table.
const ROWS: [&str; 8] = [
    "READ, first",
    "READ, again",
    "WRITE, again",
    "SNAPSHOT",
    "MIGRATE_TO_DEV",
    "MIGRATE_TO_SYS",
    "CPU touches in sequence",
    "CPU touches a single page",
];

fn round(node: &File, huge: bool, buffer: &mut [u8]) -> [f64; ROWS.len()] {
    let memory = Memory::new(huge);
    let pages = BYTES / PAGE;
    let mut measure = |number| timed(pages, || ask(node, number, &memory, pages, buffer));
    let first = measure(READ);
    let again = measure(READ);
    measure(WRITE);
    let write = measure(WRITE);
    let snapshot = measure(SNAPSHOT);
    let there = measure(TO_DEV);
    let back = measure(TO_SYS);
    measure(TO_DEV);
    let sequence = timed(pages, || memory.touch(pages, PAGE));
    measure(TO_DEV);
    // One of each huge page.
    let (count, apart) = if huge { (BYTES / HUGE, HUGE) } else { (SINGLE, BYTES / SINGLE) };
    let single = timed(count, || memory.touch(count, apart));
    // SAFETY: mapped by `new`, and nobody uses it any more.
    unsafe { libc::munmap(memory.start.cast(), BYTES) };
    [first, again, write, snapshot, there, back, sequence, single]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "/dev/hmm_dmirror0".to_owned());
    let rounds = arguments.next().map_or(21, |rounds| rounds.parse().expect("a number of rounds"));
    let node = OpenOptions::new().read(true).write(true).open(&path);
    let node = node.unwrap_or_else(|error| {
        eprintln!("{path}: {error}: load the module test_hmm, or run this under `uhmm dmirror`");
        std::process::exit(1);
    });
    // From a buffer that is there already: it is the device that is measured.
    let mut buffer = vec![1; BYTES];
    // The first round warms up.
    let measured: Vec<[[f64; ROWS.len()]; 2]> = (0..=rounds)
        .map(|_| [false, true].map(|huge| round(&node, huge, &mut buffer)))
        .skip(1)
        .collect();
    println!("{path}: ns per page of 4 KiB, median of {rounds} rounds; the last row per touch");
    println!("{:<28}{:>12}{:>12}", "", "4 KiB", "2 MiB");
    for (row, name) in ROWS.iter().enumerate() {
        let of = |kind: usize| median(measured.iter().map(|round| round[kind][row]).collect());
        println!("{name:<28}{:>12.0}{:>12.0}", of(0), of(1));
    }
}
