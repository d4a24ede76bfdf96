//! What is in a page: nothing but one word, or more; and a checksum of it.

use std::fmt;
use std::sync::Arc;

use uhmm::{DeviceFrame, PAGE_SIZE};

/// The bytes of a page.
pub(super) type PageBytes = [u8; PAGE_SIZE];

/// Whether what comes out of a store is compared with what went in, by a checksum of each page.
///
/// A page whose checksum is wrong does not come home. The default does not look.
#[derive(Clone, Default)]
pub enum Verification {
    /// There are no checksums.
    #[default]
    Off,
    /// A wrong page ends the process, with a message on its standard error.
    Abort,
    /// A wrong page is reported. Whoever needs it goes on without it only as far as the address
    /// space lets it: to the layer above, the copy has failed.
    Report(Arc<dyn Fn(&Mismatch) + Send + Sync>),
}

/// A page is not what was stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{store}: the page at {frame:?} is not what was stored there: its checksum is {found:#010x} \
     and was {expected:#010x}. Memory or the file was overwritten by somebody else, or is defective"
)]
pub struct Mismatch {
    /// Which kind of store.
    pub store: &'static str,
    /// Where the page was stored.
    pub frame: DeviceFrame,
    /// The checksum when it was stored.
    pub expected: u32,
    /// The checksum when it was fetched.
    pub found: u32,
}

impl Verification {
    /// Reports pages that are not what was stored to `report`. It runs where a page is to come
    /// home, with no lock held; it must touch nothing that may be on a device.
    pub fn report(report: impl Fn(&Mismatch) + Send + Sync + 'static) -> Verification {
        Verification::Report(Arc::new(report))
    }

    /// Returns the checksum that is kept of a page: none, which is 0, where nobody will look.
    pub(super) fn checksum(&self, bytes: &PageBytes) -> u32 {
        match self {
            Verification::Off => 0,
            Verification::Abort | Verification::Report(_) => crc32fast::hash(bytes),
        }
    }

    /// Tells whether a page is what was stored, and otherwise does what is to be done then.
    pub(super) fn confirms(
        &self,
        store: &'static str,
        frame: DeviceFrame,
        expected: u32,
        bytes: &PageBytes,
    ) -> bool {
        let found = self.checksum(bytes);
        if found == expected {
            return true;
        }
        let mismatch = Mismatch { store, frame, expected, found };
        tracing::error!(target: "uhmm", %mismatch, "a page was damaged");
        match self {
            Verification::Off => {}
            Verification::Report(report) => report(&mismatch),
            Verification::Abort => {
                eprintln!("uhmm: {mismatch}");
                std::process::abort();
            }
        }
        false
    }
}

/// Returns the word that a page repeats, if it is nothing else.
pub(super) fn repeated_word(bytes: &PageBytes) -> Option<u64> {
    let (words, _) = bytes.as_chunks::<8>();
    let first = words[0];
    // The last first: what begins with zeroes often ends with something else.
    let same = words[words.len() - 1] == first && words.iter().all(|&word| word == first);
    same.then_some(u64::from_ne_bytes(first))
}

/// Fills a page with one word.
pub(super) fn repeat_word(word: u64, bytes: &mut PageBytes) {
    let (words, _) = bytes.as_chunks_mut::<8>();
    words.fill(word.to_ne_bytes());
}

impl fmt::Debug for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verification::Off => "Off",
            Verification::Abort => "Abort",
            Verification::Report(_) => "Report",
        })
    }
}
