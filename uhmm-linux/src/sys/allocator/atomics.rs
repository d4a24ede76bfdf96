//! The atomics of the protocol. Its test puts those of a checker in their place.

pub(super) use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
