//! Kernels compute what a CPU would, wherever the memory is.
#![cfg(not(shuttle))]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Rig, mirror, options, range, word};
use uhmm::sim::{Machine, Mapping};
use uhmm::{Access, PAGE_SIZE, Page, PageRange, Residency};
use uhmm_devices::gpu::kernels::{Chased, ListNode, chase, histogram, saxpy};
use uhmm_devices::gpu::{CompareError, Difference, FaultReason, KernelFault, SoftGpu, compare};

const PAGE: u64 = PAGE_SIZE as u64;

/// Sizes of the device's memory, in pages, for data of 16 pages: none, so the device works on system
/// memory; enough; and so little that pages go home while others are worked on.
const MEMORIES: [u64; 3] = [0, 64, 3];

fn store_f32(rig: &Rig, address: u64, value: f32) {
    rig.process.store(address, &value.to_ne_bytes()).unwrap();
}

fn load_f32(rig: &Rig, address: u64) -> f32 {
    let mut bytes = [0; 4];
    rig.process.load(address, &mut bytes).unwrap();
    f32::from_ne_bytes(bytes)
}

#[test]
fn saxpy_gives_the_answer_of_a_cpu() {
    const PAGES: u64 = 8;
    const COUNT: u64 = PAGES * PAGE / 4;
    for memory in MEMORIES {
        let rig = Rig::new(2 * PAGES, options(memory));
        let (x, y) = (word(0), word(PAGES));
        for index in 0..COUNT {
            store_f32(&rig, x + 4 * index, index as f32);
            store_f32(&rig, y + 4 * index, 0.5);
        }
        let service = rig.gpu.start_service().unwrap();
        rig.context().run(|view| saxpy(view, COUNT, 2.0, x, y)).unwrap();
        drop(service);
        let moved = rig.gpu.pagemap().map_or(0, |pagemap| pagemap.used());
        assert_eq!(moved, memory.min(2 * PAGES), "what fits is on the device");
        rig.check();
        for index in 0..COUNT {
            assert_eq!(load_f32(&rig, x + 4 * index), index as f32);
            assert_eq!(load_f32(&rig, y + 4 * index), 2.0 * index as f32 + 0.5, "at {index}");
        }
        rig.finish();
    }
}

/// Several contexts, and a CPU, count into the same bins.
#[test]
fn a_histogram_counts_each_byte_once() {
    const PAGES: u64 = 8;
    const BINS: u64 = 16;
    const LENGTH: u64 = 600;
    for memory in MEMORIES {
        let rig = Rig::new(PAGES + 1, options(memory));
        let bins = word(PAGES);
        for index in 0..PAGES {
            let bytes: Vec<u8> = (0..LENGTH).map(|byte| (byte * 7 + index) as u8).collect();
            rig.process.store(word(index), &bytes).unwrap();
        }
        let service = rig.gpu.start_service().unwrap();
        let kernels: Vec<_> = (0..PAGES / 2)
            .map(|half| {
                rig.context().spawn(move |view| {
                    histogram(view, word(2 * half), LENGTH, bins, BINS)?;
                    histogram(view, word(2 * half + 1), LENGTH, bins, BINS)
                })
            })
            .collect();
        for bin in 0..BINS {
            rig.process.fetch_add_u64(bins + 8 * bin, 1000).unwrap();
        }
        kernels.into_iter().for_each(|kernel| kernel.join().unwrap());
        drop(service);
        let mut expected = [1000; BINS as usize];
        for index in 0..PAGES {
            for byte in 0..LENGTH {
                expected[usize::from((byte * 7 + index) as u8) % BINS as usize] += 1;
            }
        }
        for (bin, &count) in (0..).zip(&expected) {
            assert_eq!(rig.process.load_u64(bins + 8 * bin).unwrap(), count, "bin {bin}");
        }
        rig.finish();
    }
}

/// A list whose nodes lie as an allocator might put them.
#[test]
fn a_list_is_followed_wherever_its_nodes_are() {
    const PAGES: u64 = 16;
    const NODES: u64 = 500;
    for memory in MEMORIES {
        let rig = Rig::new(PAGES, options(memory));
        // 16 and 7919 share no factor with the number of places, so no two nodes share one.
        let places = PAGES * PAGE / ListNode::SIZE as u64;
        let address = |node: u64| word(0) + (node * 7919 % (places - 1) + 1) * 16;
        assert_eq!((0..NODES).map(address).collect::<BTreeSet<_>>().len() as u64, NODES);
        for node in 0..NODES {
            let next = if node + 1 < NODES { address(node + 1) } else { 0 };
            let bytes = ListNode { next, value: node * node }.to_bytes();
            rig.process.store(address(node), &bytes).unwrap();
        }
        let service = rig.gpu.start_service().unwrap();
        let context = rig.context();
        let found = context.run(|view| chase(view, address(0), 1_000_000)).unwrap();
        let sum = (0..NODES).map(|node| node * node).sum::<u64>();
        assert_eq!((found.nodes, found.sum, found.rest), (NODES, sum, 0));
        let found = context.run(|view| chase(view, address(0), 10)).unwrap();
        assert_eq!((found.nodes, found.rest), (10, address(10)), "a limit is kept");
        drop(service);
        rig.finish();
    }
}

/// A list built of boxes, each wherever this program's own allocator put it: the simulated process
/// has the same bytes at the same addresses.
#[test]
fn a_list_built_of_boxes_is_followed_at_its_own_addresses() {
    const NODES: usize = 499;
    let mut boxes: Vec<Box<ListNode>> =
        (0..NODES as u64).map(|node| Box::new(ListNode { next: 0, value: node * node })).collect();
    let address = |node: &ListNode| std::ptr::from_ref(node).addr() as u64;
    // 7 and the prime share no factor: every box has its turn, and neighbours are far apart.
    let order: Vec<usize> = (0..NODES).map(|turn| turn * 7 % NODES).collect();
    for turns in order.windows(2) {
        boxes[turns[0]].next = address(&boxes[turns[1]]);
    }
    let head = address(&boxes[order[0]]);
    // What a CPU finds, following the same addresses.
    let places: BTreeMap<u64, &ListNode> =
        boxes.iter().map(|node| (address(node), &**node)).collect();
    let mut expected = Chased { nodes: 0, sum: 0, rest: head };
    while let Some(node) = places.get(&expected.rest) {
        expected =
            Chased { nodes: expected.nodes + 1, sum: expected.sum + node.value, rest: node.next };
    }
    assert_eq!((expected.nodes, expected.rest), (NODES as u64, 0));
    let ends = places.keys().flat_map(|at| [*at, at + ListNode::SIZE as u64 - 1]);
    let pages: BTreeSet<Page> = ends.map(Page::containing).collect();
    let all = PageRange::from_bounds(*pages.first().unwrap(), *pages.last().unwrap()).unwrap();

    for memory in MEMORIES {
        let machine = Machine::new();
        let process = machine.spawn();
        for &page in &pages {
            process.map(page.into(), Mapping::anonymous(Access::Write)).unwrap();
        }
        for (&at, node) in &places {
            process.store(at, &node.to_bytes()).unwrap();
        }
        let gpu = SoftGpu::new(options(memory));
        let mirror = gpu.mirror(process.address_space(), all).unwrap();
        let service = gpu.start_service().unwrap();
        let context = gpu.context(&mirror).unwrap();
        let found = context.run(|view| chase(view, head, u64::MAX)).unwrap();
        assert_eq!(found, expected, "with {memory} pages of device memory");
        gpu.check([&*mirror]).unwrap();
        drop((context, service, mirror));
        process.exit();
        common::check_empty(&machine, &gpu);
    }
}

/// Addresses that lead past the top of the address space are faults, whatever they come from.
#[test]
fn wild_addresses_are_faults_of_the_operation() {
    const TOP: u64 = u64::MAX - 7;
    let rig = Rig::new(2, options(8));
    let service = rig.gpu.start_service().unwrap();
    let context = rig.context();
    let wild = |result: Result<(), KernelFault>, address, access| {
        let reason = FaultReason::Operation;
        assert_eq!(result, Err(KernelFault { reason, address, access }));
    };
    wild(context.run(|view| chase(view, TOP, 1).map(drop)), TOP, Access::Read);
    rig.process.store_u64(word(0) + 16, TOP).unwrap();
    wild(context.run(|view| chase(view, word(0) + 16, 2).map(drop)), TOP, Access::Read);
    let huge = u64::MAX - 4095;
    rig.process.store(word(0), &[255]).unwrap();
    let result = context.run(|view| histogram(view, word(0), 1, TOP, 256));
    wild(result, TOP, Access::Atomic);
    let (x, y) = (word(0), word(1));
    let not_there =
        KernelFault { reason: FaultReason::Address, address: huge, access: Access::Read };
    assert_eq!(context.run(|view| saxpy(view, 1, 1.0, huge, y)), Err(not_there));
    assert_eq!(context.run(|view| saxpy(view, 1, 1.0, x, huge)), Err(not_there));
    context
        .run(|view| {
            let past = compare(view, TOP, 9, |_, _| Ok::<_, ()>(()));
            let Err(CompareError::Device(fault)) = past else { panic!("{past:?}") };
            wild(Err(fault), TOP, Access::Read);
            Ok(())
        })
        .unwrap();
    drop((service, context));
    rig.finish();
}

/// Two GPUs and a CPU work on one page, which goes from one to the other.
#[test]
fn two_gpus_on_one_range_lose_no_update() {
    for memories in [[4, 4], [0, 4], [0, 0]] {
        let rig = Rig::new(2, options(memories[0]));
        let other = SoftGpu::new(options(memories[1]));
        let other_mirror = mirror(&other, &rig.process);
        let services = [rig.gpu.start_service().unwrap(), other.start_service().unwrap()];
        let contexts = [rig.context(), other.context(&other_mirror).unwrap()];
        let kernels = contexts.map(|context| {
            context.spawn(|view| {
                for round in 0..200 {
                    view.fetch_add_u64(word(0), 1)?;
                    view.fetch_add_u64(word(1) + 8 * (round % 3), 1)?;
                }
                Ok(())
            })
        });
        for _ in 0..200 {
            rig.process.fetch_add_u64(word(0), 1).unwrap();
        }
        kernels.into_iter().for_each(|kernel| kernel.join().unwrap());
        drop(services);
        assert_eq!(rig.process.load_u64(word(0)).unwrap(), 600);
        let sum: u64 = (0..3).map(|at| rig.process.load_u64(word(1) + 8 * at).unwrap()).sum();
        assert_eq!(sum, 400);
        other.check([&*other_mirror]).unwrap();
        drop(other_mirror);
        rig.finish();
        common::check_no_memory(&other);
    }
}

#[test]
fn words_of_all_sizes_and_bytes_across_pages_are_loaded_and_stored() {
    let rig = Rig::new(4, options(8));
    let service = rig.gpu.start_service().unwrap();
    let text: Vec<u8> = (0..9000).map(|index| (index % 251) as u8).collect();
    rig.context()
        .run(|view| {
            view.store::<u8>(word(0) + 1, 0x12)?;
            view.store::<u16>(word(0) + 2, 0x3456)?;
            view.store::<u32>(word(0) + 4, 0x789a_bcde)?;
            view.store::<i64>(word(0) + 8, -5)?;
            view.store::<f64>(word(0) + 16, 0.25)?;
            assert_eq!(view.load::<u8>(word(0) + 1)?, 0x12);
            assert_eq!(view.load::<u16>(word(0) + 2)?, 0x3456);
            assert_eq!(view.load::<u32>(word(0) + 4)?, 0x789a_bcde);
            assert_eq!(view.load::<i64>(word(0) + 8)?, -5);
            assert_eq!(view.load::<f64>(word(0) + 16)?, 0.25);
            view.write(word(0) + 100, &text)?;
            let mut back = vec![0; text.len()];
            view.read(word(0) + 100, &mut back)?;
            assert_eq!(back, text);
            view.read(u64::MAX, &mut [])
        })
        .unwrap();
    let mut bytes = vec![0; text.len()];
    rig.process.load(word(0) + 100, &mut bytes).unwrap();
    assert_eq!(bytes, text);
    drop(service);
    rig.finish();
}

#[test]
fn atomic_operations_do_what_their_names_say() {
    for memory in [0, 4] {
        let rig = Rig::new(1, options(memory));
        rig.process.store_u64(word(0), 5).unwrap();
        let service = rig.gpu.start_service().unwrap();
        rig.context()
            .run(|view| {
                assert_eq!(view.fetch_add_u64(word(0), 2)?, 5);
                assert_eq!(view.compare_exchange(word(0), 5, 100)?, 7);
                assert_eq!(view.compare_exchange(word(0), 7, 8)?, 7);
                assert_eq!(view.fetch_update(word(0), |old| Some(old * 2))?, 8);
                assert_eq!(view.fetch_update(word(0), |_| None)?, 16);
                assert_eq!(view.load::<u64>(word(0))?, 16);
                Ok(())
            })
            .unwrap();
        drop(service);
        assert_eq!(rig.process.load_u64(word(0)).unwrap(), 16);
        rig.finish();
    }
}

#[test]
fn device_and_cpu_see_the_same() {
    let rig = Rig::new(6, options(3));
    rig.fill(6, 77);
    let service = rig.gpu.start_service().unwrap();
    let context = rig.context();
    context
        .run(|view| {
            view.store(word(2) + 8, 99_u64)?;
            let same = compare(view, word(0), 6 * PAGE, |at, bytes| rig.process.load(at, bytes));
            let same = same.expect("both can read");
            assert!(same.is_same(), "{same:?}");
            assert_eq!(same.bytes, 6 * PAGE);
            // A CPU that is wrong in one byte.
            let wrong = compare(view, word(1) + 3, 5000, |at, bytes| {
                rig.process.load(at, bytes)?;
                if at == word(2) {
                    bytes[1] ^= 0xff;
                }
                Ok::<_, uhmm::sim::SimError>(())
            });
            let wrong = wrong.expect("both can read");
            let difference = Difference { address: word(2) + 1, device: 0, cpu: 0xff };
            assert_eq!((wrong.differing, &*wrong.differences), (1, &[difference][..]));
            let hole = compare(view, word(100), 8, |at, bytes| rig.process.load(at, bytes));
            assert!(matches!(hole, Err(CompareError::Device(fault)) if fault.address == word(100)));
            Ok(())
        })
        .unwrap();
    drop(service);
    rig.finish();
}

/// A huge page of system memory is one translation, and one of device memory too.
#[test]
fn huge_pages_are_mapped_as_one() {
    let huge = uhmm::Order::HUGE;
    for memory in [0, 1024] {
        let rig = Rig::new(1, options(memory));
        let mapping = uhmm::sim::Mapping::anonymous(uhmm::Access::Write).huge(true);
        rig.process.map(range(512, 512), mapping).unwrap();
        rig.process.store_u64(word(512 + 7), 42).unwrap();
        if let Some(pagemap) = rig.gpu.pagemap() {
            let report = rig.process.address_space().migrate(range(512, 512), pagemap).run();
            assert_eq!(report.moved, 512);
        }
        let request = uhmm::RangeFault::write(range(512, 512));
        rig.mirror.range_fault(&request).unwrap();
        assert_eq!(rig.translation(512 + 7).unwrap().order, huge);
        let context = rig.context();
        context
            .run(|view| {
                for index in 512..1024 {
                    let old = view.load::<u64>(word(index))?;
                    view.store(word(index), old + 1)?;
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(context.cached(), 1, "one translation served them all");
        assert_eq!(rig.process.load_u64(word(512 + 7)).unwrap(), 43);
        assert_eq!(rig.process.load_u64(word(512 + 8)).unwrap(), 1);
        assert!(matches!(rig.residency(512), Residency::System(_)), "the CPU has brought it home");
        rig.finish();
    }
}
