#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod announce;
pub mod bind;
mod growth;
mod mutant;
mod options;
mod pages;
pub mod probe;
mod process;
mod space;
mod sys;

pub use announce::{Coverage, Exception, NoAnnouncement};
pub use growth::{FirstTouch, Growth};
pub use options::Options;
pub use pages::{Mapping, MappingKind, PageFlags};
#[doc(inline)]
pub use probe::{NoMigration, Probe, probe};
pub use process::{AttachError, Process, ProcessStatistics};
pub use space::{HostMemory, Immovable};
pub use sys::allocator::{Allocator, movable};
