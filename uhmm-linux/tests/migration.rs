//! Pages of a live process that move to a device and come home.

mod common;

use std::sync::Arc;

use common::in_own_process;
use common::memory::Mapping;
use common::rig::{Gpu, attach};
use uhmm::{DevicePagemap, Order, Residency};
use uhmm_linux::Process;

/// Where the page `index` of a mapping is.
fn residency(process: &Process, mapping: &Mapping, index: u64) -> Residency {
    process.snapshot(mapping.page(index).into())[0].residency
}

fn on_device(process: &Process, mapping: &Mapping, index: u64) -> bool {
    matches!(residency(process, mapping, index), Residency::Device(_))
}

fn host(process: &Process, pages: u64) -> Arc<DevicePagemap> {
    DevicePagemap::register(process.host_memory(pages))
}

#[test]
fn pages_in_host_memory_come_home_when_they_are_touched() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| 100 + index);
        let memory = host(&process, 64);
        let report = process.migrate(mapping.range(), &memory).run();
        assert_eq!(report.moved, 8, "{report:?}");
        assert!((0..8).all(|index| on_device(&process, &mapping, index)));
        assert_eq!(memory.used(), 8);
        for index in 0..8 {
            assert_eq!(mapping.peek(index), 100 + index);
        }
        assert!((0..8).all(|index| !on_device(&process, &mapping, index)));
        assert_eq!(memory.used(), 0);
    });
}

#[test]
fn pages_on_a_device_come_home_when_they_are_touched() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| 100 + index);
        let gpu = Gpu::new(64);
        let report = process.migrate(mapping.range(), &gpu.pagemap).run();
        assert_eq!(report.moved, 8, "{report:?}");
        assert!((0..8).all(|index| on_device(&process, &mapping, index)));
        for index in 0..8 {
            assert_eq!(mapping.peek(index), 100 + index);
        }
        mapping.poke(3, 7);
        assert_eq!(mapping.peek(3), 7);
    });
}

#[test]
fn a_huge_page_moves_whole() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(1024);
        let block = mapping.page(511).block(Order::HUGE);
        mapping.fill(|index| index);
        let memory = host(&process, 1024);
        let report = process.migrate(block, &memory).run();
        assert_eq!(report.moved, 512, "{report:?}");
        assert_eq!(process.snapshot(block)[0].order, Order::HUGE);
        for page in block.iter() {
            let index = mapping.range().index_of(page).expect("within") as u64;
            assert_eq!(mapping.peek(index), index);
        }
    });
}
