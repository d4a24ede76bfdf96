//! Forks, at every point.

use uhmm_agent::dmirror::{Command, Counts, Errno};

use super::common::children::{End, How, WAYS, child, end_of};
use super::common::in_own_process;
use super::common::memory::{Backing, Mapping, RW};
use super::rig::{Rig, ask, asked, counting, filled, load, peeked, snapshot, store, to_dev};

/// Where the memory is when the process forks.
#[derive(Clone, Copy, Debug)]
enum Before {
    Nothing,
    Read,
    Written,
    OnUnit,
    Exclusive,
}

const ALL: [Before; 5] =
    [Before::Nothing, Before::Read, Before::Written, Before::OnUnit, Before::Exclusive];

#[test]
fn both_have_what_there_was_and_change_it_apart() {
    in_own_process(|| {
        let rig = Rig::new();
        for how in WAYS {
            for before in ALL {
                for file in rig.variants() {
                    let memory = filled(16, 3);
                    let range = memory.range();
                    match before {
                        Before::Nothing => {}
                        Before::Read => drop(load(&file, range, 1)),
                        Before::Written => {
                            store(&file, range, |index| index + 3).expect("it is written");
                        }
                        Before::OnUnit => drop(to_dev(&file, range)),
                        Before::Exclusive => drop(asked(&file, Command::Exclusive, range, 0)),
                    }
                    let pid = child(how, || {
                        let same = peeked(&memory) == counting(3, 16);
                        memory.fill(|index| index + 50);
                        same && peeked(&memory) == counting(50, 16)
                    });
                    // While the child does so, or after.
                    let done = store(&file, range, |index| index + 90);
                    assert_eq!(done, Ok(Counts { cpages: 16, faults: 1 }), "{before:?} {how:?}");
                    assert_eq!(end_of(pid), End::Well, "{before:?} {how:?}");
                    assert_eq!(peeked(&memory), counting(90, 16));
                    let none = Ok((Counts::default(), Vec::new()));
                    assert_eq!(ask(&file, Command::CheckExclusive, range), none);
                }
            }
        }
    });
}

#[test]
fn after_a_fork_pages_may_not_be_stored_to_until_they_are_copied() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = filled(4, 3);
            load(&file, memory.range(), 1);
            // The child lives until its pipe is closed.
            let (reader, writer) = rustix::pipe::pipe().expect("pipe");
            let pid = child(How::Hooked, || {
                rustix::io::read(&reader, &mut [0; 1]).is_ok_and(|bytes| bytes == 1)
            });
            assert_eq!(snapshot(&file, memory.range()), [0x01; 4]);
            // What was there to be stored to has to be faulted in again.
            assert_eq!(load(&file, memory.range(), 1), counting(3, 4));
            assert_eq!(store(&file, memory.range(), |_| 7).map(|done| done.faults), Ok(1));
            assert_eq!(snapshot(&file, memory.range()), [0x02; 4]);
            rustix::io::write(&writer, b"x").expect("the child reads it");
            assert_eq!(end_of(pid), End::Well);
        }
    });
}

#[test]
fn shared_memory_stays_shared() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::new(4, Backing::Shared, RW);
            memory.fill(|index| index);
            load(&file, memory.range(), 1);
            let pid = child(How::Hooked, || {
                memory.fill(|index| index + 5);
                true
            });
            assert_eq!(end_of(pid), End::Well);
            // Nothing was taken back.
            assert_eq!(load(&file, memory.range(), 0), counting(5, 4));
        }
    });
}

#[test]
fn a_child_opens_the_device_for_itself_and_so_does_its_child() {
    in_own_process(|| {
        let rig = Rig::new();
        let file = rig.open(0);
        let memory = filled(8, 3);
        to_dev(&file, memory.range());
        let pid = child(How::Hooked, || {
            let rig = Rig::new();
            let file = rig.open(0);
            let mut well = to_dev(&file, memory.range()) == counting(3, 8);
            let pid = child(How::Hooked, || {
                let rig = Rig::new();
                let file = rig.open(1);
                let well = load(&file, memory.range(), 1) == counting(3, 8);
                std::mem::forget((rig, file));
                well
            });
            well &= end_of(pid) == End::Well && peeked(&memory) == counting(3, 8);
            std::mem::forget((rig, file));
            well
        });
        assert_eq!(end_of(pid), End::Well);
        assert_eq!(peeked(&memory), counting(3, 8));
        assert_eq!(
            ask(&file, Command::MigrateToSys, memory.range()).map(|done| done.0.cpages),
            Ok(0)
        );
        let _: Option<Errno> = None;
    });
}
