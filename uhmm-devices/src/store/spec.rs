//! Stores by the words that a user writes.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use uhmm::{CopyJob, DeviceFrame, DeviceMemory, Order, OutOfDeviceMemory, SystemMemory};

use super::compressed::Compressed;
use super::file::FileStore;
use super::options::StoreOptions;
use super::statistics::StoreStatistics;

/// What there is to choose from, for messages.
const CHOICES: &str = "`lz4`, `lz4:LIMIT`, `file:PATH` or `file:PATH:LIMIT`, as in `lz4:1G`";

/// A store of either kind.
///
/// # Examples
///
/// ```
/// use uhmm_devices::store::{Store, StoreError};
///
/// let store = Store::parse("lz4:64M")?;
/// assert_eq!(store.statistics().limit_bytes, Some(64 << 20));
/// let pagemap = uhmm::DevicePagemap::register(store.memory());
///
/// let error = Store::parse("zstd").unwrap_err();
/// assert!(error.to_string().contains("`lz4`"), "{error}");
/// # drop(pagemap);
/// # Ok::<(), StoreError>(())
/// ```
#[derive(Clone, Debug)]
pub enum Store {
    /// Compressed memory.
    Compressed(Arc<Compressed>),
    /// A file.
    File(Arc<FileStore>),
}

/// Which store is wanted: `lz4` or `file:PATH`, each with a limit after another colon if there is
/// to be one.
///
/// What follows the last colon of `file:` is a limit if it begins with a digit and has no slash in
/// it. A name that looks like that is written with `./` before it.
///
/// ```
/// use uhmm_devices::store::StoreSpec;
///
/// let spec: StoreSpec = "file:/var/tmp:4G".parse()?;
/// let expected = StoreSpec::File { path: "/var/tmp".into(), limit_bytes: Some(4 << 30) };
/// assert_eq!(spec, expected);
/// assert_eq!(spec.to_string(), "file:/var/tmp:4294967296");
/// # Ok::<(), uhmm_devices::store::StoreError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreSpec {
    /// Compressed memory.
    Compressed {
        /// The most that may be taken, in bytes.
        limit_bytes: Option<u64>,
    },
    /// A file.
    File {
        /// The directory that it is in, or a name in that directory.
        path: PathBuf,
        /// The most that may be taken, in bytes.
        limit_bytes: Option<u64>,
    },
}

/// Why there is no such store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No kind of store is called that.
    #[error("there is no store `{spec}`: write {CHOICES}")]
    Unknown {
        /// What was written.
        spec: String,
    },
    /// It does not say where the file is to be.
    #[error(
        "`{spec}` does not say where the file is to be: write `file:PATH`, as in `file:/var/tmp`"
    )]
    NoPath {
        /// What was written.
        spec: String,
    },
    /// A size cannot be read.
    #[error(
        "`{size}` is no size: write bytes as a whole number, or with K, M, G or T after it for \
         multiples of 1024, as in `512M`"
    )]
    Size {
        /// What was written.
        size: String,
    },
    /// A limit leaves no room for anything.
    #[error("the limit is too small to keep anything: allow at least {least} bytes")]
    SmallLimit {
        /// The smallest that works, in bytes.
        least: u64,
    },
    /// The file cannot be made.
    #[error("there can be no file at {}: {error}", path.display())]
    File {
        /// What was asked for.
        path: PathBuf,
        /// Why not.
        #[source]
        error: io::Error,
    },
}

impl StoreSpec {
    /// Makes the store. A limit that is written holds before that of `options`.
    ///
    /// # Errors
    ///
    /// As [`FileStore::create`]. [`StoreError::SmallLimit`]: it is less than one slab.
    pub fn open(&self, options: StoreOptions) -> Result<Store, StoreError> {
        let options = match self.limit_bytes() {
            Some(bytes) => options.limit_bytes(bytes),
            None => options,
        };
        match self {
            StoreSpec::Compressed { limit_bytes: Some(bytes) }
                if *bytes < Compressed::LEAST_LIMIT =>
            {
                Err(StoreError::SmallLimit { least: Compressed::LEAST_LIMIT })
            }
            StoreSpec::Compressed { .. } => {
                Ok(Store::Compressed(Arc::new(Compressed::new(options))))
            }
            StoreSpec::File { path, .. } => {
                FileStore::create(path, options).map(|store| Store::File(Arc::new(store)))
            }
        }
    }

    /// Returns the limit that is written, in bytes.
    pub fn limit_bytes(&self) -> Option<u64> {
        let (StoreSpec::Compressed { limit_bytes } | StoreSpec::File { limit_bytes, .. }) = self;
        *limit_bytes
    }
}

impl FromStr for StoreSpec {
    type Err = StoreError;

    fn from_str(spec: &str) -> Result<StoreSpec, StoreError> {
        match spec.split_once(':').unwrap_or((spec, "")) {
            ("lz4", "") if !spec.contains(':') => Ok(StoreSpec::Compressed { limit_bytes: None }),
            ("lz4", limit) => Ok(StoreSpec::Compressed { limit_bytes: Some(parse_bytes(limit)?) }),
            ("file", rest) => {
                let (path, limit_bytes) = match rest.rsplit_once(':') {
                    Some((path, limit)) if looks_like_limit(limit) => {
                        (path, Some(parse_bytes(limit)?))
                    }
                    _ => (rest, None),
                };
                match path {
                    "" => Err(StoreError::NoPath { spec: spec.to_owned() }),
                    path => Ok(StoreSpec::File { path: path.into(), limit_bytes }),
                }
            }
            _ => Err(StoreError::Unknown { spec: spec.to_owned() }),
        }
    }
}

impl fmt::Display for StoreSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreSpec::Compressed { .. } => f.write_str("lz4")?,
            StoreSpec::File { path, .. } => write!(f, "file:{}", path.display())?,
        }
        match self.limit_bytes() {
            Some(bytes) => write!(f, ":{bytes}"),
            None => Ok(()),
        }
    }
}

impl Store {
    /// Makes the store of a [`StoreSpec`] as it is written, with the default options.
    ///
    /// # Errors
    ///
    /// [`StoreError`]: nothing was made.
    pub fn parse(spec: &str) -> Result<Store, StoreError> {
        spec.parse::<StoreSpec>()?.open(StoreOptions::new())
    }

    /// Returns it as what a [`DevicePagemap`](uhmm::DevicePagemap) is registered with.
    pub fn memory(&self) -> Arc<dyn DeviceMemory> {
        match self {
            Store::Compressed(store) => Arc::clone(store) as Arc<dyn DeviceMemory>,
            Store::File(store) => Arc::clone(store) as Arc<dyn DeviceMemory>,
        }
    }

    /// Returns what it holds, what that takes, and what it has done.
    pub fn statistics(&self) -> StoreStatistics {
        match self {
            Store::Compressed(store) => store.statistics(),
            Store::File(store) => store.statistics(),
        }
    }

    /// Tells whether there is room for this many more pages, as far as can be known: in compressed
    /// memory, if they do not compress. See [`FileStore::has_room`].
    pub fn has_room(&self, pages: u64) -> bool {
        match self {
            Store::Compressed(store) => store.has_room(pages),
            Store::File(store) => store.has_room(pages),
        }
    }

    /// Does for up to `most` pages what makes the store take less, and returns for how many. See
    /// [`Compressed::compact`]; a file needs nothing of the kind.
    pub fn compact(&self, most: u64) -> u64 {
        match self {
            Store::Compressed(store) => store.compact(most),
            Store::File(_) => 0,
        }
    }

    /// Checks that tables and statistics agree. To be called while nobody uses the store.
    ///
    /// # Errors
    ///
    /// What does not agree, in words.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Store::Compressed(store) => store.check(),
            Store::File(store) => store.check(),
        }
    }

    fn device(&self) -> &dyn DeviceMemory {
        match self {
            Store::Compressed(store) => &**store,
            Store::File(store) => &**store,
        }
    }
}

impl DeviceMemory for Store {
    fn capacity(&self) -> u64 {
        self.device().capacity()
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        self.device().allocate(order)
    }

    fn is_prompt(&self) -> bool {
        self.device().is_prompt()
    }

    fn free(&self, frame: DeviceFrame, order: Order) {
        self.device().free(frame, order);
    }

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        self.device().copy(memory, jobs);
    }
}

/// Reads a number of bytes as users write it: a whole number, with `K`, `M`, `G` or `T` after it
/// for multiples of 1024, and `B` or `iB` after that or not.
///
/// # Errors
///
/// [`StoreError::Size`]: it is no such number, or larger than any memory.
///
/// ```
/// use uhmm_devices::store::parse_bytes;
///
/// assert_eq!(parse_bytes("512M")?, 512 << 20);
/// assert_eq!(parse_bytes("3kib")?, 3 << 10);
/// assert!(parse_bytes("1.5G").is_err());
/// # Ok::<(), uhmm_devices::store::StoreError>(())
/// ```
pub fn parse_bytes(size: &str) -> Result<u64, StoreError> {
    let no_size = || StoreError::Size { size: size.to_owned() };
    let digits = size.find(|c: char| !c.is_ascii_digit()).unwrap_or(size.len());
    let (number, unit) = size.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(no_size()),
    };
    let number: u64 = number.parse().map_err(|_| no_size())?;
    number.checked_mul(1 << shift).ok_or_else(no_size)
}

/// Tells whether the last part of a `file:` was meant as a limit.
fn looks_like_limit(part: &str) -> bool {
    part.starts_with(|c: char| c.is_ascii_digit())
        && !Path::new(part).has_root()
        && !part.contains('/')
}
