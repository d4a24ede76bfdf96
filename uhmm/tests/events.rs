//! What is told to whoever watches: an event and a counter for each thing that happens.
#![cfg(not(any(loom, shuttle)))]

mod common;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Rig, page, range, word};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use uhmm::policy::{CpuFault, DeviceFault, DevicePlan, HomePlan, Policies, Policy};
use uhmm::{Access, PagemapOptions};

/// Keeps every event of this crate, as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}:{}", self.0);
        } else {
            self.0 += &format!(" {}={value:?}", field.name());
        }
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "uhmm"
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        unreachable!("this crate opens no span")
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().expect("no panic").push(text.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl Log {
    /// Takes what was logged since the last time, and returns the first event that begins so.
    fn take(&self, message: &str) -> String {
        let all = std::mem::take(&mut *self.0.lock().expect("no panic"));
        let found = all.iter().find(|event| event.starts_with(&format!("{message}:")));
        found.unwrap_or_else(|| panic!("no event `{message}` among {all:#?}")).clone()
    }
}

/// Makes everybody wait a moment.
#[derive(Debug)]
struct Wait;

impl Policy for Wait {
    fn name(&self) -> &'static str {
        "wait"
    }

    fn device_fault(&self, _: &DeviceFault<'_>, plan: &mut DevicePlan) {
        plan.nap = Duration::from_millis(1);
    }

    fn cpu_fault(&self, _: &CpuFault, plan: &mut HomePlan) {
        plan.nap = Duration::from_millis(1);
    }
}

#[test]
fn each_thing_that_happens_has_an_event_and_a_counter() {
    let log = Log::default();
    let _default = tracing::subscriber::set_default(log.clone());
    let policies = Policies::new([Arc::new(Wait) as Arc<dyn Policy>]);
    let rig = Rig::with(2, 1, PagemapOptions::new().policies(policies));
    log.take("mirror");
    rig.fill(2, 1);

    // A device's fault, with a nap, a migration and a range fault.
    rig.mirror.handle_fault(page(0), Access::Write).expect("it can be had");
    assert!(log.take("throttled").contains("nap=1ms"));
    rig.mirror.handle_fault(page(0), Access::Write).expect("it can be had");
    assert!(log.take("device fault").contains("access=Write"));
    let space = rig.mirror.mm().statistics();
    assert_eq!((space.device_faults, space.throttles, space.range_faults), (2, 2, 2));
    assert_eq!(rig.pagemap.statistics().in_by_device_fault, 1);

    // An eviction, and a migration on request.
    let report = rig.process.address_space().migrate(range(1, 1), &rig.pagemap).run();
    assert_eq!(report.moved, 1);
    let evicted = log.take("migrated");
    assert!(evicted.contains("cause=Eviction") && evicted.contains("to=System"), "{evicted}");
    let memory = rig.pagemap.statistics();
    assert_eq!((memory.home_by_eviction, memory.in_by_request), (1, 1));

    // A CPU's touch.
    rig.process.load_u64(word(1)).expect("memory is there");
    assert!(log.take("cpu fault").contains("page="));
    let memory = rig.pagemap.statistics();
    assert_eq!((memory.cpu_faults, memory.home_by_cpu_fault, memory.throttles), (1, 1, 1));

    // An invalidation.
    let before = rig.mirror.mm().statistics().invalidations;
    rig.process.unmap(range(0, 1));
    assert!(log.take("invalidate").contains("event=Unmap"));
    assert_eq!(rig.mirror.mm().statistics().invalidations, before + 1);

    // A fault that fails, and a page that stays.
    rig.mirror.handle_fault(page(0), Access::Read).expect_err("nothing is mapped");
    assert!(log.take("range fault failed").contains("nothing is mapped"));
    assert_eq!(rig.mirror.mm().statistics().failed_range_faults, 1);
    rig.gpu.injector.fail("copy", 0);
    assert_eq!(rig.process.address_space().migrate(range(1, 1), &rig.pagemap).run().moved, 0);
    assert!(log.take("stays").contains("could not copy"));
    assert_eq!(rig.pagemap.statistics().failed_copies, 1);

    rig.finish();
    log.take("release");
}
