//! What memory that never moves costs to allocate, beside the C library's, in the same run.
//!
//! `cargo bench -p uhmm-linux --bench allocator`. The figures and the machine are in
//! `docs/performance.md`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::mpsc::sync_channel;
use std::thread;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use uhmm_linux::Allocator;

/// The arena, not used for anything else.
static ARENA: Allocator = Allocator::new();

/// How many blocks are held at a time.
const HELD: usize = 10_000;

/// How many blocks pass from one thread to the other at a time.
const BATCH: usize = 1000;

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

type Group<'a> = BenchmarkGroup<'a, criterion::measurement::WallTime>;

fn measure<A: GlobalAlloc + Sync>(group: &mut Group<'_>, name: &str, allocator: &'static A) {
    group.throughput(Throughput::Elements(1));
    for bytes in [16, 64, 256, 4000, 100_000] {
        group.bench_function(format!("{bytes} bytes, and free: {name}"), |b| {
            b.iter(|| Block::new(allocator, bytes));
        });
    }
    let mut held: Vec<_> = (0..HELD).map(|_| Block::new(allocator, 16)).collect();
    let mut state = 1;
    group.bench_function(format!("16 to 500 bytes in the place of a random other: {name}"), |b| {
        b.iter(|| {
            let bytes = 16 + next(&mut state) % 484;
            held[next(&mut state) % HELD] = Block::new(allocator, bytes);
        });
    });
    drop(held);
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function(format!("1000 of 64 bytes, freed by another thread: {name}"), |b| {
        let (sender, receiver) = sync_channel::<Vec<Block<'_, A>>>(2);
        thread::scope(|scope| {
            scope.spawn(move || receiver.into_iter().for_each(drop));
            b.iter(|| {
                let batch = (0..BATCH).map(|_| Block::new(allocator, 64)).collect();
                sender.send(batch).expect("it is received");
            });
            drop(sender);
        });
    });
}

fn allocate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("allocate");
    measure(&mut group, "the C library", &System);
    measure(&mut group, "the arena", &ARENA);
    group.finish();
}

criterion_group!(benches, allocate);
criterion_main!(benches);
