//! Requests that are wrong in some way: which error, in which order, and what has been done.

use core::ffi::c_void;

use crate::device::{
    CHECK_EXCLUSIVE, EXCLUSIVE, FLAGS, PAGE, Pages, READ, RELEASE, SNAPSHOT, TO_DEV, TO_SYS, WRITE,
    command, raw_ioctl, unit,
};
use crate::with_device;

const ALL: [u64; 9] =
    [READ, WRITE, TO_DEV, TO_SYS, SNAPSHOT, EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE, FLAGS];

#[test]
fn every_command_makes_the_same_checks() {
    with_device("requests::every_command_makes_the_same_checks", || {
        let fd = unit(0);
        let pages = Pages::filled(2, 1);
        let addr = pages.addr();
        for number in ALL {
            assert_eq!(raw_ioctl(fd, number, core::ptr::null_mut()), Err(libc::EFAULT));
            let top: *mut c_void = core::ptr::without_provenance_mut(usize::MAX - 8);
            assert_eq!(raw_ioctl(fd, number, top), Err(libc::EFAULT));
            for (addr, npages) in [
                (addr + 1, 1),
                (addr, 0),
                (addr, 1 << 52),
                (addr, u64::MAX),
                (u64::MAX - 4095, 1),
                (u64::MAX - 4095, 2),
            ] {
                let answer = command(fd, number, addr, npages, 0);
                assert_eq!(answer, Err(libc::EINVAL), "{number:#x} {addr:#x} {npages:#x}");
            }
        }
        // What is none of the commands, by its number, size or direction.
        for number in [READ + 9, READ - 0x100, 0x8028_4800, 0xc020_4800, 0xc028_4700, 0, 0x5401] {
            assert_eq!(command(fd, number, addr, 1, 0), Err(libc::EINVAL), "{number:#x}");
            assert_eq!(raw_ioctl(fd, number, core::ptr::null_mut()), Err(libc::EFAULT));
        }
        assert_eq!(pages.bytes(), [1, 2]);
    });
}

#[test]
fn a_buffer_that_cannot_be_reached_is_an_error_after_the_deed() {
    with_device("requests::a_buffer_that_cannot_be_reached_is_an_error_after_the_deed", || {
        let fd = unit(0);
        let pages = Pages::filled(2, 1);
        let addr = pages.addr();
        let read_only = Pages::fenced(2, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        read_only.fill_all(9);
        read_only.protect(libc::PROT_READ);
        for ptr in [0, 8, u64::MAX, read_only.addr()] {
            for number in [READ, SNAPSHOT] {
                assert_eq!(command(fd, number, addr, 2, ptr), Err(libc::EFAULT), "{ptr:#x}");
            }
        }
        assert_eq!(read_only.bytes(), [9, 10]);
        assert_eq!(command(fd, TO_DEV, addr, 2, 0), Err(libc::EFAULT));
        assert_eq!(pages.snapshot(fd), [0x22; 2], "they are there nevertheless");
        // Nothing is written where what is to be written cannot be had.
        assert_eq!(command(fd, WRITE, addr, 2, read_only.addr() + PAGE as u64), Err(libc::EFAULT));
        assert_eq!(pages.bytes(), [1, 2]);
        assert_eq!(command(fd, WRITE, addr, 2, read_only.addr()).map(|done| done.0), Ok(2));
        assert_eq!(pages.bytes(), [9, 10]);
        // A byte in the middle of a page will do as well.
        let mut bytes = vec![0_u8; 2 * PAGE + 1];
        let ptr = bytes.as_mut_ptr().expose_provenance() as u64 + 1;
        assert_eq!(command(fd, READ, addr, 2, ptr).map(|done| done.0), Ok(2));
        assert_eq!((bytes[0], bytes[1], bytes[PAGE], bytes[2 * PAGE]), (0, 9, 9, 10));
    });
}

#[test]
fn a_structure_that_cannot_be_written_is_an_error_after_the_deed() {
    with_device("requests::a_structure_that_cannot_be_written_is_an_error_after_the_deed", || {
        let fd = unit(1);
        let pages = Pages::filled(1, 1);
        let from = Pages::filled(1, 7);
        let place = Pages::filled(1, 0);
        let structure: *mut [u64; 5] = place.start.cast();
        // SAFETY: a page has room for it, and nobody else uses it.
        unsafe { structure.write([pages.addr(), from.addr(), 1, 0, 0]) };
        place.protect(libc::PROT_READ);
        assert_eq!(raw_ioctl(fd, WRITE, structure.cast()), Err(libc::EFAULT));
        assert_eq!(pages.bytes(), [7]);
        place.protect(libc::PROT_NONE);
        assert_eq!(raw_ioctl(fd, WRITE, structure.cast()), Err(libc::EFAULT));
    });
}

#[test]
fn more_than_there_is_memory_for_is_an_error() {
    with_device("requests::more_than_there_is_memory_for_is_an_error", || {
        let fd = unit(0);
        let pages = Pages::filled(1, 1);
        for number in [READ, WRITE] {
            let answer = command(fd, number, pages.addr(), 1 << 30, pages.addr());
            assert_eq!(answer, Err(libc::ENOMEM), "{number:#x}");
        }
    });
}

#[test]
fn memory_on_the_device_can_be_the_buffer() {
    with_device("requests::memory_on_the_device_can_be_the_buffer", || {
        let fd = unit(0);
        let (pages, buffer) = (Pages::filled(2, 1), Pages::filled(2, 11));
        buffer.to_device(fd);
        assert_eq!(command(fd, READ, pages.addr(), 2, buffer.addr()).map(|done| done.0), Ok(2));
        assert_eq!(buffer.bytes(), [1, 2]);
        buffer.to_device(fd);
        assert_eq!(command(fd, WRITE, pages.addr(), 2, buffer.addr()).map(|done| done.0), Ok(2));
        assert_eq!(pages.bytes(), [1, 2]);
    });
}
