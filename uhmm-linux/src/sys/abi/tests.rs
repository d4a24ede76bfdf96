//! That the numbers and structures are the kernel's.
//!
//! Each is compared with the kernel's headers, as the C compiler sees them, and those that the
//! installed headers do not have yet are used on the running kernel in a way that would fail if
//! they were others. What is checked in neither way is a failure.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::process::Command;

use rustix::mm::{MapFlags, ProtFlags};
use uhmm::PAGE_SIZE;

use super::super::advise;
use super::super::testing::{
    Cause, Mapping, Reader, load, pointer, register, start, store, waiting,
};
use super::super::userfaultfd::{Faults, Features, Modes, Userfaultfd};
use super::*;

/// A number: the C expression for it, the macro without which headers do not know it, and ours.
struct Number {
    expression: String,
    needs: &'static str,
    ours: u64,
}

/// Lists constants by their names, which are macros in C, or members of an enumeration that came
/// with the macro `needs`.
macro_rules! constants {
    ($($name:ident $(if $needs:literal)?,)*) => {
        [$(Number {
            expression: stringify!($name).to_owned(),
            needs: [$($needs,)? stringify!($name)][0],
            ours: u64::from($name),
        },)*]
    };
}

/// Lists the size of a structure and the offsets of its fields, by their names here and in C.
macro_rules! structure {
    ($ours:ident, $theirs:literal if $needs:literal: $($field:ident = $member:literal,)*) => {
        vec![
            Number {
                expression: concat!("sizeof(struct ", $theirs, ")").to_owned(),
                needs: $needs,
                ours: size_of::<$ours>() as u64,
            },
            $(Number {
                expression: concat!("offsetof(struct ", $theirs, ", ", $member, ")").to_owned(),
                needs: $needs,
                ours: offset_of!($ours, $field) as u64,
            },)*
        ]
    };
}

fn constants() -> Vec<Number> {
    let all = constants! {
        UFFD_API, USERFAULTFD_IOC_NEW, UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE,
        UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_MOVE, UFFDIO_WRITEPROTECT, UFFDIO_CONTINUE,
        UFFDIO_POISON, PAGEMAP_SCAN, PROCMAP_QUERY, UFFD_USER_MODE_ONLY,
        UFFD_EVENT_PAGEFAULT, UFFD_EVENT_FORK, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE,
        UFFD_EVENT_UNMAP,
        UFFD_PAGEFAULT_FLAG_WRITE, UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_MINOR,
        UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP,
        UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM,
        UFFD_FEATURE_EVENT_UNMAP, UFFD_FEATURE_SIGBUS, UFFD_FEATURE_THREAD_ID,
        UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_EXACT_ADDRESS,
        UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFD_FEATURE_POISON,
        UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_MOVE,
        UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_MINOR,
        UFFDIO_COPY_MODE_DONTWAKE, UFFDIO_ZEROPAGE_MODE_DONTWAKE, UFFDIO_WRITEPROTECT_MODE_WP,
        UFFDIO_WRITEPROTECT_MODE_DONTWAKE, UFFDIO_CONTINUE_MODE_DONTWAKE,
        UFFDIO_POISON_MODE_DONTWAKE, UFFDIO_MOVE_MODE_DONTWAKE, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
        PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED,
        PAGE_IS_PFNZERO, PAGE_IS_HUGE, PAGE_IS_SOFT_DIRTY, PAGE_IS_GUARD,
        PROCMAP_QUERY_VMA_READABLE if "PROCMAP_QUERY",
        PROCMAP_QUERY_VMA_WRITABLE if "PROCMAP_QUERY",
        PROCMAP_QUERY_VMA_EXECUTABLE if "PROCMAP_QUERY",
        PROCMAP_QUERY_VMA_SHARED if "PROCMAP_QUERY",
        PROCMAP_QUERY_COVERING_OR_NEXT_VMA if "PROCMAP_QUERY",
    };
    all.into()
}

fn structures() -> Vec<Number> {
    let all = [
        structure!(UffdioApi, "uffdio_api" if "UFFDIO_API":
            api = "api", features = "features", ioctls = "ioctls",),
        structure!(UffdioRange, "uffdio_range" if "UFFDIO_WAKE":
            start = "start", len = "len",),
        structure!(UffdioRegister, "uffdio_register" if "UFFDIO_REGISTER":
            range = "range", mode = "mode", ioctls = "ioctls",),
        structure!(UffdioCopy, "uffdio_copy" if "UFFDIO_COPY":
            dst = "dst", src = "src", len = "len", mode = "mode", copy = "copy",),
        structure!(UffdioZeropage, "uffdio_zeropage" if "UFFDIO_ZEROPAGE":
            range = "range", mode = "mode", zeropage = "zeropage",),
        structure!(UffdioMove, "uffdio_move" if "UFFDIO_MOVE":
            dst = "dst", src = "src", len = "len", mode = "mode", moved = "move",),
        structure!(UffdioWriteprotect, "uffdio_writeprotect" if "UFFDIO_WRITEPROTECT":
            range = "range", mode = "mode",),
        structure!(UffdioContinue, "uffdio_continue" if "UFFDIO_CONTINUE":
            range = "range", mode = "mode", mapped = "mapped",),
        structure!(UffdioPoison, "uffdio_poison" if "UFFDIO_POISON":
            range = "range", mode = "mode", updated = "updated",),
        structure!(UffdMsg, "uffd_msg" if "UFFDIO": event = "event", words = "arg",),
        structure!(PageRegion, "page_region" if "PAGEMAP_SCAN":
            start = "start", end = "end", categories = "categories",),
        structure!(PmScanArg, "pm_scan_arg" if "PAGEMAP_SCAN":
            size = "size", flags = "flags", start = "start", end = "end", walk_end = "walk_end",
            vec = "vec", vec_len = "vec_len", max_pages = "max_pages",
            category_inverted = "category_inverted", category_mask = "category_mask",
            category_anyof_mask = "category_anyof_mask", return_mask = "return_mask",),
        structure!(ProcmapQuery, "procmap_query" if "PROCMAP_QUERY":
            size = "size", query_flags = "query_flags", query_addr = "query_addr",
            vma_start = "vma_start", vma_end = "vma_end", vma_flags = "vma_flags",
            vma_page_size = "vma_page_size", vma_offset = "vma_offset", inode = "inode",
            dev_major = "dev_major", dev_minor = "dev_minor", vma_name_size = "vma_name_size",
            build_id_size = "build_id_size", vma_name_addr = "vma_name_addr",
            build_id_addr = "build_id_addr",),
    ];
    all.into_iter().flatten().chain(words()).collect()
}

/// What the words of a message are, which the kernel has a union for.
fn words() -> impl Iterator<Item = Number> {
    let members = [
        [Some("pagefault.flags"), Some("pagefault.address"), Some("pagefault.feat.ptid")],
        [Some("fork.ufd"), None, None],
        [Some("remap.from"), Some("remap.to"), Some("remap.len")],
        [Some("remove.start"), Some("remove.end"), None],
    ];
    members.into_iter().flat_map(|members| {
        members.into_iter().enumerate().filter_map(|(word, member)| {
            Some(Number {
                expression: format!("offsetof(struct uffd_msg, arg.{})", member?),
                needs: "UFFDIO",
                ours: (offset_of!(UffdMsg, words) + word * size_of::<u64>()) as u64,
            })
        })
    })
}

/// Asks the headers. Returns the value of each number, where they know it.
fn ask_headers(numbers: &[Number]) -> Vec<Option<u64>> {
    let mut program = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n\
         #include <linux/fs.h>\n#include <linux/userfaultfd.h>\nint main(void) {\n",
    );
    for (index, Number { expression, needs, .. }) in numbers.iter().enumerate() {
        writeln!(program, "#ifdef {needs}").expect("a string");
        writeln!(program, "printf(\"{index} %llu\\n\", (unsigned long long)({expression}));")
            .expect("a string");
        writeln!(program, "#endif").expect("a string");
    }
    program.push_str("return 0;\n}\n");
    let folder = std::env::temp_dir().join(format!("uhmm-abi-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("room for a folder");
    let [source, binary] = ["abi.c", "abi"].map(|name| folder.join(name));
    std::fs::write(&source, program).expect("room for a file");
    let compiled = Command::new("cc").arg("-o").arg(&binary).arg(&source).output();
    let compiled = compiled.expect("there is a C compiler, which Rust needs too");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let told = Command::new(&binary).output().expect("it runs");
    std::fs::remove_dir_all(&folder).expect("it is there");
    let mut values = vec![None; numbers.len()];
    for line in String::from_utf8(told.stdout).expect("text").lines() {
        let (index, value) = line.split_once(' ').expect("two numbers");
        let index: usize = index.parse().expect("a number");
        values[index] = Some(value.parse().expect("a number"));
    }
    values
}

#[test]
fn every_number_is_the_kernels() {
    let mut numbers = constants();
    numbers.extend(structures());
    let shown: BTreeSet<&str> = behaviour();
    let by_behaviour = |expression: &str| {
        // A structure is shown as a whole.
        shown.contains(expression)
            || shown.iter().any(|name| expression.contains(&format!("(struct {name}")))
    };
    let mut wrong = String::new();
    for (number, value) in numbers.iter().zip(ask_headers(&numbers)) {
        let Number { expression, ours, .. } = number;
        let ways = match (value, by_behaviour(expression)) {
            (Some(value), _) if value != *ours => {
                writeln!(wrong, "{expression} is {value:#x} and not {ours:#x}").expect("a string");
                continue;
            }
            (Some(_), true) => "headers and behaviour",
            (Some(_), false) => "headers",
            (None, true) => "behaviour",
            (None, false) => {
                writeln!(wrong, "{expression} is not checked").expect("a string");
                continue;
            }
        };
        println!("{expression} = {ours:#x}: {ways}");
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

/// Uses on the running kernel what headers may lack, and returns the names of what it used.
fn behaviour() -> BTreeSet<&'static str> {
    let mut shown = BTreeSet::new();
    if Userfaultfd::open(Faults::UserModeOnly, Features::empty()).is_ok() {
        shown.extend(moves());
        shown.extend(poisons());
        shown.extend(protects_unpopulated());
        shown.extend(protects_asynchronously());
        shown.extend(accepts_the_last_features());
    } else {
        println!("no userfaultfd: what needs one is only compared with the headers");
    }
    shown.extend(scans());
    shown.extend(scans_within_limits());
    shown.extend(scans_huge());
    shown.extend(queries());
    shown
}

fn open(features: Features) -> Userfaultfd {
    Userfaultfd::open(Faults::UserModeOnly, features).expect("a userfaultfd")
}

/// Makes an ioctl of userfaultfd.
fn try_call<T: Argument>(uffd: &Userfaultfd, argument: &mut T) -> Result<i32, Errno> {
    // SAFETY: 1: the structures of userfaultfd have no field for the kernel to write through.
    // 2: the ranges are the test's.
    unsafe { call(uffd, argument) }
}

fn moves() -> [&'static str; 4] {
    let uffd = open(Features::empty());
    let (from, to) = (Mapping::anonymous(3), Mapping::anonymous(3));
    from.store(0, 7);
    from.store(2, 9);
    register(&uffd, &to, Modes::MISSING);
    let loading = start({
        let page = to.page(0);
        move || load(page)
    });
    assert_eq!(Reader::new(&uffd).fault().0, to.page(0));
    let mut argument = UffdioMove {
        dst: to.range().address(),
        src: from.range().address(),
        len: len_of(from.range()),
        mode: UFFDIO_MOVE_MODE_DONTWAKE,
        moved: 0,
    };
    // Page 1 is a hole.
    assert_eq!(try_call(&uffd, &mut argument), Err(Errno::AGAIN));
    assert_eq!(argument.moved, PAGE_SIZE as i64);
    assert_eq!(waiting(&uffd), 1);
    uffd.wake(to.range()).expect("a range");
    assert_eq!(loading.done(), 7);
    for page in [&mut argument.dst, &mut argument.src] {
        *page += PAGE_SIZE as u64;
    }
    argument.len -= PAGE_SIZE as u64;
    argument.mode = UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES;
    assert_eq!(try_call(&uffd, &mut argument), Ok(0));
    assert_eq!(argument.moved, 2 * PAGE_SIZE as i64);
    assert_eq!(to.load(2), 9);
    ["UFFDIO_MOVE", "UFFDIO_MOVE_MODE_DONTWAKE", "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES", "uffdio_move"]
}

fn poisons() -> [&'static str; 3] {
    let uffd = open(Features::empty());
    let memory = Mapping::anonymous(3);
    memory.store(2, 1);
    register(&uffd, &memory, Modes::MISSING);
    let page = memory.page(1);
    let loading = start(move || load(page));
    assert_eq!(Reader::new(&uffd).fault().0, page);
    let mode = UFFDIO_POISON_MODE_DONTWAKE;
    let mut argument = UffdioPoison { range: memory.range().into(), mode, updated: 0 };
    assert_eq!(try_call(&uffd, &mut argument), Err(Errno::AGAIN), "page 2 is there");
    assert_eq!(argument.updated, 2 * PAGE_SIZE as i64);
    assert_eq!(advise::populate_read(memory.pages(0..1)), Err(Errno::HWPOISON));
    // Were the thread woken, the poison would end it.
    assert_eq!(waiting(&uffd), 1);
    advise::dontneed(page.into()).expect("memory");
    assert!(uffd.zeropage(page.into(), true).result.is_ok());
    assert_eq!(loading.done(), 0);
    ["UFFDIO_POISON", "UFFDIO_POISON_MODE_DONTWAKE", "uffdio_poison"]
}

/// Whether a store to a page that was protected before it was there is reported.
fn store_is_reported(uffd: &Userfaultfd) -> bool {
    let memory = Mapping::anonymous(1);
    register(uffd, &memory, Modes::WP);
    uffd.write_protect(memory.range(), true, true).expect("it is registered");
    let marked = scan(memory.range(), 0, PAGE_IS_SWAPPED) == [(0..1, PAGE_IS_SWAPPED)];
    if marked && !uffd.features().contains(Features::WP_ASYNC) {
        let page = memory.page(0);
        let storing = start(move || store(page, 1));
        let cause = Cause { write: true, wp: true, minor: false };
        assert_eq!(Reader::new(uffd).fault(), (page, cause));
        uffd.write_protect(memory.range(), false, true).expect("it is registered");
        storing.done();
        return true;
    }
    memory.store(0, 1);
    assert_eq!(uffd.read_now(&mut Default::default()), Err(Errno::AGAIN));
    marked
}

fn protects_unpopulated() -> [&'static str; 2] {
    assert!(!store_is_reported(&open(Features::empty())));
    assert!(store_is_reported(&open(Features::from_bits_retain(UFFD_FEATURE_WP_UNPOPULATED))));
    ["UFFD_FEATURE_WP_UNPOPULATED", "PAGE_IS_SWAPPED"]
}

fn protects_asynchronously() -> [&'static str; 3] {
    let uffd = open(Features::from_bits_retain(UFFD_FEATURE_WP_ASYNC));
    let memory = Mapping::anonymous(3);
    memory.fill(|index| index);
    uffd.register(memory.pages(0..2), Modes::WP).expect("it can be registered");
    uffd.write_protect(memory.pages(0..2), true, true).expect("it is registered");
    memory.store(1, 5);
    assert_eq!(uffd.read_now(&mut Default::default()), Err(Errno::AGAIN));
    let both = PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN;
    let expected = [(0..1, PAGE_IS_WPALLOWED), (1..2, both), (2..3, PAGE_IS_WRITTEN)];
    assert_eq!(scan(memory.range(), 0, both), expected);
    ["UFFD_FEATURE_WP_ASYNC", "PAGE_IS_WPALLOWED", "PAGE_IS_WRITTEN"]
}

/// Those that change nothing by being asked for. The kernel refuses numbers that it does not know;
/// which of the two is which follows from the order in which the kernel got them.
fn accepts_the_last_features() -> [&'static str; 2] {
    let all = Features::all().bits();
    assert_eq!(all, (1 << 17) - 1, "no number is left out");
    for feature in [UFFD_FEATURE_POISON, UFFD_FEATURE_MOVE] {
        let feature = Features::from_bits_retain(feature);
        assert_eq!(open(feature).features(), feature);
    }
    ["UFFD_FEATURE_POISON", "UFFD_FEATURE_MOVE"]
}

/// Makes a scan, and returns its answers.
fn try_scan(argument: &mut PmScanArg, regions: &mut [PageRegion]) -> Result<i32, Errno> {
    let pagemap = std::fs::File::open("/proc/self/pagemap").expect("a pagemap");
    argument.vec = regions.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: 1: `vec` is `regions`, and no test says that it is longer. 2: only the test's own
    // ranges are ever write-protected.
    unsafe { call(&pagemap, argument) }
}

/// The argument for all pages of a range.
fn scan_of(range: PageRange, any_of: u64, report: u64) -> PmScanArg {
    PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start: range.address(),
        end: range.address() + len_of(range),
        category_anyof_mask: any_of,
        return_mask: report,
        ..PmScanArg::default()
    }
}

/// Says what is true of the pages of a range, by their positions.
fn scan(range: PageRange, any_of: u64, report: u64) -> Vec<(std::ops::Range<u64>, u64)> {
    let mut regions = [PageRegion::default(); 8];
    let mut argument = scan_of(range, any_of, report);
    argument.vec_len = 8;
    let found = try_scan(&mut argument, &mut regions).expect("a scan");
    assert_eq!(argument.walk_end, argument.end);
    let position = |address: u64| (address - range.address()) / PAGE_SIZE as u64;
    let tell =
        |region: &PageRegion| (position(region.start)..position(region.end), region.categories);
    regions[..found as usize].iter().map(tell).collect()
}

fn scans() -> Vec<&'static str> {
    let memory = Mapping::anonymous(4);
    memory.store(0, 1);
    assert_eq!(memory.load(1), 0);
    let kinds = PAGE_IS_PRESENT | PAGE_IS_FILE | PAGE_IS_PFNZERO;
    let expected = [(0..1, PAGE_IS_PRESENT), (1..2, PAGE_IS_PRESENT | PAGE_IS_PFNZERO)];
    assert_eq!(scan(memory.range(), kinds, kinds), expected);
    let shared = Mapping::new(2, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    shared.store(1, 1);
    assert_eq!(scan(shared.range(), kinds, kinds), [(1..2, PAGE_IS_PRESENT | PAGE_IS_FILE)]);
    let mut shown =
        vec!["PAGEMAP_SCAN", "page_region", "PAGE_IS_PRESENT", "PAGE_IS_FILE", "PAGE_IS_PFNZERO"];

    /// `MADV_GUARD_INSTALL`, Linux 6.13, which neither rustix nor libc has a name for.
    const MADV_GUARD_INSTALL: i32 = 102;
    // SAFETY: the memory is the test's, and nobody touches the page afterwards.
    let done = unsafe { libc::madvise(pointer(memory.page(2)), PAGE_SIZE, MADV_GUARD_INSTALL) };
    let known = super::super::pagemap::Pagemap::open().expect("a pagemap").known().bits();
    if done == 0 && known & PAGE_IS_GUARD != 0 {
        assert_eq!(scan(memory.range(), PAGE_IS_GUARD, PAGE_IS_GUARD), [(2..3, PAGE_IS_GUARD)]);
        shown.push("PAGE_IS_GUARD");
    }
    // 4 clears the marks of the process, which nobody else here looks at (proc_pid_clear_refs(5)).
    std::fs::write("/proc/self/clear_refs", "4").expect("it can be cleared");
    memory.store(1, 1);
    let dirty = scan(memory.range(), PAGE_IS_SOFT_DIRTY, PAGE_IS_SOFT_DIRTY);
    // A kernel without these marks takes the number all the same, and refuses those that it does
    // not know; all others around it are shown to be something else.
    assert!(dirty.is_empty() || dirty == [(1..2, PAGE_IS_SOFT_DIRTY)]);
    assert_eq!(PAGE_IS_HUGE << 1, PAGE_IS_SOFT_DIRTY);
    assert_eq!(PAGE_IS_GUARD >> 1, PAGE_IS_SOFT_DIRTY);
    shown.push("PAGE_IS_SOFT_DIRTY");
    shown
}

fn scans_huge() -> Option<&'static str> {
    let memory = Mapping::huge(1);
    advise::hugepage(memory.range()).expect("the kernel has huge pages");
    memory.store(0, 1);
    let huge = scan(memory.range(), PAGE_IS_HUGE, PAGE_IS_HUGE);
    (huge == [(0..512, PAGE_IS_HUGE)]).then_some("PAGE_IS_HUGE")
}

/// Every field of the argument.
fn scans_within_limits() -> [&'static str; 1] {
    let memory = Mapping::anonymous(6);
    [0, 1, 3, 4].into_iter().for_each(|index| memory.store(index, 1));
    let (address, page) = (memory.range().address(), PAGE_SIZE as u64);
    let mut regions = [PageRegion::default(); 8];
    let plain = scan_of(memory.range(), PAGE_IS_PRESENT, PAGE_IS_PRESENT);
    let mut ask = |change: &dyn Fn(&mut PmScanArg)| {
        let mut argument = PmScanArg { vec_len: 8, ..plain };
        change(&mut argument);
        let found = try_scan(&mut argument, &mut regions)?;
        Ok((found, argument.walk_end, regions[0].start, regions[0].end))
    };
    let whole = (2, address + 6 * page, address, address + 2 * page);
    assert_eq!(ask(&|_| {}), Ok(whole));
    assert_eq!(ask(&|argument| argument.size -= 8), Err(Errno::INVAL));
    assert_eq!(ask(&|argument| argument.flags = 1 << 63), Err(Errno::INVAL));
    let later = (2, address + 6 * page, address + page, address + 2 * page);
    assert_eq!(ask(&|argument| argument.start += page), Ok(later));
    let shorter = (1, address + page, address, address + page);
    assert_eq!(ask(&|argument| argument.end = address + page), Ok(shorter));
    let (found, walked, ..) = ask(&|argument| argument.vec_len = 1).expect("a scan");
    assert_eq!(found, 1);
    assert!(
        (address + 2 * page..=address + 3 * page).contains(&walked),
        "it stops for want of room"
    );
    let (found, walked, ..) = ask(&|argument| argument.max_pages = 1).expect("a scan");
    assert_eq!((found, walked), (1, address + page));
    let inverted = |argument: &mut PmScanArg| {
        argument.category_anyof_mask = 0;
        argument.category_mask = PAGE_IS_PRESENT;
        argument.category_inverted = PAGE_IS_PRESENT;
    };
    let absent = (2, address + 6 * page, address + 2 * page, address + 3 * page);
    assert_eq!(ask(&inverted), Ok(absent));
    let required = |argument: &mut PmScanArg| {
        argument.category_anyof_mask = 0;
        argument.category_mask = PAGE_IS_PRESENT;
    };
    assert_eq!(ask(&required), Ok(whole));
    let unknown = |argument: &mut PmScanArg| argument.return_mask = 1 << 63;
    assert_eq!(ask(&unknown), Err(Errno::INVAL));
    let unknown = |argument: &mut PmScanArg| argument.category_anyof_mask = 1 << 63;
    assert_eq!(ask(&unknown), Err(Errno::INVAL));
    ["pm_scan_arg"]
}

/// Makes a query.
fn query(argument: &mut ProcmapQuery) -> Result<i32, Errno> {
    let maps = std::fs::File::open("/proc/self/maps").expect("maps");
    // SAFETY: 1: the tests give the buffers that they say. 2: a query changes nothing.
    unsafe { call(&maps, argument) }
}

/// The argument for the mapping at an address.
fn query_of(address: u64) -> ProcmapQuery {
    let size = size_of::<ProcmapQuery>() as u64;
    ProcmapQuery { size, query_addr: address, ..ProcmapQuery::default() }
}

fn queries() -> Vec<&'static str> {
    if query(&mut query_of(0)) == Err(Errno::NOTTY) {
        println!("no PROCMAP_QUERY: it is only compared with the headers");
        return Vec::new();
    }
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::NOEXEC_SEAL;
    let memfd = rustix::fs::memfd_create(c"query", flags).expect("a memfd");
    rustix::fs::ftruncate(&memfd, 3 * PAGE_SIZE as u64).expect("room");
    let file = Mapping::of(&memfd, 3, ProtFlags::READ, MapFlags::SHARED);
    super::super::testing::protect(file.pages(0..1), rustix::mm::MprotectFlags::empty());
    let mut name = [0u8; 64];
    let mut argument = query_of(file.page(2).address());
    argument.vma_name_size = name.len() as u32;
    argument.vma_name_addr = name.as_mut_ptr().expose_provenance() as u64;
    assert_eq!(query(&mut argument), Ok(0));
    assert_eq!(argument.vma_start, file.page(1).address());
    assert_eq!(argument.vma_end, file.page(2).address() + PAGE_SIZE as u64);
    assert_eq!(argument.vma_flags, PROCMAP_QUERY_VMA_READABLE | PROCMAP_QUERY_VMA_SHARED);
    assert_eq!((argument.vma_offset, argument.vma_page_size), (PAGE_SIZE as u64, 4096));
    let stat = rustix::fs::fstat(&memfd).expect("a memfd");
    assert_eq!(argument.inode, stat.st_ino);
    assert_eq!(argument.dev_major, rustix::fs::major(stat.st_dev));
    assert_eq!(argument.dev_minor, rustix::fs::minor(stat.st_dev));
    let said = &name[..argument.vma_name_size as usize];
    assert_eq!(said, b"/memfd:query (deleted)\0");
    queries_of_rights();
    queries_that_are_refused(file.range().address());
    vec![
        "PROCMAP_QUERY",
        "procmap_query",
        "PROCMAP_QUERY_VMA_READABLE",
        "PROCMAP_QUERY_VMA_WRITABLE",
        "PROCMAP_QUERY_VMA_EXECUTABLE",
        "PROCMAP_QUERY_VMA_SHARED",
        "PROCMAP_QUERY_COVERING_OR_NEXT_VMA",
    ]
}

fn queries_of_rights() {
    let cases = [
        (ProtFlags::WRITE, PROCMAP_QUERY_VMA_WRITABLE),
        (ProtFlags::EXEC, PROCMAP_QUERY_VMA_EXECUTABLE),
        (ProtFlags::empty(), 0),
    ];
    for (rights, flags) in cases {
        let memory = Mapping::new(1, rights, MapFlags::PRIVATE);
        let mut argument = query_of(memory.range().address());
        assert_eq!(query(&mut argument), Ok(0));
        assert_eq!(argument.vma_flags, flags);
    }
    let huge = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::NORESERVE;
    let memory = Mapping::new(512, ProtFlags::READ, huge);
    let mut argument = query_of(memory.range().address());
    assert_eq!(query(&mut argument), Ok(0));
    assert_eq!(argument.vma_page_size, 2 << 20);
}

fn queries_that_are_refused(address: u64) {
    let mut nothing = query_of(0);
    assert_eq!(query(&mut nothing), Err(Errno::NOENT), "nothing is mapped at 0");
    nothing.query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA;
    assert_eq!(query(&mut nothing), Ok(0), "and something above");
    let refused = |change: &dyn Fn(&mut ProcmapQuery)| {
        let mut argument = query_of(address);
        change(&mut argument);
        query(&mut argument).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|argument| argument.size = 8));
    assert!(refused(&|argument| argument.query_flags = 1 << 63));
    // A buffer is an address and a length, or neither.
    assert!(refused(&|argument| argument.vma_name_size = 1));
    assert!(refused(&|argument| argument.vma_name_addr = address));
    assert!(refused(&|argument| argument.build_id_size = 1));
    assert!(refused(&|argument| argument.build_id_addr = address));
}
