//! Memory that never moves, since serving a fault may need it.
//!
//! A server that touched a page that is out would wait for itself. So would a thread that holds a
//! lock that a server needs, and touches one: its stack, or what it allocates. Therefore these stay:
//! the arena that Rust code allocates from where [`Allocator`](crate::Allocator) is installed, the
//! loaded objects with their static data, staging and buffers, and the stack and the thread-local
//! storage of every thread that has called in. In a shared library the last are found by what the
//! dynamic loader keeps, which therefore stays too ([`Space::reserve_loader`]).

use std::cell::Cell;
use std::sync::atomic::Ordering;

use uhmm::{Page, PageRange, SpaceId};

use super::Space;
use super::state::numbers;
use crate::sys::maps::Kind;
use crate::sys::{allocator, loader, objects, thread};

/// The most pages that a mapping of the loader's own has: what it needs before there is a heap.
const LOADER_PAGES: u64 = 256;

/// How many pages of its stack a thread needs to reserve it.
const ROOM_TO_RESERVE: u64 = 32;

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
        self.make_thread_locals();
        // The C library may allocate for this, and read a file: no lock is held.
        let stack = thread::stack_of_this_thread().ok();
        stack.into_iter().for_each(|stack| self.prepare_stack(stack));
        let stack = stack.into_iter().chain([thread::tls_of_this_thread()]);
        for range in stack.chain(thread::tls_table_of_this_thread()) {
            self.reserve(range);
        }
        RESERVED_IN.set(Some(self.id));
    }

    /// Has there be what the calling thread needs of its stack until it is reserved: under the lock it
    /// must not find a page of it away, or registered and missing.
    fn prepare_stack(&self, stack: PageRange) {
        let here = Page::containing(&raw const stack as u64);
        let deepest = here.number().saturating_sub(ROOM_TO_RESERVE).max(stack.first().number());
        let room = Page::new(deepest).and_then(|first| PageRange::from_bounds(first, here));
        // Of the main thread's there may be less, as it has not grown so far. What is not mapped is not
        // registered.
        if let Some(room) = room {
            let _ = self.kernel.populate(room, true);
        }
    }

    /// Reserves what the dynamic loader keeps, unless nothing was loaded since the last time.
    pub(crate) fn reserve_loader(&self) {
        let changes = loader::changes();
        // Relaxed: it is a number by itself, and to do this twice does no harm.
        if self.loaded.swap(changes, Ordering::Relaxed) != changes {
            for record in loader::records() {
                self.reserve(self.loader_memory(record.first()).unwrap_or(record));
            }
        }
    }

    /// Reserves the arguments and the environment, where the kernel says where they are.
    pub(crate) fn reserve_arguments(&self) {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        arguments_in(&stat).into_iter().for_each(|range| self.reserve(range));
    }

    /// Returns the mapping that `page` is in if it is the loader's own, and not the C library's heap:
    /// then there is more in it that the loader needs.
    fn loader_memory(&self, page: Page) -> Option<PageRange> {
        let mapping = self.kernel.vma(page).ok().flatten()?;
        let own = mapping.kind == Kind::Anonymous && mapping.range.contains(page);
        (own && mapping.range.pages() <= LOADER_PAGES).then_some(mapping.range)
    }

    /// Keeps `range` from moving, and brings home what of it has.
    pub(crate) fn reserve(&self, range: PageRange) {
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

/// Finds where the arguments and the environment are in the text of a `stat` file: the fields 48 to
/// 51, of which the third is the first after the name (proc_pid_stat(5)).
fn arguments_in(stat: &str) -> Vec<PageRange> {
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let numbers = rest.split_whitespace().skip(48 - 3).take(4).map(str::parse::<u64>);
    let numbers: Vec<u64> = numbers.map_while(Result::ok).collect();
    let pages = |bounds: &[u64]| {
        let last = bounds[1].checked_sub(1)?;
        PageRange::from_bounds(Page::containing(bounds[0]), Page::containing(last))
    };
    numbers.chunks_exact(2).filter(|bounds| bounds[0] > 0).filter_map(pages).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_and_environment_are_where_the_kernel_says() {
        let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc is there");
        let found = arguments_in(&stat);
        assert_eq!(found.len(), 2, "{stat}");
        let bytes = std::fs::read("/proc/self/cmdline").expect("/proc is there");
        assert!(found[0].len() * uhmm::PAGE_SIZE >= bytes.len());
        let one = arguments_in("7 (a) b) S 1 1");
        assert!(one.is_empty());
    }
}
