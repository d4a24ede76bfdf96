#![doc = include_str!("../README.md")]
//!
//! The pages above are in [`guide`]; what does not compile, on purpose, is in [`guarantees`].
#![forbid(unsafe_code)]

mod context;
mod device;
mod diagnostics;
mod event;
mod gate;
pub mod guarantees;
pub mod guide;
mod index;
mod node;
mod notifier;
mod primitive;
mod registry;
mod subscription;
mod subscriptions;
mod va_range;

#[doc(hidden)]
pub use context::holds_registry_lock;
pub use context::{in_callback, thread_number};
pub use device::{Busy, DeviceHandle, DeviceRef};
pub use diagnostics::{Cause, Statistics};
pub use event::{Class, Event, EventKind, Owner};
pub use gate::TimedOut;
pub use notifier::{Fence, Notifier, PairedNotifier, WouldBlock};
pub use subscription::{
    Handle, Operation, ReadBeginError, ReadSection, Retry, SelfWait, Subscription, Unfinished,
    UnsubscribeError, Update,
};
pub use subscriptions::{
    NotSubscribed, RangeInvalidation, Released, SubscribeError, SubscribeOptions, Subscriptions,
};
pub use va_range::{VaRange, VaRangeError};
