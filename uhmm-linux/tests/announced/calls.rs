//! Each call that is made in the place of the program has the kernel's own results, and is told of.

use std::ffi::CString;
use std::os::fd::AsRawFd as _;
use std::sync::mpsc;

use mmu_notifier::EventKind;
use rustix::io::Errno;

use super::common::memory::{self, Backing, Mapping, R, RW, part, place};
use super::{attach, in_own_process, listen};
use crate::common;

/// Makes a system call.
fn call(number: i64, arguments: [u64; 6]) -> Result<u64, Errno> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the tests here name memory of their own, and descriptors.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).expect("it failed")),
        result => Ok(result as u64),
    }
}

/// Calls of each kind, right ones and wrong ones, and their results, with addresses as distances from
/// where the test's memory is.
fn results() -> Vec<Result<u64, Errno>> {
    let all = place(64);
    let base = all.address();
    let at = |page: u64| base + page * 4096;
    let fresh = || memory::map(all, Backing::Anonymous, RW).expect("it can be mapped");
    let file = memory::memory_file(8);
    let fd = file.as_raw_fd() as u64;
    let path = CString::new(format!("/proc/self/fd/{fd}")).expect("no zeroes");
    let none = u64::MAX;
    let private_fixed = (libc::MAP_PRIVATE | libc::MAP_FIXED) as u64;
    let anonymous_fixed = private_fixed | libc::MAP_ANONYMOUS as u64;
    let mut results = Vec::new();
    let mut make = |number: i64, arguments: [u64; 6]| {
        let result = call(number, arguments);
        let inside = |value: u64| value.checked_sub(base).filter(|&distance| distance < 1 << 20);
        results
            .push(result.map(|value| inside(value).map_or(value, |distance| distance + (1 << 40))));
        result
    };
    fresh();
    // munmap: a part, none, one that is not aligned, nothing at all.
    for (address, bytes) in [(at(3), 8192), (at(3), 8192), (at(8) + 1, 4096), (at(8), 0)] {
        let _ = make(libc::SYS_munmap, [address, bytes, 0, 0, 0, 0]);
    }
    fresh();
    for (address, bytes, rights) in
        [(at(1), 4096, 1), (at(1) + 8, 4096, 1), (at(1), 4096, 3), (16, 4096, 1)]
    {
        let _ = make(libc::SYS_mprotect, [address, bytes, rights, 0, 0, 0]);
    }
    let _ = make(libc::SYS_pkey_mprotect, [at(1), 4096, 3, none, 0, 0]);
    let _ = make(libc::SYS_pkey_mprotect, [at(1), 4096, 3, 77, 0, 0]);
    // mmap: anonymous, of a file, beyond what is aligned, of no descriptor.
    let _ = make(libc::SYS_mmap, [at(2), 4096, 3, anonymous_fixed, none, 0]);
    let _ = make(libc::SYS_mmap, [at(2), 4096, 3, private_fixed, fd, 4096]);
    let _ = make(libc::SYS_mmap, [at(2) + 1, 4096, 3, anonymous_fixed, none, 0]);
    let _ = make(libc::SYS_mmap, [at(2), 4096, 3, private_fixed, 9999, 0]);
    let _ = make(libc::SYS_mmap, [at(2), 0, 3, anonymous_fixed, none, 0]);
    // mremap: larger in place, smaller, to another place, what is not there.
    fresh();
    memory::unmap(part(all, 8, 56));
    let _ = make(libc::SYS_mremap, [at(0), 8 * 4096, 12 * 4096, 0, 0, 0]);
    let _ = make(libc::SYS_mremap, [at(0), 12 * 4096, 6 * 4096, 0, 0, 0]);
    let _ = make(libc::SYS_mremap, [at(0), 6 * 4096, 6 * 4096, 3, at(30), 0]);
    let _ = make(libc::SYS_mremap, [at(0), 4096, 8192, 1, 0, 0]);
    fresh();
    for advice in [4_u64, 8, 9, 24, 102, 103, 999] {
        let _ = make(libc::SYS_madvise, [at(4), 8192, advice, 0, 0, 0]);
    }
    // A vector of two pieces; one that cannot be read; too many.
    let vector = [at(10), 4096, at(20), 8192];
    // SAFETY: takes numbers.
    let myself = call(libc::SYS_pidfd_open, [u64::from(std::process::id()), 0, 0, 0, 0, 0]);
    let myself = myself.expect("this process exists");
    for (at, pieces, advice) in [(vector.as_ptr() as u64, 2, 4), (16, 2, 4), (16, 5000, 4)] {
        let _ = make(libc::SYS_process_madvise, [myself, at, pieces, advice, 0, 0]);
    }
    let _ = make(libc::SYS_process_madvise, [9999, vector.as_ptr() as u64, 2, 4, 0, 0]);
    // Shared memory: over something, without the leave to, and away again.
    let segment = call(libc::SYS_shmget, [0, 8192, 0o1600, 0, 0, 0]).expect("there is room");
    let _ = make(libc::SYS_shmat, [segment, at(40), 0o40000, 0, 0, 0]);
    let _ = make(libc::SYS_shmat, [segment, at(40), 0, 0, 0, 0]);
    let _ = make(libc::SYS_shmat, [99_999_999, at(40), 0o40000, 0, 0, 0]);
    let _ = make(libc::SYS_shmdt, [at(40), 0, 0, 0, 0, 0]);
    let _ = make(libc::SYS_shmdt, [at(40), 0, 0, 0, 0, 0]);
    call(libc::SYS_shmctl, [segment, 0, 0, 0, 0, 0]).expect("it is ours");
    let _ = make(libc::SYS_remap_file_pages, [at(50), 4096, 0, 0, 0, 0]);
    // Files.
    for (fd, length) in [(fd, 4096 * 6), (fd, none), (9999, 0), (none, 0)] {
        let _ = make(libc::SYS_ftruncate, [fd, length, 0, 0, 0, 0]);
    }
    let _ = make(libc::SYS_truncate, [path.as_ptr() as u64, 4096 * 4, 0, 0, 0, 0]);
    let _ = make(libc::SYS_truncate, [c"/nowhere/at/all".as_ptr() as u64, 0, 0, 0, 0, 0]);
    let _ = make(libc::SYS_truncate, [16, 0, 0, 0, 0, 0]);
    for (fd, mode) in [(fd, 3), (fd, 2), (9999, 3)] {
        let _ = make(libc::SYS_fallocate, [fd, mode, 4096, 4096, 0, 0]);
    }
    // The heap: up, down, and to where it cannot be.
    let top = call(libc::SYS_brk, [0; 6]).expect("there is a heap");
    for to in [top + 8 * 4096, top + 4096, top, 4096] {
        let now = call(libc::SYS_brk, [to, 0, 0, 0, 0, 0]).map(|now| now.wrapping_sub(top));
        results.push(now);
    }
    call(libc::SYS_close, [myself, 0, 0, 0, 0, 0]).expect("it is open");
    memory::unmap(all);
    results
}

#[test]
fn the_results_are_those_of_the_kernel() {
    in_own_process(|| {
        let plain = results();
        let process = attach();
        let announced = results();
        assert_eq!(announced, plain);
        drop(process);
        // The filter is still there, and lets everything pass.
        assert_eq!(results(), plain);
        let process = attach();
        assert_eq!(results(), plain);
        drop(process);
    });
}

/// Makes a call on a mapping of 8 pages, and checks that this was announced of some of its pages.
#[track_caller]
fn assert_announced(
    mapping: &Mapping,
    process: &uhmm_linux::Process,
    kind: EventKind,
    pages: (u64, u64),
    number: i64,
    arguments: [u64; 6],
) {
    let (heard, subscription) = listen(process, mapping.range(), || true);
    call(number, arguments).unwrap_or_else(|error| panic!("{number}: {error}"));
    let heard = heard.lock().expect("nobody panics");
    let range = mapping.part(pages.0, pages.1);
    assert_eq!(heard.first(), Some(&(kind, range, true)), "call {number}");
    drop(heard);
    drop(subscription);
}

#[test]
fn each_call_is_announced_for_what_it_changes() {
    in_own_process(|| {
        let process = attach();
        let all = place(8);
        let mapping = Mapping::at(all, Backing::Anonymous, RW);
        let fresh = || memory::map(all, Backing::Anonymous, RW).expect("it can be mapped");
        let at = |page: u64| all.address() + page * 4096;
        let announced = |kind, pages, number, arguments| {
            assert_announced(&mapping, &process, kind, pages, number, arguments);
        };
        let fixed = (libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_ANONYMOUS) as u64;
        let none = u64::MAX;
        announced(EventKind::ProtectionVma, (1, 2), libc::SYS_mprotect, [at(1), 8192, 1, 0, 0, 0]);
        announced(
            EventKind::ProtectionVma,
            (1, 2),
            libc::SYS_pkey_mprotect,
            [at(1), 8192, 3, none, 0, 0],
        );
        for advice in [4, 8, 24, 102] {
            announced(EventKind::Clear, (2, 1), libc::SYS_madvise, [at(2), 4096, advice, 0, 0, 0]);
        }
        fresh();
        announced(EventKind::Unmap, (3, 1), libc::SYS_mmap, [at(3), 4096, 3, fixed, none, 0]);
        announced(EventKind::Unmap, (6, 1), libc::SYS_munmap, [at(6), 4096, 0, 0, 0, 0]);
        // What moves away, and what is replaced by what moves there.
        let target = place(8);
        memory::map(target, Backing::Anonymous, RW).expect("it can be mapped");
        let to = target.address();
        announced(EventKind::Unmap, (0, 2), libc::SYS_mremap, [at(0), 8192, 8192, 3, to, 0]);
        announced(EventKind::Unmap, (0, 2), libc::SYS_mremap, [to, 8192, 8192, 3, at(0), 0]);
        fresh();
        let vector = [at(5), 4096];
        let myself = call(libc::SYS_pidfd_open, [u64::from(std::process::id()), 0, 0, 0, 0, 0]);
        let arguments = [myself.expect("this process exists"), vector.as_ptr() as u64, 1, 4, 0, 0];
        // Linux 6.13: of one's own memory everything may be said.
        if call(libc::SYS_process_madvise, arguments).is_ok() {
            announced(EventKind::Clear, (5, 1), libc::SYS_process_madvise, arguments);
        } else {
            common::loudly("process_madvise(DONTNEED) is not there: it was not tested");
        }
        let segment = call(libc::SYS_shmget, [0, 8192, 0o1600, 0, 0, 0]).expect("there is room");
        announced(EventKind::Unmap, (2, 2), libc::SYS_shmat, [segment, at(2), 0o40000, 0, 0, 0]);
        announced(EventKind::Unmap, (2, 2), libc::SYS_shmdt, [at(2), 0, 0, 0, 0, 0]);
        call(libc::SYS_shmctl, [segment, 0, 0, 0, 0, 0]).expect("it is ours");
    });
}

#[test]
fn what_is_cut_from_a_file_is_announced_where_it_is_mapped() {
    in_own_process(|| {
        let process = attach();
        let file = memory::memory_file(8);
        let fd = file.as_raw_fd() as u64;
        let path = CString::new(format!("/proc/self/fd/{fd}")).expect("no zeroes");
        // The mapping begins at the second page of the file.
        let mapping = Mapping::new(6, Backing::File(memory::borrow(file.as_raw_fd()), 1), R);
        let announced = |pages, number, arguments| {
            assert_announced(&mapping, &process, EventKind::Clear, pages, number, arguments);
        };
        announced((2, 1), libc::SYS_fallocate, [fd, 3, 3 * 4096, 4096, 0, 0]);
        announced((4, 2), libc::SYS_ftruncate, [fd, 5 * 4096, 0, 0, 0, 0]);
        announced((1, 5), libc::SYS_truncate, [path.as_ptr() as u64, 2 * 4096, 0, 0, 0, 0]);
    });
}

#[test]
fn a_thread_with_descriptors_of_its_own_means_its_own() {
    in_own_process(|| {
        let _process = attach();
        let ours = memory::memory_file(1);
        rustix::io::pwrite(&ours, &[1; 8], 0).expect("there is room");
        let number = ours.as_raw_fd();
        let range = place(1);
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            // SAFETY: from here on this thread names its own.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }
                .expect("it may");
            let other = memory::memory_file(1);
            rustix::io::pwrite(&other, &[2; 8], 0).expect("there is room");
            // Under the number that is something else to the others.
            // SAFETY: numbers of descriptors.
            let moved = unsafe { libc::dup2(other.as_raw_fd(), number) };
            assert_eq!(moved, number);
            memory::map(range, Backing::File(memory::borrow(number), 0), R)
                .expect("it can be mapped");
            // SAFETY: it was mapped just now.
            let word = unsafe { (range.address() as *const u64).read_volatile() };
            // No number is somebody's.
            let none = u64::MAX;
            let fixed = (libc::MAP_PRIVATE | libc::MAP_FIXED) as u64;
            let mapped = call(libc::SYS_mmap, [range.address(), 4096, 1, fixed, none, 0]);
            assert_eq!(mapped, Err(Errno::BADF));
            assert_eq!(call(libc::SYS_ftruncate, [none, 0, 0, 0, 0, 0]), Err(Errno::BADF));
            tell.send(word).expect("somebody waits");
        });
        assert_eq!(told.recv(), Ok(0x0202_0202_0202_0202));
        drop(ours);
    });
}

/// Who has given up its rights has not got ours.
#[test]
fn a_thread_with_credentials_of_its_own_may_do_what_it_may() {
    in_own_process(|| {
        if !rustix::process::geteuid().is_root() {
            return common::loudly("only root can give up rights: nothing was tested");
        }
        let _process = attach();
        let file = memory::disk_file(2);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = CString::new(path).expect("no zeroes");
        let to = |bytes: u64| call(libc::SYS_truncate, [path.as_ptr() as u64, bytes, 0, 0, 0, 0]);
        assert_eq!(to(4096), Ok(0));
        let at = Mapping::anonymous(1);
        // SAFETY: makes a segment.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, 0o600) };
        let attach = || {
            call(
                libc::SYS_shmat,
                [id as u64, at.range().address(), libc::SHM_REMAP as u64, 0, 0, 0],
            )
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The system call is of this thread alone, unlike the C library's function.
                let same = u64::MAX;
                let given_up = call(libc::SYS_setresuid, [same, 65534, same, 0, 0, 0]);
                assert_eq!(given_up, Ok(0));
                assert_eq!(to(0), Err(Errno::ACCESS));
                assert_eq!(attach(), Err(Errno::ACCESS));
            });
        });
        assert_eq!(rustix::fs::fstat(&file).expect("it is open").st_size, 4096);
        assert_eq!(attach(), Ok(at.range().address()));
        // SAFETY: the segment is this test's.
        unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    });
}
