//! Memory that gives pages back without waiting for anybody, and what staging keeps of a page that
//! was copied from it.

use std::sync::Mutex;

use uhmm::{CopyJob, CopyKind, DeviceFrame, DeviceMemory, OutOfDeviceMemory, SystemMemory};

use super::*;

/// Memory that keeps the first word of each page, one page at a time.
struct Words {
    prompt: bool,
    words: Mutex<Vec<u64>>,
}

impl Words {
    fn new(prompt: bool) -> Arc<Words> {
        Arc::new(Words { prompt, words: Mutex::default() })
    }
}

impl DeviceMemory for Words {
    fn capacity(&self) -> u64 {
        1 << 20
    }

    fn allocate(&self, order: Order) -> Result<DeviceFrame, OutOfDeviceMemory> {
        if order > Order::PAGE {
            return Err(OutOfDeviceMemory { order });
        }
        let mut words = self.words.lock().expect("no panic");
        words.push(0);
        Ok(DeviceFrame(words.len() as u64 - 1))
    }

    fn is_prompt(&self) -> bool {
        self.prompt
    }

    fn free(&self, _frame: DeviceFrame, _order: Order) {}

    fn copy(&self, memory: &dyn SystemMemory, jobs: &mut [CopyJob]) {
        let mut words = self.words.lock().expect("no panic");
        for job in jobs {
            match job.kind() {
                CopyKind::In { from, to } => {
                    let mut word = [0; 8];
                    memory.read(from, 0, &mut word);
                    words[to.0 as usize] = u64::from_ne_bytes(word);
                }
                CopyKind::Out { from, to } => {
                    let mut page = [0; PAGE_SIZE];
                    page[..8].copy_from_slice(&words[from.0 as usize].to_ne_bytes());
                    memory.write(to, 0, &page);
                }
                CopyKind::Clear { to } => words[to.0 as usize] = 0,
            }
            job.complete();
        }
    }
}

/// Sends pages out one by one, touches each, and returns how often a server went to sleep for that.
fn sleeps(process: &Process, prompt: bool) -> u64 {
    const PAGES: u64 = 512;
    let options = PagemapOptions::new().policies(Policies::none()).clock(Clock::manual());
    let memory = DevicePagemap::register_with(Words::new(prompt), options);
    let mapping = Mapping::anonymous(PAGES);
    mapping.fill(|index| index + 1);
    for page in mapping.range().iter() {
        assert_eq!(process.migrate(page.into(), &memory).run().moved, 1);
    }
    let before = server_sleeps();
    (0..PAGES).for_each(|index| assert_eq!(mapping.peek(index), index + 1));
    assert!(eventually(|| memory.used() == 0));
    server_sleeps() - before
}

/// Returns how often servers have gone to sleep (proc_pid_status(5)).
fn server_sleeps() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("there is one");
    let texts =
        tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or("").trim().to_owned()
    };
    let servers = texts.filter(|text| field(text, "Name") == "uhmm-server");
    servers.filter_map(|text| field(&text, "voluntary_ctxt_switches").parse::<u64>().ok()).sum()
}

/// The thread that all faults wait for serves one by itself where it need not wait. Otherwise another
/// is woken each time, to be there for the next.
#[test]
fn a_page_of_memory_that_is_prompt_wakes_no_second_thread() {
    in_own_process(|| {
        let process = attach();
        let (prompt, other) = (sleeps(&process, true), sleeps(&process, false));
        println!("{prompt} and {other}");
        assert!(4 * prompt < 3 * other, "servers slept {prompt} times, and {other} times");
    });
}

/// Staging is not emptied page by page, and yet keeps next to nothing of what has left by way of it.
#[test]
fn what_has_left_takes_no_memory() {
    in_own_process(|| {
        const PAGES: u64 = 4096;
        let process = attach();
        let memory = DevicePagemap::register(Words::new(true));
        let mapping = Mapping::anonymous(PAGES);
        mapping.fill(|index| index + 1);
        let (before, in_use) = (anonymous_pages(), process.statistics().staging);
        for page in mapping.range().iter() {
            assert_eq!(process.migrate(page.into(), &memory).run().moved, 1);
        }
        assert_eq!(process.statistics().staging, in_use, "nothing is on its way");
        let left = before.saturating_sub(anonymous_pages());
        // What is known of each page takes memory too.
        assert!(left > PAGES - PAGES / 8, "{left} pages of {PAGES} have left");
    });
}

/// Returns how many pages without a file are in memory (proc_pid_statm(5)).
fn anonymous_pages() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("there is one");
    let fields: Vec<u64> = text.split_ascii_whitespace().flat_map(str::parse).collect();
    fields[1] - fields[2]
}
