//! Who has the filter and not the listener: children, and what comes after this program.

use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Signal, getpid};

use super::common::children::{Board, End, How, WAYS, child, end_of, fork_by, send};
use super::common::memory::{self, Backing, Mapping, RW, place};
use super::common::{OwnProcess, alarm, ends_within, eventually, exit_now};
use super::{attach, in_own_process, listen};

/// Makes calls that stop, and tells whether each did what it should.
fn calls_work() -> bool {
    (0..50).all(|_| {
        let range = place(4);
        let mapped = memory::map(range, Backing::Anonymous, RW).is_ok();
        let protected = memory::protect(range, memory::R).is_ok();
        let discarded = memory::advise(range, libc::MADV_DONTNEED).is_ok();
        memory::unmap(range);
        mapped && protected && discarded && memory::mapped_in(range).is_empty()
    })
}

#[test]
fn children_change_their_own_memory_and_not_ours() {
    in_own_process(|| {
        let process = attach();
        let mapping = Mapping::anonymous(8);
        mapping.fill(|index| index);
        let (heard, _subscription) = listen(&process, mapping.range(), || true);
        for how in WAYS {
            let pid = child(how, || {
                memory::unmap(mapping.range());
                memory::mapped_in(mapping.range()).is_empty() && calls_work()
            });
            assert_eq!(end_of(pid), End::Well, "{how:?}");
        }
        assert_eq!(*heard.lock().expect("nobody panics"), []);
        assert_eq!(mapping.peek(7), 7);
    });
}

#[test]
fn other_programs_can_be_started() {
    in_own_process(|| {
        let _process = attach();
        for _ in 0..5 {
            let mut shell = Command::new("sh");
            shell.args(["-c", "echo one; ls / | wc -l; sh -c 'echo two'"]).stderr(Stdio::inherit());
            let output = shell.output().expect("there is a shell");
            assert!(output.status.success(), "{output:?}");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.starts_with("one\n") && text.ends_with("two\n"), "{text}");
        }
    });
}

/// What the child of a process that has ended finds, by `end`.
fn assert_outlives(end: impl Fn()) {
    let board = Board::new();
    let grandchild = || {
        alarm(Duration::from_secs(20));
        let works = calls_work();
        board.set(0, getpid().as_raw_nonzero().get() as u64);
        // The parent ends in the middle of this.
        let mut rounds = 0;
        while board.get(1) == 0 || rounds < 4 {
            if !calls_work() {
                board.set(2, 2);
                exit_now(1);
            }
            rounds += 1;
        }
        board.set(2, if works { 1 } else { 2 });
        exit_now(0);
    };
    let pid = child(How::Hooked, || {
        let _process = attach();
        if fork_by(How::Hooked).is_none() {
            grandchild();
        }
        assert!(eventually(|| board.get(0) != 0));
        end();
        true
    });
    let _ = end_of(pid);
    board.set(1, 1);
    assert!(eventually(|| board.get(2) != 0), "the grandchild does not go on");
    assert_eq!(board.get(2), 1, "a call of the grandchild failed");
    // Nobody is left but the keeper, and that ends.
    assert!(ends_within(board.get(0) as u32, Duration::from_secs(10)));
}

#[test]
fn a_child_goes_on_when_its_parent_has_exited() {
    in_own_process(|| assert_outlives(|| exit_now(0)));
}

#[test]
fn a_child_goes_on_when_its_parent_was_killed() {
    in_own_process(|| {
        for _ in 0..5 {
            assert_outlives(|| {
                send(getpid().as_raw_nonzero().get() as u32, Signal::KILL);
            });
        }
    });
}

#[test]
fn a_child_goes_on_when_its_parent_has_become_another_program() {
    in_own_process(|| {
        assert_outlives(|| {
            use std::os::unix::process::CommandExt as _;
            let error = Command::new("sleep").arg("1").exec();
            panic!("exec: {error}");
        });
    });
}

#[test]
fn this_process_can_become_another_program() {
    in_own_process(|| {
        let pid = child(How::Hooked, || {
            let _process = attach();
            use std::os::unix::process::CommandExt as _;
            let script = "for i in 1 2 3; do ls / > /dev/null || exit 1; done; exit 0";
            // By a thread that is not the first.
            let error = std::thread::spawn(move || Command::new("sh").args(["-c", script]).exec());
            let error = error.join().expect("it does not panic");
            panic!("exec: {error}");
        });
        assert_eq!(end_of(pid), End::Well);
    });
}

#[test]
fn a_program_may_close_every_descriptor() {
    in_own_process(|| {
        let pid = child(How::Hooked, || {
            let process = attach();
            let mapping = Mapping::anonymous(4);
            let (heard, _subscription) = listen(&process, mapping.range(), || true);
            for _ in 0..3 {
                // SAFETY: numbers. Some are of the userfaultfd, which is not used here.
                let closed = unsafe { libc::close_range(3, u32::MAX, 0) };
                assert_eq!(closed, 0);
                assert!(calls_work());
            }
            memory::protect(mapping.range(), memory::R).expect("it is mapped");
            let heard = heard.lock().expect("nobody panics").len();
            // Nothing can be brought home without it, and nothing is out.
            exit_now(if heard == 1 { 0 } else { 3 });
        });
        assert_eq!(end_of(pid), End::Well);
    });
}

/// Returns the number of the file that a process of uhmm's shares with its keeper, if it has one.
fn board_of(process: &str) -> Option<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).ok()?;
    let mut lines = maps.lines().filter_map(memory::Line::parse);
    lines.find(|line| line.name.contains("uhmm-board")).map(|line| line.inode)
}

/// Returns the keeper that has this file open. Others have keepers too.
fn keeper_with(board: u64) -> Option<u32> {
    let processes = std::fs::read_dir("/proc").expect("proc is mounted");
    let names = processes.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut pids = names.filter_map(|name| name.parse::<u32>().ok());
    pids.find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        let mut inodes = files.filter_map(|file| std::fs::metadata(file.ok()?.path()).ok());
        line.starts_with(b"uhmm-keeper") && inodes.any(|file| file.ino() == board)
    })
}

#[test]
fn nothing_is_left_when_all_have_ended() {
    in_own_process(|| {
        let found = Board::new();
        let pid = child(How::Hooked, || {
            let _process = attach();
            let board = board_of("self").expect("it has one");
            found.set(0, board);
            eventually(|| keeper_with(board).is_some())
        });
        assert_eq!(end_of(pid), End::Well, "it has a keeper");
        let board = found.get(0);
        assert!(eventually(|| keeper_with(board).is_none()), "a keeper is left");
    });
}

#[test]
fn a_child_cannot_announce_while_its_parent_does() {
    in_own_process(|| {
        let _process = attach();
        let pid = child(How::Hooked, || {
            let refused = uhmm_linux::Process::attach(uhmm_linux::Options::new().announced(true));
            let why = uhmm_linux::NoAnnouncement::Listened;
            let refused = matches!(
                refused,
                Err(uhmm_linux::AttachError::NotAnnounced { why: found }) if found == why
            );
            // But it can observe.
            refused && uhmm_linux::Process::attach(uhmm_linux::Options::new()).is_ok()
        });
        assert_eq!(end_of(pid), End::Well);
    });
}

/// Makes a call until no signal has come before it was received: then it has not been made.
fn unless_interrupted<T>(what: impl Fn() -> Result<T, Errno>) -> T {
    loop {
        match what() {
            Err(Errno::INTR) => INTERRUPTED.fetch_add(1, Ordering::SeqCst),
            result => return result.expect("it can be done"),
        };
    }
}

static SEEN: AtomicU64 = AtomicU64::new(0);
static INTERRUPTED: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

/// Calls of which a second execution fails, or shows.
fn one_time_calls() {
    let (from, to) = (place(1), place(1));
    unless_interrupted(|| memory::map(from, Backing::Anonymous, RW));
    // SAFETY: it was mapped just now.
    unsafe { (from.address() as *mut u64).write_volatile(7) };
    // Nothing is there to be moved a second time.
    unless_interrupted(|| memory::remap(from, to.first()));
    // SAFETY: it is there now.
    assert_eq!(unsafe { (to.address() as *const u64).read_volatile() }, 7);
    // If this were made again later, it would drop what is stored.
    unless_interrupted(|| memory::map(to, Backing::Anonymous, RW));
    // SAFETY: it was mapped just now.
    unsafe { (to.address() as *mut u64).write_volatile(8) };
    std::thread::yield_now();
    // SAFETY: as above.
    assert_eq!(unsafe { (to.address() as *const u64).read_volatile() }, 8);
    unless_interrupted(|| memory::try_unmap(to));
    assert!(memory::mapped_in(to).is_empty());
}

#[test]
fn a_storm_of_signals_makes_no_call_twice() {
    OwnProcess::new().deadline(Duration::from_secs(100)).run(|| {
        let _process = attach();
        for flags in [libc::SA_RESTART, 0] {
            // SAFETY: all zeroes is a `sigaction`.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = count as *const () as usize;
            action.sa_flags = flags;
            // SAFETY: the handler touches an atomic alone.
            let installed =
                unsafe { libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()) };
            assert_eq!(installed, 0);
            // SAFETY: no conditions.
            let target = unsafe { libc::pthread_self() };
            let stop = AtomicBool::new(false);
            let before = SEEN.load(Ordering::SeqCst);
            std::thread::scope(|scope| {
                // It ends when this one does, also by a panic.
                let stop = Stop(&stop);
                scope.spawn(|| {
                    while !stop.0.load(Ordering::SeqCst) {
                        // SAFETY: the thread lives until this one has ended.
                        unsafe { libc::pthread_kill(target, libc::SIGUSR1) };
                        std::thread::yield_now();
                    }
                });
                (0..1000).for_each(|_| one_time_calls());
                stop.0.store(true, Ordering::SeqCst);
            });
            assert!(SEEN.load(Ordering::SeqCst) > before + 100, "there was no storm");
            if flags == libc::SA_RESTART {
                // The kernel begins again what it interrupts.
                assert_eq!(INTERRUPTED.load(Ordering::SeqCst), 0);
            }
        }
        println!("{} calls were interrupted before", INTERRUPTED.load(Ordering::SeqCst));
    });
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
