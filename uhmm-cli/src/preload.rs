//! Where the library is that is preloaded, and the environment that says so.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// The file's name of the library.
const NAME: &str = "libuhmm_preload.so";

/// The variable of the environment that says where the library is, if it is not where it belongs.
pub(crate) const VARIABLE: &str = "UHMM_PRELOAD";

/// Where the library may be, from the folder of the command: beside it, where cargo builds it, and
/// where packages install it.
const PLACES: [&str; 4] = ["", "deps", "../lib/uhmm", "../lib"];

/// Finds the library.
///
/// # Errors
///
/// 125 where it is nowhere, or at a path that `LD_PRELOAD` cannot have.
pub(crate) fn find() -> Result<PathBuf, Failure> {
    let path = match std::env::var_os(VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => beside_the_command()?,
    };
    let path = path.canonicalize().map_err(|error| {
        Failure::own(format!("{}: {error}: let {VARIABLE} be the path of {NAME}", path.display()))
    })?;
    let separates = |byte: &u8| matches!(byte, b':' | b' ' | b'\t' | b'\n');
    if path.as_os_str().as_bytes().iter().any(separates) {
        return Err(Failure::own(format!(
            "{}: LD_PRELOAD cannot have a path with a space or a colon: move it, and let {VARIABLE} \
             be its path",
            path.display()
        )));
    }
    Ok(path)
}

fn beside_the_command() -> Result<PathBuf, Failure> {
    let command = std::env::current_exe()
        .map_err(|error| Failure::own(format!("/proc/self/exe: {error}: mount /proc")))?;
    let folder = command.parent().unwrap_or(Path::new("/"));
    let places = PLACES.iter().map(|place| folder.join(place).join(NAME));
    places.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        Failure::own(format!(
            "{NAME} is not beside {}: build both (cargo build --release -p uhmm-cli), or let \
             {VARIABLE} be its path",
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
