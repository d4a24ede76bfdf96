//! Huge pages, whole and in pieces.

use uhmm::PageRange;
use uhmm_agent::dmirror::{Command, Errno, OpenFile};

use super::common::in_own_process;
use super::common::memory::{Backing, Mapping, R, RW, advise, part, place, remap, unmap};
use super::rig::{Rig, ask, counting, filled, load, peeked, snapshot, store, to_dev, to_sys};

const HUGE: u64 = 512;

fn here(file: &OpenFile) -> u8 {
    if file.unit().is_coherent() { 0x46 } else { 0x26 }
}

/// A huge page with contents.
#[track_caller]
fn huge(file: &OpenFile, base: u64) -> Mapping {
    let memory = Mapping::new(HUGE, Backing::Huge, RW);
    memory.fill(|index| base + index);
    assert_eq!(snapshot(file, memory.range()), [0x06; 512], "the kernel gives huge pages");
    memory
}

#[test]
fn a_huge_page_goes_whole_and_comes_home_whole() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = huge(&file, 3);
            assert_eq!(to_dev(&file, memory.range()), counting(3, HUGE));
            assert_eq!(snapshot(&file, memory.range()), [here(&file); 512]);
            assert_eq!(memory.peek(77), 80);
            if !file.unit().is_coherent() {
                assert_eq!(snapshot(&file, memory.range()), [0x06; 512]);
            }
            assert_eq!(peeked(&memory), counting(3, HUGE));
            to_dev(&file, memory.range());
            assert_eq!(to_sys(&file, memory.range()), HUGE);
            assert_eq!(snapshot(&file, memory.range()), [0x06; 512]);
        }
    });
}

#[test]
fn a_part_of_a_huge_page_goes_alone() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = huge(&file, 3);
            assert_eq!(to_dev(&file, memory.part(8, 8)), counting(11, 8));
            let seen = snapshot(&file, memory.part(7, 10));
            if !file.unit().is_coherent() {
                assert_eq!(seen, [2, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 2]);
            }
            assert_eq!(peeked(&memory), counting(3, HUGE));
        }
    });
}

#[test]
fn nothing_yet_and_the_huge_page_of_zeroes() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            for rights in [R, RW] {
                let memory = Mapping::new(HUGE, Backing::Huge, rights);
                assert_eq!(to_dev(&file, memory.range()), [0; 512]);
                assert_eq!(peeked(&memory), [0; 512]);
                let memory = Mapping::new(HUGE, Backing::Huge, rights);
                assert_eq!(memory.peek(0), 0);
                assert_eq!(to_dev(&file, memory.range()), [0; 512]);
                assert_eq!(peeked(&memory), [0; 512]);
            }
        }
    });
}

#[test]
fn a_part_is_unmapped_while_it_is_away() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            for backing in [Backing::Huge, Backing::Anonymous] {
                for first in [0, 128, 256] {
                    let memory = Mapping::new(HUGE, backing, RW);
                    memory.fill(|index| index);
                    to_dev(&file, memory.range());
                    let gone = memory.part(first, 256);
                    unmap(gone);
                    let is_gone = |index: u64| gone.contains(memory.page(index));
                    let left: Vec<u64> = (0..HUGE).filter(|&index| !is_gone(index)).collect();
                    for &index in &left {
                        assert_eq!(memory.peek(index), index);
                    }
                    let whole = ask(&file, Command::Read, memory.range());
                    assert_eq!(whole, Err(Errno::FAULT));
                    super::common::memory::map(gone, Backing::Anonymous, RW).expect("mmap");
                    assert_eq!(memory.peek(first), 0);
                }
            }
        }
    });
}

#[test]
fn the_mapping_moves_before_or_after() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            for backing in [Backing::Huge, Backing::Anonymous] {
                for (before, offset) in [(true, 0), (true, 1), (false, 0), (false, 1), (false, 256)]
                {
                    let memory = Mapping::new(HUGE, backing, RW);
                    memory.fill(|index| index + 3);
                    let target = part(place(3 * HUGE), offset, HUGE);
                    if before {
                        remap(memory.range(), target.first()).expect("mremap");
                        assert_eq!(to_dev(&file, target), counting(3, HUGE));
                    } else {
                        assert_eq!(to_dev(&file, memory.range()), counting(3, HUGE));
                        remap(memory.range(), target.first()).expect("mremap");
                    }
                    assert_eq!(load(&file, target, u64::from(!before)), counting(3, HUGE));
                    assert_eq!(peek_all(target), counting(3, HUGE));
                    unmap(target);
                }
            }
        }
    });
}

fn peek_all(range: PageRange) -> Vec<u64> {
    let load = |page: uhmm::Page| super::common::trap::load(page.address());
    range.iter().map(|page| load(page).expect("it is mapped")).collect()
}

#[test]
fn advice_leaves_what_is_away_whole() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = huge(&file, 3);
            to_dev(&file, memory.range());
            for advice in [libc::MADV_COLD, libc::MADV_WILLNEED] {
                advise(memory.range(), advice).expect("madvise");
            }
            assert_eq!(snapshot(&file, memory.range()), [here(&file); 512]);
            // What is given up may be what it was, or zeroes.
            advise(memory.range(), libc::MADV_FREE).expect("madvise");
            let words = peeked(&memory);
            assert!((0..).zip(words).all(|(index, word)| word == 0 || word == index + 3));
        }
    });
}

#[test]
fn several_with_edges_in_between() {
    in_own_process(|| {
        let rig = Rig::new();
        for file in rig.variants() {
            let memory = Mapping::new(4 * HUGE, Backing::Huge, RW);
            memory.fill(|index| index);
            let middle = memory.part(100, 3 * HUGE);
            assert_eq!(to_dev(&file, middle), counting(100, 3 * HUGE));
            assert_eq!(store(&file, middle, |index| index + 7).map(|done| done.faults), Ok(0));
            let expected = (0..4 * HUGE).map(|index| match index {
                100..1636 => index - 93,
                _ => index,
            });
            assert_eq!(peeked(&memory), expected.collect::<Vec<_>>());
            drop(filled(1, 0));
        }
    });
}
