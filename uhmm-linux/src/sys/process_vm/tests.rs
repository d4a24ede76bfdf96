//! Tests.

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use uhmm::PAGE_SIZE;

use super::super::child::{End, Fork, alone, start};
use super::super::testing::{Mapping, protect, unmap};
use super::*;

#[test]
fn memory_is_read_and_written_at_its_address() {
    let mapping = Mapping::anonymous(3);
    let address = mapping.range().address() + 1000;
    let data: Vec<u8> = (0..2 * PAGE_SIZE).map(|index| index as u8).collect();
    assert_eq!(write(address, &data), Ok(data.len()));
    let mut back = vec![0; data.len()];
    assert_eq!(read(address, &mut back), Ok(data.len()));
    assert_eq!(back, data);
    assert_eq!((read(address, &mut []), write(address, &[])), (Ok(0), Ok(0)));
}

#[test]
fn what_cannot_be_accessed_is_said_and_not_signalled() {
    let mapping = Mapping::anonymous(4);
    mapping.fill(|index| index);
    let address = |index| mapping.page(index).address();
    protect(mapping.pages(1..2), MprotectFlags::READ);
    protect(mapping.pages(2..3), MprotectFlags::empty());
    unmap(mapping.pages(3..4));
    let mut bytes = [0; 16];
    assert_eq!(read(address(1), &mut bytes), Ok(16));
    assert_eq!(write(address(1), &bytes), Err(Errno::FAULT));
    for index in [2, 3] {
        assert_eq!(read(address(index), &mut bytes), Err(Errno::FAULT));
        assert_eq!(write(address(index), &bytes), Err(Errno::FAULT));
    }
    for address in [0, u64::MAX - 100, 1 << 63] {
        assert_eq!(read(address, &mut bytes), Err(Errno::FAULT));
        assert_eq!(write(address, &bytes), Err(Errno::FAULT));
    }
    // The last page went already.
    let rest = mapping.pages(0..3);
    mapping.into_range();
    unmap(rest);
}

#[test]
fn a_part_of_a_transfer_is_told_to_its_page() {
    let mapping = Mapping::new(3, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    mapping.fill(|index| index + 1);
    protect(mapping.pages(2..3), MprotectFlags::empty());
    let mut bytes = vec![0; 3 * PAGE_SIZE];
    let address = mapping.range().address();
    assert_eq!(read(address + 8, &mut bytes), Ok(2 * PAGE_SIZE - 8));
    assert_eq!(bytes[PAGE_SIZE - 8], 2);
    assert_eq!(write(address + 8, &bytes), Ok(2 * PAGE_SIZE - 8));
}

#[test]
fn a_child_reads_and_writes_its_own_memory() {
    alone(module_path!(), "a_child_reads_and_writes_its_own_memory", || {
        let mapping = Mapping::anonymous(1);
        mapping.store(0, 1);
        let address = mapping.range().address();
        let word = || {
            let mut word = [0; 8];
            read(address, &mut word).map(|_| u64::from_ne_bytes(word))
        };
        for how in [Fork::Hooked, Fork::Raw] {
            let child = start(how, || {
                mapping.store(0, 2);
                word() == Ok(2)
                    && write(address, &3_u64.to_ne_bytes()) == Ok(8)
                    && mapping.load(0) == 3
            });
            assert_eq!(child.end(), End::Returned(true));
            assert_eq!((word(), mapping.load(0)), (Ok(1), 1));
        }
    });
}
