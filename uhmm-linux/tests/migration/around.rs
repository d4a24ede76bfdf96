//! What comes home along with a page, where its device has a part of it in the process's own memory.

use std::sync::{Condvar, Mutex};

use uhmm::policy::FaultAround;
use uhmm::{CopyJob, CopyKind, DeviceFrame, DeviceMemory, Frame, OutOfDeviceMemory, SystemMemory};
use uhmm_linux::HostMemory;

use super::*;

/// Device memory that adopts every second page, and copies the others, home only while it is open.
struct Half {
    host: Arc<HostMemory>,
    adopts: AtomicBool,
    pages: Mutex<Vec<Vec<u8>>>,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Half {
    /// The first frame of those that it copies to.
    const OWN: u64 = 1 << 50;

    fn new(process: &Process) -> Arc<Half> {
        Arc::new(Half {
            host: process.host_memory(64),
            adopts: AtomicBool::new(false),
            pages: Mutex::default(),
            open: Mutex::new(true),
            opened: Condvar::new(),
        })
    }

    fn set_open(&self, open: bool) {
        *self.open.lock().expect("no panic") = open;
        self.opened.notify_all();
    }
}

impl DeviceMemory for Half {
    fn capacity(&self) -> u64 {
        64
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        if order > Order::PAGE {
            return Err(OutOfDeviceMemory { order });
        }
        let mut pages = self.pages.lock().expect("no panic");
        pages.push(vec![0; PAGE_SIZE]);
        Ok(DeviceFrame(Half::OWN + pages.len() as u64 - 1))
    }

    fn adopt(&self, memory: &dyn SystemMemory, from: Frame, order: Order) -> Option<DeviceFrame> {
        // Relaxed: pages are sent by one thread.
        let adopts = !self.adopts.fetch_not(Ordering::Relaxed);
        adopts.then(|| self.host.adopt(memory, from, order)).flatten()
    }

    fn in_place(&self, memory: &dyn SystemMemory, frame: DeviceFrame) -> Option<Frame> {
        (frame.0 < Half::OWN).then(|| self.host.in_place(memory, frame)).flatten()
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        if frame.0 < Half::OWN {
            self.host.free(frame, order);
        }
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        for job in jobs {
            let index = |frame: DeviceFrame| (frame.0 - Half::OWN) as usize;
            match job.kind() {
                CopyKind::In { from, to } => {
                    let mut pages = self.pages.lock().expect("no panic");
                    memory.read(from, 0, &mut pages[index(to)]);
                }
                CopyKind::Out { from, to } => {
                    let open = self.open.lock().expect("no panic");
                    drop(self.opened.wait_while(open, |open| !*open).expect("no panic"));
                    let pages = self.pages.lock().expect("no panic");
                    memory.write(to, 0, &pages[index(from)]);
                }
                CopyKind::Clear { to } => {
                    self.pages.lock().expect("no panic")[index(to)].fill(0);
                }
            }
            job.complete();
        }
    }
}

/// The thread that all who touch a page wait for asks a policy that is prompt, and brings what it
/// wants to come along; but it waits for no device that has a part of that to give.
#[test]
fn whoever_touches_a_page_in_place_waits_for_no_copy_of_what_is_around_it() {
    in_own_process(|| {
        let process = attach();
        let half = Half::new(&process);
        let policies = Policies::none().and(FaultAround::new());
        assert!(policies.are_prompt());
        let options = PagemapOptions::new().policies(policies).clock(Clock::manual());
        let memory = DevicePagemap::register_with(half.clone(), options);
        // At least one block of those that come home at a time is all of it in here.
        let mapping = Mapping::anonymous(32);
        fill(&mapping);
        mapping.range().iter().for_each(|page| send_out(&process, page.into(), &memory));
        half.set_open(false);
        assert_whole(mapping.page(16), 16);
        // Counted a moment after whoever waited for it has gone on.
        let came = || memory.statistics().home_by_cpu_fault;
        assert!(
            eventually(|| came() > 1),
            "what is in place came along: {:?}",
            memory.statistics()
        );
        assert!(is_out(&process, mapping.page(17)), "what must be copied did not");
        half.set_open(true);
        assert_all_whole(&mapping);
        assert_used(&memory, 0);
    });
}
