//! What is mapped: `/proc/self/maps`.
//!
//! The kernel is asked for one mapping at a time by `PROCMAP_QUERY` (6.11), whatever their number
//! in half a microsecond, and without a text to parse. Older kernels are asked for the text of
//! `/proc/self/smaps`: `maps` does not tell the size of pages. That walks all page tables.
//!
//! An answer is true of one mapping at one moment. Those of [`Maps::all`] are of different
//! moments.
#![allow(dead_code, reason = "the interface is wrapped and tested whole, and used in part")]

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use uhmm::{Access, PAGE_SIZE, Page, PageRange};

use super::abi::{self, ProcmapQuery};

/// The mappings of the process that opened it, for a forked child too: the child opens its own.
#[derive(Debug)]
pub(crate) struct Maps {
    fd: OwnedFd,
    source: Source,
    /// The device of shared memory that has no name in a file system.
    shmem: (u32, u32),
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// `PROCMAP_QUERY` on `/proc/self/maps`.
    Query,
    /// The text of `/proc/self/smaps`.
    Text,
}

/// A mapping: addresses in a row with the same rights, backed by the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vma {
    /// Where it is.
    pub(crate) range: PageRange,
    /// Whether it was mapped with `PROT_READ`.
    pub(crate) readable: bool,
    /// Whether it was mapped with `PROT_WRITE`.
    pub(crate) writable: bool,
    /// Whether it was mapped with `PROT_EXEC`.
    pub(crate) executable: bool,
    /// Whether others see what is written.
    pub(crate) shared: bool,
    /// Where in the file it begins, in bytes; 0 without a file.
    pub(crate) offset: u64,
    /// The file's number; 0 without a file.
    pub(crate) inode: u64,
    /// The file's device, major and minor; 0 and 0 without a file.
    pub(crate) device: (u32, u32),
    /// The size of its smallest pages, in bytes.
    pub(crate) page_size: u64,
    /// What backs it.
    pub(crate) kind: Kind,
}

/// What backs a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Private memory.
    Anonymous,
    /// Private memory: what brk(2) manages.
    Heap,
    /// Private memory: the first thread's stack.
    Stack,
    /// A file, which may be one of tmpfs, or a device.
    File,
    /// Shared memory that has no name in a file system, though it be mapped privately: a memfd,
    /// `MAP_SHARED | MAP_ANONYMOUS`, or that of System V.
    Shmem,
    /// Pages that the kernel has taken out of its own sight: memfd_secret(2).
    Secret,
    /// Huge pages that were set aside for this.
    Hugetlb,
    /// The kernel's own: vdso, vvar and others. Not memory that could be registered.
    Special,
}

impl Vma {
    /// Tells whether it is private memory without a file: what can move.
    #[inline]
    pub(crate) fn is_anonymous(&self) -> bool {
        matches!(self.kind, Kind::Anonymous | Kind::Heap | Kind::Stack)
    }

    /// Returns what a device may do there. Memory that may be written and not read is nothing for
    /// it: [`Access::Write`] includes loads, and the kernel refuses them.
    #[inline]
    pub(crate) fn rights(&self) -> Access {
        match (self.readable, self.writable) {
            (true, true) => Access::Write,
            (true, false) => Access::Read,
            (false, _) => Access::None,
        }
    }
}

impl Maps {
    /// The room for a name. What has no file has a name of at most 80 letters and `[anon_shmem:]`.
    const NAME: usize = 96;

    /// Opens the calling process's.
    ///
    /// # Errors
    ///
    /// Those of open(2) and memfd_create(2).
    pub(crate) fn open() -> Result<Maps, Errno> {
        let maps = Maps::of(Source::Query)?;
        match maps.query(Page::containing(0)) {
            Err(Errno::NOTTY) => Maps::of(Source::Text),
            Err(errno) => Err(errno),
            Ok(_) => Ok(maps),
        }
    }

    /// Returns the mapping that holds `page`, or the next above it; `None` if there is none.
    ///
    /// # Errors
    ///
    /// Those of read(2) on files of `/proc`: `ESRCH` once the process that opened it is no more.
    #[doc(alias = "PROCMAP_QUERY")]
    #[inline]
    pub(crate) fn at_or_after(&self, page: Page) -> Result<Option<Vma>, Errno> {
        match self.source {
            Source::Query => self.query(page),
            Source::Text => Ok(self.text()?.into_iter().find(|vma| page <= vma.range.last())),
        }
    }

    /// Returns all mappings, in ascending order.
    ///
    /// # Errors
    ///
    /// Those of [`Maps::at_or_after`].
    pub(crate) fn all(&self) -> Result<Vec<Vma>, Errno> {
        if self.source == Source::Text {
            return self.text();
        }
        let mut all = Vec::new();
        let mut next = Some(Page::containing(0));
        while let Some(page) = next {
            let Some(vma) = self.query(page)? else { break };
            next = vma.range.last().checked_add(1);
            all.push(vma);
        }
        Ok(all)
    }

    /// Returns the name of the mapping that holds `page`: that of its file, or the kernel's word for it.
    /// Empty if it has none, if it is longer than 255 bytes, or if nothing is mapped.
    ///
    /// # Errors
    ///
    /// Those of [`Maps::at_or_after`].
    pub(crate) fn name(&self, page: Page) -> Result<Vec<u8>, Errno> {
        if self.source == Source::Text {
            let text = self.read()?;
            let lines = text.split(|&byte| byte == b'\n').filter_map(parse_mapping);
            let mut names = lines.filter(|(vma, _)| vma.range.contains(page)).map(|(_, name)| name);
            return Ok(names.next().map(<[u8]>::to_vec).unwrap_or_default());
        }
        let mut name = [0; 256];
        match self.query_with(page, &mut name) {
            Ok(vma) if vma.range.contains(page) => {
                let length = name.iter().position(|&byte| byte == 0).unwrap_or(0);
                Ok(name[..length].to_vec())
            }
            Ok(_) | Err(Errno::NAMETOOLONG | Errno::NOENT) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Tells whether the kernel is asked for one mapping at a time, and no text is parsed.
    pub(crate) fn is_quick(&self) -> bool {
        self.source == Source::Query
    }

    fn of(source: Source) -> Result<Maps, Errno> {
        let path = match source {
            Source::Query => "/proc/self/maps",
            Source::Text => "/proc/self/smaps",
        };
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        // All shared memory without a name is on one device, and so is this.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL;
        let memfd = rustix::fs::memfd_create(c"uhmm", flags)?;
        let device = rustix::fs::fstat(&memfd)?.st_dev;
        let shmem = (rustix::fs::major(device), rustix::fs::minor(device));
        Ok(Maps { fd, source, shmem })
    }

    #[inline]
    fn query(&self, page: Page) -> Result<Option<Vma>, Errno> {
        let mut name = [0; Maps::NAME];
        let answer = loop {
            match self.query_with(page, &mut name) {
                Err(Errno::NAMETOOLONG) => {}
                answer => break answer,
            }
            // Only names of files are that long, and a file is known without its name. If it is no
            // file, another mapping has come in its place since.
            match self.query_with(page, &mut []) {
                Ok(vma) if vma.is_anonymous() => {}
                answer => break answer,
            }
        };
        match answer {
            Err(Errno::NOENT) => Ok(None),
            answer => answer.map(Some),
        }
    }

    /// Makes the ioctl once, with room for a name of that length.
    #[inline]
    fn query_with(&self, page: Page, name: &mut [u8]) -> Result<Vma, Errno> {
        let address = match name.is_empty() {
            true => 0,
            false => name.as_mut_ptr().expose_provenance() as u64,
        };
        let mut query = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: abi::PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
            query_addr: page.address(),
            vma_name_size: name.len() as u32,
            vma_name_addr: address,
            ..ProcmapQuery::default()
        };
        // SAFETY: 1: the name is `name`, of this length. 2: a query changes nothing.
        unsafe { abi::call(&self.fd, &mut query) }?;
        let flag = |flag| query.vma_flags & flag != 0;
        let range = PageRange::new(query.vma_start, query.vma_end - query.vma_start);
        // The size that is returned includes the 0 at the end; a name that there is none of is 0.
        let length = (query.vma_name_size as usize).saturating_sub(1);
        let vma = Vma {
            range: range.expect("a mapping is made of pages"),
            readable: flag(abi::PROCMAP_QUERY_VMA_READABLE),
            writable: flag(abi::PROCMAP_QUERY_VMA_WRITABLE),
            executable: flag(abi::PROCMAP_QUERY_VMA_EXECUTABLE),
            shared: flag(abi::PROCMAP_QUERY_VMA_SHARED),
            offset: query.vma_offset,
            inode: query.inode,
            device: (query.dev_major, query.dev_minor),
            page_size: query.vma_page_size,
            kind: Kind::Anonymous,
        };
        Ok(self.named(vma, name.get(..length).unwrap_or_default()))
    }

    /// Reads the text, which says the same.
    fn text(&self) -> Result<Vec<Vma>, Errno> {
        let text = self.read()?;
        let mut all: Vec<Vma> = Vec::new();
        let mut name: &[u8] = &[];
        for line in text.split(|&byte| byte == b'\n') {
            if let Some((vma, its_name)) = parse_mapping(line) {
                all.push(vma);
                name = its_name;
            } else if let Some(size) = parse_page_size(line)
                && let Some(vma) = all.last_mut()
            {
                vma.page_size = size;
                *vma = self.named(*vma, name);
            }
        }
        // At the very top, the kernel lists a page of its own that is no mapping of the process.
        all.retain(|vma| vma.range.address() >> 63 == 0);
        Ok(all)
    }

    fn read(&self) -> Result<Vec<u8>, Errno> {
        let mut text = vec![0; 64 << 10];
        let mut length = 0;
        loop {
            if length == text.len() {
                text.resize(2 * length, 0);
            }
            match rustix::io::pread(&self.fd, &mut text[length..], length as u64)? {
                0 => break,
                read => length += read,
            }
        }
        text.truncate(length);
        Ok(text)
    }

    /// Says what backs a mapping of which all but that is known.
    #[inline]
    fn named(&self, vma: Vma, name: &[u8]) -> Vma {
        let kind = if vma.page_size != PAGE_SIZE as u64 {
            Kind::Hugetlb
        } else if name == b"/secretmem (deleted)" {
            Kind::Secret
        } else if vma.device == self.shmem {
            Kind::Shmem
        } else if vma.device != (0, 0) || vma.inode != 0 {
            Kind::File
        } else {
            match name {
                b"[heap]" => Kind::Heap,
                b"[stack]" => Kind::Stack,
                name if name.is_empty() || name.starts_with(b"[anon:") => Kind::Anonymous,
                _ => Kind::Special,
            }
        };
        Vma { kind, ..vma }
    }
}

/// Tells whether children do not get the mapping that holds `page` (`MADV_DONTFORK`). Only the text of
/// `/proc/self/smaps` says so, which walks all page tables.
///
/// # Errors
///
/// Those of reading it.
pub(crate) fn is_kept_from_children(page: Page) -> Result<bool, Errno> {
    let text = std::fs::read("/proc/self/smaps")
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let mut lines = text.split(|&byte| byte == b'\n');
    let holds = |line: &[u8]| parse_mapping(line).is_some_and(|(vma, _)| vma.range.contains(page));
    if !lines.any(holds) {
        return Ok(false);
    }
    let flags = lines.find_map(|line| line.strip_prefix(b"VmFlags:")).unwrap_or_default();
    Ok(flags.split(|&byte| byte == b' ').any(|flag| flag == b"dc"))
}

/// Takes the line of a mapping apart: what it says, but for the page size and the kind, and the
/// name. `None` for lines of another form.
fn parse_mapping(line: &[u8]) -> Option<(Vma, &[u8])> {
    // The name may hold any bytes; what stands before it is separated by single spaces.
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let mut field = || str::from_utf8(fields.next()?).ok();
    let (start, end) = field()?.split_once('-')?;
    let rights = field()?.as_bytes();
    let offset = hexadecimal(field()?)?;
    let (major, minor) = field()?.split_once(':')?;
    let device = (hexadecimal(major)?.try_into().ok()?, hexadecimal(minor)?.try_into().ok()?);
    let inode = field()?.parse().ok()?;
    let name = fields.next().unwrap_or_default().trim_ascii_start();
    let start = hexadecimal(start)?;
    let range = PageRange::new(start, hexadecimal(end)?.checked_sub(start)?).ok()?;
    let &[r, w, x, s] = rights else { return None };
    let vma = Vma {
        range,
        readable: r == b'r',
        writable: w == b'w',
        executable: x == b'x',
        shared: s == b's',
        offset,
        inode,
        device,
        page_size: PAGE_SIZE as u64,
        kind: Kind::Anonymous,
    };
    Some((vma, name))
}

/// Takes a line like `KernelPageSize:        4 kB` apart, and returns the size in bytes.
fn parse_page_size(line: &[u8]) -> Option<u64> {
    let value = line.strip_prefix(b"KernelPageSize:")?.strip_suffix(b"kB")?;
    str::from_utf8(value).ok()?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn hexadecimal(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests;
