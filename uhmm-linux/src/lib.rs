#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod announce;
pub mod bind;
mod mutant;
mod options;
pub mod probe;
mod process;
mod space;
mod sys;

pub use announce::{Coverage, Exception, NoAnnouncement};
pub use options::Options;
#[doc(inline)]
pub use probe::{NoMigration, Probe, probe};
pub use process::{AttachError, Process, ProcessStatistics};
pub use space::HostMemory;
pub use sys::allocator::{Allocator, movable};
