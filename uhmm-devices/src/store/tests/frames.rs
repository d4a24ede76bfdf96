use std::collections::BTreeMap;

use proptest::prelude::*;
use uhmm::{DeviceFrame, Order};

use super::super::frames::{CHUNK, FrameSpace};
use super::order;

/// Four chunks in two shards.
fn space() -> FrameSpace<u32> {
    FrameSpace::new(4 * CHUNK as u64, 2)
}

#[test]
fn every_frame_is_given_out_once_at_every_order() {
    for size in 0..=Order::HUGE.get() {
        let space = space();
        let mut given = Vec::new();
        while let Some(frame) = space.allocate(order(size), |_| true) {
            assert!(frame.0.is_multiple_of(order(size).pages()), "{frame:?} is not aligned");
            given.push(frame.0);
        }
        given.sort_unstable();
        let expected: Vec<u64> =
            (0..space.capacity()).step_by(order(size).pages() as usize).collect();
        assert_eq!(given, expected);
        space.check().expect("the lists are right");
    }
}

#[test]
fn what_is_larger_than_a_chunk_is_refused() {
    assert_eq!(space().allocate(order(10), |_| true), None);
}

#[test]
fn a_chunk_that_cannot_be_backed_gives_nothing_and_can_be_backed_later() {
    let space = space();
    let mut asked = 0;
    let refuse = |_| {
        asked += 1;
        false
    };
    assert_eq!(space.allocate(Order::PAGE, refuse), None);
    assert_eq!(asked, 1);
    space.check().expect("the lists are right");
    let all = std::iter::from_fn(|| space.allocate(Order::HUGE, |_| true)).count();
    assert_eq!(all, 4);
}

#[test]
fn an_idle_chunk_can_be_retired_or_kept() {
    let space = space();
    let frame = space.allocate(Order::PAGE, |_| true).expect("there is room");
    assert_eq!(space.take_idle(0), None, "it is in use");
    assert!(space.free(frame, Order::PAGE, |_| {}), "it is idle now");
    assert_eq!(space.take_idle(1), None, "one is to be kept");

    let chunk = space.take_idle(0).expect("it is idle");
    let mut backed = 0;
    let mut count = |_| {
        backed += 1;
        true
    };
    // Nobody else gets it meanwhile.
    for _ in 0..3 {
        space.allocate(Order::HUGE, &mut count).expect("three are left");
    }
    assert_eq!(space.allocate(Order::PAGE, &mut count), None);
    space.restore(chunk);
    let frame = space.allocate(Order::HUGE, &mut count).expect("it is back");
    assert_eq!(backed, 3, "it was backed all along");

    assert!(space.free(frame, Order::HUGE, |_| {}));
    let tables = space.table_bytes();
    space.retire(space.take_idle(0).expect("it is idle"));
    assert!(space.table_bytes() < tables, "its entries are kept");
    space.check().expect("the lists are right");
    let mut again = 0;
    let backs = |_| {
        again += 1;
        true
    };
    space.allocate(Order::PAGE, backs).expect("it is free");
    assert_eq!(again, 1, "it was not backed");
}

#[test]
#[should_panic(expected = "is not held")]
fn freeing_twice_is_found_out() {
    let space = space();
    let frame = space.allocate(order(3), |_| true).expect("there is room");
    space.free(frame, order(2), |_| {});
    space.free(frame, order(3), |_| {});
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(u8),
    /// The piece of this order that holds some frame in use.
    Free {
        which: usize,
        order: u8,
    },
    Retire,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..=9_u8).prop_map(Step::Allocate),
        4 => (any::<usize>(), 0..=9_u8).prop_map(|(which, order)| Step::Free { which, order }),
        1 => Just(Step::Retire),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_beside_a_map(steps in prop::collection::vec(step(), 1..100)) {
        let space = space();
        // The frames in use, each with what its entry holds.
        let mut model: BTreeMap<u64, u32> = BTreeMap::new();
        for (step, mark) in steps.into_iter().zip(1..) {
            match step {
                Step::Allocate(size) => {
                    let pages = order(size).pages();
                    let Some(frame) = space.allocate(order(size), |_| true) else {
                        let fits =
                            |&first: &u64| model.range(first..first + pages).next().is_none();
                        let free = (0..space.capacity()).step_by(pages as usize).find(fits);
                        prop_assert_eq!(free, None, "there was room");
                        continue;
                    };
                    prop_assert!(frame.0.is_multiple_of(pages), "{:?} is not aligned", frame);
                    space.with(frame, pages as usize, |entries| {
                        assert!(entries.iter().all(|&entry| entry == 0), "an entry is stale");
                        entries.fill(mark);
                    });
                    for frame in frame.0..frame.0 + pages {
                        prop_assert_eq!(model.insert(frame, mark), None, "given out twice");
                    }
                }
                Step::Free { which, order: size } => {
                    let frames: Vec<u64> = model.keys().copied().collect();
                    let Some(&frame) = frames.get(which % frames.len().max(1)) else { continue };
                    let pages = order(size).pages();
                    let first = frame & !(pages - 1);
                    if model.range(first..first + pages).count() as u64 != pages {
                        continue;
                    }
                    let mut next = first;
                    space.free(DeviceFrame(first), order(size), |entry| {
                        assert_eq!(model.remove(&next), Some(std::mem::take(entry)));
                        next += 1;
                    });
                }
                Step::Retire => {
                    if let Some(chunk) = space.take_idle(0) {
                        space.retire(chunk);
                    }
                }
            }
            let mut found = BTreeMap::new();
            space.for_each(|frame, &entry| {
                found.insert(frame.0, entry);
            });
            prop_assert_eq!(&found, &model);
            space.check().map_err(TestCaseError::fail)?;
        }
    }
}
