//! Where the library is that is preloaded, and the environment that says so.
//!
//! The command and its library share memory whose layout both must know, so they are of one build. A
//! library says in a symbol of which it is, and none of another build is preloaded, wherever it was
//! found.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use object::elf::FileHeader64;
use object::read::elf::ElfFile;
use object::read::{Object as _, ObjectSegment as _, ObjectSymbol as _, ReadCache};
use object::{Endian as _, Endianness};
use uhmm_agent::BUILD;

use crate::failure::Failure;

/// A library that is preloaded.
#[derive(Debug)]
pub(crate) struct Library {
    /// The file's name.
    name: &'static str,
    /// The variable of the environment that says where it is, if it is not where it belongs.
    variable: &'static str,
}

/// The one of `uhmm run`.
pub(crate) const RUN: Library = Library { name: "libuhmm_preload.so", variable: "UHMM_PRELOAD" };

/// The one of `uhmm dmirror`.
pub(crate) const DMIRROR: Library =
    Library { name: "libuhmm_dmirror_preload.so", variable: "UHMM_DMIRROR_PRELOAD" };

/// Where the library may be, from the folder of the command: beside it, where cargo builds it, and
/// where packages install it.
const PLACES: [&str; 4] = ["", "deps", "../lib/uhmm", "../lib"];

/// Finds the library.
///
/// # Errors
///
/// 125 where it is nowhere, of another build, or at a path that `LD_PRELOAD` cannot have.
pub(crate) fn find(library: &Library) -> Result<PathBuf, Failure> {
    let Library { name, variable } = library;
    let path = match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => beside_the_command(library)?,
    };
    let path = path.canonicalize().map_err(|error| {
        Failure::own(format!("{}: {error}: let {variable} be the path of {name}", path.display()))
    })?;
    let separates = |byte: &u8| matches!(byte, b':' | b' ' | b'\t' | b'\n');
    if path.as_os_str().as_bytes().iter().any(separates) {
        return Err(Failure::own(format!(
            "{}: LD_PRELOAD cannot have a path with a space or a colon: move it, and let {variable} \
             be its path",
            path.display()
        )));
    }
    if build_of(&path) != Some(BUILD) {
        return Err(Failure::own(format!(
            "{}: it is not of the same build as this command: build both (cargo build --release -p \
             uhmm-cli), and remove it or let {variable} be the path of the right one",
            path.display()
        )));
    }
    Ok(path)
}

/// Returns the number of the build that a library is of; nothing if it says none.
fn build_of(path: &Path) -> Option<u64> {
    let file = ReadCache::new(File::open(path).ok()?);
    let file = ElfFile::<FileHeader64<Endianness>, _>::parse(&file).ok()?;
    let symbol = file.dynamic_symbols().find(|symbol| symbol.name_bytes() == Ok(b"UHMM_BUILD"))?;
    let data = |address| {
        let mut segments = file.segments();
        segments.find_map(|segment| segment.data_range(address, 8).ok().flatten())
    };
    let number = data(symbol.address())?.try_into().ok()?;
    Some(file.endian().read_u64(u64::from_ne_bytes(number)))
}

/// Returns the library of this build, of those that are in the places where it may be; or another
/// one, for want of a better.
fn beside_the_command(library: &Library) -> Result<PathBuf, Failure> {
    let Library { name, variable } = library;
    let command = std::env::current_exe()
        .map_err(|error| Failure::own(format!("/proc/self/exe: {error}: mount /proc")))?;
    let folder = command.parent().unwrap_or(Path::new("/"));
    let places = PLACES.iter().map(|place| folder.join(place).join(name));
    let found: Vec<PathBuf> = places.into_iter().filter(|path| path.is_file()).collect();
    let own = found.iter().find(|path| build_of(path) == Some(BUILD));
    own.or(found.first()).cloned().ok_or_else(|| {
        Failure::own(format!(
            "{name} is not beside {}: build both (cargo build --release -p uhmm-cli), or let \
             {variable} be its path",
            command.display()
        ))
    })
}

/// Returns what `LD_PRELOAD` is to be: ours, and what there was.
pub(crate) fn ld_preload(library: &Path, before: Option<&OsStr>) -> OsString {
    let mut value = library.as_os_str().to_owned();
    let before = before.unwrap_or_default().as_bytes();
    let others = before
        .split(|byte| matches!(byte, b':' | b' '))
        .filter(|other| !other.is_empty() && *other != library.as_os_str().as_bytes());
    for other in others {
        value.push(":");
        value.push(OsStr::from_bytes(other));
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_preloaded_before_still_is() {
        let rows = [
            (None, "/l.so"),
            (Some(""), "/l.so"),
            (Some("/a.so"), "/l.so:/a.so"),
            (Some("/a.so b.so:/l.so"), "/l.so:/a.so:b.so"),
        ];
        for (before, after) in rows {
            assert_eq!(ld_preload(Path::new("/l.so"), before.map(OsStr::new)), after);
        }
    }
}
