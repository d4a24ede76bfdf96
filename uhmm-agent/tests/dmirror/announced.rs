//! Where changes are announced the device is told of rights too, and pages that may only be read leave
//! the page table. (`UHMM_DMIRROR_ANNOUNCED=1` has all other tests run like that.)

use uhmm_agent::dmirror::Errno;
use uhmm_linux::Options;

use super::common::memory::{R, RW, protect};
use super::common::{in_own_process, loudly};
use super::rig::{Rig, counting, filled, load, peeked, snapshot, store, to_dev};

/// A process whose changes are announced, where this user may have that.
fn announced() -> Option<Rig> {
    match Rig::attach(Options::new().announced(true)) {
        Ok(rig) => Some(rig),
        Err(Errno::PERM) => {
            loudly("changes cannot be announced here: nothing was tested");
            None
        }
        Err(error) => panic!("the process attaches: {error}"),
    }
}

#[test]
fn rights_that_are_taken_and_given_back_are_a_fault() {
    in_own_process(|| {
        let Some(rig) = announced() else { return };
        for file in rig.variants() {
            let memory = filled(8, 3);
            load(&file, memory.range(), 1);
            protect(memory.range(), R).expect("mprotect");
            protect(memory.range(), RW).expect("mprotect");
            assert_eq!(load(&file, memory.range(), 1), counting(3, 8));
            assert_eq!(store(&file, memory.range(), |_| 7).map(|done| done.faults), Ok(0));
        }
    });
}

#[test]
fn pages_that_may_only_be_read_leave_and_come_home() {
    in_own_process(|| {
        let Some(rig) = announced() else { return };
        let file = rig.open(0);
        let memory = filled(8, 3);
        protect(memory.range(), R).expect("mprotect");
        assert_eq!(to_dev(&file, memory.range()), counting(3, 8));
        assert_eq!(snapshot(&file, memory.range()), [0x21; 8]);
        assert_eq!(memory.peek(2), 5);
        assert_eq!(snapshot(&file, memory.part(1, 3)), [0x21, 0x01, 0x21]);
        assert_eq!(peeked(&memory), counting(3, 8));
    });
}
