//! Where this crate meets the system: the only folder that may be unsafe.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`children`] | sees the program make children |
//! | [`copy`] | copies to and from addresses that may be anything |
//! | [`filter`] | refuses the system calls that destroy memory without a word |
//! | [`launch`] | starts a program with what the supervisor was given |
//! | [`mapping`] | maps the ledger |
//! | [`per_mm`] | one value for each address space |
//! | [`populate`] | makes pages present, and maps what programs ask for |
//! | [`process`] | starts threads, and finds functions |
//! | [`ring`] | pins pages |
//! | [`socket`] | what the kernel knows of a program's descriptor; holds signals off |
//! | [`turns`] | asks for a processor sooner |
#![allow(unsafe_code, reason = "this folder is where the crate talks to the system")]

pub mod children;
pub(crate) mod copy;
pub(crate) mod filter;
pub mod launch;
pub(crate) mod mapping;
pub(crate) mod per_mm;
pub(crate) mod populate;
pub(crate) mod process;
pub(crate) mod ring;
pub(crate) mod socket;
pub(crate) mod turns;
