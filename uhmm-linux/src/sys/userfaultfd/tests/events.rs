//! Every message about changes, and what can be done meanwhile.

use std::os::fd::{AsRawFd, IntoRawFd};

use super::*;
use crate::sys::abi::UffdMsg;

fn all_events() -> Features {
    Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP
}

#[test]
fn dropping_pages_is_told_before_it_happens() {
    let memory = Mapping::anonymous(4);
    let Some(uffd) = userfaultfd(all_events()) else { return };
    memory.fill(|_| 1);
    register(&uffd, &memory, MISSING);
    let range = memory.pages(1..3);
    let dropping = start(move || advise::dontneed(range));
    assert!(readable(&uffd, DEADLINE));
    assert_eq!(memory.load(1), 1, "the pages are still there");
    assert!(matches!(Reader::new(&uffd).next(), Message::Remove(removed) if removed == range));
    assert_eq!(dropping.done(), Ok(()));
    assert_eq!(uffd.zeropage(range, true), all(2), "the pages are gone");
}

#[test]
fn unmapping_is_told_after_it_happened() {
    let memory = Mapping::apart(4);
    let Some(uffd) = userfaultfd(all_events()) else { return };
    memory.fill(|_| 1);
    register(&uffd, &memory, MISSING);
    let range = memory.pages(1..3);
    let unmapping = start(move || unmap(range));
    assert!(readable(&uffd, DEADLINE));
    assert_eq!(advise::populate_read(range), Err(Errno::NOMEM), "nothing is mapped there");
    assert!(matches!(Reader::new(&uffd).next(), Message::Unmap(gone) if gone == range));
    unmapping.done();
}

/// Moves a mapping with mremap(2), to a length of `pages`.
fn remap(from: PageRange, to: PageRange, pages: u64, flags: MremapFlags) {
    let old = from.len() * 4096;
    let (new, at) = (pages as usize * 4096, pointer(to.first()));
    // SAFETY: both ranges are the test's, which has no references into them.
    let moved = unsafe { rustix::mm::mremap_fixed(pointer(from.first()), old, new, flags, at) };
    moved.expect("it can be moved");
}

#[test]
fn remapping_is_told_with_the_old_length_and_then_as_unmapping() {
    let (memory, place) = (Mapping::anonymous(2), Mapping::anonymous(4));
    let Some(uffd) = userfaultfd(all_events()) else { return };
    memory.store(0, 7);
    register(&uffd, &memory, MISSING);
    let (from, to) = (memory.into_range(), place.range());
    let moving = start(move || remap(from, to, 4, MremapFlags::MAYMOVE));
    let mut reader = Reader::new(&uffd);
    let remapped = reader.next();
    let Message::Remap { from: old, to: new } = remapped else { panic!("{remapped:?}") };
    assert_eq!((old, new), (from, to.first()));
    assert!(matches!(reader.next(), Message::Unmap(gone) if gone == from));
    moving.done();
    assert_eq!(place.load(0), 7);
    // What was registered still is, and what it grew by is too.
    assert_eq!(uffd.zeropage(place.pages(1..4), true), all(3));
}

#[test]
fn remapping_that_leaves_the_old_mapping_is_told_once() {
    let (memory, place) = (Mapping::anonymous(2), Mapping::anonymous(2));
    let Some(uffd) = userfaultfd(all_events()) else { return };
    register(&uffd, &memory, MISSING);
    let (from, to) = (memory.range(), place.range());
    let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
    let moving = start(move || remap(from, to, 2, flags));
    assert!(
        matches!(Reader::new(&uffd).next(), Message::Remap { to: new, .. } if new == to.first())
    );
    moving.done();
    assert_eq!(uffd.read_now(&mut Messages::new()), Err(Errno::AGAIN));
}

/// mremap(2) from a length of 0: an event of which the kernel says no length.
#[test]
fn a_second_mapping_of_shared_memory_is_told_without_a_length() {
    let memory = shared(2);
    let Some(uffd) = userfaultfd(all_events() | Features::WP_ASYNC) else { return };
    memory.store(1, 6);
    register(&uffd, &memory, Modes::WP);
    let first = memory.page(0);
    let doubling = start(move || {
        let flags = MremapFlags::MAYMOVE;
        // SAFETY: the kernel chooses the place, which nobody has.
        unsafe { rustix::mm::mremap(pointer(first), 0, 2 * 4096, flags) }
            .expect("shared memory can be")
            .expose_provenance() as u64
    });
    let message = Reader::new(&uffd).next();
    let Message::Duplicate { of, at } = message else { panic!("{message:?}") };
    let second = Mapping::at(doubling.done(), 2 * 4096);
    assert_eq!((of, at), (first, second.page(0)));
    assert_eq!(second.load(1), 6);
    // It is registered as the first one is.
    uffd.write_protect(second.range(), true, true).expect("it is registered");
    drop(uffd);
}

/// Forks. The child runs `child` and exits with what it returns; the parent gets its number.
///
/// It is the bare system call: of the C library's own nothing may run in the child of a program
/// with threads, and the hooks of `pthread_atfork` are none of this test's.
fn fork(child: impl FnOnce() -> i32) -> rustix::process::Pid {
    // SAFETY: the child calls nothing but `child`, which loads, and `_exit`.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if pid == 0 {
        let code = child();
        // SAFETY: it ends the child.
        unsafe { libc::_exit(code) };
    }
    rustix::process::Pid::from_raw(pid as i32).expect("a child")
}

#[test]
fn a_fork_is_told_with_the_descriptor_of_the_child() {
    let wanted = all_events() | Features::EVENT_FORK;
    let (memory, from) = (Mapping::anonymous(2), Mapping::anonymous(1));
    let Some(uffd) = userfaultfd(wanted) else { return };
    memory.store(0, 11);
    from.store(0, 31);
    register(&uffd, &memory, MISSING);
    let (there, missing) = (memory.page(0), memory.page(1));
    let forking = start(move || fork(move || (load(there) + load(missing)) as i32));
    let message = Reader::new(&uffd).next();
    let Message::Fork(child) = message else { panic!("{message:?}") };
    assert_eq!(child.features(), wanted);
    let flags = rustix::io::fcntl_getfd(&child).expect("a descriptor");
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    let pid = forking.done();

    // The child's fault comes to its own descriptor, and the parent can answer by a copy only.
    assert_eq!(Reader::new(&child).fault().0, missing);
    let moved = child.move_pages(from.range(), missing, WAKE);
    assert_eq!(moved, stopped(0, Errno::INVAL));
    assert_eq!(child.copy(from.page(0), missing.into(), true), all(1));
    let status = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
    let (_, status) = status.expect("a child").expect("it has ended");
    assert_eq!(status.exit_status(), Some(42));
    assert_eq!(uffd.zeropage(missing.into(), true), all(1), "the parent's is still missing");
}

#[test]
fn a_descriptor_in_a_message_that_nobody_takes_is_closed() {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let fd = writer.into_raw_fd() as u32;
    let message =
        UffdMsg { event: abi::UFFD_EVENT_FORK, words: [fd.into(), 0, 0], ..UffdMsg::default() };
    // SAFETY: the message owns the descriptor.
    let mut messages = unsafe { Messages::of(message) };
    assert_eq!(messages.len(), 1);
    let open = Err(Errno::AGAIN);
    rustix::io::ioctl_fionbio(&reader, true).expect("a pipe");
    assert_eq!(rustix::io::read(&reader, &mut [0]), open);
    let Some(Message::Fork(child)) = messages.take() else { panic!("it is one") };
    assert_eq!(child.as_fd().as_raw_fd() as u32, fd);
    drop(messages);
    assert_eq!(rustix::io::read(&reader, &mut [0]), open, "it is the child's now");

    let fd = child.fd.into_raw_fd() as u32;
    let message = UffdMsg { words: [fd.into(), 0, 0], ..message };
    // SAFETY: the message owns the descriptor.
    drop(unsafe { Messages::of(message) });
    assert_eq!(rustix::io::read(&reader, &mut [0]), Ok(0), "nobody has it any more");
}

#[test]
fn nothing_can_be_done_while_the_address_space_changes() {
    let (memory, from) = (Mapping::anonymous(4), Mapping::anonymous(1));
    let Some(uffd) = userfaultfd(all_events()) else { return };
    from.store(0, 1);
    register(&uffd, &memory, MISSING | Modes::WP);
    assert!(!uffd.changing());
    let (range, other) = (memory.pages(2..4), memory.pages(0..1));
    let dropping = start(move || advise::dontneed(range));
    assert!(readable(&uffd, DEADLINE));
    assert!(uffd.changing());
    let again = stopped(0, Errno::AGAIN);
    assert_eq!(uffd.copy(from.page(0), other, true), again);
    assert_eq!(uffd.zeropage(other, true), again);
    assert_eq!(uffd.move_pages(from.range(), other.first(), WAKE), again);
    assert_eq!(uffd.continue_(other, true), again);
    assert_eq!(uffd.poison(other, true), again);
    assert_eq!(uffd.write_protect(other, true, true), Err(Errno::AGAIN));
    assert!(uffd.changing(), "to ask changes nothing");
    let mut messages = Messages::new();
    assert_eq!(uffd.read_now(&mut messages), Ok(1));
    assert_eq!(dropping.done(), Ok(()));
    // The caller has returned, so the change is over.
    assert!(!uffd.changing());
    assert_eq!(uffd.zeropage(other, true), all(1));
}

/// The time between the read of an event and its caller's waking up is a part of the change.
#[test]
fn a_change_is_over_once_its_caller_has_woken_up() {
    let memory = Mapping::anonymous(1);
    let Some(uffd) = userfaultfd(all_events()) else { return };
    register(&uffd, &memory, MISSING);
    let mut reader = Reader::new(&uffd);
    for _ in 0..100 {
        let range = memory.range();
        let dropping = start(move || advise::dontneed(range));
        assert!(matches!(reader.next(), Message::Remove(_)));
        let start = Instant::now();
        while uffd.changing() {
            assert!(start.elapsed() < DEADLINE, "it comes to an end");
            std::thread::yield_now();
        }
        assert_eq!(dropping.done(), Ok(()));
    }
}

#[test]
fn one_read_brings_what_there_is_up_to_the_capacity() {
    let memory = Mapping::anonymous(20);
    let Some(uffd) = userfaultfd(all_events()) else { return };
    register(&uffd, &memory, MISSING);
    let touch = |page| start(move || load(page));
    let mut loading: Vec<Doing<u64>> = memory.range().iter().map(touch).collect();
    let start = Instant::now();
    while waiting(&uffd) < 20 {
        assert!(start.elapsed() < DEADLINE, "all of them come to wait");
        std::thread::yield_now();
    }
    let mut messages = Messages::new();
    assert_eq!(uffd.read(&mut messages), Ok(Messages::CAPACITY));
    let mut pages: Vec<Page> = Vec::new();
    let mut collect = |messages: &mut Messages| {
        for message in messages.drain() {
            let Message::Fault { address, .. } = message else { panic!("{message:?}") };
            pages.push(Page::containing(address));
        }
    };
    collect(&mut messages);
    assert!(messages.is_empty());
    assert_eq!(uffd.read(&mut messages), Ok(4));
    collect(&mut messages);
    pages.sort();
    assert_eq!(pages, memory.range().iter().collect::<Vec<_>>(), "each once");
    assert_eq!(uffd.read_now(&mut messages), Err(Errno::AGAIN));
    assert!(messages.is_empty());
    assert_eq!(uffd.zeropage(memory.range(), true), all(20));
    loading.drain(..).for_each(|thread| assert_eq!(thread.done(), 0));
}

#[test]
fn a_read_waits_and_a_wait_can_be_stopped() {
    let Some(uffd) = userfaultfd(Features::empty()) else { return };
    let uffd = Arc::new(uffd);
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, MISSING);
    let reading = start({
        let uffd = uffd.clone();
        move || {
            let mut messages = Messages::new();
            (
                uffd.read(&mut messages),
                messages.take().map(|message| matches!(message, Message::Fault { .. })),
            )
        }
    });
    let page = memory.page(0);
    let loading = start(move || load(page));
    assert_eq!(reading.done(), (Ok(1), Some(true)));
    assert_eq!(uffd.zeropage(page.into(), true), all(1));
    assert_eq!(loading.done(), 0);

    let stop = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd");
    let stop = Arc::new(stop);
    let stopping = start({
        let (uffd, stop) = (uffd.clone(), stop.clone());
        move || uffd.wait(Some(stop.as_fd()))
    });
    rustix::io::write(&*stop, &1u64.to_ne_bytes()).expect("an eventfd");
    assert_eq!(stopping.done(), Ok(false));
    // If both can be read, the message comes first.
    let memory = Mapping::anonymous(1);
    register(&uffd, &memory, MISSING);
    let page = memory.page(0);
    let loading = start(move || load(page));
    assert!(readable(&*uffd, DEADLINE));
    assert_eq!(uffd.wait(Some(stop.as_fd())), Ok(true));
    assert_eq!(uffd.zeropage(page.into(), true), all(1));
    assert_eq!(loading.done(), 0);
}
