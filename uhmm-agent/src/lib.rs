#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod device;
pub mod dmirror;
mod edge;
mod enter;
mod keeper;
pub mod ledger;
pub mod node;
mod policy;
pub mod verify;

pub use edge::{children, launch};

/// The number of the build. The command, the library that it preloads and the ledger that both have
/// must be of the same: the library says it in its symbol `UHMM_BUILD`.
pub const BUILD: u64 = match u64::from_str_radix(env!("UHMM_BUILD"), 16) {
    Ok(number) => number,
    Err(_) => panic!("the build script writes a number"),
};
pub use enter::{LOCATION, enter};
pub use policy::POLICY;
