//! The programs that are run, and what they are given.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// How a program goes about its memory, as far as the goals differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// From one end to the other, several times.
    Sequential,
    /// A small part again and again.
    Fitting,
    /// Anywhere.
    Random,
}

/// A program with its arguments.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) access: Access,
    pub(crate) program: Vec<OsString>,
    /// Where the input is; gone when the last program is dropped.
    _folder: Arc<tempfile::TempDir>,
}

impl Access {
    /// Returns the word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Access::Sequential => "sequential",
            Access::Fitting => "fits",
            Access::Random => "random",
        }
    }

    /// Returns how much longer it may take than with zram, at most.
    pub(crate) fn goal(self) -> f64 {
        match self {
            Access::Sequential | Access::Fitting => 1.3,
            Access::Random => 2.5,
        }
    }
}

/// Looks up entries of a dictionary in a random order.
const DICTIONARY: &str = "\
import sys
n = int(sys.argv[1])
table = {'key%d' % i: [i, 'value %d' % (i * 7)] for i in range(n)}
x, found = 12345, 0
for _ in range(n // 4):
    x = (x * 6364136223846793005 + 1442695040888963407) % 2**64
    found ^= table['key%d' % ((x >> 20) % n)][0]
print(len(table), found)
";

impl Workload {
    /// Returns all programs, of a size in percent of the usual one, with their input made.
    ///
    /// # Errors
    ///
    /// Which program is missing, and how to get it; or why the input cannot be written.
    pub(crate) fn all(size: u64) -> Result<Vec<Workload>, String> {
        let rows = |usual: u64| (usual * size / 100).max(1000);
        let folder = tempfile::tempdir().map_err(|error| format!("a temporary folder: {error}"))?;
        let folder = Arc::new(folder);
        let write = |name: &str, text: String| {
            let path = folder.path().join(name);
            let written =
                std::fs::File::create(&path).and_then(|mut file| file.write_all(text.as_bytes()));
            written.map(|()| path).map_err(|error| format!("{name}: {error}"))
        };
        let lines = write("lines", lines(rows(2_500_000)))?;
        let scans = write("scans.sql", scans(rows(2_000_000)))?;
        let lookups = write("lookups.sql", lookups(rows(2_000_000)))?;
        let dictionary = write("dictionary.py", DICTIONARY.to_owned())?;
        let (sort, sqlite, python) =
            (find("sort", "coreutils")?, find("sqlite3", "sqlite3")?, find_python()?);
        let sql = |script: PathBuf| {
            let mut read = OsString::from(".read ");
            read.push(script);
            vec![sqlite.clone().into(), ":memory:".into(), read]
        };
        let count = rows(1_000_000).to_string().into();
        let to = ["-S", "2G", "-o", "/dev/null"].map(OsString::from);
        let sorting = [sort.into()].into_iter().chain(to).chain([lines.into()]).collect();
        let asking = vec![python.into(), dictionary.into(), count];
        let workload = |name, access, program| Workload {
            name,
            access,
            program,
            _folder: Arc::clone(&folder),
        };
        Ok(vec![
            workload("sqlite3, scans of a table", Access::Sequential, sql(scans)),
            workload("sqlite3, rows of a tenth of a table", Access::Fitting, sql(lookups)),
            workload("python3, entries of a dictionary", Access::Random, asking),
            workload("sort, lines in no order", Access::Random, sorting),
        ])
    }
}

/// Makes a table of so many rows. What is in them compresses as text does.
fn table(rows: u64) -> String {
    format!(
        "create table t(a integer primary key, b text);\n\
         insert into t with recursive n(i) as (select 0 union all select i + 1 from n where i + 1 < {rows})\n\
         select i, printf('row %d: %d, %d, as it was on %d', i, i * 7919 % 1000003, i * 104729 % 999983, \
         i * 31 % 365) from n;\n"
    )
}

/// Goes through a table from one end to the other, several times.
fn scans(rows: u64) -> String {
    let mut text = table(rows);
    for number in 0..12 {
        let _ = writeln!(text, "select sum(length(b)), max(a) from t where a % 97 != {number};");
    }
    text
}

/// Asks for rows of the last tenth of a table, in a random order.
fn lookups(rows: u64) -> String {
    let (first, tenth, asked) = (rows - rows / 10, rows / 10, rows * 2);
    let mut text = table(rows);
    let _ = write!(
        text,
        "with recursive n(i) as (select 0 union all select i + 1 from n where i + 1 < {asked})\n\
         select count(*), sum(length(t.b)) from n join t on t.a = {first} + i * 7919 % {tenth};\n"
    );
    text
}

/// Makes so many lines in no order.
fn lines(count: u64) -> String {
    let mut text = String::new();
    let mut state = 1_u64;
    for number in 0..count {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let _ = writeln!(text, "{:011} came as number {number} of {count}", state >> 28);
    }
    text
}

/// Finds a program in `PATH`.
fn find(name: &str, package: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|folder| folder.join(name));
    places
        .find(|at| at.is_file())
        .ok_or_else(|| format!("{name} is not installed: apt-get install {package}"))
}

/// Finds the interpreter itself: what is in `PATH` may be a script that looks for it.
fn find_python() -> Result<PathBuf, String> {
    let python = find("python3", "python3")?;
    let asked = Command::new(&python).args(["-c", "import sys; print(sys.executable)"]).output();
    let said = asked.map_err(|error| format!("{}: {error}", python.display()))?;
    let said = String::from_utf8_lossy(&said.stdout);
    Ok(Path::new(said.trim_end()).to_path_buf())
}
