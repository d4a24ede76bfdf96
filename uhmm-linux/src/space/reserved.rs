//! Memory that never moves, since serving a fault may need it.
//!
//! A server that touched a page that is out would wait for itself. So would a thread that holds a
//! lock that a server needs, and touches one: its stack, or what it allocates. Therefore these stay:
//! the arena that Rust code allocates from where [`Allocator`](crate::Allocator) is installed, the
//! loaded objects with their static data, staging and buffers, and the stack and the thread-local
//! storage of every thread that has called in.

use std::cell::Cell;

use uhmm::{PageRange, SpaceId};

use super::Space;
use super::state::numbers;
use crate::sys::{allocator, objects, thread};

thread_local! {
    /// The space that this thread's stack is reserved in.
    static RESERVED_IN: Cell<Option<SpaceId>> = const { Cell::new(None) };
}

/// Returns where the loaded objects are, with their static data.
pub(super) fn loaded_objects() -> Vec<PageRange> {
    let mut ranges = objects::segments();
    ranges.extend(objects::thread_local_segments());
    ranges
}

/// Returns the arena that Rust code allocates from, where there is one. It is never unmapped.
pub(super) fn arena() -> Option<PageRange> {
    allocator::range()
}

impl Space {
    /// Lets `range` move, where not everything may.
    pub(crate) fn manage(&self, range: PageRange) {
        self.reserve_this_thread();
        if let Some(managed) = &mut self.lock().managed {
            managed.insert(numbers(range));
        }
    }

    /// Reserves the stack of the calling thread, the first time that it calls in. What is out of it
    /// by then comes home when it is touched, which is before any lock is taken.
    pub(crate) fn reserve_this_thread(&self) {
        if RESERVED_IN.get() == Some(self.id) {
            return;
        }
        // The C library may allocate for this, and read a file: no lock is held.
        let stack = thread::stack_of_this_thread().ok();
        for range in stack.into_iter().chain([thread::tls_of_this_thread()]) {
            self.reserve(range);
        }
        RESERVED_IN.set(Some(self.id));
    }

    /// Keeps `range` from moving, and brings home what of it has.
    fn reserve(&self, range: PageRange) {
        self.lock().reserved.insert(numbers(range));
        loop {
            let out = {
                let mut state = self.lock();
                let out = state.overlapping(range).next().map(|(first, extent)| {
                    first.block(extent.order).intersection(range).expect("they overlap")
                });
                match out {
                    // From now on a page of it that is not there is the kernel's affair. If it will
                    // not be, the range stays registered, and holes in it are served.
                    None => {
                        let _ = self.release_range(&mut state, range);
                        return;
                    }
                    Some(out) => out,
                }
            };
            // An ordinary touch, with nothing held.
            if self.kernel.populate(out, false).is_err() {
                return;
            }
        }
    }
}
