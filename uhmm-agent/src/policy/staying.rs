//! What cannot leave, for the report: how much of the process is not managed, and why.
//!
//! To find it takes a walk through all page tables. So it is done once in a while, and when the
//! process has grown.

use std::time::{Duration, Instant};

use uhmm_linux::Process;

use super::account::{Footprint, locked_bytes};
use crate::ledger::{Gauge, Slot};

/// How long it is between two looks at least, and which part of the time they may take: one in so
/// many.
const PERIOD: Duration = Duration::from_secs(1);
const LOOKING: u32 = 64;

/// When it was last looked at.
#[derive(Debug)]
pub(crate) struct Staying {
    due: Instant,
    /// How large the process was.
    bytes: u64,
    /// When it may be looked at again if the process has grown.
    earliest: Instant,
}

impl Staying {
    /// Begins. The first look is due.
    pub(crate) fn new() -> Staying {
        let now = Instant::now();
        Staying { due: now, bytes: 0, earliest: now }
    }

    /// Looks, if it is time to. The device takes so many bytes of the process's own memory.
    pub(crate) fn look_if_due(
        &mut self,
        process: &Process,
        slot: &Slot,
        footprint: Footprint,
        device: u64,
    ) {
        let now = Instant::now();
        let bytes = footprint.anonymous.saturating_add(footprint.others);
        let grown = bytes > self.bytes + self.bytes / 8 && now >= self.earliest;
        if now < self.due && !grown {
            return;
        }
        let found = process.immovable();
        let gauges = [
            (Gauge::Files, found.files),
            (Gauge::Shared, found.shared),
            (Gauge::NotWritable, found.not_writable),
            (Gauge::Special, found.special),
            (Gauge::Reserved, found.reserved),
            (Gauge::Locked, locked_bytes()),
            (Gauge::Agent, found.own.saturating_sub(device)),
        ];
        gauges.into_iter().for_each(|(gauge, bytes)| slot.set(gauge, bytes));
        let pause = now.elapsed() * LOOKING;
        let now = Instant::now();
        (self.due, self.earliest) = (now + pause.max(PERIOD), now + pause);
        self.bytes = bytes;
    }
}
