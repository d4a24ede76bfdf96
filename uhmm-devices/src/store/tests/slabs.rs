use std::cell::Cell;

use proptest::prelude::*;
use uhmm::PAGE_SIZE;

use super::super::slabs::{Handle, NoRoom, Slabs};

const LARGEST: usize = PAGE_SIZE / 8 * 7;

/// Slabs whose bytes are counted, up to a limit.
struct Counted {
    slabs: Slabs,
    taken: Cell<u64>,
    limit: u64,
}

impl Counted {
    fn new(limit: u64) -> Counted {
        Counted { slabs: Slabs::new(LARGEST, PAGE_SIZE), taken: Cell::new(0), limit }
    }

    fn insert(&self, object: &[u8]) -> Result<Handle, NoRoom> {
        let take = |bytes| {
            let within = self.taken.get() + bytes <= self.limit;
            self.taken.set(self.taken.get() + if within { bytes } else { 0 });
            within
        };
        self.slabs.insert(object, object.len() as u32, take, |bytes| {
            self.taken.set(self.taken.get() - bytes)
        })
    }

    fn remove(&self, handle: Handle) {
        self.taken.set(self.taken.get() - self.slabs.remove(handle));
    }

    /// Moves all that can be moved. `moved` is told from where to where.
    fn compact(&self, mut moved: impl FnMut(Handle, Handle)) {
        while let Some((from, owner)) = self.slabs.last_of_sparse() {
            assert!(owner > 0, "it was stored with its size");
            let Some((to, bytes)) = self.slabs.relocate(from) else { return };
            self.taken.set(self.taken.get() - bytes);
            moved(from, to);
        }
    }

    fn read(&self, handle: Handle, bytes: usize) -> Vec<u8> {
        let mut object = vec![0; bytes];
        self.slabs.read(handle, &mut object);
        object
    }
}

#[test]
fn many_objects_of_each_size_leave_little_over() {
    for size in (64..=LARGEST).step_by(64).chain([PAGE_SIZE]) {
        let slabs = Counted::new(u64::MAX);
        for object in 0..1000 {
            slabs.insert(&vec![object as u8; size]).expect("there is room");
        }
        let (used, taken) = (1000 * size as u64, slabs.taken.get());
        // Two slabs' worth may be begun, and of each at most 4 percent is left over.
        assert!(taken <= used * 104 / 100 + (64 << 10), "{taken} bytes for {used} of {size}");
    }
}

#[test]
fn slabs_that_are_empty_are_given_back() {
    let slabs = Counted::new(u64::MAX);
    let objects: Vec<Handle> =
        (0..10_000).map(|n| slabs.insert(&vec![1; 1 + n % LARGEST]).expect("room")).collect();
    objects.into_iter().for_each(|handle| slabs.remove(handle));
    assert_eq!(slabs.taken.get(), 0);
    assert_eq!(slabs.slabs.check(), Ok((0, 0)));
}

#[test]
fn objects_fill_the_first_slabs_so_that_the_last_become_empty() {
    let slabs = Counted::new(u64::MAX);
    let mut objects: Vec<Handle> =
        (0..1024).map(|_| slabs.insert(&[1; 1024]).expect("room")).collect();
    let full = slabs.taken.get();
    // Half of each slab goes, and as much comes as fills half of them again.
    for index in (0..objects.len()).rev().step_by(2) {
        slabs.remove(objects.swap_remove(index));
    }
    assert_eq!(slabs.taken.get(), full, "each slab has an object left");
    let again: Vec<Handle> = (0..512).map(|_| slabs.insert(&[2; 1024]).expect("room")).collect();
    assert_eq!(slabs.taken.get(), full, "the holes were not used");
    again.into_iter().for_each(|handle| slabs.remove(handle));
}

#[test]
fn nearly_empty_slabs_are_packed_together() {
    let slabs = Counted::new(u64::MAX);
    let object = |n: u32| n.to_ne_bytes().repeat(250);
    let objects: Vec<Handle> = (0..4096).map(|n| slabs.insert(&object(n)).expect("room")).collect();
    let full = slabs.taken.get();
    let mut kept: Vec<(Handle, u32)> = objects.into_iter().zip(0..).collect();
    for index in (0..kept.len()).rev().filter(|index| index % 16 != 0) {
        slabs.remove(kept.swap_remove(index).0);
    }
    assert_eq!(slabs.taken.get(), full, "each slab has an object left");
    slabs.compact(|from, to| {
        let moved = kept.iter_mut().find(|(handle, _)| *handle == from);
        moved.expect("it is there").0 = to;
    });
    assert!(slabs.taken.get() * 10 < full, "{} bytes of {full} are left", slabs.taken.get());
    for (handle, n) in kept {
        assert_eq!(slabs.read(handle, 1000), object(n));
    }
    slabs.slabs.check().expect("tables and bits agree");
}

#[test]
fn at_the_limit_room_in_larger_slabs_will_do() {
    let slabs = Counted::new(64 << 10);
    slabs.insert(&[1; PAGE_SIZE]).expect("there is room");
    let left = std::iter::from_fn(|| slabs.insert(&[2; 64]).ok()).count();
    assert!(left >= 3, "{left} objects found room beside the first");
    assert_eq!(slabs.insert(&[3; 1]), Err(NoRoom));
    assert!(slabs.taken.get() <= 64 << 10);
}

#[test]
#[should_panic(expected = "is free")]
fn removing_twice_is_found_out() {
    let slabs = Counted::new(u64::MAX);
    let [first, _second] = [[1; 64], [2; 64]].map(|object| slabs.insert(&object).expect("room"));
    slabs.remove(first);
    slabs.remove(first);
}

#[derive(Clone, Debug)]
enum Step {
    Insert(usize),
    Remove(usize),
    Compact,
}

proptest! {
    #[test]
    fn slabs_beside_a_list(
        limit in prop_oneof![Just(u64::MAX), (1_u64..1 << 20)],
        steps in prop::collection::vec(
            prop_oneof![
                3 => (1..=LARGEST).prop_map(Step::Insert),
                1 => Just(Step::Insert(PAGE_SIZE)),
                3 => any::<usize>().prop_map(Step::Remove),
                1 => Just(Step::Compact),
            ],
            1..300,
        ),
    ) {
        let slabs = Counted::new(limit);
        let mut model: Vec<(Handle, Vec<u8>)> = Vec::new();
        for (step, mark) in steps.into_iter().zip(0_u64..) {
            match step {
                Step::Insert(bytes) => {
                    let object: Vec<u8> =
                        (0..bytes as u64).map(|at| (at * 31 + mark * 7) as u8).collect();
                    match slabs.insert(&object) {
                        Ok(handle) => {
                            prop_assert_eq!(Handle::from_bits(handle.to_bits()), handle);
                            model.push((handle, object));
                        }
                        Err(NoRoom) => prop_assert!(limit < u64::MAX, "there was room"),
                    }
                }
                Step::Compact => slabs.compact(|from, to| {
                    let moved = model.iter_mut().find(|(handle, _)| *handle == from);
                    moved.expect("it is there").0 = to;
                }),
                Step::Remove(_) if model.is_empty() => {}
                Step::Remove(which) => {
                    let (handle, object) = model.swap_remove(which % model.len());
                    prop_assert_eq!(slabs.read(handle, object.len()), object);
                    slabs.remove(handle);
                }
            }
            prop_assert!(slabs.taken.get() <= limit);
            let checked = slabs.slabs.check().map_err(TestCaseError::fail)?;
            prop_assert_eq!(checked, (model.len() as u64, slabs.taken.get()));
        }
        for (handle, object) in model {
            prop_assert_eq!(slabs.read(handle, object.len()), object);
        }
    }
}
