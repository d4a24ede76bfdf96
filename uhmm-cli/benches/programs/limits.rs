//! The kernel's own way to run a program in little memory: a cgroup with a limit, and swap in
//! compressed memory.
//!
//! Both are things of the whole machine, which nobody may be left with. So it is a shell, the
//! *keeper*, that makes them and takes them away, and not the process that measures: the keeper waits
//! at the end of a pipe that only the other holds. When that closes it, or ends in whatever way, the
//! keeper ends what still runs in the cgroups, and takes away all that it has made. It is in a process
//! group of its own and ignores the signals of a terminal.
//!
//! Each run has a cgroup of its own below the keeper's, so that no run is charged with what another
//! has left there.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How much can be in swap, before compression.
const SWAP: &str = "16G";

/// How long the keeper may take to take everything away.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes cgroup and swap, waits, and takes them away. Its arguments: the cgroup; the file that says
/// which controllers the cgroups below the root have, or nothing; the size of the swap.
const KEEPER: &str = r#"
trap '' HUP INT QUIT TERM
group=$1 enable=$2 size=$3 number= on= enabled=
fail() { clean; echo "$1"; exit 1; }
clean() {
    # What still runs there is ours, and the one who would have ended it is gone.
    tries=0
    while [ "$tries" -lt 100 ] && pids=$(cat "$group"/cgroup.procs "$group"/*/cgroup.procs 2>/dev/null) && [ -n "$pids" ]
    do
        kill -KILL $pids
        tries=$((tries + 1))
        sleep 0.1
    done 2>/dev/null
    [ -z "$on" ] || swapoff "/dev/zram$number"
    if [ -n "$number" ]; then
        echo 1 > "/sys/block/zram$number/reset"
        echo "$number" > /sys/class/zram-control/hot_remove
    fi
    for below in "$group"/*/; do
        [ ! -d "$below" ] || rmdir "$below"
    done
    [ ! -d "$group" ] || rmdir "$group"
    [ -z "$enabled" ] || echo -memory > "$enable"
}
mkdir "$group" || fail "no cgroup can be made: run as root, outside of a container"
if [ -n "$enable" ]; then
    if ! grep -qw memory "$enable"; then
        echo +memory > "$enable" || fail "the memory controller cannot be enabled in $enable"
        enabled=1
    fi
    echo +memory > "$group/cgroup.subtree_control" || fail "$group has no memory controller"
fi
number=$(cat /sys/class/zram-control/hot_add) || fail "no zram device can be made: run as root"
echo lz4 > "/sys/block/zram$number/comp_algorithm" || fail "this kernel's zram has no lz4"
echo "$size" > "/sys/block/zram$number/disksize" || fail "the zram device takes no size"
tries=0
while [ ! -b "/dev/zram$number" ] && [ "$tries" -lt 50 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
mkswap "/dev/zram$number" > /dev/null || fail "mkswap: apt-get install util-linux"
swapon -p 100 "/dev/zram$number" || fail "swapon: run as root, outside of a container"
on=1
echo "ready $number"
read -r _
clean
"#;

/// Cgroup and swap, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Limits {
    keeper: Child,
    /// What the keeper waits for the end of.
    pipe: Option<ChildStdin>,
    group: PathBuf,
    names: Names,
    /// The folder of the zram device in sysfs, and its node.
    device: PathBuf,
    node: PathBuf,
    groups: u32,
}

/// What the files of a memory cgroup are called.
#[derive(Clone, Copy, Debug)]
struct Names {
    limit: &'static str,
    current: &'static str,
}

/// A cgroup of one run. Gone when dropped; nothing may run in it then.
#[derive(Debug)]
pub(crate) struct Group {
    path: PathBuf,
    names: Names,
    mm_stat: PathBuf,
}

impl Limits {
    /// Makes a cgroup, and swap in compressed memory.
    ///
    /// # Errors
    ///
    /// What is missing, and what to do, in one line. Nothing is left then.
    pub(crate) fn make() -> Result<Limits, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("cgroups and zram need root: run as root".into());
        }
        if !Path::new("/sys/class/zram-control/hot_add").exists() {
            return Err("this kernel has no zram: modprobe zram".into());
        }
        let (root, names, enable) = hierarchy()?;
        let group = root.join(format!("uhmm-bench-{}", std::process::id()));
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .args([group.as_os_str(), enable.as_os_str(), SWAP.as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|error| format!("sh: {error}"))?;
        let pipe = keeper.stdin.take();
        let mut line = String::new();
        let said = keeper.stdout.take().expect("it is a pipe");
        BufReader::new(said).read_line(&mut line).map_err(|error| error.to_string())?;
        let Some(number) = line.trim_end().strip_prefix("ready ") else {
            _ = keeper.wait();
            return Err(line.trim_end().to_owned());
        };
        let device = Path::new("/sys/block").join(format!("zram{number}"));
        let node = Path::new("/dev").join(format!("zram{number}"));
        Ok(Limits { keeper, pipe, group, names, device, node, groups: 0 })
    }

    /// Makes a cgroup for one run, with a limit in bytes if there is to be one.
    pub(crate) fn group(&mut self, limit: Option<u64>) -> Result<Group, String> {
        self.groups += 1;
        let path = self.group.join(self.groups.to_string());
        let said = |error: std::io::Error| format!("{}: {error}", path.display());
        fs::create_dir(&path).map_err(said)?;
        if let Some(limit) = limit {
            fs::write(path.join(self.names.limit), limit.to_string()).map_err(said)?;
        }
        let mm_stat = self.device.join("mm_stat");
        Ok(Group { path, names: self.names, mm_stat })
    }

    /// Has all of it taken away, and checks that it is gone.
    ///
    /// # Errors
    ///
    /// What is still there, and how to take it away.
    pub(crate) fn take_away(mut self) -> Result<(), String> {
        let status = self.end().ok_or("the keeper of cgroup and swap does not end")?;
        let node = self.node.display();
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.contains(&*self.node.to_string_lossy()) {
            return Err(format!("swap is still on: swapoff {node}"));
        }
        if self.device.exists() {
            return Err(format!("the zram device is still there: zramctl --reset {node}"));
        }
        if self.group.exists() {
            return Err(format!("the cgroup is still there: rmdir {}", self.group.display()));
        }
        status.success().then_some(()).ok_or_else(|| format!("the keeper has ended with {status}"))
    }

    /// Ends the keeper, and waits for that.
    fn end(&mut self) -> Option<ExitStatus> {
        drop(self.pipe.take());
        wait(&mut self.keeper, PATIENCE)
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        self.end();
    }
}

impl Group {
    /// Returns the file that a process writes itself into to belong here.
    pub(crate) fn members(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Returns what is taken now, in bytes: by what is in the cgroup, and by all that is in swap.
    pub(crate) fn taken(&self) -> u64 {
        let first = |path: &Path, field: usize| {
            let text = fs::read_to_string(path).ok()?;
            text.split_ascii_whitespace().nth(field)?.parse::<u64>().ok()
        };
        let current = first(&self.path.join(self.names.current), 0).unwrap_or(0);
        // The third number is what zram has taken from the machine.
        current + first(&self.mm_stat, 2).unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The keeper says so if that fails, and tries again.
        _ = fs::remove_dir(&self.path);
    }
}

/// Waits for a process to end, for so long at most.
fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if began.elapsed() < patience => std::thread::sleep(Duration::from_millis(10)),
            _ => return None,
        }
    }
}

/// Finds the hierarchy of cgroups that has the memory controller: where it is mounted, what its files
/// are called, and the file that hands the controller down, if it has one.
fn hierarchy() -> Result<(PathBuf, Names, PathBuf), String> {
    let mounts = fs::read_to_string("/proc/mounts").map_err(|error| error.to_string())?;
    for mount in mounts.lines() {
        let fields: Vec<&str> = mount.split(' ').collect();
        let &[_, path, kind, options, ..] = fields.as_slice() else { continue };
        let path = PathBuf::from(path);
        if kind == "cgroup2" {
            let has = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
            if has.split_ascii_whitespace().any(|controller| controller == "memory") {
                let names = Names { limit: "memory.max", current: "memory.current" };
                let enable = path.join("cgroup.subtree_control");
                return Ok((path, names, enable));
            }
        }
        if kind == "cgroup" && options.split(',').any(|option| option == "memory") {
            let (limit, current) = ("memory.limit_in_bytes", "memory.usage_in_bytes");
            return Ok((path, Names { limit, current }, PathBuf::new()));
        }
    }
    Err("no memory controller of cgroups is mounted: mount -t cgroup2 none /sys/fs/cgroup".into())
}
