//! Memory that never moves, since serving a fault may need it.
//!
//! A server that touched a page that is out would wait for itself. So would a thread that holds a
//! lock that a server needs, and touches one: its stack, or what it allocates. Therefore these stay:
//! the arena that Rust code allocates from where [`Allocator`](crate::Allocator) is installed, the
//! loaded objects with their static data, staging and buffers, and the stack and the thread-local
//! storage of every thread that has called in.

use std::cell::Cell;

use uhmm::PageRange;

use super::Space;
use super::state::numbers;
use crate::sys::{allocator, objects, thread};

thread_local! {
    /// The space that this thread's stack is reserved in, as the address of it.
    static RESERVED_IN: Cell<usize> = const { Cell::new(0) };
}

/// Returns what is reserved whatever threads there are.
pub(super) fn of_process() -> Vec<PageRange> {
    let mut ranges = objects::segments();
    ranges.extend(objects::thread_local_segments());
    ranges.extend(allocator::range());
    ranges
}

impl Space {
    /// Lets `range` move, where not everything may.
    pub(crate) fn manage(&self, range: PageRange) {
        if let Some(managed) = &mut self.lock().managed {
            managed.insert(numbers(range));
        }
    }

    /// Reserves the stack of the calling thread, the first time that it calls in. What is out of it
    /// by then comes home when it is touched, which is before any lock is taken.
    pub(crate) fn reserve_this_thread(&self) {
        let this = std::ptr::from_ref(self).addr();
        if RESERVED_IN.get() == this {
            return;
        }
        // The C library may allocate for this, and read a file: no lock is held.
        let stack = thread::stack_of_this_thread().ok();
        let ranges = [stack, Some(thread::tls_of_this_thread())];
        let out: Vec<PageRange> = {
            let mut state = self.lock();
            ranges.iter().flatten().for_each(|&range| state.reserved.insert(numbers(range)));
            let out = ranges.iter().flatten().flat_map(|&range| state.overlapping(range));
            out.map(|(first, extent)| first.block(extent.order)).collect()
        };
        RESERVED_IN.set(this);
        for range in out {
            // An ordinary touch, with nothing held.
            let _ = self.kernel.populate(range, false);
        }
    }
}
