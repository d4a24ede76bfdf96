//! Threads that serve with descriptors of their own: the program sees none, and may close all it has.

mod common;

use std::sync::mpsc;

use common::children::{End, How, WAYS, child, end_of};
use common::in_own_process;
use common::memory::Mapping;
use common::rig::{Gpu, attach_with};
use uhmm_linux::{Options, Process};

/// Returns how many descriptors the program has, as it finds out itself.
fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc is there").count()
}

/// Attaches on a thread of its own, does `away` there, `meanwhile` here, and detaches.
fn attached(away: impl FnOnce(&Process) + Send, meanwhile: impl FnOnce()) {
    let (ready, is_ready) = mpsc::channel();
    let (over, is_over) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let process = attach_with(Options::new().own_descriptors(true));
            away(&process);
            ready.send(()).expect("somebody waits");
            // Until the other side is done, or has panicked.
            let _ = is_over.recv();
        });
        is_ready.recv().expect("it attaches");
        meanwhile();
        drop(over);
    });
}

fn fill(mapping: &Mapping) {
    mapping.fill(|index| 1 + index);
}

/// Tells whether all is there.
fn is_filled(mapping: &Mapping) -> bool {
    (0..mapping.range().pages()).all(|index| mapping.peek(index) == 1 + index)
}

#[test]
fn the_program_has_no_descriptor_more() {
    in_own_process(|| {
        let mapping = Mapping::anonymous(64);
        fill(&mapping);
        let gpu = Gpu::new(64);
        let before = open_descriptors();
        attached(
            |process| assert_eq!(process.migrate(mapping.range(), &gpu.pagemap).run().moved, 64),
            || {
                assert_eq!(open_descriptors(), before);
                assert!(is_filled(&mapping));
                assert_eq!(open_descriptors(), before);
            },
        );
    });
}

#[test]
fn a_program_that_closes_every_descriptor_keeps_its_memory() {
    in_own_process(|| {
        let mapping = Mapping::anonymous(64);
        fill(&mapping);
        let gpu = Gpu::new(64);
        attached(
            |process| assert_eq!(process.migrate(mapping.range(), &gpu.pagemap).run().moved, 64),
            || {
                // SAFETY: what is used after this is opened after this.
                let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
                assert_eq!(closed, 0);
                assert!(is_filled(&mapping));
            },
        );
    });
}

#[test]
fn a_child_that_is_made_in_any_way_has_what_is_away() {
    in_own_process(|| {
        let mapping = Mapping::anonymous(64);
        fill(&mapping);
        let gpu = Gpu::new(64);
        for how in WAYS {
            let (from, to) = (&mapping, &gpu.pagemap);
            attached(
                |process| assert_eq!(process.migrate(from.range(), to).run().moved, 64),
                || {
                    let pid = child(how, || is_filled(&mapping));
                    assert_eq!(end_of(pid), End::Well, "{how:?}");
                    assert!(is_filled(&mapping), "{how:?}");
                    let again = child(How::Hooked, || is_filled(&mapping));
                    assert_eq!(end_of(again), End::Well, "{how:?}");
                },
            );
        }
    });
}

#[test]
fn a_fork_brings_everything_home_by_whoever_has_the_descriptors() {
    in_own_process(|| {
        let mapping = Mapping::anonymous(64);
        fill(&mapping);
        let gpu = Gpu::new(64);
        let (out, is_still_out) = mpsc::channel();
        let (forked, has_forked) = mpsc::channel();
        attached(
            |process| {
                assert_eq!(process.migrate(mapping.range(), &gpu.pagemap).run().moved, 64);
                let process = process.clone();
                // A thread that is made here has the same descriptors.
                std::thread::spawn(move || {
                    has_forked.recv().expect("it forks");
                    out.send(process.statistics().fork_overrun).expect("somebody waits");
                });
            },
            || {
                let pid = child(How::Hooked, || is_filled(&mapping));
                assert_eq!(end_of(pid), End::Well);
                forked.send(()).expect("somebody waits");
                assert_eq!(is_still_out.recv(), Ok(64));
                assert!(is_filled(&mapping));
            },
        );
    });
}
