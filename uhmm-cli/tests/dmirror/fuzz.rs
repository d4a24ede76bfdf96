//! Every command with every kind of malformed input: an answer each time, and nothing lost or left.

use core::time::Duration;
use std::time::Instant;

use crate::device::{Child, FLAGS, PAGE, Pages, READ, TO_DEV, WRITE, command, raw_ioctl, unit};
use crate::with_device;

/// How many requests are made, if `UHMM_FUZZ_REQUESTS` does not say.
const REQUESTS: u64 = 3000;

/// The errors that a command may answer with.
const ERRORS: [i32; 9] = [
    libc::EFAULT,
    libc::EINVAL,
    libc::ENOMEM,
    libc::EPERM,
    libc::ENOENT,
    libc::EBUSY,
    libc::EOVERFLOW,
    libc::EIO,
    libc::ENOSPC,
];

/// A linear congruential generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn of<T: Copy>(&mut self, these: &[T]) -> T {
        these[(self.next() % these.len() as u64) as usize]
    }
}

fn wanted() -> u64 {
    let said = std::env::var("UHMM_FUZZ_REQUESTS").ok();
    said.map_or(REQUESTS, |said| said.parse().expect("a number"))
}

/// What is open, by number.
fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("there is one").count()
}

fn fuzz(requests: u64, seed: u64, descriptors: &[i32]) {
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let fenced = |count, first| {
        let pages = Pages::fenced(count, both, libc::MAP_PRIVATE);
        pages.fill_all(first);
        pages
    };
    let (kept, written) = (fenced(32, 1), fenced(32, 100));
    let expected = kept.bytes();
    let untouched = Pages::fenced(8, both, libc::MAP_PRIVATE);
    let nothing = Pages::fenced(8, libc::PROT_NONE, libc::MAP_PRIVATE);
    let read_only = fenced(8, 60);
    read_only.protect(libc::PROT_READ);
    let shared = Pages::fenced(8, both, libc::MAP_SHARED);
    let node = Pages::map(4, both, libc::MAP_SHARED, descriptors[0]);
    let buffer = fenced(600, 200);
    let stack = [0_u64; 1024];
    let stack = (stack.as_ptr().expose_provenance() as u64).next_multiple_of(PAGE as u64);

    let mut random = Random(seed);
    let addresses = [
        kept.addr(),
        kept.addr() + 5 * PAGE as u64,
        written.addr(),
        untouched.addr(),
        nothing.addr(),
        read_only.addr(),
        shared.addr(),
        node.addr(),
        written.addr() + 1,
        0,
        PAGE as u64,
        1 << 47,
        u64::MAX - 4095,
        u64::MAX,
    ];
    let lengths = [0, 1, 2, 3, 8, 31, 32, 64, 513, 1 << 30, 1 << 51, 1 << 52, u64::MAX];
    let pointers =
        [buffer.addr(), buffer.addr() + 3, read_only.addr(), nothing.addr(), 0, 1 << 47, u64::MAX];
    // The last command takes no address.
    let numbers: Vec<u64> = (READ..=FLAGS + 1).chain([0, 0xc020_4800, u64::MAX]).collect();
    let longest = Duration::from_secs(20);
    for step in 0..requests {
        let fd = random.of(descriptors);
        let number = random.of(&numbers);
        let mut addr = random.of(&addresses);
        if random.next().is_multiple_of(8) && number == TO_DEV {
            addr = stack;
        }
        // What is written is known to nobody afterwards: not what is looked at in the end.
        let in_kept = kept.addr()..kept.addr() + (32 * PAGE) as u64;
        if number == WRITE && in_kept.contains(&addr) {
            addr = written.addr();
        }
        let (npages, ptr) = (random.of(&lengths), random.of(&pointers));
        // Nothing beyond what is ours is written to.
        let few = number == WRITE || addr == stack || addr == node.addr();
        let npages = if few && npages < 1 << 30 { npages.min(4) } else { npages };
        let began = Instant::now();
        let answer = if random.next().is_multiple_of(16) {
            let structure = core::ptr::with_exposed_provenance_mut(ptr as usize);
            let outside = [0, 1 << 47, u64::MAX, nothing.addr()].contains(&ptr);
            if outside { raw_ioctl(fd, number, structure).map(|()| (0, 0)) } else { Ok((0, 0)) }
        } else {
            command(fd, number, addr, npages, ptr)
        };
        let what = format!("step {step}, seed {seed}: {number:#x} {addr:#x} {npages:#x} {ptr:#x}");
        if let Err(errno) = answer {
            assert!(ERRORS.contains(&errno), "{what}: {errno}");
        }
        assert!(began.elapsed() < longest, "{what}");
    }
    assert_eq!(kept.bytes(), expected, "seed {seed}");
}

fn seed() -> u64 {
    let said = std::env::var("UHMM_FUZZ_SEED").ok();
    said.map_or(20_240_611, |said| said.parse().expect("a number"))
}

#[test]
fn whatever_is_asked_is_answered() {
    with_device("fuzz::whatever_is_asked_is_answered", || {
        let descriptors = [unit(0), unit(1), unit(2), unit(3), unit(0)];
        // What is opened once stays so.
        fuzz(200, seed() + 9, &descriptors);
        let before = open_files();
        fuzz(wanted(), seed(), &descriptors);
        assert_eq!(open_files(), before);
    });
}

#[test]
fn whatever_a_child_asks_is_answered() {
    with_device("fuzz::whatever_a_child_asks_is_answered", || {
        let descriptors = [unit(0), unit(2)];
        let ask = |requests| Child::fork(|| fuzz(requests, seed() + 1, &descriptors)).ends_well();
        // What is opened once stays so.
        ask(100);
        let before = open_files();
        // Its requests are about this memory, which has the same at the same addresses.
        ask(wanted() / 4);
        assert_eq!(open_files(), before);
    });
}

#[test]
fn whatever_threads_ask_at_once_is_answered() {
    with_device("fuzz::whatever_threads_ask_at_once_is_answered", || {
        let descriptors = [unit(0), unit(1), unit(3)];
        std::thread::scope(|scope| {
            for thread in 0..3 {
                scope.spawn(move || fuzz(wanted() / 4, seed() + 2 + thread, &descriptors));
            }
        });
    });
}
