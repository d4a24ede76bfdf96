//! The device that the user names.

use std::ffi::{OsStr, OsString};

use uhmm::{DeviceMemory as _, Order};
use uhmm_devices::store::{StoreError, StoreOptions, StoreSpec};

use crate::failure::Failure;

/// Reads what the user wrote, makes such a device once to see that it can be made, and returns how
/// the agents are to make it: wherever they are, so with an absolute path.
///
/// # Errors
///
/// 125, with what is wrong and what could be written.
pub(crate) fn checked(device: &OsStr) -> Result<OsString, Failure> {
    let wrong = |what: &dyn std::fmt::Display| {
        Failure::own(format!("--device {}: {what}", device.display()))
    };
    let text = device.to_str().ok_or_else(|| wrong(&"it is not in UTF-8: use another path"))?;
    if text == "soft" {
        return Ok(device.to_owned());
    }
    let spec: StoreSpec = text.parse().map_err(|error| match error {
        StoreError::Unknown { .. } => wrong(&format!("{error}; or `soft`")),
        error => wrong(&error),
    })?;
    let spec = match spec {
        StoreSpec::File { path, limit_bytes } => {
            let path = std::path::absolute(path).map_err(|error| wrong(&error))?;
            StoreSpec::File { path, limit_bytes }
        }
        spec => spec,
    };
    let store = spec.open(StoreOptions::new()).map_err(|error| match error {
        StoreError::File { .. } => wrong(&format!("{error}: name a folder that you may write to")),
        error => wrong(&error),
    })?;
    let no_room = |_| wrong(&"there is no room: free some, or name another device");
    let frame = store.allocate(Order::PAGE).map_err(no_room)?;
    store.free(frame, Order::PAGE);
    Ok(spec.to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_hear_of_absolute_paths() {
        let folder = std::env::current_dir().expect("there is one");
        let file = |path: &str| format!("file:{}{path}", folder.display());
        let rows = [
            ("lz4", "lz4".to_owned()),
            ("lz4:1G", "lz4:1073741824".to_owned()),
            ("soft", "soft".to_owned()),
            ("file:.", file("")),
            ("file:src:64M", file("/src:67108864")),
        ];
        for (written, checked_as) in rows {
            let device = checked(OsStr::new(written)).unwrap_or_else(|failure| panic!("{failure}"));
            assert_eq!(device, OsStr::new(&checked_as));
        }
    }

    #[test]
    fn what_is_no_device_is_refused_with_what_could_be_written() {
        let rows = [
            ("zstd", "`lz4`"),
            ("soft:1G", "`soft`"),
            ("lz4:much", "is no size"),
            ("lz4:1", "at least"),
            ("file:", "file:PATH"),
            ("file:/nowhere/at/all", "may write to"),
        ];
        for (written, hint) in rows {
            let failure = checked(OsStr::new(written)).expect_err("it is no device").to_string();
            assert!(failure.contains(hint), "{failure}");
            assert!(failure.starts_with(&format!("--device {written}: ")), "{failure}");
        }
    }
}
