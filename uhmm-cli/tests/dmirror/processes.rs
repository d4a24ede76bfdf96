//! Several processes: children, successors, openers that are no more.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::common::{Folder, allowed, output, until};
use crate::device::{
    CHECK_EXCLUSIVE, Child, EXCLUSIVE, FLAGS, PAGE, Pages, READ, RELEASE, SNAPSHOT, Signal, TO_DEV,
    TO_SYS, WRITE, close, command, errno, unit,
};
use crate::{PUPPET, puppet, with_device};

#[test]
fn a_child_reaches_its_parents_memory_through_what_it_inherits() {
    with_device("processes::a_child_reaches_its_parents_memory_through_what_it_inherits", || {
        let fd = unit(0);
        let pages = Pages::filled(3, 1);
        let buffer = Pages::filled(3, 40);
        let child = Child::fork(|| {
            // Its own copy, of which the parent knows nothing.
            pages.fill(0, 99);
            assert_eq!(pages.device_reads(fd), [1, 2, 3]);
            let done = command(fd, WRITE, pages.addr(), 3, buffer.addr());
            assert_eq!(done.map(|done| done.0), Ok(3));
            assert_eq!(pages.bytes(), [99, 2, 3]);
            assert_eq!(command(fd, READ, pages.addr(), 3, 8), Err(libc::EFAULT));
            assert_eq!(command(fd, WRITE, pages.addr(), 3, 8), Err(libc::EFAULT));
            assert_eq!(command(fd, READ, 0, 1, buffer.addr()), Err(libc::EFAULT));
            assert_eq!(command(fd, READ, 1, 1, buffer.addr()), Err(libc::EINVAL));
            // A memory of its own, which the parent does not have.
            let own = Pages::filled(1, 7);
            let here = command(fd, SNAPSHOT, own.addr(), 1, buffer.addr());
            assert_eq!((here, buffer.bytes()[0]), (Ok((1, 0)), 0xff));
            pages.to_device(fd);
        });
        child.ends_well();
        assert_eq!(pages.snapshot(fd), [0x22; 3]);
        assert_eq!(pages.bytes(), [40, 41, 42]);
        // The child has closed its descriptor, which was not the last.
        assert_eq!(pages.device_reads(fd), [40, 41, 42]);
    });
}

fn a_child_opens_its_own(make: impl FnOnce(&dyn Fn()) -> Child) {
    let fd = unit(0);
    let pages = Pages::filled(2, 1);
    let other = Pages::filled(2, 50);
    pages.to_device(fd);
    let work = || {
        // By the parent's open file, the parent's memory; by its own, its own.
        assert_eq!(pages.device_reads(fd), [1, 2]);
        let own = unit(0);
        let done = command(own, WRITE, pages.addr(), 2, other.addr());
        assert_eq!(done.map(|done| done.0), Ok(2));
        assert_eq!(pages.bytes(), [50, 51]);
        assert_eq!(pages.device_reads(fd), [1, 2]);
        pages.to_device(own);
        assert_eq!(pages.snapshot(own), [0x22; 2]);
        assert_eq!(pages.bytes(), [50, 51]);
        close(own);
    };
    make(&work).ends_well();
    assert_eq!(pages.bytes(), [1, 2]);
    assert_eq!(pages.device_reads(fd), [1, 2]);
}

#[test]
fn a_child_opens_its_own_memory() {
    with_device("processes::a_child_opens_its_own_memory", || {
        a_child_opens_its_own(|work| Child::fork(work));
    });
}

#[test]
fn a_child_of_which_nobody_is_told_opens_its_own_memory() {
    with_device("processes::a_child_of_which_nobody_is_told_opens_its_own_memory", || {
        a_child_opens_its_own(|work| Child::clone(work));
    });
}

/// What every command says when the opener's memory is no more.
fn without_opener(fd: i32) {
    let buffer = Pages::filled(1, 1);
    let ask = |number| command(fd, number, buffer.addr(), 1, buffer.addr());
    for (number, expected) in [
        (READ, Err(libc::EFAULT)),
        (WRITE, Err(libc::EFAULT)),
        (TO_DEV, Err(libc::EINVAL)),
        (TO_SYS, Err(libc::EINVAL)),
        (SNAPSHOT, Err(libc::EINVAL)),
        (EXCLUSIVE, Err(libc::EINVAL)),
        (CHECK_EXCLUSIVE, Ok((0, 0))),
        (RELEASE, Ok((0, 0))),
        (FLAGS, Ok((0, 0))),
        (READ + 9, Err(libc::EINVAL)),
    ] {
        assert_eq!(ask(number), expected, "{number:#x}");
    }
    assert_eq!(command(fd, READ, buffer.addr(), 0, 0), Err(libc::EINVAL));
}

#[test]
fn an_opener_that_has_ended_leaves_errors() {
    with_device("processes::an_opener_that_has_ended_leaves_errors", || {
        let (ended, tested) = (Signal::new(), Signal::new());
        let opener = Child::fork(|| {
            let fd = unit(1);
            let heir = Child::fork(|| {
                // The opener holds the other end until it ends.
                ended.wait_for_end();
                without_opener(fd);
                close(fd);
                tested.send();
            });
            // Nobody waits for the heir here: whether it is well, its message says.
            let _ = heir;
        });
        // The parent's end would keep the heir waiting.
        let [_, write] = ended.ends();
        close(write);
        opener.ends_well();
        tested.wait();
    });
}

#[test]
fn a_successor_is_another_memory() {
    with_device("processes::a_successor_is_another_memory", || {
        const INHERITED: &str = "UHMM_CLI_DMIRROR_INHERITED";
        if let Ok(inherited) = std::env::var(INHERITED) {
            let numbers: Vec<i32> =
                inherited.split(' ').map(|number| number.parse().expect("a number")).collect();
            without_opener(numbers[0]);
            // SAFETY: it asks for flags.
            assert_eq!(unsafe { libc::fcntl(numbers[1], libc::F_GETFD) }, -1);
            assert_eq!(errno(), libc::EBADF);
            let pages = Pages::filled(1, 4);
            assert_eq!(pages.device_reads(unit(0)), [4]);
            return;
        }
        let stays = unit(0);
        let goes = crate::device::open("/dev/hmm_dmirror0", libc::O_RDWR | libc::O_CLOEXEC);
        let goes = goes.expect("there is one");
        Pages::filled(2, 1).to_device(stays);
        let mut command = Command::new(std::env::current_exe().expect("it runs"));
        command.args(std::env::args_os().skip(1)).env(INHERITED, format!("{stays} {goes}"));
        panic!("{}", command.exec());
    });
}

#[test]
fn a_release_is_for_all_processes() {
    with_device("processes::a_release_is_for_all_processes", || {
        let (there, released) = (Signal::new(), Signal::new());
        let done = Signal::new();
        let child = Child::fork(|| {
            let (fd, other) = (unit(0), unit(1));
            let (pages, others) = (Pages::filled(2, 1), Pages::filled(1, 8));
            pages.to_device(fd);
            others.to_device(other);
            there.send();
            released.wait();
            assert_eq!(pages.snapshot(fd), [0x02; 2]);
            assert_eq!(others.snapshot(other), [0x22], "another unit");
            assert_eq!((pages.bytes(), others.bytes()), (vec![1, 2], vec![8]));
            // And so is the last close.
            pages.to_device(fd);
            there.send();
            done.wait();
            assert_eq!(pages.snapshot(fd), [0x02; 2]);
        });
        let fd = unit(0);
        let pages = Pages::filled(2, 20);
        pages.to_device(fd);
        there.wait();
        assert_eq!(command(fd, RELEASE, PAGE as u64, 1, 0), Ok((0, 0)));
        assert_eq!(pages.snapshot(fd), [0x02; 2]);
        released.send();
        there.wait();
        close(fd);
        done.send();
        child.ends_well();
        assert_eq!(pages.bytes(), [20, 21]);
    });
}

/// Where the daemon of the test below writes what it has found.
const DAEMON: &str = "UHMM_CLI_DMIRROR_DAEMON";

#[test]
fn a_daemon_keeps_the_device_and_then_nothing_is_left() {
    let name = "processes::a_daemon_keeps_the_device_and_then_nothing_is_left";
    if std::env::var_os(PUPPET).is_some() {
        return daemon();
    }
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let (go, found) = (folder.path("go"), folder.path("found"));
    let ended = output(puppet(name).env(DAEMON, folder.path("")));
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    // The command has ended, and the daemon has not.
    assert!(!found.exists());
    std::fs::write(&go, b"").expect("there is room");
    let said = until("the daemon has said what it has found", || {
        std::fs::read_to_string(&found).ok().filter(|text| text.ends_with('\n'))
    });
    let (location, answer) = said.trim_end().split_once(' ').expect("two words");
    assert_eq!(answer, "well");
    until("the broker has ended", || {
        let sockets = std::fs::read_to_string("/proc/net/unix").expect("there is one");
        (!sockets.contains(location)).then_some(())
    });
}

/// Is the program that makes a daemon, and the daemon.
fn daemon() {
    let folder = std::path::PathBuf::from(std::env::var_os(DAEMON).expect("it was given"));
    let fd = unit(0);
    let opened = Signal::new();
    let child = Child::fork(|| {
        // SAFETY: a session of its own, and no terminal or pipe of its parent's.
        assert!(unsafe { libc::setsid() } > 0);
        for standard in 0..3 {
            let null = crate::device::open("/dev/null", libc::O_RDWR).expect("there is one");
            // SAFETY: nobody uses those here.
            unsafe { libc::dup2(null, standard) };
        }
        let own = unit(0);
        opened.send();
        until("it may go on", || folder.join("go").exists().then_some(()));
        let pages = Pages::filled(2, 1);
        let well = std::panic::catch_unwind(|| {
            pages.to_device(own);
            assert_eq!(pages.device_reads(own), [1, 2]);
            assert_eq!(command(own, RELEASE, PAGE as u64, 1, 0), Ok((0, 0)));
            assert_eq!(pages.snapshot(own), [0x02; 2]);
            without_opener(fd);
            assert_eq!(Pages::filled(1, 3).device_reads(unit(2)), [3]);
        });
        let location = std::env::var("UHMM_DMIRROR").expect("it is there");
        let word = if well.is_ok() { "well" } else { "wrong" };
        let written = std::fs::write(folder.join("found"), format!("{location} {word}\n"));
        written.expect("there is room");
    });
    opened.wait();
    let _ = child;
}
