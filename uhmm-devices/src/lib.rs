#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod dmirror;
pub mod gpu;
#[cfg(target_os = "linux")]
pub mod store;
