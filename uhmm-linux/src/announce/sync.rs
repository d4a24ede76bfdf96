//! What the relay takes from the system. A test puts what a checker has in its place.

pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(super) use std::sync::{Condvar, Mutex, PoisonError};
pub(super) use std::thread::sleep;

pub(super) use crate::space::lock;
