//! The texts of a repository, by their paths from its root.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The Rust, Markdown and Cargo files of a repository.
pub(crate) struct Tree(BTreeMap<String, String>);

impl Tree {
    /// Reads this repository.
    pub(crate) fn of_the_repository() -> Tree {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut tree = Tree(BTreeMap::new());
        tree.read(&root, "");
        tree
    }

    /// Makes a tree of these paths and texts.
    pub(crate) fn of(files: &[(&str, &str)]) -> Tree {
        let own = |&(path, text): &(&str, &str)| (path.to_owned(), text.to_owned());
        Tree(files.iter().map(own).collect())
    }

    /// Returns the text of the file at `path`.
    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        self.0.get(path).map(String::as_str)
    }

    /// Tells whether `folder` is that of a crate.
    pub(crate) fn is_crate(&self, folder: &str) -> bool {
        self.0.contains_key(&format!("{folder}/Cargo.toml"))
    }

    /// Returns the files in `folder`, at any depth, whose paths there end with `tail`: with a name,
    /// or with a name and some of the folders before it.
    pub(crate) fn find<'a>(
        &'a self,
        folder: &'a str,
        tail: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(path, text)| {
            let inside = path.strip_prefix(folder)?;
            let before = inside.strip_suffix(tail)?;
            (inside.starts_with('/') && before.ends_with('/')).then_some((&**path, &**text))
        })
    }

    fn read(&mut self, folder: &Path, prefix: &str) {
        let entries = fs::read_dir(folder).expect("a folder of the repository can be read");
        for entry in entries {
            let entry = entry.expect("a folder of the repository can be read");
            let name = entry.file_name();
            let name = name.to_str().expect("names in the repository are UTF-8");
            let path = format!("{prefix}{name}");
            let kind = entry.file_type().expect("an entry of a folder has a type");
            if kind.is_dir() && name != "target" && !name.starts_with('.') {
                self.read(&entry.path(), &format!("{path}/"));
            } else if kind.is_file() && [".rs", ".md", ".toml"].iter().any(|e| name.ends_with(e)) {
                let text = fs::read_to_string(entry.path());
                self.0.insert(path, text.expect("a text of the repository can be read"));
            }
        }
    }
}
