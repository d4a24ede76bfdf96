//! Half and a quarter of the memory that a program takes: `uhmm`, and the kernel with zram.

use std::path::Path;

use crate::limits::Limits;
use crate::measure::{self, Failure, Taken};
use crate::rounds::{compare, median};
use crate::workload::Workload;

/// What part of the program's peak there is, in percent.
const PARTS: [u64; 2] = [50, 25];

/// How often a program is run again that the kernel has ended with zram.
const MOST_KILLED: u32 = 5;

/// The bytes of a MiB.
const MIB: f64 = (1 << 20) as f64;

/// What one side took in each round.
#[derive(Debug, Default)]
struct Side {
    wall: Vec<f64>,
    processor: Vec<f64>,
    peak: Vec<f64>,
    /// Of `uhmm`: the most at home, by its report.
    home: Vec<f64>,
}

impl Side {
    fn add(&mut self, taken: &Taken) {
        self.wall.push(taken.wall);
        self.processor.push(taken.processor);
        self.peak.push(taken.peak as f64);
    }
}

/// What was measured of a program with a part of its memory.
#[derive(Debug)]
struct Row<'a> {
    workload: &'a Workload,
    part: u64,
    limit: u64,
    /// How often it had to be run again, since it was killed with zram.
    killed: u32,
    alone: Side,
    zram: Side,
    uhmm: Side,
}

/// Measures, and prints the tables.
///
/// # Errors
///
/// What is missing, or has failed.
pub(crate) fn run(workloads: &[&Workload], rounds: usize) -> Result<(), String> {
    let mut limits = Limits::make()?;
    let measured = measure_all(&mut limits, workloads, rounds);
    limits.take_away()?;
    let rows = measured?;
    print_time(&rows, rounds);
    print_memory(&rows);
    Ok(())
}

fn measure_all<'a>(
    limits: &mut Limits,
    workloads: &[&'a Workload],
    rounds: usize,
) -> Result<Vec<Row<'a>>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let mut rows = Vec::new();
    for workload in workloads {
        // The first run has the files in the page cache afterwards, which is charged to it.
        measure::run(&workload.program, Some(&limits.group(None)?))?;
        let expected = measure::run(&workload.program, Some(&limits.group(None)?))?;
        let mut own: Vec<Row<'_>> = PARTS
            .map(|part| Row {
                workload,
                part,
                limit: expected.peak * part / 100,
                killed: 0,
                alone: Side::default(),
                zram: Side::default(),
                uhmm: Side::default(),
            })
            .into();
        for round in 0..rounds {
            eprintln!("programs: {}, round {} of {rounds}", workload.name, round + 1);
            for row in &mut own {
                row.measure(limits, &folder.path().join("report"), round, &expected.output)?;
            }
        }
        rows.extend(own);
    }
    Ok(rows)
}

impl Row<'_> {
    /// Has each side take its turn. Each round begins with another side.
    fn measure(
        &mut self,
        limits: &mut Limits,
        report: &Path,
        round: usize,
        expected: &[u8],
    ) -> Result<(), String> {
        let program = &self.workload.program;
        for side in (0..3).map(|index| (index + round) % 3) {
            let taken = match side {
                0 => measure::run(program, Some(&limits.group(None)?))?,
                1 => match self.run_with_zram(limits)? {
                    Some(taken) => taken,
                    None => continue,
                },
                _ => {
                    let program = measure::under_uhmm(program, &self.limit.to_string(), report);
                    measure::run(&program, Some(&limits.group(None)?))?
                }
            };
            if taken.output != expected {
                return Err(format!("{}: wrote something else", self.workload.name));
            }
            [&mut self.alone, &mut self.zram, &mut self.uhmm][side].add(&taken);
            if side == 2 {
                self.uhmm.home.push(at_home(report)?);
            }
        }
        Ok(())
    }
}

impl Row<'_> {
    /// Runs the program with a limit, again where the kernel has ended it for want of memory: it does
    /// so now and then although there is swap. `None` if it always does.
    fn run_with_zram(&mut self, limits: &mut Limits) -> Result<Option<Taken>, String> {
        while self.killed < MOST_KILLED {
            let group = limits.group(Some(self.limit))?;
            match measure::run(&self.workload.program, Some(&group)) {
                Ok(taken) => return Ok(Some(taken)),
                Err(Failure::Killed) => self.killed += 1,
                Err(Failure::Other(message)) => return Err(message),
            }
        }
        Ok(None)
    }
}

/// Returns the most that was at home, in bytes, by the report.
fn at_home(report: &Path) -> Result<f64, String> {
    let text = std::fs::read_to_string(report).map_err(|error| error.to_string())?;
    let report: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| error.to_string())?;
    report["peak_bytes"]["resident"].as_f64().ok_or_else(|| "the report lacks its peak".to_owned())
}

fn print_time(rows: &[Row<'_>], rounds: usize) {
    println!("\n### Time, of {rounds} rounds\n");
    println!(
        "| program | access | memory | alone, s | zram, s | `uhmm`, s | ratio to zram | 95 % | goal \
         | reached | processor time, ratio to zram |"
    );
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- | ---: |");
    for row in rows {
        let Row { workload, part, alone, zram, uhmm, .. } = row;
        let (name, access, goal) = (workload.name, workload.access.name(), workload.access.goal());
        let (alone, own) = (median(&alone.wall), median(&uhmm.wall));
        print!("| {name} | {access} | {part} % | {alone:.2} | ");
        if zram.wall.is_empty() {
            println!("killed | {own:.2} | | | {goal} | | |");
            continue;
        }
        let (ratio, (from, to)) = compare(&uhmm.wall, &zram.wall);
        let (processor, _) = compare(&uhmm.processor, &zram.processor);
        let (beside, reached) = (median(&zram.wall), if ratio <= goal { "yes" } else { "no" });
        println!(
            "{beside:.2} | {own:.2} | {ratio:.2} | {from:.2} to {to:.2} | {goal} | {reached} \
             | {processor:.2} |"
        );
    }
}

fn print_memory(rows: &[Row<'_>]) {
    println!("\n### Memory, the most at a time, in MiB\n");
    println!(
        "| program | limit | alone | zram: all | `uhmm`: all | ratio | `uhmm`: at home, of what it \
         manages |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for row in rows {
        let of = |values: &[f64]| median(values) / MIB;
        let (limit, alone, uhmm) =
            (row.limit as f64 / MIB, of(&row.alone.peak), of(&row.uhmm.peak));
        let (zram, ratio) = match row.zram.peak.is_empty() {
            true => ("killed".into(), String::new()),
            false => {
                let zram = of(&row.zram.peak);
                (format!("{zram:.0}"), format!("{:.2}", uhmm / zram))
            }
        };
        println!(
            "| {}, {} % | {limit:.0} | {alone:.0} | {zram} | {uhmm:.0} | {ratio} | {:.0} |",
            row.workload.name,
            row.part,
            of(&row.uhmm.home),
        );
    }
    for row in rows.iter().filter(|row| row.killed > 0) {
        let Row { workload, part, killed, .. } = row;
        println!(
            "\nWith zram the kernel has killed \"{}\" at {part} % {killed} times for want of memory.",
            workload.name
        );
    }
}
