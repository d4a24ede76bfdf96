//! Amounts of memory, as people write them.

use std::fmt;
use std::str::FromStr;

/// An amount of memory: so many bytes, or so much of what the machine has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Size {
    Bytes(u64),
    PerCent(f64),
}

/// Why a text is no [`Size`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    #[error("a number is missing: write 512M, 1.5G or 25%")]
    NoNumber,
    #[error("`{0}` is no unit: K, M, G and T are, and % of the machine's memory")]
    UnknownUnit(String),
    #[error("it must be more than 0")]
    NotPositive,
    #[error("it is more than 100 % of the machine's memory")]
    MoreThanAll,
    #[error("it is more than there are addresses")]
    TooLarge,
}

impl Size {
    /// Returns the size in bytes, on a machine with `memory` bytes.
    pub(crate) fn bytes(self, memory: u64) -> u64 {
        match self {
            Size::Bytes(bytes) => bytes,
            // At most `memory`, so it fits; a fraction of a byte does not matter.
            Size::PerCent(per_cent) => (memory as f64 * per_cent / 100.0) as u64,
        }
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Size, SizeError> {
        let text = text.trim();
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let number: f64 = number.parse().map_err(|_| SizeError::NoNumber)?;
        let unit = unit.trim();
        if number <= 0.0 {
            return Err(SizeError::NotPositive);
        }
        if unit == "%" {
            let fits = number <= 100.0;
            return fits.then_some(Size::PerCent(number)).ok_or(SizeError::MoreThanAll);
        }
        let bytes = number * factor(unit).ok_or_else(|| SizeError::UnknownUnit(unit.to_owned()))?;
        match bytes {
            bytes if bytes < 1.0 => Err(SizeError::NotPositive),
            bytes if bytes >= (1_u64 << 56) as f64 => Err(SizeError::TooLarge),
            bytes => Ok(Size::Bytes(bytes as u64)),
        }
    }
}

/// Returns what a unit stands for. `M`, `MB` and `MiB` are the same, as for dd(1) `M` is.
fn factor(unit: &str) -> Option<f64> {
    let unit = unit.to_ascii_lowercase();
    let prefix = unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit);
    let power = match prefix {
        // "ib" alone is no unit.
        "" if unit != "ib" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    Some((1_u64 << power) as f64)
}

/// A number of bytes for people: three digits or so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < units.len() {
            value /= 1024.0;
            unit += 1;
        }
        let digits = if unit == 0 || value >= 99.95 { 0 } else { 1 };
        write!(f, "{value:.digits$} {}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let rows = [
            ("1", 1),
            ("4096", 4096),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("512MB", 512 << 20),
            ("512MiB", 512 << 20),
            (" 512 MiB ", 512 << 20),
            ("1.5G", 3 << 29),
            (".5K", 512),
            ("2T", 2 << 40),
            ("7b", 7),
        ];
        for (text, bytes) in rows {
            assert_eq!(text.parse(), Ok(Size::Bytes(bytes)), "{text}");
        }
        assert_eq!("25%".parse(), Ok(Size::PerCent(25.0)));
        assert_eq!(Size::PerCent(12.5).bytes(800), 100);
        assert_eq!(Size::PerCent(100.0).bytes(1 << 46), 1 << 46);
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_reason() {
        let unknown = |unit: &str| SizeError::UnknownUnit(unit.to_owned());
        let rows = [
            ("", SizeError::NoNumber),
            ("M", SizeError::NoNumber),
            ("-5M", SizeError::NoNumber),
            ("1.2.3M", SizeError::NoNumber),
            ("0", SizeError::NotPositive),
            ("0%", SizeError::NotPositive),
            ("0.1", SizeError::NotPositive),
            ("100.1%", SizeError::MoreThanAll),
            ("5X", unknown("X")),
            ("5 iB", unknown("iB")),
            ("5M%", unknown("M%")),
            ("1e3", unknown("e3")),
            ("99999999T", SizeError::TooLarge),
        ];
        for (text, error) in rows {
            assert_eq!(text.parse::<Size>(), Err(error), "{text}");
        }
    }

    #[test]
    fn bytes_are_shown_with_three_digits() {
        let rows = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (100 << 10, "100 KiB"),
            (102_300, "99.9 KiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16384 PiB"),
        ];
        for (bytes, text) in rows {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
