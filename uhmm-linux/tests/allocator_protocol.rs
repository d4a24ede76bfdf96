//! The protocol of the allocator's small objects, under a checker that draws schedules at random.
//!
//! The modules are the crate's own, with the checker's atomics in the place of the processor's, and
//! with classes of one and two objects in a machine of a few spans: so spans fill, empty, are
//! listed, returned, and made for another class in nearly every step. What the checker cannot draw
//! is what weak orderings allow; the comments in the modules argue about those.
//!
//! A failure prints the one schedule that failed, for `shuttle::replay`.
#![cfg(not(loom))]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;

use self::atomics::AtomicU64;
use self::classes::{ALL, CLASSES};
use self::objects::{Object, Objects, Shard};
use self::runs::{Runs, Summary};
use self::spans::{ClassSpans, Span, Spans, Use};

/// What the modules take from the module around them.
mod atomics {
    pub(super) use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
}

/// Two classes with few objects.
mod classes {
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Class {
        pub(super) objects: u32,
    }

    pub(super) const CLASSES: usize = 2;
    pub(super) const MOST_OBJECTS: usize = 64;
    pub(super) static ALL: [Class; CLASSES] = [Class { objects: 1 }, Class { objects: 2 }];

    impl Class {
        pub(super) fn words(self) -> usize {
            1
        }

        pub(super) fn mask(self, word: usize) -> u64 {
            if word == 0 { (1 << self.objects) - 1 } else { 0 }
        }
    }
}

#[path = "../src/sys/allocator/objects.rs"]
mod objects;
#[path = "../src/sys/allocator/runs.rs"]
#[allow(dead_code, reason = "spans have no bytes here")]
mod runs;
#[path = "../src/sys/allocator/spans.rs"]
mod spans;

const UNUSED_SPANS: u32 = 1;

fn corrupted(what: &str) -> ! {
    panic!("{what}")
}

/// Spans are numbered from 1; few enough to run out.
const SPANS: u32 = 3;

/// How many threads there are. The first two have a shard in common.
const THREADS: usize = 3;

/// How many things each thread does.
const STEPS: usize = 8;

/// An arena without memory.
struct World {
    spans: Vec<Span>,
    classes: [ClassSpans; CLASSES],
    shards: [Shard; 2],
    used: [AtomicU64; 1],
    dirty: [AtomicU64; 1],
    summary: Summary,
    /// What belongs to the threads: objects, and runs as objects of no class. No step of the
    /// checker: it only notes.
    taken: Mutex<BTreeSet<(Object, Option<usize>)>>,
}

impl World {
    fn new() -> World {
        World {
            spans: (0..=SPANS).map(|_| Span::new()).collect(),
            classes: [(); CLASSES].map(|()| ClassSpans::new()),
            shards: [(); 2].map(|()| Shard::new()),
            used: [AtomicU64::new(!0 << (SPANS + 1) | 1)],
            dirty: [AtomicU64::new(0)],
            summary: Summary::default(),
            taken: Mutex::default(),
        }
    }

    fn spans(&self) -> Spans<'_> {
        // SAFETY: all spans are there, and numbers are only passed of those.
        unsafe { Spans::new(self.spans.as_ptr(), &self.classes) }
    }

    fn objects(&self, shard: usize) -> Objects<'_> {
        Objects { spans: self.spans(), shard: &self.shards[shard] }
    }

    fn runs(&self) -> Runs<'_> {
        Runs { used: &self.used, dirty: &self.dirty, summary: &self.summary }
    }

    fn taken(&self) -> MutexGuard<'_, BTreeSet<(Object, Option<usize>)>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an object, or a run of one span for no class.
    fn take(&self, class: Option<usize>, shard: usize) {
        let fresh = || self.runs().take(1, 1).map(|run| run.first);
        let taken = match class {
            Some(class) => self.objects(shard).take(class, fresh),
            None => fresh().map(|span| {
                self.spans().span(span).set_usage(Use::Run);
                Object { span, index: 0 }
            }),
        };
        let Some(object) = taken else { return };
        let mut all = self.taken();
        assert!(class.is_none_or(|class| object.index < ALL[class].objects), "{object:?}");
        let of_span = all.iter().filter(|(other, _)| other.span == object.span);
        assert!(of_span.clone().all(|(other, _)| *other != object), "{object:?} is taken twice");
        assert!(of_span.clone().all(|(_, other)| *other == class), "{object:?} has two classes");
        all.insert((object, class));
    }

    /// Gives back something that a thread has taken, the `which`th.
    fn give_back(&self, which: usize, shard: usize) {
        let mut all = self.taken();
        let Some(&(object, class)) = all.iter().nth(which % all.len().max(1)) else { return };
        all.remove(&(object, class));
        drop(all);
        let returned = |span| self.runs().give_back(span, 1, || true);
        match class {
            Some(class) => self.objects(shard).give_back(object, class, returned),
            None => {
                self.spans().span(object.span).set_usage(Use::None);
                returned(object.span);
            }
        }
    }

    /// Checks that nothing is lost, while all is still.
    fn check(&self) {
        self.runs().check();
        self.spans().check(1..SPANS + 1);
        let taken = self.taken();
        for number in 1..=SPANS {
            let span = self.spans().span(number);
            let in_use = taken.iter().filter(|(object, _)| object.span == number).count() as u32;
            assert_eq!(self.runs().is_used(number), span.usage() != Use::None, "span {number}");
            let Use::Class(class) = span.usage() else {
                assert_eq!(in_use > 0, span.usage() == Use::Run, "span {number}");
                continue;
            };
            assert_eq!(span.has_free(), in_use < ALL[class].objects, "span {number}");
            let current = self.shards.iter().any(|shard| shard.has_current(number, class));
            let found = current || span.is_listed() || !span.has_free();
            assert!(found, "what is free in span {number} is forgotten");
        }
    }
}

/// Lets threads take and give back, and checks when all is still, in between and at the end.
fn take_and_give_back() {
    let world = Arc::new(World::new());
    for _ in 0..2 {
        let threads = [0, 1, 2].map(|index: usize| {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                for _ in 0..STEPS {
                    let mut random = thread_rng();
                    let shard = index / 2;
                    match random.gen_range(0..9) {
                        0..4 => world.take(Some(random.gen_range(0..CLASSES)), shard),
                        4 => world.take(None, shard),
                        _ => world.give_back(random.gen_range(0..64), shard),
                    }
                }
            })
        });
        threads.into_iter().for_each(|thread| thread.join().expect("it holds"));
        world.check();
    }
}

#[test]
fn no_object_is_taken_twice_and_none_that_is_free_is_forgotten() {
    assert_eq!(THREADS, 3);
    shuttle::check_random(take_and_give_back, 5000);
}

#[test]
fn the_same_under_schedules_with_few_surprises() {
    shuttle::check_pct(take_and_give_back, 5000, 4);
}
