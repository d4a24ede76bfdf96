//! `/sys/kernel/debug/gup_test`.

use crate::device::{Pages, close, open, raw_ioctl, unit};
use crate::with_device;

const GUP_FAST: u64 = 0xc050_6701;
const PIN_FAST: u64 = 0xc050_6702;
const PIN_LONGTERM: u64 = 0xc050_6703;
const GUP: u64 = 0xc050_6704;
const PIN: u64 = 0xc050_6705;

const WRITE: u64 = 1;
const LONGTERM: u64 = 0x100;

/// Has pages got or pinned, two in a call; returns how many bytes were gone through.
fn take(fd: i32, command: u64, addr: u64, pages: u64, flags: u64) -> Result<u64, i32> {
    let mut structure = [0_u64; 10];
    structure[2] = addr;
    structure[3] = pages * 4096;
    structure[4] = 2 | flags << 32;
    raw_ioctl(fd, command, structure.as_mut_ptr().cast()).map(|()| structure[3])
}

fn node() -> i32 {
    open("/sys/kernel/debug/gup_test", libc::O_RDWR).expect("there is one")
}

#[test]
fn pages_come_home_to_be_pinned() {
    with_device("gup::pages_come_home_to_be_pinned", || {
        let gup = node();
        for command in [GUP_FAST, PIN_FAST, PIN_LONGTERM, GUP, PIN] {
            let (private, coherent) = (unit(0), unit(2));
            let pages = Pages::filled(4, 1);
            pages.to_device(private);
            assert_eq!(take(gup, command, pages.addr(), 4, WRITE), Ok(4 * 4096));
            assert_eq!(pages.snapshot(private), [0x02; 4], "{command:#x}");
            pages.to_device(coherent);
            assert_eq!(take(gup, command, pages.addr(), 4, WRITE), Ok(4 * 4096));
            let expected = if command == PIN_LONGTERM { 0x02 } else { 0x42 };
            assert_eq!(pages.snapshot(coherent), [expected; 4], "{command:#x}");
            assert_eq!(take(gup, PIN_FAST, pages.addr(), 4, WRITE | LONGTERM), Ok(4 * 4096));
            assert_eq!(pages.snapshot(coherent), [0x02; 4]);
            assert_eq!(pages.bytes(), [1, 2, 3, 4]);
            // Nothing stays pinned: what is pinned cannot move.
            pages.to_device(private);
            assert_eq!(pages.snapshot(private), [0x22; 4], "{command:#x}");
            close(private);
            close(coherent);
        }
    });
}

#[test]
fn what_cannot_be_had_ends_it() {
    with_device("gup::what_cannot_be_had_ends_it", || {
        let gup = node();
        let pages = Pages::filled(6, 1);
        let third = pages.start.wrapping_add(2 * 4096);
        // SAFETY: pages of this test's.
        assert_eq!(unsafe { libc::mprotect(third.cast(), 2 * 4096, libc::PROT_READ) }, 0);
        for command in [GUP, GUP_FAST, PIN, PIN_FAST, PIN_LONGTERM] {
            // The second call finds pages that cannot be written.
            assert_eq!(take(gup, command, pages.addr(), 6, WRITE), Ok(4 * 4096), "{command:#x}");
            assert_eq!(take(gup, command, pages.addr(), 6, 0), Ok(6 * 4096), "{command:#x}");
            assert_eq!(take(gup, command, 0, 6, WRITE), Ok(2 * 4096), "{command:#x}");
        }
        // A plain get is not for long.
        assert_eq!(take(gup, GUP, pages.addr(), 6, WRITE | LONGTERM), Ok(2 * 4096));
    });
}

#[test]
fn what_makes_no_sense_is_an_error() {
    with_device("gup::what_makes_no_sense_is_an_error", || {
        let gup = node();
        for command in [0, 0xc050_6700, 0xc050_6706, 0xc028_4800, 0x4018_6707] {
            assert_eq!(take(gup, command, 0, 1, 0), Err(libc::EINVAL), "{command:#x}");
        }
        assert_eq!(raw_ioctl(gup, GUP, core::ptr::null_mut()), Err(libc::EFAULT));
        assert_eq!(take(gup, GUP, 0, 1 << 50, 0), Err(libc::ENOMEM));
        let mut byte = 0_u8;
        // SAFETY: there is room for one byte.
        assert_eq!(unsafe { libc::read(gup, (&raw mut byte).cast(), 1) }, -1);
    });
}
