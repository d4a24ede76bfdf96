//! The mirror device of the kernel's HMM tests: each command, each error, each count, on each kind of
//! memory. One process for each test.
//!
//! `selftest.rs` has the behaviours that the kernel's own tests ask for, test by test; the others what
//! is known of the device besides.

#[path = "../../uhmm-linux/tests/common/mod.rs"]
mod common;

#[path = "dmirror/announced.rs"]
mod announced;
#[path = "dmirror/errors.rs"]
mod errors;
#[path = "dmirror/forks.rs"]
mod forks;
#[path = "dmirror/kinds.rs"]
mod kinds;
#[path = "dmirror/large.rs"]
mod large;
#[path = "dmirror/moves.rs"]
mod moves;
#[path = "dmirror/rig.rs"]
mod rig;
#[path = "dmirror/selftest.rs"]
mod selftest;
#[path = "dmirror/threads.rs"]
mod threads;
