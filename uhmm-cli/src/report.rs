//! What is said of a run at its end: for people, and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use uhmm_agent::ledger::{
    Config, Counter, Gauge, Latency, Ledger, NoteKind, Numbers, State, Stock, Totals,
};

use crate::args;
use crate::size::Bytes;

/// The version of the JSON: a later one may have more fields, and another number if one changes its
/// meaning or goes.
const SCHEMA: u32 = 1;

/// By which part of it a budget may be exceeded without a word: 5 per cent.
const TOLERANCE: u64 = 20;

/// The percentiles that are told of.
const PERCENTILES: [(&str, f64); 4] = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("max", 100.0)];

/// The report of a run. docs/run.md explains the fields.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    schema: u32,
    program: Vec<String>,
    ended: Ended,
    seconds: f64,
    budget_bytes: u64,
    device: String,
    policy: String,
    verify: bool,
    announced: bool,
    peak_bytes: BTreeMap<&'static str, u64>,
    staying_bytes: BTreeMap<&'static str, u64>,
    compression: Compression,
    counts: BTreeMap<&'static str, u64>,
    fault_latency: FaultLatency,
    room_waits: FaultLatency,
    stayed: Vec<Reason>,
    processes: Processes,
    not_managed: Vec<Reason>,
    warnings: Vec<Reason>,
}

/// How the program ended: by itself with a status, or by a signal.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Ended {
    pub(crate) status: Option<u8>,
    pub(crate) signal: Option<i32>,
}

/// What the device made of it, when the most was away.
#[derive(Debug, Serialize)]
struct Compression {
    away_bytes: u64,
    stored_bytes: u64,
    zero_bytes: u64,
    same_filled_bytes: u64,
    incompressible_bytes: u64,
    /// `None` where nothing was stored.
    ratio: Option<f64>,
}

#[derive(Debug, Serialize)]
struct FaultLatency {
    count: u64,
    percentiles_ns: BTreeMap<&'static str, u64>,
    histogram: Vec<Bucket>,
}

/// How many faults took less than `below_ns`, and not less than half of it.
#[derive(Debug, Serialize)]
struct Bucket {
    below_ns: u64,
    count: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Reason {
    reason: String,
    count: u64,
}

#[derive(Debug, Serialize)]
struct Processes {
    started: u64,
    managed: u64,
    without_slot: u64,
    going_on: u64,
}

impl Report {
    /// Reads the ledger when the program has ended.
    pub(crate) fn of(
        ledger: &Ledger,
        config: &Config,
        arguments: &args::Run,
        ended: Ended,
        elapsed: Duration,
    ) -> Report {
        ledger.reap();
        ledger.take_stock();
        let live = ledger.processes();
        let going_on = live.iter().filter(|process| process.state != State::Ended).count() as u64;
        let totals = ledger.totals();
        let notes = |kind: NoteKind| {
            let notes = totals.notes.iter().filter(|note| note.kind == kind);
            notes.map(|note| Reason { reason: note.text.clone(), count: note.count }).collect()
        };
        let counts =
            Counter::ALL.iter().map(|&counter| (counter.name(), totals.numbers.counter(counter)));
        Report {
            schema: SCHEMA,
            program: arguments.program.iter().map(|word| word.display().to_string()).collect(),
            ended,
            seconds: elapsed.as_secs_f64(),
            budget_bytes: config.budget,
            device: config.device.display().to_string(),
            policy: config.policy.clone(),
            verify: config.verify,
            announced: config.announced,
            peak_bytes: peaks(&totals),
            staying_bytes: Gauge::STAYING
                .map(|gauge| (gauge.name(), totals.numbers.peak(gauge)))
                .into(),
            compression: Compression::of(&totals.most_away),
            counts: counts.collect(),
            fault_latency: FaultLatency::of(totals.numbers.latency()),
            room_waits: FaultLatency::of(totals.numbers.waits()),
            stayed: stayed(&totals.numbers),
            processes: Processes {
                started: totals.started,
                managed: totals.attached,
                without_slot: totals.without_slot,
                going_on,
            },
            not_managed: notes(NoteKind::NotManaged),
            warnings: notes(NoteKind::Warning),
        }
    }

    /// Returns it as JSON, with a line's end.
    pub(crate) fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self);
        // Numbers, texts and lists of them always have a form in JSON.
        text.map_or_else(|error| format!("{{\"error\": \"{error}\"}}\n"), |text| text + "\n")
    }

    fn count(&self, counter: Counter) -> u64 {
        self.counts.get(counter.name()).copied().unwrap_or(0)
    }

    fn peak(&self, gauge: Gauge) -> Bytes {
        Bytes(self.peak_bytes.get(gauge.name()).copied().unwrap_or(0))
    }
}

/// The most there was of each gauge, of what would have been at home without a budget, and of what
/// was at home once the tree was warm.
fn peaks(totals: &Totals) -> BTreeMap<&'static str, u64> {
    let gauges = Gauge::ALL.iter().filter(|gauge| !Gauge::STAYING.contains(gauge));
    let gauges = gauges.map(|&gauge| (gauge.name(), totals.numbers.peak(gauge)));
    gauges.chain([("needed", totals.demand_peak), ("warm", totals.warm_peak)]).collect()
}

fn stayed(numbers: &Numbers) -> Vec<Reason> {
    let mut reasons: Vec<Reason> =
        numbers.stays().map(|(reason, count)| Reason { reason, count }).collect();
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.count));
    reasons
}

impl Compression {
    fn of(most_away: &Stock) -> Compression {
        let Stock { away, stored, zero, same_filled, incompressible, .. } = *most_away;
        Compression {
            away_bytes: away,
            stored_bytes: stored,
            zero_bytes: zero,
            same_filled_bytes: same_filled,
            incompressible_bytes: incompressible,
            ratio: (stored > 0).then(|| away as f64 / stored as f64),
        }
    }

    /// Says what some of it was.
    fn parts(&self) -> String {
        let parts = [
            (self.zero_bytes, "zeroes"),
            (self.same_filled_bytes, "one word repeated"),
            (self.incompressible_bytes, "incompressible"),
        ];
        let some = parts.iter().filter(|(bytes, _)| *bytes > 0);
        let words: Vec<String> =
            some.map(|(bytes, what)| format!("{} {what}", Bytes(*bytes))).collect();
        match words.is_empty() {
            true => String::new(),
            false => format!("; of this {}", words.join(", ")),
        }
    }
}

impl FaultLatency {
    fn of(latency: &Latency) -> FaultLatency {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let percentiles = PERCENTILES.iter().filter_map(|&(name, per_cent)| {
            Some((name, nanoseconds(latency.percentile(per_cent)?)))
        });
        let buckets = latency.buckets();
        let used = |count: &u64| *count > 0;
        let first = buckets.iter().position(used).unwrap_or(0);
        let end = buckets.iter().rposition(used).map_or(0, |last| last + 1);
        let bucket = |place: usize| Bucket { below_ns: 2 << place, count: buckets[place] };
        FaultLatency {
            count: latency.count(),
            percentiles_ns: percentiles.collect(),
            histogram: (first..end).map(bucket).collect(),
        }
    }

    /// Returns the percentiles in words.
    fn percentiles(&self) -> String {
        let percentiles: Vec<String> = PERCENTILES
            .iter()
            .filter_map(|(name, _)| Some((name, self.percentiles_ns.get(name)?)))
            .map(|(name, &nanoseconds)| format!("{name} < {}", Nanoseconds(nanoseconds)))
            .collect();
        percentiles.join(", ")
    }
}

/// Writes a line of the report, with its subject in a column of its own.
macro_rules! line {
    ($f:expr, $subject:expr, $($words:tt)*) => {
        writeln!($f, "  {:<12} {}", $subject, format_args!($($words)*))
    };
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.program.first().map_or("", String::as_str);
        writeln!(f, "uhmm: {name}: {} after {:.1} s", self.ended, self.seconds)?;
        if self.processes.managed > 0 {
            self.write_memory(f)?;
            self.write_pages(f)?;
            self.write_latency(f)?;
            self.write_waits(f)?;
        } else {
            line!(f, "budget", "{}", Bytes(self.budget_bytes))?;
        }
        self.write_processes(f)
    }
}

impl Report {
    fn write_memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { device, compression, .. } = self;
        let named = |name| self.peak_bytes.get(name).copied().unwrap_or(0);
        line!(
            f,
            "budget",
            "{}; at home at most {}{}; without a budget {}",
            Bytes(self.budget_bytes),
            self.peak(Gauge::Resident),
            match named("warm") {
                0 => String::new(),
                warm => format!(", once warm {}", Bytes(warm)),
            },
            Bytes(named("needed"))
        )?;
        let over = self.peak(Gauge::Resident).0.saturating_sub(self.budget_bytes);
        if over > self.budget_bytes / TOLERANCE {
            line!(f, "over budget", "by {} at most; what stayed is below", Bytes(over))?;
        }
        let verified = match self.count(Counter::PagesVerified) {
            0 if self.verify => "; nothing had to be verified".to_owned(),
            0 => String::new(),
            pages => format!("; {} pages verified", Grouped(pages)),
        };
        let (away, stored) = (Bytes(compression.away_bytes), Bytes(compression.stored_bytes));
        let ratio = compression.ratio.map_or(String::new(), |ratio| format!(" ({ratio:.1} : 1)"));
        let parts = compression.parts();
        line!(
            f,
            "device",
            "{device}: at most {away} away, kept in {stored}{ratio}{parts}{verified}"
        )?;
        match self.peak(Gauge::Agent) {
            Bytes(0) => {}
            agent => line!(f, "agent", "at most {agent}, in all processes")?,
        }
        self.write_staying(f)
    }

    /// Writes what is in no budget, and why.
    fn write_staying(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [
            (Gauge::Files, "of files"),
            (Gauge::Shared, "shared with others"),
            (Gauge::NotWritable, "not to be written"),
            (Gauge::Special, "of special kinds"),
            (Gauge::Reserved, "that serving a fault may need"),
            (Gauge::TooSmall, "of processes that are too small"),
            (Gauge::Locked, "locked by the program (and in the budget)"),
        ];
        let most = words.map(|(gauge, words)| {
            (self.staying_bytes.get(gauge.name()).copied().unwrap_or(0), words)
        });
        let some: Vec<String> = most
            .iter()
            .filter(|(bytes, _)| *bytes > 0)
            .map(|(bytes, words)| format!("{} {words}", Bytes(*bytes)))
            .collect();
        match some.is_empty() {
            true => Ok(()),
            false => line!(f, "unmanaged", "at most {}", some.join(", ")),
        }
    }

    fn write_pages(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let some = |words: &[(Counter, &str)]| -> Vec<String> {
            let counted = words.iter().map(|&(counter, words)| (self.count(counter), words));
            let counted = counted.filter(|(count, _)| *count > 0);
            counted.map(|(count, words)| format!("{} {words}", Grouped(count))).collect()
        };
        let out = Grouped(self.count(Counter::PagesOut));
        let home = Grouped(self.count(Counter::PagesHome));
        let soon = match self.count(Counter::SecondChances) {
            0 => String::new(),
            soon => format!(" ({} soon after)", Grouped(soon)),
        };
        line!(f, "pages", "{out} moved out, {home} brought home{soon}")?;
        let changes = some(&[
            (Counter::Unmapped, "unmapped"),
            (Counter::Discarded, "discarded"),
            (Counter::Remapped, "moved"),
            (Counter::Replaced, "replaced"),
        ]);
        if !changes.is_empty() {
            line!(f, "invalidated", "{} while away", changes.join(", "))?;
        }
        let announced = some(&[(Counter::Announced, "calls, before they were made")]);
        announced.iter().try_for_each(|words| line!(f, "announced", "{words}"))?;
        let forks = some(&[
            (Counter::ForkOverrun, "pages came home for forks, whatever the budget"),
            (Counter::UnforeseenForks, "children were made by raw system calls"),
        ]);
        forks.iter().try_for_each(|words| line!(f, "fork", "{words}"))?;
        let refused =
            some(&[(Counter::FaultsRefused, "accesses failed: their pages did not come")]);
        refused.iter().try_for_each(|words| line!(f, "FAILED", "{words}"))?;
        self.stayed.iter().try_for_each(|Reason { reason, count }| {
            line!(f, "stayed", "{} pages: {reason}", Grouped(*count))
        })
    }

    fn write_waits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.room_waits.count == 0 {
            return Ok(());
        }
        let (count, waits) = (Grouped(self.room_waits.count), self.room_waits.percentiles());
        line!(f, "waits", "{count} for room: {waits}")?;
        match self.count(Counter::WentOver) {
            0 => Ok(()),
            over => line!(f, "", "{} of them in vain: the program went on without", Grouped(over)),
        }
    }

    fn write_latency(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FaultLatency { count, histogram, .. } = &self.fault_latency;
        if *count == 0 {
            return line!(f, "faults", "{}", Grouped(self.count(Counter::Faults)));
        }
        line!(f, "faults", "{}: {}", Grouped(*count), self.fault_latency.percentiles())?;
        let most = histogram.iter().map(|bucket| bucket.count).max().unwrap_or(1).max(1);
        for Bucket { below_ns, count } in histogram {
            // At least a mark for whatever there is.
            let marks = (count * 40).div_ceil(most);
            let bar = "#".repeat(usize::try_from(marks).unwrap_or(40));
            let (below, count) = (Nanoseconds(*below_ns).to_string(), Grouped(*count).to_string());
            let row = format!("< {below:>7} {count:>11} {bar}");
            line!(f, "", "{}", row.trim_end())?;
        }
        Ok(())
    }

    fn write_processes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Processes { started, managed, without_slot, going_on } = self.processes;
        let all = started + without_slot;
        let rest = all.saturating_sub(managed);
        let noted: u64 = self.not_managed.iter().map(|reason| reason.count).sum();
        let small = match rest.saturating_sub(noted) {
            0 => String::new(),
            small => format!("; {} had too little memory to be worth it", Grouped(small)),
        };
        line!(f, "processes", "{} managed of {}{small}", Grouped(managed), Grouped(all))?;
        if going_on > 0 {
            line!(f, "", "{going_on} go on; what they do from now on is in no report")?;
        }
        for Reason { reason, count } in &self.not_managed {
            line!(f, "not managed", "{}: {reason}", Grouped(*count))?;
        }
        self.warnings.iter().try_for_each(|Reason { reason, count }| {
            line!(f, "warning", "{reason} ({count} times)")
        })
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status, self.signal) {
            (_, Some(signal)) => match signal_hook::low_level::signal_name(signal) {
                Some(name) => write!(f, "ended by {name}"),
                None => write!(f, "ended by signal {signal}"),
            },
            (status, None) => write!(f, "exit status {}", status.unwrap_or(0)),
        }
    }
}

/// A number with its thousands apart.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (place, digit) in digits.char_indices() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                f.write_str(",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

/// A time for people.
struct Nanoseconds(u64);

impl fmt::Display for Nanoseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            nanoseconds @ ..10_000 => write!(f, "{nanoseconds} ns"),
            nanoseconds @ ..10_000_000 => write!(f, "{} us", nanoseconds / 1000),
            nanoseconds @ ..10_000_000_000 => write!(f, "{} ms", nanoseconds / 1_000_000),
            nanoseconds => write!(f, "{} s", nanoseconds / 1_000_000_000),
        }
    }
}

#[cfg(test)]
mod tests;
