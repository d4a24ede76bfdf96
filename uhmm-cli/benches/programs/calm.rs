//! What `uhmm` costs a program that never reaches its budget.

use crate::measure;
use crate::rounds::{compare, median};
use crate::workload::Workload;

/// A budget that nobody reaches.
const BUDGET: &str = "100%";

/// How much longer a program may take.
const GOAL: f64 = 1.03;

/// Measures pairs, and prints a table.
///
/// # Errors
///
/// What has failed.
pub(crate) fn run(workloads: &[&Workload], pairs: usize) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let report = folder.path().join("report");
    let mut lines = Vec::new();
    for workload in workloads {
        eprintln!("programs: {}, {pairs} pairs", workload.name);
        let expected = measure::run(&workload.program, None)?;
        let sides =
            [workload.program.clone(), measure::under_uhmm(&workload.program, BUDGET, &report)];
        let (mut wall, mut processor) = ([vec![], vec![]], [vec![], vec![]]);
        for pair in 0..pairs {
            for side in [pair % 2, 1 - pair % 2] {
                let taken = measure::run(&sides[side], None)?;
                if taken.output != expected.output {
                    return Err(format!("{}: wrote something else", workload.name));
                }
                wall[side].push(taken.wall);
                processor[side].push(taken.processor);
            }
        }
        for (what, [alone, uhmm]) in [("time", wall), ("processor time", processor)] {
            let (ratio, (from, to)) = compare(&uhmm, &alone);
            let (alone, uhmm) = (median(&alone), median(&uhmm));
            let reached = if ratio <= GOAL { "yes" } else { "no" };
            lines.push(format!(
                "| {}, {what} | {alone:.2} | {uhmm:.2} | {ratio:.3} | {from:.3} to {to:.3} | {GOAL} | \
                 {reached} |",
                workload.name
            ));
        }
    }
    println!("\n### Without pressure, of {pairs} pairs\n");
    println!("| program | alone, s | `uhmm`, s | ratio | 95 % | goal | reached |");
    println!("| --- | ---: | ---: | ---: | --- | ---: | --- |");
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}
