//! How `uhmm` ends: as the program did, or with a status of its own and one line that says why.

mod common;

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Folder, allowed, complains, output, run, run_sh, uhmm};

#[test]
fn the_status_is_the_program_s() {
    if !allowed() {
        return;
    }
    for status in [0, 1, 7, 125, 126, 127, 255] {
        let ended = output(&mut run_sh(&["--quiet"], &format!("exit {status}")));
        assert_eq!(ended.status.code(), Some(status));
        assert_eq!(ended.stderr, b"");
    }
}

#[test]
fn a_signal_that_ends_the_program_ends_uhmm() {
    if !allowed() {
        return;
    }
    for (name, signal) in [("TERM", 15), ("KILL", 9), ("SEGV", 11), ("PIPE", 13), ("ALRM", 14)] {
        let ended = output(&mut run_sh(&["--quiet"], &format!("kill -{name} $$")));
        assert_eq!(ended.status.signal(), Some(signal), "{name}");
        assert!(!ended.status.core_dumped(), "the core is that of the program");
    }
    // The last of the signals of real time.
    let ended = output(&mut run_sh(&["--quiet"], "kill -64 $$"));
    assert_eq!(ended.status.signal(), Some(64));
}

#[test]
fn a_program_that_executes_another_is_that_one() {
    if !allowed() {
        return;
    }
    let ended = output(&mut run_sh(&["--quiet"], "exec sh -c 'echo $0; exit 9' other"));
    assert_eq!((ended.status.code(), &*ended.stdout), (Some(9), &b"other\n"[..]));
}

#[test]
fn the_program_is_called_as_the_user_calls_it() {
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let link = folder.path("called");
    std::os::unix::fs::symlink("/bin/sh", &link).expect("there is room");
    let mut command = run(&["--quiet"], &["called", "-c", "tr '\\0' ' ' < /proc/$$/cmdline"]);
    let path = std::env::var("PATH").expect("there is one");
    let folder_path = link.parent().expect("it is in a folder").display();
    let ended = output(command.env("PATH", format!("{folder_path}:{path}")));
    assert!(ended.stdout.starts_with(b"called -c tr"), "{ended:?}");
}

#[test]
fn what_does_not_exist_is_127() {
    let folder = Folder::new();
    let nowhere = folder.path("nothing");
    complains(&mut run(&[], &["no-such-program-anywhere"]), 127, &["not found in PATH"]);
    complains(&mut run(&[], &[&nowhere]), 127, &["no such file"]);
    complains(&mut run(&[], &[""]), 127, &["empty"]);
    if allowed() {
        let script = folder.file("script", b"#!/no/such/interpreter\n", 0o755);
        complains(&mut run(&[], &[&script]), 127, &["interpreter", "does not exist"]);
    }
}

#[test]
fn what_cannot_be_executed_is_126() {
    let folder = Folder::new();
    let plain = folder.file("plain", b"#!/bin/sh\n", 0o644);
    complains(&mut run(&[], &[&plain]), 126, &["may not be executed", "chmod +x"]);
    complains(&mut run(&[], &[Path::new("/tmp/")]), 126, &["directory"]);
    // Of two of the same name in PATH the one that can be executed is taken, as execvp does.
    let mut command = run(&[], &["plain"]);
    let only = plain.parent().expect("it is in a folder");
    complains(command.env("PATH", only), 126, &["may not be executed"]);
}

/// Makes the header of an ELF file, and one segment that names a loader if there is one.
fn elf(class: u8, machine: u16, loader: Option<&str>) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', class, 1, 1, 0];
    file.resize(16, 0);
    file.extend([2, 0]);
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    // The entry, the place of the segments, that of the sections, flags.
    file.extend(0_u64.to_le_bytes());
    file.extend(64_u64.to_le_bytes());
    file.extend(0_u64.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // PT_INTERP is 3, PT_LOAD 1.
    let name = loader.map(|loader| format!("{loader}\0")).unwrap_or_default();
    let kind: u32 = if loader.is_some() { 3 } else { 1 };
    file.extend(kind.to_le_bytes());
    file.extend(4_u32.to_le_bytes());
    for word in [120, 0, 0, name.len() as u64, name.len() as u64, 1] {
        file.extend(word.to_le_bytes());
    }
    file.extend(name.as_bytes());
    file
}

#[cfg(target_arch = "x86_64")]
const MACHINES: (u16, u16) = (62, 183);
#[cfg(target_arch = "aarch64")]
const MACHINES: (u16, u16) = (183, 62);

#[test]
fn what_nothing_can_be_preloaded_into_is_126() {
    let (own, other) = MACHINES;
    let folder = Folder::new();
    let rows = [
        ("static", elf(2, own, None), "statically linked"),
        ("musl", elf(2, own, Some("/lib/ld-musl-x86_64.so.1")), "ld-musl-x86_64.so.1"),
        ("foreign", elf(2, other, None), "another kind of machine"),
        ("narrow", elf(1, 3, None), "32-bit"),
    ];
    for (name, content, word) in rows {
        let path = folder.file(name, &content, 0o755);
        complains(&mut run(&[], &[&path]), 126, &[word]);
        // A script is what its interpreter is.
        let line = format!("#!{} -x\n", path.display());
        let script = folder.file("script", line.as_bytes(), 0o755);
        complains(&mut run(&[], &[&script]), 126, &[word]);
    }
}

#[test]
fn a_program_that_was_linked_statically_is_126() {
    let folder = Folder::new();
    let source = folder.file("main.c", b"int main(void) { return 0; }\n", 0o644);
    let program = folder.path("program");
    for options in [&["-static"][..], &["-static-pie"]] {
        let linked = Command::new("cc").args(options).arg("-o").arg(&program).arg(&source).status();
        if !linked.is_ok_and(|status| status.success()) {
            eprintln!("NOT TESTED: cc {options:?} does not work here");
            continue;
        }
        complains(&mut run(&[], &[&program]), 126, &["statically linked"]);
    }
}

/// `program`, run by the user nobody. Only root can do so.
fn as_nobody(folder: &Folder, options: &[&str], program: &Path) -> Option<Command> {
    if !rustix::process::getuid().is_root() {
        eprintln!("NOT TESTED: only root can be somebody else");
        return None;
    }
    // Nobody may not look into the folders where cargo builds.
    let copy = |from: &Path, name: &str| -> PathBuf {
        let to = folder.path(name);
        std::fs::copy(from, &to).expect("there is room");
        common::set_mode(&to, 0o755);
        to
    };
    let built = Path::new(env!("CARGO_BIN_EXE_uhmm"));
    let command = copy(built, "uhmm");
    copy(&built.with_file_name("deps").join("libuhmm_preload.so"), "libuhmm_preload.so");
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(command);
    nobody.arg("run").args(options).arg("--").arg(program);
    Some(nobody)
}

#[test]
fn a_program_with_rights_of_its_own_is_126() {
    let folder = Folder::new();
    let program = folder.path("program");
    std::fs::copy("/bin/true", &program).expect("there is room");
    for mode in [0o4755, 0o2755] {
        common::set_mode(&program, mode);
        let Some(mut command) = as_nobody(&folder, &[], &program) else { return };
        complains(&mut command, 126, &["setuid", "without uhmm"]);
        // Who has those rights anyway gains none.
        if allowed() {
            let ended = output(&mut run(&["--quiet"], &[&program]));
            assert_eq!(ended.status.code(), Some(0), "{ended:?}");
        }
    }
}

#[test]
fn a_user_without_the_rights_is_told_so() {
    let folder = Folder::new();
    let Some(mut command) = as_nobody(&folder, &[], Path::new("/bin/true")) else { return };
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if setting.is_ok_and(|setting| setting.trim() == "0") {
        complains(
            &mut command,
            125,
            &["does not let memory move", "CAP_SYS_PTRACE", "uhmm doctor"],
        );
    }
}

#[test]
fn what_is_not_understood_is_125() {
    let rows: [(&[&str], &str); 9] = [
        (&["run"], "PROGRAM"),
        (&["run", "--no-such-option", "--", "true"], "--no-such-option"),
        (&["walk"], "walk"),
        (&[], "uhmm --help"),
        (&["run", "--progress=maybe", "--", "true"], "maybe"),
        (&["run", "--policy=none", "--", "true"], "second-chance"),
        (&["run", "--quiet", "--json", "--", "true"], "--json"),
        (&["completions", "cmd"], "cmd"),
        (&["doctor", "--no"], "--no"),
    ];
    for (arguments, word) in rows {
        complains(uhmm().args(arguments), 125, &[word, "--help"]);
    }
}

#[test]
fn what_cannot_be_done_is_125() {
    if !allowed() {
        return;
    }
    let rows: [(&[&str], &[&str]); 9] = [
        (&["--budget", "many"], &["--budget many", "512M"]),
        (&["--budget", "5X"], &["--budget 5X", "no unit"]),
        (&["--budget", "200%"], &["--budget 200%", "more than 100 %"]),
        (&["--budget", "64K"], &["--budget 64K", "4.0 MiB at least"]),
        (&["--device", "tape"], &["--device tape", "`lz4`", "`soft`"]),
        (&["--device", "file:/no/such/place/here"], &["--device file:", "may write to"]),
        (&["--device", "lz4:lots"], &["--device lz4:lots", "no size"]),
        (&["--report", "/no/such/place/report"], &["--report", "name a file"]),
        (&["--device", "file:"], &["--device file:", "file:PATH"]),
    ];
    for (options, words) in rows {
        complains(&mut run(options, &["true"]), 125, words);
    }
    let mut command = run(&[], &["true"]);
    complains(command.env("UHMM_PRELOAD", "/no/library.so"), 125, &["UHMM_PRELOAD"]);
    let folder = Folder::new();
    let spaced = folder.file("a library.so", b"", 0o755);
    complains(run(&[], &["true"]).env("UHMM_PRELOAD", &spaced), 125, &["space", "move it"]);
}

/// Makes a command run on a kernel that does not know userfaultfd(2): by a seccomp filter that
/// answers for it.
fn without_userfaultfd(command: &mut Command) -> &mut Command {
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let (load, equal, answer) = (0x20, 0x15, 0x06);
    let number = u32::try_from(libc::SYS_userfaultfd).expect("system calls are small numbers");
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    let mut filter = [
        step(load, 0, 0, 0),
        step(equal, number, 0, 1),
        step(answer, unknown, 0, 0),
        step(answer, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let install = move || {
        let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
        // SAFETY: sets a flag of the child.
        let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        let mode = libc::SECCOMP_MODE_FILTER;
        // SAFETY: the kernel copies the program, which lives until it has.
        let installed = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
        if set == 0 && installed == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes system calls alone.
    unsafe { command.pre_exec(install) }
}

#[test]
fn a_kernel_without_userfaultfd_is_125() {
    let words = ["does not let memory move", "userfaultfd", "see uhmm doctor"];
    complains(without_userfaultfd(&mut run(&[], &["true"])), 125, &words);
    let told = output(without_userfaultfd(uhmm().arg("doctor")));
    assert_eq!(told.status.code(), Some(2), "{told:?}");
}

/// Where cargo has built the library.
fn library() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_uhmm")).with_file_name("deps").join("libuhmm_preload.so")
}

/// Makes a copy of the library that says that it is of another build.
fn stale_library(folder: &Folder, name: &str) -> PathBuf {
    let mut content = std::fs::read(library()).expect("it was built");
    let build = uhmm_agent::BUILD.to_ne_bytes();
    let mut found = 0;
    for at in 0..content.len() - build.len() {
        if content[at..].starts_with(&build) {
            content[at] ^= 1;
            found += 1;
        }
    }
    assert!(found > 0, "the library says of which build it is");
    folder.file(name, &content, 0o755)
}

#[test]
fn a_library_of_another_build_is_125() {
    let folder = Folder::new();
    let stale = stale_library(&folder, "libuhmm_preload.so");
    let nothing = folder.file("nothing.so", b"", 0o755);
    for wrong in [&stale, &nothing, &PathBuf::from("/bin/true")] {
        let mut command = run(&[], &["true"]);
        let words = ["not of the same build", "build both", "UHMM_PRELOAD"];
        complains(command.env("UHMM_PRELOAD", wrong), 125, &words);
    }
    // Beside the command too; where there is one of its own build, that one is taken.
    let command = folder.path("uhmm");
    std::fs::copy(env!("CARGO_BIN_EXE_uhmm"), &command).expect("there is room");
    let run_there = || {
        let mut command = Command::new(&command);
        command.env_remove("UHMM_PRELOAD").args(["run", "--quiet", "--", "sh", "-c", "exit 3"]);
        command
    };
    complains(&mut run_there(), 125, &["not of the same build"]);
    std::fs::create_dir(folder.path("deps")).expect("there is room");
    std::fs::copy(library(), folder.path("deps/libuhmm_preload.so")).expect("there is room");
    if allowed() {
        assert_eq!(output(&mut run_there()).status.code(), Some(3));
    }
}

#[test]
fn a_full_disk_is_125_before_the_program_runs() {
    if !allowed() {
        return;
    }
    let folder = Folder::new();
    let disk = folder.path("disk");
    std::fs::create_dir(&disk).expect("there is room");
    // In a mount namespace of its own: nothing is left mounted.
    let script = "mount -t tmpfs -o size=64k none \"$0\" && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(&disk).arg(env!("CARGO_BIN_EXE_uhmm"));
    command.args(["run", "--device"]).arg(format!("file:{}", disk.display())).args(["--", "true"]);
    let may = Command::new("unshare").args(["--mount", "true"]).status();
    if !may.is_ok_and(|status| status.success()) {
        eprintln!("NOT TESTED: nothing can be mounted here");
        return;
    }
    complains(&mut command, 125, &["there is no room"]);
}
