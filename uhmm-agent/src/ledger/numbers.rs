//! What is counted: the names of the numbers, and copies of them.

use std::time::Duration;

use uhmm::StayReason;

/// Declares an enumeration whose values are places in an array, each with a name for reports.
macro_rules! places {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// All of them, in the order in which they are reported.
            pub const ALL: &[$name] = &[$($name::$variant,)*];

            /// How many there are.
            pub(crate) const COUNT: usize = $name::ALL.len();

            /// Returns its name, as reports have it.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }
    };
}

places! {
    /// Something that is counted, from the start of a process to its end. What ended processes
    /// counted is kept.
    Counter {
        /// Pages that went to the device.
        PagesOut = "pages_out",
        /// Pages that came home, for whatever reason.
        PagesHome = "pages_home",
        /// Bytes that the device took in, as they were.
        BytesTaken = "bytes_taken",
        /// Pages that came home since a CPU touched one that was away.
        PagesTouched = "pages_touched",
        /// Of all that came home, pages that had not been away for long.
        SecondChances = "second_chances",
        /// Faults of CPUs on pages that were away.
        Faults = "faults",
        /// Accesses that failed since their page could not be brought home.
        FaultsRefused = "faults_refused",
        /// Times that a thread which wanted more memory was made to wait for room.
        Throttled = "throttled",
        /// Of those, times that there was no room in time, and the thread went on without.
        WentOver = "went_over",
        /// Pages that came home because the program forked.
        ForkOverrun = "fork_overrun",
        /// Children made without the C library's `fork` while pages were away.
        UnforeseenForks = "unforeseen_forks",
        /// Blocks of pages that were away, or on their way, when the program unmapped them.
        Unmapped = "unmapped",
        /// Blocks of pages that were away, or on their way, when the program discarded what is in
        /// them.
        Discarded = "discarded",
        /// Blocks of pages that were away, or on their way, when the program moved their mapping.
        Remapped = "remapped",
        /// Pages that were dropped because the program had put something else in their place.
        Replaced = "replaced",
        /// Pages whose contents were compared with a second copy (`--verify`).
        PagesVerified = "pages_verified",
        /// Times that the policy looked at all memory.
        Sweeps = "sweeps",
        /// System calls that were announced before they were made (`--announced`).
        Announced = "announced",
    }
}

places! {
    /// Something that goes up and down, in bytes. Of a process that has ended it is 0.
    Gauge {
        /// Memory of the program that is managed and at home. The budget is a limit on this.
        Resident = "resident",
        /// Memory of the program that is on the device.
        Away = "away",
        /// What the device keeps for that, in memory or in a file.
        Stored = "stored",
        /// Of what is away, pages of zeroes.
        Zero = "zero",
        /// Of what is away, pages that repeat one word, which alone is kept.
        SameFilled = "same_filled",
        /// Of what is away, pages that are kept as they are since compression gains nothing.
        Incompressible = "incompressible",
        /// What the agent itself takes of memory, without what the device keeps.
        Agent = "agent",
        /// Memory of the program that is not managed: mapped from files.
        Files = "files",
        /// Not managed: shared with other processes, or to be.
        Shared = "shared",
        /// Not managed: private, and not to be written.
        NotWritable = "not_writable",
        /// Not managed: the kernel's own, huge pages that were set aside, executable memory.
        Special = "special",
        /// Not managed, since serving a fault may need it: stacks of the agent, static data of loaded
        /// objects, what the loader keeps.
        Reserved = "reserved",
        /// Not managed: private memory of processes that have too little of it.
        TooSmall = "too_small",
        /// Managed, and never moved: locked in memory by the program.
        Locked = "locked",
    }
}

impl Gauge {
    /// Those that are of memory which is not managed or never moves, by the reason.
    pub const STAYING: [Gauge; 7] = [
        Gauge::Files,
        Gauge::Shared,
        Gauge::NotWritable,
        Gauge::Special,
        Gauge::Reserved,
        Gauge::TooSmall,
        Gauge::Locked,
    ];
}

/// How many buckets the histogram of latencies has: the last begins at 9 minutes.
pub const BUCKETS: usize = 40;

/// The reasons for which pages stay, in the order of the ledger. What a later version of `uhmm`
/// adds is counted as the place after the last.
const REASONS: [StayReason; 23] = [
    StayReason::Hole,
    StayReason::Denied,
    StayReason::FileBacked,
    StayReason::Pinned,
    StayReason::InTransit,
    StayReason::Exclusive,
    StayReason::SwappedOut,
    StayReason::AlreadyThere,
    StayReason::Elsewhere,
    StayReason::Changed,
    StayReason::Busy,
    StayReason::LargePage,
    StayReason::Shared,
    StayReason::OutOfDeviceMemory,
    StayReason::OutOfSystemMemory,
    StayReason::CopyFailed,
    StayReason::Gone,
    StayReason::Policy,
    StayReason::Reserved,
    StayReason::Locked,
    StayReason::ReadOnly,
    StayReason::Handled,
    StayReason::Unsupported,
];

/// How many reasons the ledger has room for.
pub(crate) const STAYS: usize = 32;

/// Returns the place of a reason.
pub(crate) fn place_of(reason: StayReason) -> usize {
    REASONS.iter().position(|&known| known == reason).unwrap_or(REASONS.len())
}

/// Returns the bucket of a latency: bucket `i` is for 2^i ns up to, without, 2^(i+1) ns.
pub(crate) fn bucket_of(latency: Duration) -> usize {
    let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(1);
    (nanoseconds.ilog2() as usize).min(BUCKETS - 1)
}

/// A copy of the numbers of one process, or of all. Each is exact by itself; they are not of one
/// moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    pub(crate) counters: [u64; Counter::COUNT],
    pub(crate) gauges: [u64; Gauge::COUNT],
    pub(crate) peaks: [u64; Gauge::COUNT],
    pub(crate) stays: [u64; STAYS],
    pub(crate) latency: Latency,
    pub(crate) waits: Latency,
}

impl Numbers {
    /// Returns how much was counted of `counter`.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters[counter as usize]
    }

    /// Returns how much there is of `gauge`, in bytes.
    pub fn gauge(&self, gauge: Gauge) -> u64 {
        self.gauges[gauge as usize]
    }

    /// Returns the most there ever was of `gauge`, in bytes: for all processes together, the most
    /// that was seen by [`Ledger::take_stock`](super::Ledger::take_stock).
    pub fn peak(&self, gauge: Gauge) -> u64 {
        self.peaks[gauge as usize]
    }

    /// Returns how often a page had to stay, and why, where that is not never.
    pub fn stays(&self) -> impl Iterator<Item = (String, u64)> {
        let name = |place: usize| match REASONS.get(place) {
            Some(reason) => reason.to_string(),
            None => "for another reason".to_owned(),
        };
        let counted = self.stays.iter().enumerate().filter(|(_, count)| **count > 0);
        counted.map(move |(place, &count)| (name(place), count))
    }

    /// Returns how long faults took to be served, without the wait for room.
    pub fn latency(&self) -> &Latency {
        &self.latency
    }

    /// Returns how long threads waited for room, where they did.
    pub fn waits(&self) -> &Latency {
        &self.waits
    }

    /// Adds the numbers of another process. Peaks are not added: the sum of two is no peak of both.
    pub(crate) fn add(&mut self, other: &Numbers) {
        let add = |into: &mut [u64], from: &[u64]| {
            into.iter_mut().zip(from).for_each(|(sum, &value)| *sum = sum.wrapping_add(value));
        };
        add(&mut self.counters, &other.counters);
        add(&mut self.gauges, &other.gauges);
        add(&mut self.stays, &other.stays);
        add(&mut self.latency.buckets, &other.latency.buckets);
        add(&mut self.waits.buckets, &other.waits.buckets);
    }
}

/// A histogram of latencies, in buckets of powers of two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latency {
    pub(crate) buckets: [u64; BUCKETS],
}

impl Default for Latency {
    fn default() -> Latency {
        Latency { buckets: [0; BUCKETS] }
    }
}

impl Latency {
    /// Returns the counts of the buckets: bucket `i` has what took 2^i ns or longer, and less than
    /// 2^(i+1) ns. The last has all that took longer, and the first what took less.
    pub fn buckets(&self) -> &[u64; BUCKETS] {
        &self.buckets
    }

    /// Returns how many there are in all.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, &count| sum.saturating_add(count))
    }

    /// Returns a time that `per_cent` of them did not exceed: the end of the bucket in which that
    /// one is. `None` if nothing was counted.
    ///
    /// # Panics
    ///
    /// If `per_cent` is not more than 0 and at most 100.
    pub fn percentile(&self, per_cent: f64) -> Option<Duration> {
        assert!(per_cent > 0.0 && per_cent <= 100.0, "{per_cent} is no percentage");
        let count = self.count();
        let rank = (count as f64 * per_cent / 100.0).ceil() as u64;
        let mut seen = 0_u64;
        let bucket = self.buckets.iter().position(|&in_bucket| {
            seen = seen.saturating_add(in_bucket);
            seen >= rank && in_bucket > 0
        })?;
        Some(Duration::from_nanos(1 << (bucket + 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_lands_in_the_bucket_of_its_power_of_two() {
        let rows = [(0, 0), (1, 0), (2, 1), (1023, 9), (1024, 10), (1 << 39, 39), (u64::MAX, 39)];
        for (nanoseconds, bucket) in rows {
            assert_eq!(bucket_of(Duration::from_nanos(nanoseconds)), bucket, "{nanoseconds} ns");
        }
    }

    #[test]
    fn percentiles_are_the_ends_of_buckets() {
        let mut latency = Latency::default();
        assert_eq!(latency.percentile(50.0), None);
        latency.buckets[10] = 90;
        latency.buckets[15] = 9;
        latency.buckets[20] = 1;
        let rows =
            [(1.0, 11), (50.0, 11), (90.0, 11), (90.5, 16), (99.0, 16), (99.9, 21), (100.0, 21)];
        for (per_cent, power) in rows {
            let expected = Some(Duration::from_nanos(1 << power));
            assert_eq!(latency.percentile(per_cent), expected, "{per_cent} %");
        }
    }

    #[test]
    fn every_reason_has_a_place_of_its_own() {
        assert!(REASONS.len() < STAYS);
        for (place, &reason) in REASONS.iter().enumerate() {
            assert_eq!(place_of(reason), place);
        }
        let mut numbers = Numbers::default();
        numbers.stays[place_of(StayReason::Locked)] = 3;
        numbers.stays[REASONS.len()] = 1;
        let stays: Vec<(String, u64)> = numbers.stays().collect();
        let expected = [(StayReason::Locked.to_string(), 3), ("for another reason".to_owned(), 1)];
        assert_eq!(stays, expected);
    }

    #[test]
    fn names_are_not_used_twice() {
        let counters = Counter::ALL.iter().map(|counter| counter.name());
        let gauges = Gauge::ALL.iter().map(|gauge| gauge.name());
        let mut names: Vec<&str> = counters.chain(gauges).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
