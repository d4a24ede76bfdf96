//! Devices for uhmm.
#![forbid(unsafe_code)]
