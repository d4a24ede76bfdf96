//! What a store costs, beside what it cannot cost less than: the bare compressor, and a copy of the
//! same bytes.
//!
//! Run by name, since it takes a minute: `cargo bench -p uhmm-devices --bench store`. Each figure
//! is a ratio of medians, of rounds that take turns with those of the floor, so that what else the
//! machine does meets both. A round is 512 pages.
#![cfg_attr(any(loom, shuttle, not(target_os = "linux")), allow(unused, reason = "nothing to run"))]

#[cfg(all(target_os = "linux", not(any(loom, shuttle))))]
mod measured {
    use std::hint::black_box;
    use std::time::Instant;

    use lz4_flex::block::{
        CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
    };
    use uhmm::{
        CopyJob, CopyKind, DeviceFrame, DeviceMemory, Frame, Order, PAGE_SIZE, SystemMemory,
    };
    use uhmm_devices::store::{Store, StoreOptions, StoreSpec, Verification};

    /// The pages of a round.
    const PAGES: usize = 512;

    /// How many rounds of each kind take turns.
    const ROUNDS: usize = 101;

    /// How many pages are copied by one call where they come in batches.
    const BATCH: usize = 64;

    type Page = [u8; PAGE_SIZE];

    /// Pages by number; what is written goes to one place.
    struct Memory(Vec<Page>);

    impl SystemMemory for Memory {
        fn read(&self, frame: Frame, _: usize, bytes: &mut [u8]) {
            let pages = &self.0[frame.0 as usize..][..bytes.len() / PAGE_SIZE];
            bytes.copy_from_slice(pages.as_flattened());
        }

        fn write(&self, _: Frame, _: usize, bytes: &[u8]) {
            let mut copy = [0; PAGE_SIZE];
            for page in bytes.chunks_exact(PAGE_SIZE) {
                copy.copy_from_slice(page);
                black_box(&copy);
            }
        }

        fn fetch_update(&self, _: Frame, _: usize, _: &mut dyn FnMut(u64) -> u64) -> u64 {
            unreachable!("stores update nothing")
        }
    }

    /// Text-like pages: words that repeat, at about a third of their size when compressed.
    fn text() -> Vec<Page> {
        let mut state = 1_u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 33
        };
        let words: Vec<Vec<u8>> = (0..300)
            .map(|_| (0..3 + random() % 8).map(|_| b'a' + (random() % 26) as u8).collect())
            .collect();
        let page = |_| {
            let mut bytes = Vec::with_capacity(PAGE_SIZE + 16);
            while bytes.len() < PAGE_SIZE {
                bytes.extend_from_slice(&words[(random() * random() % 300) as usize]);
                bytes.push(b' ');
            }
            bytes[..PAGE_SIZE].try_into().expect("it is long enough")
        };
        (0..PAGES).map(page).collect()
    }

    /// Pages that do not compress.
    fn noise() -> Vec<Page> {
        let mut state = 1_u64;
        let mut byte = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..PAGES).map(|_| std::array::from_fn(&mut byte)).collect()
    }

    fn median(mut times: Vec<f64>) -> f64 {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    /// Returns nanoseconds a page.
    fn time(f: &mut dyn FnMut()) -> f64 {
        let begun = Instant::now();
        f();
        begun.elapsed().as_nanos() as f64 / PAGES as f64
    }

    /// Moves all pages out in calls of `batch`, and home in such calls, and times both.
    fn round(store: &Store, memory: &Memory, batch: usize) -> [f64; 2] {
        let frames: Vec<DeviceFrame> =
            (0..PAGES).map(|_| store.allocate(Order::PAGE).expect("there is room")).collect();
        let mut jobs: Vec<CopyJob> = Vec::new();
        jobs.extend(
            frames.iter().zip(0..).map(|(&to, from)| {
                CopyJob::new(CopyKind::In { from: Frame(from), to }, Order::PAGE)
            }),
        );
        let mut out: Vec<CopyJob> = Vec::new();
        out.extend(
            frames
                .iter()
                .map(|&from| CopyJob::new(CopyKind::Out { from, to: Frame(0) }, Order::PAGE)),
        );
        let times = [&mut jobs, &mut out].map(|jobs| {
            let time =
                time(&mut || jobs.chunks_mut(batch).for_each(|jobs| store.copy(memory, jobs)));
            assert!(jobs.iter().all(CopyJob::is_complete));
            time
        });
        frames.into_iter().for_each(|frame| store.free(frame, Order::PAGE));
        times
    }

    /// The bare compressor, and the bare decompressor, each with the copies that a store cannot do
    /// without: out of system memory, and into it.
    fn bare(memory: &Memory) -> [f64; 2] {
        let mut table = CompressTable::small();
        let mut output = vec![0; get_maximum_output_size(PAGE_SIZE)];
        let mut packed: Vec<Vec<u8>> = Vec::with_capacity(PAGES);
        let mut page = [0; PAGE_SIZE];
        let compress = time(&mut || {
            for frame in 0..PAGES as u64 {
                memory.read(Frame(frame), 0, &mut page);
                let length = compress_into_with_table(&page, &mut output, &mut table);
                let length = length.expect("the output is large enough");
                packed.push(output[..length].to_vec());
            }
        });
        let decompress = time(&mut || {
            for packed in &packed {
                decompress_into(packed, &mut page).expect("it was compressed");
                memory.write(Frame(0), 0, &page);
            }
        });
        [compress, decompress]
    }

    fn copy(memory: &Memory) -> [f64; 2] {
        let mut page = [0; PAGE_SIZE];
        let read = time(&mut || {
            for frame in 0..PAGES as u64 {
                memory.read(Frame(frame), 0, &mut page);
                black_box(&page);
            }
        });
        let write = time(&mut || (0..PAGES).for_each(|_| memory.write(Frame(0), 0, &page)));
        [read, write]
    }

    /// Measures in turns, and returns the medians of each way.
    fn measure<const N: usize>(mut ways: [&mut dyn FnMut() -> [f64; 2]; N]) -> [[f64; 2]; N] {
        let mut times = [const { [const { Vec::new() }; 2] }; N];
        for _ in 0..ROUNDS {
            for (way, times) in ways.iter_mut().zip(&mut times) {
                for (time, times) in way().into_iter().zip(times) {
                    times.push(time);
                }
            }
        }
        times.map(|times| times.map(median))
    }

    fn row(name: &str, [out, home]: [f64; 2], [floor_out, floor_home]: [f64; 2]) {
        println!(
            "{name:<44} out {out:7.0} ns {:5.2}   home {home:7.0} ns {:5.2}",
            out / floor_out,
            home / floor_home
        );
    }

    fn compressed(name: &str, pages: Vec<Page>) {
        let open = |verification| {
            let options = StoreOptions::new().verification(verification);
            StoreSpec::Compressed { limit_bytes: None }.open(options).expect("there is memory")
        };
        let (plain, verified) = (open(Verification::Off), open(Verification::Abort));
        let memory = Memory(pages);
        let [floor, copied, batch, one, checked] = measure([
            &mut || bare(&memory),
            &mut || copy(&memory),
            &mut || round(&plain, &memory, BATCH),
            &mut || round(&plain, &memory, 1),
            &mut || round(&verified, &memory, BATCH),
        ]);
        println!("\n{name}: nanoseconds a page, and how many times the bare compressor's");
        row("bare lz4_flex", floor, floor);
        row("a copy of the bytes", copied, floor);
        row("lz4, 64 pages a call", batch, floor);
        row("lz4, one page a call", one, floor);
        row("lz4, 64 pages a call, verified", checked, floor);
    }

    fn file() {
        let path = std::env::temp_dir();
        let spec = StoreSpec::File { path: path.clone(), limit_bytes: None };
        let store = spec.open(StoreOptions::new()).expect("there is a temporary directory");
        let memory = Memory(noise());
        let bare = tempfile::tempfile_in(path).expect("there is a temporary directory");
        let mut floor = || {
            use std::os::unix::fs::FileExt;
            let mut page = [0; PAGE_SIZE];
            let write = time(&mut || {
                for frame in 0..PAGES as u64 {
                    memory.read(Frame(frame), 0, &mut page);
                    bare.write_all_at(&page, frame * PAGE_SIZE as u64).expect("there is room");
                }
            });
            let read = time(&mut || {
                for frame in 0..PAGES as u64 {
                    bare.read_exact_at(&mut page, frame * PAGE_SIZE as u64).expect("it is there");
                    memory.write(Frame(0), 0, &page);
                }
            });
            [write, read]
        };
        let [floor, batch, one] =
            measure([&mut floor, &mut || round(&store, &memory, BATCH), &mut || {
                round(&store, &memory, 1)
            }]);
        println!(
            "\na file: nanoseconds a page, and how many times bare pwrite and pread of one page"
        );
        row("bare pwrite and pread, one page a call", floor, floor);
        row("file, 64 pages a call", batch, floor);
        row("file, one page a call", one, floor);
    }

    /// Several threads at once, each with pages of its own: how much slower a page is than alone.
    fn together() {
        let store = Store::parse("lz4").expect("there is memory");
        let memory = Memory(text());
        let alone = || round(&store, &memory, 1);
        let both = || {
            let other = || round(&store, &memory, 1);
            let [a, b] = std::thread::scope(|scope| {
                let (a, b) = (scope.spawn(other), scope.spawn(other));
                [a, b].map(|thread| thread.join().expect("no panic"))
            });
            [0, 1].map(|way| f64::midpoint(a[way], b[way]))
        };
        let [floor, both] = measure([&mut { alone }, &mut { both }]);
        println!("\ntwo threads on one store, one page a call, beside one thread");
        row("two threads", both, floor);
    }

    pub(crate) fn run() {
        compressed("text", text());
        compressed("noise", noise());
        file();
        together();
    }
}

fn main() {
    #[cfg(all(target_os = "linux", not(any(loom, shuttle))))]
    measured::run();
}
