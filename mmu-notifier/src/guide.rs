//! The crate explained as a whole, for those who know the kernel's `mmu_notifier.h`.
//!
//! Begin with [`protocol`]. Read [`locks`] before writing a driver that has locks of its own, and
//! [`limitations`] before relying on anything.

/// What each side does, and when.
#[doc = include_str!("../docs/protocol.md")]
pub mod protocol {}

/// What is promised, why it holds, and which test notices when it does not.
#[doc = include_str!("../docs/invariants.md")]
pub mod invariants {}

/// Every lock and every atomic, their order, and what may run under them.
#[doc = include_str!("../docs/locks.md")]
pub mod locks {}

/// What this crate does not do, does badly, or leaves to its user.
#[doc = include_str!("../docs/limitations.md")]
pub mod limitations {}

/// The kernel's design beside this one.
#[doc = include_str!("../docs/differences.md")]
pub mod differences {}
