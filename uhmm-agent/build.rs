//! Gives the build a number: what the command and the library that it preloads must have in common.
//!
//! It is a hash of the sources that both are made from, so a build of the same sources has the same
//! number, wherever and in whatever profile it is made.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

/// The crates of the repository that the library is made from, beside this one. Where this crate is by
/// itself, its dependencies are of the versions that it names.
const CRATES: [&str; 4] = ["../mmu-notifier", "../uhmm", "../uhmm-devices", "../uhmm-linux"];

fn main() {
    let mut files = Vec::new();
    for folder in CRATES.into_iter().chain(["."]) {
        let folder = Path::new(folder);
        for part in ["src", "preload/src", "dmirror/src"] {
            collect(&folder.join(part), &mut files);
        }
        let manifest = folder.join("Cargo.toml");
        println!("cargo::rerun-if-changed={}", manifest.display());
        files.push(manifest);
    }
    files.sort();
    let mut hash = DefaultHasher::new();
    std::env::var_os("CARGO_PKG_VERSION").hash(&mut hash);
    for file in files {
        // What is not there has no part in the build.
        if let Ok(content) = fs::read(&file) {
            (&file, content).hash(&mut hash);
        }
    }
    println!("cargo::rustc-env=UHMM_BUILD={:016x}", hash.finish());
}

/// Collects the files in a folder and those below, and has cargo run this again when one changes.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    println!("cargo::rerun-if-changed={}", folder.display());
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.push(path);
        }
    }
}
