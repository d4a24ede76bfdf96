//! What memory that never moves costs to allocate, beside the C library's, in the same run.
//!
//! `cargo bench -p uhmm-linux --bench allocator`. The two take turns, in rounds that are short beside
//! a time slice, and what is printed is the median of the rounds: what else the machine does meets
//! both alike. Without `--bench`, as `cargo test` runs it, there is one round.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Instant;

use uhmm_linux::Allocator;

/// The arena, not used for anything else.
static ARENA: Allocator = Allocator::new();

/// How many rounds there are of each kind.
const ROUNDS: usize = 1000;

/// How many blocks are allocated and freed in a round.
const BLOCKS: usize = 10_000;

/// How many blocks are held at a time, where others are held.
const HELD: usize = 10_000;

/// A block, freed when it is dropped.
struct Block<'a, A: GlobalAlloc> {
    allocator: &'a A,
    address: usize,
    layout: Layout,
}

impl<'a, A: GlobalAlloc> Block<'a, A> {
    /// Allocates a block and writes its first byte.
    fn new(allocator: &'a A, bytes: usize) -> Block<'a, A> {
        let layout = Layout::from_size_align(bytes, 8).expect("a layout");
        // SAFETY: no size here is 0.
        let pointer = unsafe { allocator.alloc(layout) };
        assert!(!pointer.is_null());
        // SAFETY: it was just allocated.
        unsafe { pointer.write(1) };
        Block { allocator, address: black_box(pointer.expose_provenance()), layout }
    }
}

impl<A: GlobalAlloc> Drop for Block<'_, A> {
    fn drop(&mut self) {
        let pointer = std::ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: it was allocated by this allocator with this layout, and is freed once.
        unsafe { self.allocator.dealloc(pointer, self.layout) };
    }
}

/// An xorshift generator.
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as usize
}

/// Allocates blocks of one size, and frees each at once.
fn pairs<A: GlobalAlloc>(allocator: &A, bytes: usize) {
    (0..BLOCKS).for_each(|_| drop(Block::new(allocator, bytes)));
}

/// Puts blocks of 16 to 500 bytes in the place of others, at random.
fn replace<'a, A: GlobalAlloc>(allocator: &'a A, held: &mut Vec<Block<'a, A>>) {
    held.resize_with(HELD, || Block::new(allocator, 16));
    let mut state = 88_172_645_463_325_252;
    for _ in 0..BLOCKS {
        let bytes = 16 + next(&mut state) % 484;
        held[next(&mut state) % HELD] = Block::new(allocator, bytes);
    }
}

/// Allocates blocks of 64 bytes that another thread frees.
fn pass<'a, A: GlobalAlloc>(
    allocator: &'a A,
    to: &SyncSender<Vec<Block<'a, A>>>,
    back: &Receiver<()>,
) {
    to.send((0..BLOCKS).map(|_| Block::new(allocator, 64)).collect()).expect("it is received");
    back.recv().expect("they are freed");
}

/// Measures what two do in turns, and prints the medians, in nanoseconds for each block.
fn compare(name: &str, rounds: usize, mut library: impl FnMut(), mut arena: impl FnMut()) {
    let time = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_nanos() as f64 / BLOCKS as f64
    };
    // Once to fill caches.
    library();
    arena();
    let (mut library, mut arena): (Vec<f64>, Vec<f64>) =
        (0..rounds).map(|_| (time(&mut library), time(&mut arena))).unzip();
    let median = |times: &mut Vec<f64>| {
        times.sort_unstable_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (library, arena) = (median(&mut library), median(&mut arena));
    println!("{name:<44} {library:>10.1} {arena:>10.1} {:>8.2}", arena / library);
}

/// Makes a thread that frees what it is sent, for as long as somebody sends.
fn freeing<'scope, A: GlobalAlloc + Sync>(
    scope: &'scope thread::Scope<'scope, '_>,
) -> (SyncSender<Vec<Block<'scope, A>>>, Receiver<()>) {
    let (to, received) = sync_channel::<Vec<Block<'scope, A>>>(1);
    let (done, back) = sync_channel(1);
    scope.spawn(move || {
        for blocks in received {
            drop(blocks);
            // Nobody waits after the last round.
            let _ = done.send(());
        }
    });
    (to, back)
}

fn main() {
    let rounds = if std::env::args().any(|argument| argument == "--bench") { ROUNDS } else { 1 };
    println!("{:<44} {:>10} {:>10} {:>8}", "ns for each block", "C library", "arena", "ratio");
    for bytes in [16, 64, 256, 1000, 4000, 20_000, 100_000, 1_000_000] {
        let name = format!("{bytes} bytes, freed at once");
        compare(&name, rounds, || pairs(&System, bytes), || pairs(&ARENA, bytes));
    }
    let (mut library, mut arena) = (Vec::new(), Vec::new());
    let name = "16 to 500 bytes, in the place of any of 10000";
    compare(name, rounds, || replace(&System, &mut library), || replace(&ARENA, &mut arena));
    thread::scope(|scope| {
        let ((to_one, one), (to_two, two)) = (freeing(scope), freeing(scope));
        let library = || pass(&System, &to_one, &one);
        compare("64 bytes, 10000 freed by another thread", rounds, library, || {
            pass(&ARENA, &to_two, &two);
        });
        drop((to_one, to_two));
    });
}
