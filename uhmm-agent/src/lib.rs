#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod device;
mod edge;
mod enter;
mod keeper;
pub mod ledger;
mod policy;

pub use edge::{children, launch};
pub use enter::{LOCATION, enter};
