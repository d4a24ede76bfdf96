//! The numbers and structures of the kernel's interfaces that this folder calls by hand, and the
//! one function that calls them.
//!
//! The names are the kernel's own, so that they can be looked up in its
//! `include/uapi/linux/userfaultfd.h` and `include/uapi/linux/fs.h`. They are written down here,
//! and not taken from a crate, because no crate has all of them, and because one file can be
//! checked as a whole: the tests compare every number and every offset with the headers of the
//! machine, and try each that those lack on the running kernel.
#![allow(dead_code, reason = "the interface is wrapped and tested whole, and used in part")]

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr;

use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, opcode};
use uhmm::{PAGE_SHIFT, PageRange};

/// The only version of the interface there is.
pub(super) const UFFD_API: u64 = 0xaa;
/// The group that userfaultfd's ioctls have their numbers in.
const UFFDIO: u8 = 0xaa;
/// The group that the ioctls on files of `/proc` have their numbers in.
const PROCFS_IOCTL_MAGIC: u8 = b'f';

pub(super) const USERFAULTFD_IOC_NEW: Opcode = opcode::none(UFFDIO, 0x00);
pub(super) const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(UFFDIO, 0x3f);
pub(super) const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(UFFDIO, 0x00);
pub(super) const UFFDIO_UNREGISTER: Opcode = opcode::read::<UffdioUnregister>(UFFDIO, 0x01);
pub(super) const UFFDIO_WAKE: Opcode = opcode::read::<UffdioWake>(UFFDIO, 0x02);
pub(super) const UFFDIO_COPY: Opcode = opcode::read_write::<UffdioCopy>(UFFDIO, 0x03);
pub(super) const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<UffdioZeropage>(UFFDIO, 0x04);
pub(super) const UFFDIO_MOVE: Opcode = opcode::read_write::<UffdioMove>(UFFDIO, 0x05);
pub(super) const UFFDIO_WRITEPROTECT: Opcode =
    opcode::read_write::<UffdioWriteprotect>(UFFDIO, 0x06);
pub(super) const UFFDIO_CONTINUE: Opcode = opcode::read_write::<UffdioContinue>(UFFDIO, 0x07);
pub(super) const UFFDIO_POISON: Opcode = opcode::read_write::<UffdioPoison>(UFFDIO, 0x08);
pub(super) const PAGEMAP_SCAN: Opcode = opcode::read_write::<PmScanArg>(PROCFS_IOCTL_MAGIC, 16);
pub(super) const PROCMAP_QUERY: Opcode = opcode::read_write::<ProcmapQuery>(PROCFS_IOCTL_MAGIC, 17);

pub(super) const UFFD_USER_MODE_ONLY: u32 = 1;

pub(super) const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const UFFD_EVENT_FORK: u8 = 0x13;
pub(super) const UFFD_EVENT_REMAP: u8 = 0x14;
pub(super) const UFFD_EVENT_REMOVE: u8 = 0x15;
pub(super) const UFFD_EVENT_UNMAP: u8 = 0x16;

pub(super) const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub(super) const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
pub(super) const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

pub(super) const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub(super) const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
pub(super) const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub(super) const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub(super) const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub(super) const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(super) const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub(super) const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
pub(super) const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
pub(super) const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub(super) const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub(super) const UFFD_FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
pub(super) const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub(super) const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub(super) const UFFD_FEATURE_POISON: u64 = 1 << 14;
pub(super) const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
pub(super) const UFFD_FEATURE_MOVE: u64 = 1 << 16;

pub(super) const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub(super) const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
pub(super) const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
pub(super) const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
pub(super) const UFFDIO_ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
pub(super) const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub(super) const UFFDIO_WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
pub(super) const UFFDIO_CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;
pub(super) const UFFDIO_POISON_MODE_DONTWAKE: u64 = 1 << 0;
pub(super) const UFFDIO_MOVE_MODE_DONTWAKE: u64 = 1 << 0;
pub(super) const UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: u64 = 1 << 1;

pub(super) const PAGE_IS_WPALLOWED: u64 = 1 << 0;
pub(super) const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub(super) const PAGE_IS_FILE: u64 = 1 << 2;
pub(super) const PAGE_IS_PRESENT: u64 = 1 << 3;
pub(super) const PAGE_IS_SWAPPED: u64 = 1 << 4;
pub(super) const PAGE_IS_PFNZERO: u64 = 1 << 5;
pub(super) const PAGE_IS_HUGE: u64 = 1 << 6;
pub(super) const PAGE_IS_SOFT_DIRTY: u64 = 1 << 7;
pub(super) const PAGE_IS_GUARD: u64 = 1 << 8;

pub(super) const PROCMAP_QUERY_VMA_READABLE: u64 = 0x01;
pub(super) const PROCMAP_QUERY_VMA_WRITABLE: u64 = 0x02;
pub(super) const PROCMAP_QUERY_VMA_EXECUTABLE: u64 = 0x04;
pub(super) const PROCMAP_QUERY_VMA_SHARED: u64 = 0x08;
pub(super) const PROCMAP_QUERY_COVERING_OR_NEXT_VMA: u64 = 0x10;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioApi {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioRange {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// The `struct uffdio_range` of `UFFDIO_UNREGISTER`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioUnregister(pub(super) UffdioRange);

/// The `struct uffdio_range` of `UFFDIO_WAKE`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioWake(pub(super) UffdioRange);

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioRegister {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioCopy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copy: i64,
}

/// `struct uffdio_move`, Linux 6.8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioMove {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) moved: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioZeropage {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) zeropage: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioWriteprotect {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
}

/// `struct uffdio_continue`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioContinue {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) mapped: i64,
}

/// `struct uffdio_poison`, Linux 6.6.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct UffdioPoison {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) updated: i64,
}

/// `struct uffd_msg`. The kernel's is packed and has a union; seen as words it is the same bytes
/// at offsets that are aligned anyway:
///
/// | event | `words[0]` | `words[1]` | `words[2]` |
/// | --- | --- | --- | --- |
/// | PAGEFAULT | flags | address | thread, in the low half |
/// | FORK | descriptor, in the low half | | |
/// | REMAP | from | to | length |
/// | REMOVE, UNMAP | start | end | |
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UffdMsg {
    pub(super) event: u8,
    pub(super) reserved: [u8; 7],
    pub(super) words: [u64; 3],
}

/// `struct page_region`, Linux 6.7.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PageRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) categories: u64,
}

/// `struct pm_scan_arg`, Linux 6.7.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PmScanArg {
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) walk_end: u64,
    pub(super) vec: u64,
    pub(super) vec_len: u64,
    pub(super) max_pages: u64,
    pub(super) category_inverted: u64,
    pub(super) category_mask: u64,
    pub(super) category_anyof_mask: u64,
    pub(super) return_mask: u64,
}

/// `struct procmap_query`, Linux 6.11.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ProcmapQuery {
    pub(super) size: u64,
    pub(super) query_flags: u64,
    pub(super) query_addr: u64,
    pub(super) vma_start: u64,
    pub(super) vma_end: u64,
    pub(super) vma_flags: u64,
    pub(super) vma_page_size: u64,
    pub(super) vma_offset: u64,
    pub(super) inode: u64,
    pub(super) dev_major: u32,
    pub(super) dev_minor: u32,
    pub(super) vma_name_size: u32,
    pub(super) build_id_size: u32,
    pub(super) vma_name_addr: u64,
    pub(super) build_id_addr: u64,
}

/// A structure that one ioctl takes.
///
/// # Safety
///
/// `OPCODE` is the number of an ioctl that takes a pointer to exactly this structure, reads and
/// writes no more of memory than this and what its fields point at, and reads and writes it with
/// any bits.
pub(super) unsafe trait Argument: Copy {
    const OPCODE: Opcode;
}

/// Says which ioctl takes which structure. The opcode carries the structure's size, and the kernel
/// compares it: a structure of another size is refused, and not misread.
macro_rules! arguments {
    ($($structure:ident: $opcode:ident,)*) => {
        $(
            // SAFETY: the kernel documents this structure for this number, and the tests compare
            // its layout with the kernel's. All fields are integers.
            unsafe impl Argument for $structure {
                const OPCODE: Opcode = $opcode;
            }
        )*
    };
}

arguments! {
    UffdioApi: UFFDIO_API,
    UffdioRegister: UFFDIO_REGISTER,
    UffdioUnregister: UFFDIO_UNREGISTER,
    UffdioWake: UFFDIO_WAKE,
    UffdioCopy: UFFDIO_COPY,
    UffdioZeropage: UFFDIO_ZEROPAGE,
    UffdioMove: UFFDIO_MOVE,
    UffdioWriteprotect: UFFDIO_WRITEPROTECT,
    UffdioContinue: UFFDIO_CONTINUE,
    UffdioPoison: UFFDIO_POISON,
    PmScanArg: PAGEMAP_SCAN,
    ProcmapQuery: PROCMAP_QUERY,
}

/// Makes the ioctl that takes `argument`, and returns what ioctl(2) returns.
///
/// The fields that the kernel answers in are up to date on return, on failure too.
///
/// # Safety
///
/// 1. What a field of `argument` points at for the kernel to write to is memory that the caller
///    holds mutably, of the length the structure says.
/// 2. What the ioctl does to the address space breaks no promise of a Rust reference.
#[inline]
pub(super) unsafe fn call<T: Argument>(fd: impl AsFd, argument: &mut T) -> Result<i32, Errno> {
    // SAFETY: `Argument` promises that opcode and structure belong together; the rest is the
    // caller's promise.
    unsafe { ioctl::ioctl(fd, Call(argument)) }
}

struct Call<'a, T>(&'a mut T);

// SAFETY: `Argument` promises that the opcode takes this structure. The output is the number that
// ioctl(2) returned.
unsafe impl<T: Argument> Ioctl for Call<'_, T> {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        T::OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(returned: IoctlOutput, _: *mut c_void) -> Result<i32, Errno> {
        Ok(returned)
    }
}

/// Returns the length of `range` in bytes; 0 for all 2^64, a length that every call here refuses.
#[inline]
pub(super) const fn len_of(range: PageRange) -> u64 {
    range.pages() << PAGE_SHIFT
}

impl From<PageRange> for UffdioRange {
    #[inline]
    fn from(range: PageRange) -> UffdioRange {
        UffdioRange { start: range.address(), len: len_of(range) }
    }
}

#[cfg(test)]
mod tests;
