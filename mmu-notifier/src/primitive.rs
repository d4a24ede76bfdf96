//! The synchronisation primitives of this crate, from the standard library or from a model checker.
//!
//! Under `--cfg loom` and `--cfg shuttle` every lock, atomic, thread-local and condition variable
//! below is the checker's, so that the very code that ships is the code that is explored.
//! Reference counts stay `std::sync::Arc` everywhere: loom's cannot hold a `dyn Trait`.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Condvar, Mutex, MutexGuard, RwLock as RegistryRwLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

#[cfg(shuttle)]
pub(crate) use shuttle::sync::{
    Condvar, Mutex, MutexGuard, RwLock as RegistryRwLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

#[cfg(not(any(loom, shuttle)))]
pub(crate) use {
    crossbeam_utils::sync::ShardedLock as RegistryRwLock,
    std::sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Declares a thread-local whose first value is a constant, which makes looking at it one load.
macro_rules! const_thread_local {
    ($(static $name:ident: $type:ty = $value:expr;)*) => {
        #[cfg(loom)]
        loom::thread_local! { $(static $name: $type = $value;)* }
        #[cfg(shuttle)]
        shuttle::thread_local! { $(static $name: $type = $value;)* }
        #[cfg(not(any(loom, shuttle)))]
        std::thread_local! { $(static $name: $type = const { $value };)* }
    };
}
pub(crate) use const_thread_local;

/// How many shards an address space spreads its announcers over.
///
/// One under a model checker: a shard is chosen by thread, each is independent of the others, and
/// the checkers need the same choice on every replay.
pub(crate) const SHARDS: usize = if cfg!(any(loom, shuttle)) { 1 } else { 8 };

/// Tells whether this run is to break the algorithm at the place called `$name`.
///
/// Each place is one row of `tests/mutants.txt`, with the model that must fail when it is broken.
/// Only loom builds know mutants; everywhere else this is `false` at compile time.
macro_rules! mutant {
    ($name:literal) => {
        $crate::primitive::mutant_is($name)
    };
}
pub(crate) use mutant;

/// Returns `ordering`, or no ordering at all if `broken`: how a mutant takes one away.
#[inline(always)]
pub(crate) fn relaxed_if(broken: bool, ordering: Ordering) -> Ordering {
    if broken { Ordering::Relaxed } else { ordering }
}

/// A place where the thread may be preempted that a model checker would not see by itself, because
/// what stands on its two sides is a plain `Arc`.
#[inline]
pub(crate) fn preemption_point() {
    #[cfg(loom)]
    loom::thread::yield_now();
}

#[cfg(not(loom))]
#[inline(always)]
pub(crate) fn mutant_is(_: &str) -> bool {
    false
}

#[cfg(loom)]
pub(crate) fn mutant_is(name: &str) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    CHOSEN.get_or_init(|| std::env::var("MMU_NOTIFIER_MUTANT").ok()).as_deref() == Some(name)
}
