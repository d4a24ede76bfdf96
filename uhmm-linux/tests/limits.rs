//! Limits of the process: an error or full service, and never other contents.

mod common;

use std::fs::File;
use std::time::Duration;

use common::children::{End, How, Scattered, WAYS, child, end_of};
use common::memory::{Mapping, NONE, R, protect};
use common::rig::{attach, attach_with};
use common::{OwnProcess, in_own_process};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use uhmm::DevicePagemap;
use uhmm_linux::{AttachError, Options, Process};

/// Lowers the soft limit.
fn limit(resource: Resource, to: u64) -> Rlimit {
    let before = getrlimit(resource);
    setrlimit(resource, Rlimit { current: Some(to), ..before })
        .expect("soft limits can be lowered");
    before
}

/// Opens files until there is no descriptor left.
fn fill_descriptors() -> Vec<File> {
    std::iter::from_fn(|| File::open("/dev/null").ok()).collect()
}

#[test]
fn without_descriptors_nothing_attaches_and_nothing_is_left() {
    in_own_process(|| {
        limit(Resource::Nofile, 64);
        let mut held = fill_descriptors();
        let mut refused = 0;
        // One more at a time.
        let process = loop {
            match Process::attach(Options::new()) {
                Ok(process) => break process,
                Err(error) => {
                    assert_ne!(error, AttachError::AlreadyAttached);
                    refused += 1;
                    drop(held.pop().expect("with all of them it attaches"));
                }
            }
        };
        assert!(refused >= 4, "{refused}");
        drop(held);
        let memory = Scattered::new(&process);
        memory.fill(1);
        memory.scatter();
        memory.check(1);
    });
}

#[test]
fn without_descriptors_pages_move_and_children_have_them() {
    in_own_process(|| {
        limit(Resource::Nofile, 64);
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.scatter();
        let held = fill_descriptors();
        for round in 1..10 {
            for how in WAYS {
                let pid = child(how, || memory.is_right(round));
                assert_eq!(end_of(pid), End::Well, "{how:?}");
                memory.check(round);
                memory.fill(round + 1);
                memory.process.migrate(memory.part(0), &memory.gpu.pagemap).run();
                memory.process.migrate(memory.part(1), &memory.host).run();
                memory.check(round + 1);
                memory.fill(round);
            }
            memory.fill(round + 1);
        }
        drop(held);
        memory.scatter();
        memory.check(10);
    });
}

#[test]
fn in_a_small_address_space_less_is_reserved() {
    in_own_process(|| {
        let text = std::fs::read_to_string("/proc/self/statm").expect("proc is mounted");
        let pages = text.split(' ').next().and_then(|pages| pages.parse::<u64>().ok());
        let used = pages.expect("a number") * 4096;
        for more in [8 << 20, 64 << 20, 256 << 20, 2 << 30_u64] {
            let before = limit(Resource::As, used + more);
            let attached = Process::attach(Options::new());
            setrlimit(Resource::As, before).expect("it was so before");
            match attached {
                Ok(process) => {
                    let memory = Scattered::new(&process);
                    memory.fill(1);
                    memory.scatter();
                    memory.check(1);
                }
                Err(error) => {
                    assert!(matches!(error, AttachError::NoRoom { .. }), "{error}");
                    assert!(more < 2 << 30, "{error}");
                }
            }
        }
    });
}

#[test]
fn an_address_space_that_is_full_serves_what_is_away() {
    in_own_process(|| {
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.scatter();
        let before = limit(Resource::As, 1 << 20);
        memory.check(1);
        memory.process.migrate(memory.part(0), &memory.gpu.pagemap).run();
        memory.process.migrate(memory.part(1), &memory.host).run();
        memory.check(1);
        setrlimit(Resource::As, before).expect("it was so before");
    });
}

#[test]
fn locked_memory_is_limited_and_nothing_is_lost() {
    in_own_process(|| {
        limit(Resource::Memlock, 64 << 10);
        let memory = Scattered::new(&attach());
        memory.fill(1);
        memory.scatter();
        // Root is not held to the limit: then this locks.
        let locked = common::memory::lock(memory.part(0));
        memory.check(1);
        if locked.is_ok() {
            let report = memory.process.migrate(memory.part(0), &memory.gpu.pagemap).run();
            assert_eq!(report.moved, 0, "{report:?}");
            memory.check(1);
            common::memory::unlock(memory.part(0)).expect("it was locked");
        }
        memory.scatter();
        memory.check(1);
    });
}

#[test]
fn without_threads_nothing_attaches() {
    in_own_process(|| {
        if rustix::process::getuid().is_root() {
            // Root is not held to the limit on processes.
            let user = rustix::process::Uid::from_raw(65534);
            limit(Resource::Nproc, 0);
            let result = rustix::thread::set_thread_res_uid(user, user, user);
            // Without the right to userfaultfd it is another refusal, before any thread is made.
            let attached = Process::attach(Options::new());
            assert!(result.is_err() || attached.is_err());
        }
    });
}

/// Fills the table of mappings but for `left`.
fn crowd(left: usize) -> Mapping {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").expect("proc is mounted");
    let most: usize = text.trim().parse().expect("a number");
    let mapping = Mapping::anonymous(most as u64 + 4096);
    let mut page = 0;
    let mut count = common::memory::lines().len();
    // Each other page of other rights is two mappings more.
    while count + left < most {
        if protect(mapping.part(page, 1), if page % 4 == 0 { NONE } else { R }).is_err() {
            break;
        }
        page += 2;
        count += 2;
    }
    mapping
}

#[test]
fn with_few_mappings_left_pages_stay_or_move_and_are_right() {
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        let process = attach_with(Options::new());
        let memory = Scattered::new(&process);
        memory.fill(1);
        memory.scatter();
        for left in [64, 16, 6, 3, 1, 0] {
            let crowd = crowd(left);
            memory.check(1);
            process.migrate(memory.part(0), &memory.gpu.pagemap).run();
            process.migrate(memory.part(1), &memory.host).run();
            process.migrate(memory.part(4), &memory.host).run();
            let pid = child(How::Raw, || memory.is_right(1));
            assert_eq!(end_of(pid), End::Well, "{left} left");
            memory.check(1);
            drop(crowd);
        }
        memory.scatter();
        memory.check(1);
    });
}

#[test]
fn thousands_of_mappings_move() {
    OwnProcess::new().deadline(Duration::from_secs(120)).run(|| {
        let process = attach_with(Options::new().max_registrations(500));
        let host = DevicePagemap::register(process.host_memory(1 << 16));
        // Each in a chunk of its own.
        let mappings: Vec<Mapping> = (0..2000).map(|_| Mapping::anonymous(1)).collect();
        let mut moved = 0;
        for (index, mapping) in mappings.iter().enumerate() {
            mapping.poke(0, index as u64);
            let report = process.migrate(mapping.range(), &host).run();
            moved += report.moved;
        }
        assert!((400..=500).contains(&moved), "{moved} of them moved");
        for (index, mapping) in mappings.iter().enumerate() {
            assert_eq!(mapping.peek(0), index as u64);
        }
        // There is room again.
        assert!(common::eventually(|| {
            process.migrate(mappings[1999].range(), &host).run().moved == 1
        }));
    });
}
