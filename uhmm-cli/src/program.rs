//! Which file a program is, and whether a library can be preloaded into it.
//!
//! Where it cannot, the dynamic loader says nothing, or something that helps nobody, and the
//! program would run without a budget. So its file is looked at before.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use object::elf::FileHeader64;
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use object::read::{ReadCache, ReadRef};
use object::{Endian as _, Endianness};
use rustix::fs::{Access, StatVfsMountFlags};

use crate::failure::Failure;

/// How many interpreters of scripts are followed, as the kernel does (`BINPRM_MAX_RECURSION`).
const INTERPRETERS: usize = 5;

/// How much of the first line of a script counts (`BINPRM_BUF_SIZE`).
const FIRST_LINE: u64 = 256;

/// Finds the file that would be run for `name`, as execvp(3) does.
///
/// # Errors
///
/// 127 where there is none, 126 where there is one that cannot be run.
pub(crate) fn find(name: &OsStr) -> Result<PathBuf, Failure> {
    let shown = name.display();
    if name.is_empty() {
        return Err(Failure::not_found("the program's name is empty: name one after `--`"));
    }
    if name.as_bytes().contains(&b'/') {
        return runnable(Path::new(name));
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/bin:/usr/bin"));
    let mut refused = None;
    for directory in std::env::split_paths(&path) {
        // An empty entry is the working directory.
        let directory = if directory.as_os_str().is_empty() { ".".into() } else { directory };
        match runnable(&directory.join(name)) {
            Ok(found) => return Ok(found),
            // Like execvp, go on; there may be another one that can be run.
            Err(failure) if failure.status() == crate::failure::status::CANNOT_INVOKE => {
                refused.get_or_insert(failure);
            }
            Err(_) => {}
        }
    }
    let nowhere = || Failure::not_found(format!("{shown}: not found in PATH: give its path"));
    Err(refused.unwrap_or_else(nowhere))
}

fn runnable(path: &Path) -> Result<PathBuf, Failure> {
    let shown = path.display();
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Failure::not_found(format!("{shown}: no such file")))
        }
        Err(error) => Err(Failure::cannot_invoke(format!("{shown}: {error}"))),
        Ok(data) if data.is_dir() => {
            Err(Failure::cannot_invoke(format!("{shown}: it is a directory: name a program")))
        }
        Ok(_) => match rustix::fs::access(path, Access::EXEC_OK) {
            Ok(()) => Ok(path.to_owned()),
            Err(_) => Err(Failure::cannot_invoke(format!(
                "{shown}: it may not be executed: chmod +x, or run its interpreter"
            ))),
        },
    }
}

/// Finds out whether a library is loaded with the program in `path`.
///
/// What cannot be read is taken to be well: it may be executed all the same, and the report says
/// whether it was managed.
///
/// # Errors
///
/// 126 where it would not be, with the reason.
pub(crate) fn check(path: &Path) -> Result<(), Failure> {
    let mut path = path.to_owned();
    for _ in 0..INTERPRETERS {
        let Ok(mut file) = File::open(&path) else { return Ok(()) };
        match interpreter(&mut file) {
            // The interpreter's rights count, and not those of the script.
            Some(interpreter) => path = interpreter,
            None => {
                privileged(&path)?;
                return check_elf(&path, &file);
            }
        }
    }
    Ok(())
}

/// Returns the interpreter of a script; nothing if it is none.
fn interpreter(file: &mut File) -> Option<PathBuf> {
    let mut line = Vec::new();
    file.take(FIRST_LINE).read_to_end(&mut line).ok()?;
    file.rewind().ok()?;
    let line = line.strip_prefix(b"#!")?;
    let line = line.split(|&byte| byte == b'\n').next()?;
    let line = line.trim_ascii_start();
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    (end > 0).then(|| OsString::from_vec(line[..end].to_vec()).into())
}

/// Refuses what runs with more rights than its caller has: there the loader ignores `LD_PRELOAD`.
fn privileged(path: &Path) -> Result<(), Failure> {
    let Ok(data) = std::fs::metadata(path) else { return Ok(()) };
    let others_user = data.uid() != rustix::process::getuid().as_raw();
    let others_group = data.gid() != rustix::process::getgid().as_raw();
    let by_mode =
        data.mode() & 0o4000 != 0 && others_user || data.mode() & 0o2010 == 0o2010 && others_group;
    let by_file = !rustix::process::getuid().is_root() && has_capabilities(path);
    if !(by_mode || by_file) || rights_are_ignored(path) {
        return Ok(());
    }
    Err(Failure::cannot_invoke(format!(
        "{}: it runs with rights of its own (setuid, setgid or file capabilities), and nothing can \
         be preloaded into it: run it without uhmm, or as its owner",
        path.display()
    )))
}

fn has_capabilities(path: &Path) -> bool {
    let mut value = [0_u8; 64];
    rustix::fs::getxattr(path, c"security.capability", &mut value).is_ok_and(|bytes| bytes > 0)
}

/// Tells whether the kernel gives no rights to what it executes.
fn rights_are_ignored(path: &Path) -> bool {
    let by_mount = rustix::fs::statvfs(path)
        .is_ok_and(|file_system| file_system.f_flag.contains(StatVfsMountFlags::NOSUID));
    by_mount || rustix::thread::no_new_privs().unwrap_or(false)
}

fn check_elf(path: &Path, file: &File) -> Result<(), Failure> {
    let refuse = |what: &str| Err(Failure::cannot_invoke(format!("{}: {what}", path.display())));
    let cache = ReadCache::new(file);
    let Ok(header) = cache.read_bytes_at(0, 20) else {
        // Too short for a program: the shell runs it.
        return Ok(());
    };
    if !header.starts_with(b"\x7fELF") {
        return Ok(());
    }
    let Some(own) = loader_of(Path::new("/proc/self/exe")) else { return Ok(()) };
    match loader(&cache) {
        Loader::None => refuse(
            "it is statically linked, and nothing can be preloaded into it: link it dynamically",
        ),
        Loader::Foreign => refuse(
            "it is for another kind of machine than uhmm (a 32-bit program?), and nothing can be \
             preloaded into it: use a build for this one",
        ),
        Loader::Named(name) if name != own => refuse(&format!(
            "its C library is another than that of uhmm (its loader is {}, and not {}), and nothing \
             can be preloaded into it: use a build for that one",
            name.display(),
            own.display()
        )),
        Loader::Named(_) | Loader::Unclear => Ok(()),
    }
}

/// Who loads a program.
#[derive(Debug, PartialEq, Eq)]
enum Loader {
    /// The file's name of the loader: its folder differs between distributions.
    Named(OsString),
    /// Nobody: it is statically linked.
    None,
    /// Nobody here: it is for another machine.
    Foreign,
    /// The file cannot be understood.
    Unclear,
}

fn loader_of(path: &Path) -> Option<OsString> {
    let file = File::open(path).ok()?;
    match loader(&ReadCache::new(&file)) {
        Loader::Named(name) => Some(name),
        _ => None,
    }
}

/// Reads the header of an ELF file.
fn loader<'data>(data: impl ReadRef<'data>) -> Loader {
    let Ok(header) = FileHeader64::<Endianness>::parse(data) else {
        // The header of a 32-bit program is another one.
        return Loader::Foreign;
    };
    let Ok(endian) = header.endian() else { return Loader::Unclear };
    let native = endian.is_little_endian() == cfg!(target_endian = "little");
    if !native || header.e_machine(endian) != MACHINE {
        return Loader::Foreign;
    }
    let Ok(segments) = header.program_headers(endian, data) else { return Loader::Unclear };
    let name = segments.iter().find_map(|segment| segment.interpreter(endian, data).transpose());
    match name {
        Some(Ok(name)) => {
            let path = Path::new(OsStr::from_bytes(name));
            Loader::Named(path.file_name().unwrap_or(path.as_os_str()).to_owned())
        }
        Some(Err(_)) => Loader::Unclear,
        None => Loader::None,
    }
}

/// The machine that `uhmm` was built for, as ELF has it.
#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = object::elf::EM_X86_64;
/// The machine that `uhmm` was built for, as ELF has it.
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = object::elf::EM_AARCH64;
