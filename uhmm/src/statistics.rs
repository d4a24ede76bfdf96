//! Counters: what was done, how often, and why.

use crate::policy::{Location, MigrateCause};
use crate::primitive::atomic::{AtomicU64, Ordering};

/// Declares counters and what a reader sees of them.
macro_rules! counters {
    (
        $(#[$doc:meta])* $statistics:ident, $counters:ident {
            $($(#[$field_doc:meta])* $field:ident,)*
        }
        $({ $($(#[$gauge_doc:meta])* $gauge:ident,)* })?
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct $statistics {
            $($(#[$field_doc])* pub $field: u64,)*
            $($($(#[$gauge_doc])* pub $gauge: u64,)*)?
        }

        #[derive(Default)]
        pub(crate) struct $counters {
            $($field: AtomicU64,)*
        }

        impl $counters {
            $(pub(crate) fn $field(&self, count: u64) {
                // Relaxed: a counter orders nothing.
                self.$field.fetch_add(count, Ordering::Relaxed);
            })*

            pub(crate) fn snapshot(&self, $($($gauge: u64),*)?) -> $statistics {
                $statistics {
                    // Relaxed: as above. The values need not be of one moment.
                    $($field: self.$field.load(Ordering::Relaxed),)*
                    $($($gauge,)*)?
                }
            }
        }
    };
}

counters! {
    /// What happened to an address space, since it was made.
    SpaceStatistics, SpaceCounters {
        /// Range faults that were asked for.
        range_faults,
        /// Pages that range faults entered into device page tables.
        mapped_pages,
        /// Pages that range faults had to fault in.
        faulted_pages,
        /// Range faults' batches that an invalidation collided with.
        collisions,
        /// Range faults that failed.
        failed_range_faults,
        /// Faults that devices had served by policy.
        device_faults,
        /// Invalidations that mirrors heard of.
        invalidations,
        /// Pages that were taken exclusively.
        exclusive_pages,
        /// Naps that policies made device faults take.
        throttles,
    }
}

counters! {
    /// What happened to a device's memory, since it was registered.
    MemoryStatistics, MemoryCounters {
        /// Pages that came because somebody asked for it.
        in_by_request,
        /// Pages that came because the device faulted on or near them.
        in_by_device_fault,
        /// Of all that came, pages that had no contents and were not copied.
        in_without_copy,
        /// Of all that came, pages whose memory became the device's, as it was.
        in_by_adoption,
        /// Pages that went home because somebody asked for it.
        home_by_request,
        /// Pages that went home because a CPU touched them or a page nearby.
        home_by_cpu_fault,
        /// Pages that went home because another device needed them.
        home_by_peer_fault,
        /// Pages that went home because the device was full.
        home_by_eviction,
        /// Of all that went home, pages whose memory became the system's, as it was.
        home_in_place,
        /// CPU faults on pages in this memory.
        cpu_faults,
        /// Blocks that the copy engine failed to copy.
        failed_copies,
        /// Blocks that could not be had, whatever was evicted for them.
        failed_allocations,
        /// Large pages that were split on their way.
        splits,
        /// Naps that policies made CPUs take.
        throttles,
    }
    {
        /// Pages allocated now.
        used,
        /// The most pages that were ever allocated.
        peak,
        /// The pages that may be allocated.
        limit,
    }
}

impl MemoryCounters {
    pub(crate) fn moved(&self, to: Location, cause: MigrateCause, pages: u64) {
        match (to, cause) {
            (Location::Device, MigrateCause::DeviceFault) => self.in_by_device_fault(pages),
            (Location::Device, _) => self.in_by_request(pages),
            (Location::System, MigrateCause::CpuFault) => self.home_by_cpu_fault(pages),
            (Location::System, MigrateCause::Eviction) => self.home_by_eviction(pages),
            (Location::System, MigrateCause::PeerFault | MigrateCause::DeviceFault) => {
                self.home_by_peer_fault(pages);
            }
            (Location::System, MigrateCause::Request) => self.home_by_request(pages),
        }
    }
}
