//! The device nodes of the mirror device, as programs under `uhmm dmirror` find them.
//!
//! There are no such nodes. A preloaded library stands in for the C library's functions on
//! descriptors, and an open file is a connected socket of the kernel (`AF_UNIX`, `SOCK_SEQPACKET`) to
//! a *broker*. So duplicates, inheritance, `O_CLOEXEC` and the last close are the kernel's own doing,
//! and the broker hears of the last close as the end of the connection. A descriptor is recognised by
//! what the kernel says of it, and nothing is kept of it in the program: the peer's address says which
//! node it is (`name`), its cookie (`SO_COOKIE`) which open file, and its priority (`SO_PRIORITY`,
//! which means nothing for such sockets) how it was opened.
//!
//! | who | what |
//! | --- | --- |
//! | [`call`] | what the stand-ins do: open, `ioctl`, `mmap`, and what follows a close |
//! | `agent` | the open files of one address space, and the thread that obeys the broker |
//! | [`Broker`] | who has what open; carries requests to the opener, and evictions to everybody |
//! | `units` | how full the units are: memory that all share |
//! | `gup` | `/sys/kernel/debug/gup_test` |
//!
//! # Whose address space
//!
//! An open file belongs to the address space that opened it. The agent of an address space is found by
//! a pointer in a page that children find wiped (`MADV_WIPEONFORK`), however they were made; a child
//! that shares its parent's memory (`vfork`) shares its agent too. Where the open file is the caller's
//! own, the caller does the work itself. Else the request goes to the broker, and from there to the
//! opener's agent; data travel in a memory file of the caller's. Where the opener's address space has
//! ended the broker answers as the kernel's driver does.
//!
//! # Who waits for whom
//!
//! Callers wait for the broker. The broker waits for nobody: it is one thread that sends and receives
//! without blocking. Agents obey on a thread of their own, which waits for nobody either but the
//! operations of this process: what is carried to it from other processes runs on threads made for
//! each. No thread holds a lock while it waits for the broker. So nobody waits for himself, also where
//! a process asks for an eviction that it has to take part in. Each wait has a deadline (`wire`).
//!
//! All signals are blocked while a stand-in works on one of our nodes: a handler runs before or after,
//! as it would with a system call. What is not ours is passed on untouched, by functions that may be
//! called in a handler.

pub(crate) mod agent;
mod broker;
pub mod call;
pub(crate) mod gup;
mod name;
pub(crate) mod units;
mod wire;

pub use broker::Broker;
pub use name::{LOCATION, Node};
