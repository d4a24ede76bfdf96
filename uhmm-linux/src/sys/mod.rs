//! The kernel's interfaces, typed: the only folder of the crate that may be unsafe.
//!
//! Each module wraps one interface, under the kernel's names, and decides nothing: errors are the
//! kernel's numbers, and what they mean is for the callers to know.
//!
//! | module | interface | since Linux |
//! | --- | --- | --- |
//! | [`userfaultfd`] | userfaultfd(2) and its events | 4.11 |
//! | | faults that name their thread | 4.14 |
//! | | files registered: write protection that the kernel resolves (`WP_ASYNC`) | 6.7 |
//! | | `UFFDIO_MOVE` | 6.8 |
//! | | without privileges, for faults outside the kernel (`UFFD_USER_MODE_ONLY`) | 5.11 |
//! | | by `/dev/userfaultfd`, where the system call is not permitted | 6.1, optional |
//! | [`pagemap`] | `PAGEMAP_SCAN` | 6.7 |
//! | | guard pages told apart | 6.15, optional |
//! | [`maps`] | `PROCMAP_QUERY` | 6.11, optional |
//! | | the text of `/proc/self/smaps` in its place | 2.6.29 |
//! | [`advise`] | `MADV_POPULATE_READ` and `MADV_POPULATE_WRITE` | 5.14 |
//! | | `MADV_WIPEONFORK` | 4.14 |
//! | [`aside`] | mremap(2) with `MREMAP_DONTUNMAP` | 5.7 |
//! | [`process_vm`] | process_vm_readv(2) and process_vm_writev(2) | 3.2 |
//! | [`pidfd`] | pidfd_open(2) | 5.3 |
//! | [`sentinel`] | userfaultfd(2)'s events of forks, in the order of addresses | 4.11 |
//! | [`allocator`] | memory that never moves, for the global allocator | any |
//! | [`seccomp`] | user notification that no signal interrupts | 5.19, optional |
//! | [`proxy`] | pidfd_getfd(2) of a thread, kcmp(2) | 6.9, optional |
//! | [`gate`], [`keeper`] | a system call that no filter stops; a process that outlives this | any |
//! | [`region`], [`thread`], [`objects`], [`loader`], [`fork`] | memory, threads, objects, fork | any |
//! | [`probe`] | what of all this is to be had | any |
//!
//! Together they need Linux 6.8. `abi` holds the numbers and structures that no crate has.
//!
//! # Safety
//!
//! Nearly everything here works on memory by its address, which is somebody's: a `Vec` of the
//! program, a stack, a static. That the functions can be called without `unsafe` all the same has
//! these reasons, by what a function does:
//!
//! 1. **It asks.** A scan, a query, a read of events changes nothing.
//! 2. **It makes a page missing, or lets threads wait for it.** A missing page in a registered
//!    range is no state that Rust could see: whoever touches it waits, in the middle of the load or
//!    the store, until it is there. The same goes for write protection.
//! 3. **It fills a missing page.** It fills nothing else: where a page is, the kernel answers
//!    `EEXIST`, and where the userfaultfd is not registered, `ENOENT` or `EINVAL`. So no byte
//!    changes that a reference can have read. That the bytes which appear are those that went away
//!    is the invariant *Whole*: each page has exactly one current copy. It is not a condition on
//!    the arguments of one call, which an `unsafe fn` could ask for, but on all calls together. The
//!    rest of the crate keeps it, and has the tests that break when it does not.
//! 4. **It drops what is there**: [`advise::dontneed`], [`userfaultfd::Userfaultfd::move_pages`]
//!    out of memory that is not registered, the end of a registration with pages still missing,
//!    [`process_vm::write`]. Under *Whole* this is done to memory of our own, to what the program
//!    is dropping itself, or on behalf of a device that the program has let at the memory; the
//!    bytes of anybody else are never among them.
//!
//! Memory that the crate reads and writes itself is its own ([`region::Region`]), and accessed by
//! atomics. Pointers are made from addresses with exposed provenance.
#![allow(unsafe_code, reason = "this folder is where the crate talks to the kernel")]

mod abi;
pub(crate) mod advise;
pub(crate) mod allocator;
pub(crate) mod aside;
pub(crate) mod fork;
pub(crate) mod gate;
pub(crate) mod keeper;
pub(crate) mod loader;
pub(crate) mod maps;
pub(crate) mod objects;
pub(crate) mod pagemap;
pub(crate) mod pidfd;
pub(crate) mod probe;
pub(crate) mod process_vm;
pub(crate) mod proxy;
pub(crate) mod region;
pub(crate) mod seccomp;
pub(crate) mod sentinel;
pub(crate) mod thread;
pub(crate) mod userfaultfd;

#[cfg(test)]
mod child;
#[cfg(test)]
mod testing;
