//! Where this crate meets the system: the only folder that may be unsafe.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`children`] | sees the program make children |
//! | [`filter`] | refuses the system calls that destroy memory without a word |
//! | [`launch`] | starts a program with what the supervisor was given |
//! | [`mapping`] | maps the ledger |
//! | [`process`] | starts threads, and finds functions |
#![allow(unsafe_code, reason = "this folder is where the crate talks to the system")]

pub mod children;
pub(crate) mod filter;
pub mod launch;
pub(crate) mod mapping;
pub(crate) mod process;
