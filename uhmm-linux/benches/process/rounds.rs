//! Taking turns, and what is made of the figures.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

/// How much is measured.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    /// How many rounds.
    pub(crate) rounds: usize,
    /// How many single operations of a kind a round has.
    pub(crate) samples: usize,
    /// Whether this is only to see that everything runs.
    pub(crate) quick: bool,
    /// Where the curves go.
    pub(crate) out: Option<PathBuf>,
    /// What the name of a load, or of a placement, has in it that is measured, if not all are.
    pub(crate) load: Option<String>,
}

impl Default for Effort {
    fn default() -> Effort {
        Effort { rounds: 41, samples: 128, quick: false, out: None, load: None }
    }
}

impl Effort {
    /// One round of little.
    pub(crate) fn quick() -> Effort {
        Effort { rounds: 1, samples: 4, quick: true, out: None, load: None }
    }

    /// Tells whether a load of this name is not wanted.
    pub(crate) fn leaves_out(&self, name: &str) -> bool {
        self.load.as_ref().is_some_and(|part| !name.contains(part.as_str()))
    }

    /// Returns how many rounds to make of something that takes so many times longer than others.
    pub(crate) fn rounds_of(&self, longer: usize) -> usize {
        if self.quick { 1 } else { (self.rounds / longer).max(5) }
    }
}

/// One of several things that take turns.
pub(crate) struct Side<'a> {
    name: String,
    run: Box<dyn FnMut() -> f64 + 'a>,
}

impl<'a> Side<'a> {
    /// `run` returns what one operation took in this round, in microseconds.
    pub(crate) fn new(name: impl Into<String>, run: impl FnMut() -> f64 + 'a) -> Side<'a> {
        Side { name: name.into(), run: Box::new(run) }
    }
}

/// What one side took, round by round.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) micros: Vec<f64>,
}

impl Series {
    pub(crate) fn median(&self) -> f64 {
        median(&mut self.micros.clone())
    }
}

/// Has all sides take turns for so many rounds. Each round begins with another side.
pub(crate) fn take_turns(rounds: usize, mut sides: Vec<Side<'_>>) -> Vec<Series> {
    let mut series: Vec<Series> = sides
        .iter()
        .map(|side| Series { name: side.name.clone(), micros: Vec::with_capacity(rounds) })
        .collect();
    let count = sides.len();
    // The first of each pays for what is only done once.
    sides.iter_mut().for_each(|side| _ = (side.run)());
    for round in 0..rounds {
        for index in (0..count).map(|index| (round + index) % count) {
            series[index].micros.push((sides[index].run)());
        }
    }
    series
}

/// What something took beside something else.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ratio {
    /// The one median divided by the other.
    pub(crate) of_medians: f64,
    /// An interval of 95 percent for the median of the rounds' ratios.
    pub(crate) interval: (f64, f64),
}

/// Compares a side with the best of several floors.
pub(crate) fn compare(subject: &Series, floors: &[&Series]) -> (Ratio, String) {
    let best = floors.iter().min_by(|a, b| a.median().total_cmp(&b.median()));
    let best = best.expect("there is a floor");
    let of_medians = subject.median() / best.median();
    let rounds = subject.micros.iter().zip(&best.micros);
    let mut ratios: Vec<f64> = rounds.map(|(subject, floor)| subject / floor).collect();
    ratios.sort_by(f64::total_cmp);
    (Ratio { of_medians, interval: interval(&ratios) }, best.name.clone())
}

/// Returns the interval that holds the median in 95 of 100 cases, whatever the distribution: the
/// count of values below the median is binomial.
fn interval(sorted: &[f64]) -> (f64, f64) {
    let count = sorted.len() as f64;
    let aside = 0.98 * count.sqrt();
    let low = (count / 2.0 - aside).floor().max(0.0) as usize;
    let high = (count / 2.0 + aside).ceil() as usize;
    (sorted[low], sorted[high.min(sorted.len() - 1)])
}

/// Returns the median.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    assert!(!values.is_empty(), "something was measured");
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Times something, in microseconds.
pub(crate) fn time<R>(run: impl FnOnce() -> R) -> (f64, R) {
    let start = Instant::now();
    let result = run();
    (start.elapsed().as_nanos() as f64 / 1000.0, result)
}

/// The name of the last table.
static TABLE: Mutex<String> = Mutex::new(String::new());

/// The tables so far, a line for each row, for programs to read.
static TABLES: Mutex<String> = Mutex::new(String::new());

/// Writes the tables so far to a file.
pub(crate) fn write_tables(folder: &Path) {
    let rows = TABLES.lock().expect("no panic");
    let text = format!("what,us,floor,floor us,ratio,from,to,goal,table\n{rows}");
    std::fs::create_dir_all(folder).expect("the folder can be made");
    std::fs::write(folder.join("tables.csv"), text).expect("the folder takes files");
}

/// Begins a table.
pub(crate) fn table(name: &str) {
    *TABLE.lock().expect("no panic") = name.to_owned();
    println!("\n### {name}\n");
    println!("| what | us | floor | us | ratio | 95 % | goal |");
    println!("| --- | ---: | --- | ---: | ---: | --- | ---: |");
}

/// Prints the row of a side beside its best floor.
pub(crate) fn row(subject: &Series, floors: &[&Series], goal: Option<f64>) {
    let (ratio, floor) = compare(subject, floors);
    let best = floors.iter().find(|series| series.name == floor).expect("it is one of them");
    let goal = goal.map_or(String::new(), |goal| format!("{goal}"));
    let (name, taken, least) = (&subject.name, subject.median(), best.median());
    let (of_medians, (from, to)) = (ratio.of_medians, ratio.interval);
    println!(
        "| {name} | {taken:.3} | {floor} | {least:.3} | {of_medians:.2} | {from:.2} to {to:.2} | \
         {goal} |"
    );
    let of = TABLE.lock().expect("no panic");
    let row = format!(
        "\"{name}\",{taken:.4},\"{floor}\",{least:.4},{of_medians:.3},{from:.3},{to:.3},{goal},\
         \"{of}\"\n"
    );
    TABLES.lock().expect("no panic").push_str(&row);
}
