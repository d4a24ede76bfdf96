//! Pages that are stored, fetched and freed while others are moved together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use uhmm::{DeviceFrame, DeviceMemory, Order};

use super::super::content::PageBytes;
use super::super::{Compressed, StoreOptions};
use super::{compressible, copy_in, copy_out};

/// How often each thread fills its part of the store and empties most of it.
const ROUNDS: u64 = 12;

/// How many pages a thread has at most.
const PAGES: u64 = 400;

fn page(seed: u64) -> PageBytes {
    compressible(seed, 100 + (seed % 7) as usize * 100)
}

/// Fills and empties, and looks at what is left as often as others move it.
fn user(store: &Compressed, first: u64) {
    for round in 0..ROUNDS {
        let seeds = first + round * PAGES..first + (round + 1) * PAGES;
        let mut held: Vec<(DeviceFrame, u64)> = seeds
            .map(|seed| {
                let frame = store.allocate(Order::PAGE).expect("there is room");
                assert!(copy_in(store, frame, Order::PAGE, &[page(seed)]));
                (frame, seed)
            })
            .collect();
        for index in (0..held.len()).rev().filter(|index| index % 10 != 0) {
            store.free(held.swap_remove(index).0, Order::PAGE);
            let (frame, seed) = held[index % held.len()];
            assert_eq!(copy_out(store, frame, Order::PAGE), Some(vec![page(seed)]));
        }
        held.into_iter().for_each(|(frame, _)| store.free(frame, Order::PAGE));
    }
}

#[test]
fn pages_are_what_they_were_while_they_are_moved() {
    let store = Compressed::new(StoreOptions::new());
    let done = AtomicBool::new(false);
    let moved = thread::scope(|scope| {
        let compact = || {
            let mut moved = 0;
            while !done.load(Ordering::SeqCst) {
                moved += store.compact(8);
                thread::yield_now();
            }
            moved
        };
        let compactor = scope.spawn(compact);
        let store = &store;
        let users = [0, 1, 2]
            .map(|user_number| scope.spawn(move || user(store, user_number * ROUNDS * PAGES)));
        let ended = users.map(thread::ScopedJoinHandle::join);
        done.store(true, Ordering::SeqCst);
        ended.into_iter().for_each(|ended| ended.expect("no page was damaged"));
        compactor.join().expect("no panic")
    });
    assert!(moved > 20, "{moved} pages were moved, which is too few to test anything");
    store.check().expect("the statistics are right");
    assert_eq!((store.statistics().pages(), store.statistics().taken_bytes), (0, 0));
}
