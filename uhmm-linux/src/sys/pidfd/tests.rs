//! Tests.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::super::testing::{DEADLINE, readable};
use super::*;

#[test]
fn a_process_has_exited_once_it_has() {
    // `cat` ends when its input does.
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("there is cat");
    let pidfd = Pidfd::open(child.id()).expect("it lives");
    assert_eq!(pidfd.has_exited(), Ok(false));
    assert!(!readable(&pidfd, Duration::ZERO));
    let mut input = child.stdin.take().expect("piped");
    input.write_all(b"\n").expect("it reads");
    drop(input);
    assert!(readable(&pidfd, DEADLINE), "the end is told");
    // It is told before anybody has waited for the process, and after.
    assert_eq!(pidfd.has_exited(), Ok(true));
    child.wait().expect("it has ended");
    assert_eq!(pidfd.has_exited(), Ok(true));
}

#[test]
fn what_is_no_process_is_none() {
    assert_eq!(Pidfd::open(0).err(), Some(Errno::SRCH));
    assert_eq!(Pidfd::open(u32::MAX).err(), Some(Errno::SRCH));
    assert_eq!(Pidfd::open(i32::MAX.unsigned_abs()).err(), Some(Errno::SRCH));
}

#[test]
fn the_end_of_a_thread_is_told() {
    let (tell, told) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        tell.send(crate::sys::thread::gettid()).expect("somebody waits for it");
        let _ = gone.recv();
    });
    let life = match Pidfd::open_thread(told.recv().expect("it begins")) {
        Err(Errno::INVAL) => return eprintln!("NOT TESTED: PIDFD_THREAD needs Linux 6.9"),
        life => life.expect("it lives"),
    };
    assert!(!readable(&life, Duration::ZERO));
    drop(go);
    assert!(readable(&life, DEADLINE), "the end is told");
    thread.join().expect("it has not panicked");
}
