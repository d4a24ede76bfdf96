//! Open files: how they are opened, doubled, mapped and closed.

use crate::device::{
    Pages, SNAPSHOT, TO_DEV, TO_SYS, close, command, errno, open, raw_ioctl, unit,
};
use crate::with_device;

const RDWR: i32 = libc::O_RDWR;

fn flags_of(fd: i32) -> i32 {
    // SAFETY: it asks for flags.
    unsafe { libc::fcntl(fd, libc::F_GETFD) }
}

fn dup(fd: i32) -> i32 {
    // SAFETY: it makes a new number.
    unsafe { libc::dup(fd) }
}

#[test]
fn nodes_open_as_files_do() {
    with_device("files::nodes_open_as_files_do", || {
        // It attaches the process, which takes descriptors.
        close(unit(0));
        let lowest = dup(0);
        close(lowest);
        for number in 0..4 {
            let fd = unit(number);
            assert_eq!((fd, flags_of(fd)), (lowest, 0));
            close(fd);
        }
        let path = "/dev/hmm_dmirror1";
        let fd = open(path, RDWR | libc::O_CLOEXEC).expect("there is one");
        assert_eq!((fd, flags_of(fd)), (lowest, libc::FD_CLOEXEC));
        assert_eq!(raw_ioctl(fd, libc::FIONCLEX, core::ptr::null_mut()), Ok(()));
        assert_eq!(flags_of(fd), 0);
        close(fd);
        assert_eq!(open(path, RDWR | libc::O_CREAT | libc::O_EXCL), Err(libc::EEXIST));
        assert_eq!(open(path, RDWR | libc::O_DIRECTORY), Err(libc::ENOTDIR));
        assert_eq!(open("/dev/hmm_dmirror4", RDWR), Err(libc::ENOENT));
        assert!(open(path, RDWR | libc::O_CREAT).is_ok_and(|fd| flags_of(fd) == 0));
        // SAFETY: no address of a path at all.
        assert_eq!(unsafe { libc::open(core::ptr::dangling(), RDWR) }, -1);
        assert_eq!(errno(), libc::EFAULT);
    });
}

#[test]
fn every_way_to_open_leads_there() {
    with_device("files::every_way_to_open_leads_there", || {
        let path = c"/dev/hmm_dmirror0";
        let path = path.as_ptr();
        // SAFETY: a string.
        let large = unsafe { libc::open64(path, RDWR) };
        // SAFETY: a string, and a folder that does not matter.
        let at = unsafe { libc::openat(libc::AT_FDCWD, path, RDWR) };
        // SAFETY: as above.
        let large_at = unsafe { libc::openat64(-1, path, RDWR) };
        // SAFETY: a string.
        let created = unsafe { libc::creat(path, 0o600) };
        // SAFETY: two strings.
        let stream = unsafe { libc::fopen(path, c"r+".as_ptr()) };
        assert!(!stream.is_null());
        // SAFETY: an open stream.
        let number = unsafe { libc::fileno(stream) };
        let ways = [large, at, large_at, created, number];
        let pages = Pages::filled(1, 1);
        for fd in ways {
            assert_eq!(pages.device_reads(fd), [1], "{fd}");
        }
        let file = std::fs::File::open("/dev/hmm_dmirror0").expect("there is one");
        use std::os::fd::AsRawFd as _;
        assert_eq!(pages.device_reads(file.as_raw_fd()), [1]);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::access(path, libc::R_OK | libc::W_OK) }, 0);
    });
}

#[test]
fn there_is_nothing_to_be_read_or_written() {
    with_device("files::there_is_nothing_to_be_read_or_written", || {
        let fd = unit(2);
        let mut bytes = [0_u8; 8];
        let (to, from) = (bytes.as_mut_ptr().cast(), bytes.as_ptr().cast());
        type Call = fn(i32, *mut libc::c_void, *const libc::c_void) -> isize;
        let calls: [Call; 4] = [
            // SAFETY: there is room for as many bytes, here and in what follows.
            |fd, to, _| unsafe { libc::read(fd, to, 8) },
            // SAFETY: as above.
            |fd, to, _| unsafe { libc::pread(fd, to, 8, 0) },
            // SAFETY: as above.
            |fd, _, from| unsafe { libc::write(fd, from, 8) },
            // SAFETY: as above.
            |fd, _, from| unsafe { libc::pwrite(fd, from, 8, 0) },
        ];
        for call in calls {
            assert_eq!((call(fd, to, from), errno()), (-1, libc::EINVAL));
        }
        // SAFETY: it changes a position that means nothing.
        assert_eq!(unsafe { libc::lseek(fd, 4096, libc::SEEK_SET) }, 4096);
    });
}

#[test]
fn the_last_close_evicts_the_unit_and_no_other_does() {
    with_device("files::the_last_close_evicts_the_unit_and_no_other_does", || {
        let (open, other) = (unit(0), unit(0));
        let again = dup(open);
        let pages = Pages::filled(3, 5);
        pages.to_device(open);
        assert_eq!(pages.snapshot(other), [0x22; 3]);
        close(open);
        assert_eq!(pages.snapshot(other), [0x22; 3], "there is another of it");
        close(again);
        assert_eq!(pages.snapshot(other), [0x02; 3]);
        assert_eq!(pages.bytes(), [5, 6, 7]);
        // The number is free: another file is there by dup2, and closes what was there.
        let open = unit(0);
        pages.to_device(open);
        // SAFETY: descriptors of this test's.
        assert_eq!(unsafe { libc::dup2(0, open) }, open);
        assert_eq!(pages.snapshot(other), [0x02; 3]);
        let open = unit(0);
        pages.to_device(open);
        let number = u32::try_from(open).expect("a descriptor");
        // SAFETY: as above.
        assert_eq!(unsafe { libc::close_range(number, number, 0) }, 0);
        assert_eq!(pages.snapshot(other), [0x02; 3]);
    });
}

#[test]
fn a_mapping_of_a_node_has_its_pages_from_the_start() {
    with_device("files::a_mapping_of_a_node_has_its_pages_from_the_start", || {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        for number in [0, 3] {
            let fd = unit(number);
            let private = Pages::map(2, both, libc::MAP_PRIVATE, fd);
            assert_eq!(private.snapshot(fd), [0x01; 2]);
            assert_eq!(private.bytes(), [0; 2]);
            private.fill(1, 9);
            assert_eq!(private.snapshot(fd), [0x01, 0x02]);
            let shared = Pages::map(2, both, libc::MAP_SHARED, fd);
            assert_eq!(shared.snapshot(fd), [0x02; 2]);
            shared.fill(0, 8);
            assert_eq!(shared.device_reads(fd), [8, 0]);
            let mut bytes = vec![0; 2 * 4096];
            for move_there_or_back in [TO_DEV, TO_SYS] {
                let moved = shared.ask(fd, move_there_or_back, &mut bytes);
                assert_eq!(moved, Err(libc::EINVAL));
            }
        }
    });
}

#[test]
fn a_mapping_is_as_the_file_was_opened() {
    with_device("files::a_mapping_is_as_the_file_was_opened", || {
        let map = |fd, length, protection, flags, offset| {
            // SAFETY: the kernel chooses where.
            let start =
                unsafe { libc::mmap(core::ptr::null_mut(), length, protection, flags, fd, offset) };
            if start == libc::MAP_FAILED { Err(errno()) } else { Ok(start.addr()) }
        };
        let fd = open("/dev/hmm_dmirror0", libc::O_RDONLY).expect("there is one");
        let (read, both) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(map(fd, 4096, both, libc::MAP_SHARED, 0), Err(libc::EACCES));
        assert!(map(fd, 4096, both, libc::MAP_PRIVATE, 0).is_ok());
        assert!(map(fd, 100, read, libc::MAP_SHARED, 1 << 40).is_ok());
        assert_eq!(map(fd, 0, read, libc::MAP_SHARED, 0), Err(libc::EINVAL));
        assert_eq!(map(fd, 4096, read, libc::MAP_SHARED, 1), Err(libc::EINVAL));
        assert_eq!(map(fd, 1 << 46, read, libc::MAP_SHARED, 0), Err(libc::ENOMEM));
        assert_eq!(map(fd, usize::MAX, read, libc::MAP_SHARED, 0), Err(libc::ENOMEM));
        // What the file cannot do, memory that is moved can: an open for reading is no limit there.
        let pages = Pages::filled(1, 3);
        pages.to_device(fd);
        let write = open("/dev/hmm_dmirror0", libc::O_WRONLY).expect("there is one");
        assert_eq!(map(write, 4096, read, libc::MAP_PRIVATE, 0), Err(libc::EACCES));
        let mut byte = 0_u8;
        let ptr = (&raw mut byte).expose_provenance() as u64;
        assert_eq!(command(write, SNAPSHOT, pages.addr(), 1, ptr), Ok((1, 0)));
        assert_eq!(byte, 0x22);
    });
}
