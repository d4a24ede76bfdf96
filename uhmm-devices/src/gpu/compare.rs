//! Do the device and a CPU see the same?

use uhmm::{Access, PAGE_SIZE};

use super::fault::KernelFault;
use super::view::{DeviceMemoryView, within};

/// How many differences are kept.
const KEPT: usize = 64;

/// What [`compare`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// How many bytes were compared.
    pub bytes: u64,
    /// How many of them differ.
    pub differing: u64,
    /// The first of those, by address; no more than 64.
    pub differences: Vec<Difference>,
}

/// A byte that the device and the CPU see differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where.
    pub address: u64,
    /// What the device sees.
    pub device: u8,
    /// What the CPU sees.
    pub cpu: u8,
}

/// Why two views could not be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompareError<E> {
    /// The device could not read.
    #[error("the device could not read")]
    Device(#[source] KernelFault),
    /// The CPU could not read.
    #[error("the CPU could not read at {address:#x}")]
    Cpu {
        /// The first of the bytes that it was to read.
        address: u64,
        /// Why not.
        #[source]
        error: E,
    },
}

impl Comparison {
    /// Tells whether every byte is the same.
    pub fn is_same(&self) -> bool {
        self.differing == 0
    }
}

/// Reads `length` bytes from `address` on, by the device and by `cpu`, and compares them.
///
/// `cpu` is given an address and what to fill from there. Each page is read by the device first; for
/// an answer that means something nobody must write meanwhile.
///
/// # Errors
///
/// [`CompareError`], where one of the two cannot read, or the bytes go past the top of the address
/// space.
pub fn compare<E>(
    view: &DeviceMemoryView<'_>,
    address: u64,
    length: u64,
    mut cpu: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Comparison, CompareError<E>> {
    within(address, length, Access::Read).map_err(CompareError::Device)?;
    let mut found = Comparison::default();
    let (mut seen, mut expected) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    while found.bytes < length {
        let at = address + found.bytes;
        let room = PAGE_SIZE as u64 - at % PAGE_SIZE as u64;
        let count = room.min(length - found.bytes) as usize;
        let (seen, expected) = (&mut seen[..count], &mut expected[..count]);
        view.read(at, seen).map_err(CompareError::Device)?;
        cpu(at, expected).map_err(|error| CompareError::Cpu { address: at, error })?;
        for (offset, (&device, &cpu)) in seen.iter().zip(expected.iter()).enumerate() {
            if device != cpu {
                found.differing += 1;
                if found.differences.len() < KEPT {
                    found.differences.push(Difference { address: at + offset as u64, device, cpu });
                }
            }
        }
        found.bytes += count as u64;
    }
    Ok(found)
}
