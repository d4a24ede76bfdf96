//! Tests. Those of one arena use one of their own, so that it can be looked into when all is still;
//! those of the whole use the allocator of the process, by its methods.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use uhmm::Page;

use super::super::child::{End, Fork, alone, start};
use super::super::thread::gettid;
use super::runs::{Runs, SPAN_BYTES, Summary};
use super::spans::{Freed, Span};
use super::*;

/// The bytes of a small arena.
const SMALL_ARENA: usize = 64 << 20;

/// The allocator of the process, which is not its global one.
static ALLOCATOR: Allocator = Allocator::new();

/// Something allocated, filled with a pattern of its own.
#[derive(Debug)]
struct Block {
    address: usize,
    layout: Layout,
    seed: u8,
    movable: bool,
}

impl Block {
    /// Allocates by the allocator of the process.
    fn new(layout: Layout, seed: u8, movable: bool, zeroed: bool) -> Block {
        let allocate = || match zeroed {
            // SAFETY: sizes in these tests are not 0.
            false => unsafe { ALLOCATOR.alloc(layout) },
            // SAFETY: as above.
            true => unsafe { ALLOCATOR.alloc_zeroed(layout) },
        };
        let pointer = if movable { super::movable(allocate) } else { allocate() };
        assert!(!pointer.is_null());
        let block = Block { address: pointer.expose_provenance(), layout, seed, movable };
        block.check_place();
        if zeroed {
            assert!(all_are(block.bytes(), 0), "{block:?} is not zero");
        }
        block.fill();
        block
    }

    fn pointer(&self) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.address)
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the block is ours and was written, by us or as zeroes.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.layout.size()) }
    }

    /// Checks where it is.
    fn check_place(&self) {
        assert_eq!(self.address % self.layout.align(), 0, "{self:?}");
        assert_eq!(contains(Page::containing(self.address as u64)), !self.movable, "{self:?}");
        let last = self.address + self.layout.size() - 1;
        assert_eq!(contains(Page::containing(last as u64)), !self.movable, "{self:?}");
    }

    fn fill(&self) {
        // SAFETY: the block is ours.
        unsafe { self.pointer().write_bytes(self.seed, self.layout.size()) };
    }

    /// Checks that the first bytes are as they were left.
    fn check(&self, bytes: usize) {
        assert!(all_are(&self.bytes()[..bytes], self.seed), "{self:?} was overwritten");
    }

    /// Resizes it, within a closure of the other kind.
    fn resize(&mut self, size: usize) {
        let kept = self.layout.size().min(size);
        // SAFETY: it was allocated with this layout, and the size is not 0.
        let resize = || unsafe { ALLOCATOR.realloc(self.pointer(), self.layout, size) };
        let pointer = if self.movable { resize() } else { super::movable(resize) };
        assert!(!pointer.is_null());
        self.address = pointer.expose_provenance();
        self.layout = Layout::from_size_align(size, self.layout.align()).expect("a layout");
        self.check_place();
        self.check(kept);
        self.fill();
    }

    /// Frees it, within a closure of the other kind.
    fn free(self) {
        self.check(self.layout.size());
        // SAFETY: it was allocated with this layout, and is not used below.
        let free = || unsafe { ALLOCATOR.dealloc(self.pointer(), self.layout) };
        if self.movable { free() } else { super::movable(free) }
    }
}

/// Tells whether all bytes have this value: the first has it, and each is like the one before.
/// Quicker by far than to look at each, where nothing is optimised.
fn all_are(bytes: &[u8], value: u8) -> bool {
    bytes.first().is_none_or(|&first| first == value)
        && bytes.get(1..).is_none_or(|rest| rest == &bytes[..bytes.len() - 1])
}

/// What a property test does.
#[derive(Clone, Debug)]
enum Action {
    Allocate { size: usize, align: u32, movable: bool, zeroed: bool },
    Resize { which: usize, size: usize },
    Free { which: usize },
}

/// Sizes of all kinds.
fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 1usize..700, 4 => 700usize..40_000, 2 => 40_000usize..600_000]
}

fn actions() -> impl Strategy<Value = Action> {
    let align = prop_oneof![6 => Just(0u32..=4), 2 => Just(5u32..=12), 1 => Just(13u32..=21)];
    let allocate = (sizes(), align.prop_flat_map(|align| align), any::<bool>(), any::<bool>());
    prop_oneof![
        5 => allocate.prop_map(|(size, align, movable, zeroed)| {
            Action::Allocate { size, align, movable, zeroed }
        }),
        3 => (any::<usize>(), sizes()).prop_map(|(which, size)| Action::Resize { which, size }),
        4 => any::<usize>().prop_map(|which| Action::Free { which }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn blocks_are_apart_aligned_where_they_belong_and_keep_what_they_hold(
        actions in prop::collection::vec(actions(), 1..120)
    ) {
        let mut blocks: Vec<Block> = Vec::new();
        for (seed, action) in actions.into_iter().enumerate() {
            match action {
                Action::Allocate { size, align, movable, zeroed } => {
                    let layout = Layout::from_size_align(size, 1 << align).expect("a layout");
                    blocks.push(Block::new(layout, seed as u8, movable, zeroed));
                }
                Action::Resize { which, size } if !blocks.is_empty() => {
                    let which = which % blocks.len();
                    blocks[which].resize(size);
                }
                Action::Free { which } if !blocks.is_empty() => {
                    blocks.swap_remove(which % blocks.len()).free();
                }
                _ => {}
            }
            let by_address: BTreeMap<usize, usize> =
                blocks.iter().map(|block| (block.address, block.layout.size())).collect();
            prop_assert_eq!(by_address.len(), blocks.len());
            for (one, next) in by_address.iter().zip(by_address.keys().skip(1)) {
                prop_assert!(one.0 + one.1 <= *next, "{one:?} reaches into {next:#x}");
            }
        }
        blocks.into_iter().for_each(Block::free);
    }
}

proptest! {
    #[test]
    fn runs_agree_with_a_list_of_spans(
        actions in prop::collection::vec((0u32..4, 0u32..256, 1u32..150), 1..60)
    ) {
        let [used, dirty]: [[AtomicU64; 4]; 2] = Default::default();
        let (summary, mut model) = (Summary::default(), [false; 256]);
        let runs = Runs { used: &used, dirty: &dirty, summary: &summary };
        let mut taken = Vec::new();
        for (what, first, spans) in actions {
            let free = |model: &[bool; 256], first: u32| {
                let range = model.get(first as usize..(first + spans) as usize);
                range.is_some_and(|range| range.iter().all(|&used| !used))
            };
            let align = 1 << (first % 5);
            let got = match what {
                0 => runs.take_exactly(first, spans).ok().map(|_| first),
                1 | 2 => runs.take(spans, align).map(|run| run.first),
                _ if taken.is_empty() => continue,
                _ => {
                    let (first, spans) = taken.swap_remove(first as usize % taken.len());
                    runs.give_back(first, spans, || true);
                    model[first as usize..(first + spans) as usize].fill(false);
                    runs.check();
                    continue;
                }
            };
            let expected = match what {
                0 => free(&model, first).then_some(first),
                _ => (0..256).step_by(align as usize).find(|&first| free(&model, first)),
            };
            prop_assert_eq!(got, expected);
            if let Some(first) = got {
                taken.push((first, spans));
                model[first as usize..(first + spans) as usize].fill(true);
            }
            for (span, &used) in model.iter().enumerate() {
                prop_assert_eq!(runs.is_used(span as u32), used, "span {}", span);
            }
            runs.check();
        }
    }
}

#[test]
fn all_objects_are_taken_or_none() {
    let class = classes::ALL[3];
    let free = |span: &Span| (0..class.words()).map(|word| span.free_in(word)).collect::<Vec<_>>();
    for in_use in [0, 1, 70, class.objects - 1] {
        let span = Span::new();
        span.fill(class);
        while span.take(class).is_some() {}
        for object in (0..class.objects).filter(|&object| object != in_use) {
            span.give_back(class, object);
        }
        let before = free(&span);
        assert!(!span.take_all(class), "{in_use} is in use");
        assert_eq!(free(&span), before);
        assert_eq!(span.give_back(class, in_use), Freed::LastOfWord);
        assert!(span.take_all(class));
        assert!(free(&span).iter().all(|&bits| bits == 0));
        assert_eq!(span.take(class), None);
    }
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize
    }

    /// A size and an alignment, mostly small.
    fn layout(&mut self) -> Layout {
        let limit = [64, 64, 300, 2000, 40_000, 200_000][self.next() % 6];
        let align = 1 << (self.next() % 8);
        Layout::from_size_align(1 + self.next() % limit, align).expect("a layout")
    }
}

/// An arena of a test.
fn arena() -> &'static Arena {
    Arena::reserve(SMALL_ARENA).expect("there is memory")
}

/// Allocates in an arena, and writes the first and the last byte. Returns where, or `None` if there
/// is no room.
fn take(arena: &Arena, layout: Layout, shard: usize) -> Option<usize> {
    let pointer = arena.allocate(layout, shard);
    let offset = arena.offset_of(pointer.addr())?;
    for index in [0, layout.size() - 1] {
        // SAFETY: it is within what was allocated.
        let byte = unsafe { pointer.add(index) };
        // SAFETY: as above, and nobody else has it.
        unsafe { byte.write(1) };
    }
    Some(offset)
}

/// Frees what a test has taken.
fn free(arena: &Arena, offset: usize, layout: Layout, shard: usize) {
    // SAFETY: the tests free what they have taken, once.
    unsafe { arena.free(offset, layout, shard) };
}

#[test]
fn an_arena_can_be_filled_and_emptied_again_and_again() {
    let arena = arena();
    let layouts = [48, 700, 5000, 32_768, 32_769, 65_536, 1 << 20]
        .map(|size| Layout::from_size_align(size, 16).expect("a layout"));
    for layout in layouts {
        let mut counts = Vec::new();
        for round in 0..3 {
            let taken: Vec<usize> =
                std::iter::from_fn(|| take(arena, layout, round % SHARDS)).collect();
            counts.push(taken.len());
            arena.check();
            // What is freed comes from all shards and in any order.
            for (index, &offset) in
                taken.iter().enumerate().rev().filter(|(index, _)| index % 3 == 0)
            {
                free(arena, offset, layout, index % SHARDS);
            }
            for (index, &offset) in taken.iter().enumerate().filter(|(index, _)| index % 3 != 0) {
                free(arena, offset, layout, index % SHARDS);
            }
            arena.check();
        }
        // A few spans may stay with the shards and classes that had them.
        let spans = SMALL_ARENA / SPAN_BYTES;
        let most = counts[0];
        let size = if layout.size() > classes::LARGEST {
            layout.size().next_multiple_of(SPAN_BYTES)
        } else {
            layout.size()
        };
        assert!(most * size > SMALL_ARENA / 5 * 4, "{layout:?}: {counts:?}");
        let least = *counts.iter().min().expect("three");
        assert!(least >= most - most * 64 / spans, "{layout:?}: {counts:?}");
    }
}

#[test]
fn what_there_is_no_room_for_is_refused() {
    let arena = arena();
    let layout = |size, align| Layout::from_size_align(size, align).expect("a layout");
    let most = isize::MAX as usize;
    for layout in [
        layout(SMALL_ARENA, 1),
        layout(most, 1),
        layout(most - 4095, 4096),
        layout(1, 1 << 40),
        layout(1, 1 << 62),
        layout(5 << 32 << 16, 1),
    ] {
        assert!(arena.allocate(layout, 0).is_null(), "{layout:?}");
        assert!(arena.allocate_zeroed(layout, 0).is_null(), "{layout:?}");
    }
    let (small, large) = (layout(100, 4), layout(100_000, 4));
    for (kind, size) in [(small, most - 3), (large, most - 3), (large, SMALL_ARENA)] {
        let offset = take(arena, kind, 0).expect("there is room");
        // SAFETY: it was allocated with this layout.
        assert!(!unsafe { arena.resize_in_place(offset, kind, size) });
        free(arena, offset, kind, 0);
    }
    // An alignment as large as the arena is no use, half of it is.
    let aligned = layout(1, SMALL_ARENA / 2);
    assert_eq!(take(arena, aligned, 0), Some(SMALL_ARENA / 2));
    arena.check();
}

#[test]
fn large_blocks_grow_and_shrink_where_they_are() {
    let arena = arena();
    let layout = |spans: usize| Layout::from_size_align(spans * SPAN_BYTES, 16).expect("a layout");
    let resize = |offset, from, to: usize| {
        // SAFETY: it was allocated with this layout, or resized to it.
        unsafe { arena.resize_in_place(offset, layout(from), to * SPAN_BYTES) }
    };
    let one = take(arena, layout(4), 0).expect("there is room");
    assert!(resize(one, 4, 8));
    let two = take(arena, layout(2), 0).expect("there is room");
    assert_eq!(two, one + 8 * SPAN_BYTES);
    assert!(!resize(one, 8, 9), "something is behind it");
    assert!(resize(one, 8, 3));
    assert_eq!(take(arena, layout(5), 0), Some(one + 3 * SPAN_BYTES), "the rest is free");
    free(arena, one, layout(3), 0);
    free(arena, two, layout(2), 0);
    arena.check();
}

/// Returns how much of an arena is in memory, in bytes.
fn resident(arena: &Arena) -> usize {
    let range = arena.range();
    let mut pages = vec![0_u8; range.len()];
    let start = ptr::with_exposed_provenance_mut(range.address() as usize);
    let bytes = range.len() * uhmm::PAGE_SIZE;
    // SAFETY: the range is mapped, and there is room for a byte for each page.
    let outcome = unsafe { libc::mincore(start, bytes, pages.as_mut_ptr().cast()) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    pages.iter().filter(|&&page| page & 1 != 0).count() * uhmm::PAGE_SIZE
}

#[test]
fn memory_that_is_freed_goes_back_to_the_kernel_except_for_what_is_kept() {
    const KEPT: usize = 32 << 20;
    let arena = Arena::reserve(1 << 30).expect("there is memory");
    for size in [100, 10_000, 100_000, 50 << 20] {
        let layout = Layout::from_size_align(size, 8).expect("a layout");
        let count = (200 << 20) / size;
        let taken: Vec<*mut u8> = (0..count)
            .map(|_| {
                let pointer = arena.allocate(layout, 0);
                // SAFETY: so many bytes were just allocated.
                unsafe { pointer.write_bytes(7, size) };
                pointer
            })
            .collect();
        assert!(resident(arena) >= 199 << 20, "{size}");
        for pointer in taken {
            free(arena, arena.offset_of(pointer.addr()).expect("it is here"), layout, 0);
        }
        arena.check();
        // What a class may keep unused is a quarter of its spans.
        let left = resident(arena);
        assert!(left <= KEPT + (200 << 20) / 4 + (8 << 20), "{size}: {} MiB", left >> 20);
    }
}

#[test]
fn zeroed_memory_is_zero_whoever_had_it_before() {
    let arena = arena();
    for size in [10, 1000, 40_000, 1 << 20, 20 << 20, 40 << 20] {
        let layout = Layout::from_size_align(size, 8).expect("a layout");
        for _ in 0..3 {
            let pointer = arena.allocate_zeroed(layout, 1);
            assert!(!pointer.is_null());
            // SAFETY: so many bytes were allocated, and they are initialised to zero.
            let bytes = unsafe { std::slice::from_raw_parts_mut(pointer, size) };
            assert!(all_are(bytes, 0), "{size}");
            bytes.fill(0xee);
            free(arena, arena.offset_of(pointer.addr()).expect("it is here"), layout, 1);
        }
    }
}

/// Allocates and frees in the arena at random, with up to `HELD` blocks at a time, each with its
/// own pattern. Uses no other allocator, so it may run where those must not be used.
fn churn<const HELD: usize>(random: &mut Random, rounds: usize) {
    let mut blocks = [const { None::<Block> }; HELD];
    for _ in 0..rounds {
        let (which, layout, seed) = (random.next() % HELD, random.layout(), random.next());
        let block = (seed % 4 != 0).then(|| Block::new(layout, seed as u8, false, seed % 3 == 0));
        if let Some(block) = std::mem::replace(&mut blocks[which], block) {
            block.free();
        }
    }
    blocks.into_iter().flatten().for_each(Block::free);
}

#[test]
fn threads_allocate_and_free_what_other_threads_have_allocated() {
    const THREADS: usize = 4;
    let slots: Vec<Mutex<Option<Block>>> = (0..256).map(|_| Mutex::new(None)).collect();
    thread::scope(|scope| {
        for index in 0..THREADS {
            let slots = &slots;
            scope.spawn(move || {
                let mut random = Random(index as u64 + 1);
                for _ in 0..10_000 {
                    let slot = random.next() % slots.len();
                    let (layout, seed) = (random.layout(), random.next());
                    let new = (seed % 4 != 0)
                        .then(|| Block::new(layout, seed as u8, seed % 8 == 0, false));
                    let old = std::mem::replace(&mut *slots[slot].lock().expect("unharmed"), new);
                    if let Some(block) = old {
                        block.free();
                    }
                }
            });
        }
    });
    slots.into_iter().filter_map(|slot| slot.into_inner().expect("unharmed")).for_each(Block::free);
}

/// Many threads, few spans: objects of two classes are taken and freed so that spans fill, empty,
/// change hands and change their class all the time. When all is still, nothing may be lost.
#[test]
fn no_free_object_is_forgotten_when_spans_change_hands() {
    const THREADS: usize = 4;
    let layouts = [6000, 20_000].map(|size| Layout::from_size_align(size, 16).expect("a layout"));
    for round in 0..20 {
        let arena = arena();
        let slots: Vec<AtomicUsize> = (0..1 << 9).map(|_| AtomicUsize::new(0)).collect();
        let begin = Barrier::new(THREADS);
        thread::scope(|scope| {
            for index in 0..THREADS {
                let (slots, begin) = (&slots, &begin);
                scope.spawn(move || {
                    let mut random = Random((round * THREADS + index) as u64 + 1);
                    // Some share a shard.
                    let shard = index / 2;
                    begin.wait();
                    for turn in 0..5000 {
                        let number = random.next() % slots.len();
                        let kind = number % 2;
                        let empty = turn / 500 % 2 == 1;
                        let new = if empty { None } else { take(arena, layouts[kind], shard) };
                        let old = slots[number].swap(new.unwrap_or(0), Ordering::AcqRel);
                        if old != 0 {
                            free(arena, old, layouts[kind], shard);
                        }
                    }
                });
            }
        });
        arena.check();
        for (number, slot) in slots.iter().enumerate() {
            let offset = slot.swap(0, Ordering::AcqRel);
            if offset != 0 {
                free(arena, offset, layouts[number % 2], 3);
            }
        }
        arena.check();
        let layout = layouts[0];
        let room = std::iter::from_fn(|| take(arena, layout, 0)).count();
        assert!(room * layout.size() > SMALL_ARENA / 4 * 3, "{room}");
    }
}

#[test]
fn what_is_freed_twice_or_was_never_allocated_ends_the_process() {
    let name = "what_is_freed_twice_or_was_never_allocated_ends_the_process";
    alone(module_path!(), name, || {
        let (small, large) = (Layout::new::<[u8; 100]>(), Layout::new::<[u8; 100_000]>());
        for layout in [small, large] {
            let twice = start(Fork::Hooked, || {
                let arena = arena();
                let offset = take(arena, layout, 0).expect("there is room");
                free(arena, offset, layout, 0);
                free(arena, offset, layout, 0);
                true
            });
            assert_eq!(twice.end(), End::Signal(libc::SIGABRT), "{layout:?}");
        }
        // In the arena's own data, in the middle of what is accessible, and in what is not.
        for never in [0, 10 * SPAN_BYTES, 60 * SPAN_BYTES, SMALL_ARENA - 1] {
            let never = start(Fork::Hooked, || {
                let arena = arena();
                take(arena, small, 0).expect("there is room");
                free(arena, never, small, 0);
                true
            });
            assert_eq!(never.end(), End::Signal(libc::SIGABRT));
        }
        let inside = start(Fork::Hooked, || {
            let arena = arena();
            free(arena, take(arena, large, 0).expect("there is room") + 4096, large, 0);
            true
        });
        assert_eq!(inside.end(), End::Signal(libc::SIGABRT));
    });
}

#[test]
fn a_child_goes_on_with_what_its_parent_had() {
    alone(module_path!(), "a_child_goes_on_with_what_its_parent_had", || {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for index in 0..3 {
                let over = &over;
                scope.spawn(move || {
                    let mut random = Random(index + 1);
                    while !over.load(Ordering::Relaxed) {
                        churn::<40>(&mut random, 200);
                    }
                });
            }
            let mut random = Random(99);
            for round in 0..40 {
                let how = if round % 2 == 0 { Fork::Hooked } else { Fork::Raw };
                let layouts: Vec<Layout> = (0..50).map(|_| random.layout()).collect();
                let blocks: Vec<Block> =
                    layouts.iter().map(|&layout| Block::new(layout, 3, false, false)).collect();
                let seed = random.next() as u64 | 1;
                let child = start(how, || {
                    churn::<100>(&mut Random(seed), 2000);
                    blocks.iter().for_each(|block| block.check(block.layout.size()));
                    true
                });
                // The parent's change what it has while the child checks its copy.
                churn::<20>(&mut random, 100);
                assert_eq!(child.end(), End::Returned(true), "{round}");
                blocks.into_iter().for_each(Block::free);
            }
            over.store(true, Ordering::Relaxed);
        });
    });
}

/// The thread that is stopped, and whether it may go on.
static STOPPED: AtomicBool = AtomicBool::new(false);
static GO_ON: AtomicBool = AtomicBool::new(false);

/// Allocates where it has interrupted something, then stops the thread until it may go on.
extern "C" fn stop(_signal: i32) {
    // It may have been within `movable`.
    private(|| churn::<10>(&mut Random(5), 20));
    STOPPED.store(true, Ordering::SeqCst);
    while !GO_ON.load(Ordering::SeqCst) {
        std::hint::spin_loop();
    }
    STOPPED.store(false, Ordering::SeqCst);
}

/// Why there are no locks: a thread that is stopped in the middle, as by a fault that nobody has
/// served yet, keeps nobody waiting. It is stopped by a signal wherever it happens to be.
#[test]
fn a_thread_that_stops_anywhere_keeps_nobody_waiting() {
    alone(module_path!(), "a_thread_that_stops_anywhere_keeps_nobody_waiting", || {
        let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all zeroes is an action: the default one, without flags.
        let action_ref = unsafe { action.assume_init_mut() };
        action_ref.sa_sigaction = stop as *const () as usize;
        // SAFETY: the action is valid; the handler uses nothing that a signal must not.
        let outcome =
            unsafe { libc::sigaction(libc::SIGUSR1, &raw const *action_ref, ptr::null_mut()) };
        assert_eq!(outcome, 0);
        let (over, tid) = (AtomicBool::new(false), AtomicI32::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                tid.store(gettid() as i32, Ordering::SeqCst);
                let mut random = Random(7);
                while !over.load(Ordering::SeqCst) {
                    churn::<60>(&mut random, 200);
                }
            });
            while tid.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            let mut random = Random(8);
            for _ in 0..300 {
                GO_ON.store(false, Ordering::SeqCst);
                let (pid, tid) = (std::process::id(), tid.load(Ordering::SeqCst));
                // SAFETY: no conditions; the thread runs until `over`.
                unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, libc::SIGUSR1) };
                let deadline = Instant::now() + Duration::from_secs(20);
                while !STOPPED.load(Ordering::SeqCst) {
                    assert!(Instant::now() < deadline, "the signal arrives");
                    thread::yield_now();
                }
                // If this waits for the other thread, it waits for ever; the harness notices.
                churn::<60>(&mut random, 300);
                GO_ON.store(true, Ordering::SeqCst);
                while STOPPED.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            }
            over.store(true, Ordering::SeqCst);
        });
    });
}

#[test]
fn only_the_innermost_closure_says_what_is_movable() {
    let layout = Layout::new::<[u8; 100]>();
    let is_movable = || {
        // SAFETY: the size is not 0.
        let pointer = unsafe { ALLOCATOR.alloc(layout) };
        let movable = !contains(Page::containing(pointer.addr() as u64));
        // SAFETY: it was just allocated so.
        unsafe { ALLOCATOR.dealloc(pointer, layout) };
        movable
    };
    assert!(!is_movable());
    movable(|| {
        assert!(is_movable());
        movable(|| assert!(is_movable()));
        assert!(is_movable());
        private(|| {
            assert!(!is_movable());
            movable(|| assert!(is_movable()));
            assert!(!is_movable());
        });
        assert!(is_movable());
        assert!(!thread::scope(|scope| scope.spawn(is_movable).join().expect("it tells")));
    });
    assert!(!is_movable());
    let panicked = std::panic::catch_unwind(|| movable(|| panic!("on purpose")));
    assert!(panicked.is_err() && !is_movable());
}

#[test]
fn an_arena_takes_what_addresses_there_are() {
    alone(module_path!(), "an_arena_takes_what_addresses_there_are", || {
        let limit = libc::rlimit { rlim_cur: 2 << 30, rlim_max: 2 << 30 };
        // SAFETY: the limit is a valid one; it holds for this process, which does nothing else.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
        let arena = Arena::reserve(128 << 30).expect("there is room for a smaller one");
        let bytes = arena.range().len() * uhmm::PAGE_SIZE;
        assert!([256 << 20, 512 << 20, 1 << 30].contains(&bytes), "{bytes:#x}");
        let layout = Layout::new::<[u8; 5000]>();
        assert!(take(arena, layout, 0).is_some());
        arena.check();
    });
}

#[test]
fn only_one_arena_is_begun() {
    let begun: Vec<Option<PageRange>> = thread::scope(|scope| {
        let begin = || begin().map(Arena::range);
        let threads = [(); 4].map(|()| scope.spawn(begin));
        threads.into_iter().map(|thread| thread.join().expect("it begins")).collect()
    });
    assert!(begun.iter().all(|&arena| arena.is_some() && arena == range()));
    assert!(is_installed());
}
