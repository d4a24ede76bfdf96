//! A process with memory, and a GPU that mirrors it.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm::policy::Policies;
use uhmm::primitive::thread;
use uhmm::sim::{Machine, Mapping, Process};
use uhmm::{Access, Clock, Mirror, Page, PageRange, PagemapOptions, Residency};
use uhmm_devices::gpu::{Context, SoftGpu, SoftGpuOptions, Translation};

/// Where the process's memory begins: at the edge of a huge page.
pub(crate) const BASE: u64 = 0x4000_0000;

/// The pages that are mirrored, from [`BASE`] on.
pub(crate) const MIRRORED: u64 = 1 << 20;

/// Returns `pages` pages from page `first` of the process's memory.
pub(crate) fn range(first: u64, pages: u64) -> PageRange {
    PageRange::from_pages(page(first), pages).expect("a test's range is a range")
}

/// Returns page `index` of the process's memory.
pub(crate) fn page(index: u64) -> Page {
    Page::containing(BASE).checked_add(index).expect("a test's page is a page")
}

/// Returns the address of the first word of a page.
pub(crate) fn word(index: u64) -> u64 {
    page(index).address()
}

/// Returns options for a GPU of so many pages, whose faults move the faulting page and no other.
pub(crate) fn options(memory_pages: u64) -> SoftGpuOptions {
    let pagemap = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    SoftGpuOptions::new().memory_pages(memory_pages).pagemap(pagemap)
}

pub(crate) struct Rig {
    pub(crate) machine: Machine,
    pub(crate) process: Process,
    pub(crate) gpu: Arc<SoftGpu>,
    pub(crate) mirror: Mirror<SoftGpu>,
}

impl Rig {
    /// Maps `pages` pages of anonymous memory.
    pub(crate) fn new(pages: u64, options: SoftGpuOptions) -> Rig {
        Rig::on(Machine::new(), pages, options)
    }

    pub(crate) fn on(machine: Machine, pages: u64, options: SoftGpuOptions) -> Rig {
        let process = machine.spawn();
        process.map(range(0, pages), Mapping::anonymous(Access::Write)).expect("memory is mapped");
        let gpu = SoftGpu::new(options);
        let mirror = mirror(&gpu, &process);
        Rig { machine, process, gpu, mirror }
    }

    pub(crate) fn context(&self) -> Context {
        self.gpu.context(&self.mirror).expect("the mirror lives")
    }

    /// Stores `first + i` in the first word of page `i`, for every page.
    pub(crate) fn fill(&self, pages: u64, first: u64) {
        for index in 0..pages {
            self.process.store_u64(word(index), first + index).expect("memory is there");
        }
    }

    pub(crate) fn translation(&self, index: u64) -> Option<Translation> {
        self.mirror.inspect(|table| table.translation(page(index))).expect("the mirror lives")
    }

    pub(crate) fn residency(&self, index: u64) -> Residency {
        self.process.address_space().snapshot(page(index).into())[0].residency
    }

    /// Lets other threads run until `done`, for minutes at most.
    pub(crate) fn until(&self, done: impl FnMut() -> bool) {
        until_or(done, || format!("{:?}", self.gpu.fault_statistics()));
    }

    pub(crate) fn check(&self) {
        self.machine.check().expect("the machine is whole");
        assert_eq!(self.machine.violations(), Vec::<String>::new());
        self.gpu.check([&*self.mirror]).expect("the GPU is whole");
    }

    /// Ends the process, and checks that nothing of it is left anywhere.
    pub(crate) fn finish(self) {
        self.check();
        let Rig { machine, process, gpu, mirror } = self;
        drop(mirror);
        process.exit();
        check_empty(&machine, &gpu);
    }
}

/// Checks that no process left anything behind.
pub(crate) fn check_empty(machine: &Machine, gpu: &Arc<SoftGpu>) {
    machine.check().expect("the machine is whole after the exit");
    assert_eq!(machine.frames(), 0, "system memory leaks");
    assert_eq!(machine.violations(), Vec::<String>::new());
    check_no_memory(gpu);
}

/// Checks that nothing is left in the GPU's memory.
pub(crate) fn check_no_memory(gpu: &Arc<SoftGpu>) {
    gpu.check([]).expect("the GPU is whole after the exit");
    assert_eq!(used(gpu), 0, "device memory leaks");
}

/// Returns how many pages of the GPU's memory are accounted for.
pub(crate) fn used(gpu: &SoftGpu) -> u64 {
    gpu.pagemap().map_or(0, |pagemap| pagemap.used())
}

pub(crate) fn mirror(gpu: &Arc<SoftGpu>, process: &Process) -> Mirror<SoftGpu> {
    gpu.mirror(process.address_space(), range(0, MIRRORED)).expect("the process lives")
}

/// Lets other threads run until `done`, for minutes at most.
pub(crate) fn until(done: impl FnMut() -> bool) {
    until_or(done, String::new);
}

/// Does what [`until`] does, and says what there is where it takes too long.
fn until_or(mut done: impl FnMut() -> bool, found: impl Fn() -> String) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < Duration::from_secs(300), "waited in vain: {}", found());
        thread::yield_now();
    }
}
