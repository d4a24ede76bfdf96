//! Curves, as numbers and as a picture.

use std::fmt::Write as _;
use std::path::Path;

/// Several curves over the same axis, both axes logarithmic.
pub(crate) struct Plot {
    /// The name of the files.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) across: &'static str,
    pub(crate) up: &'static str,
    pub(crate) curves: Vec<Curve>,
}

pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

const SIZE: (f64, f64) = (720.0, 420.0);
/// Left, right, above and below.
const MARGINS: [f64; 4] = [60.0, 190.0, 34.0, 44.0];
const COLOURS: [&str; 8] =
    ["#1b6ca8", "#c0392b", "#1e8449", "#7d3c98", "#b9770e", "#117a65", "#5d6d7e", "#ca6f9e"];

impl Plot {
    /// Prints the numbers, a line for each point of a curve.
    pub(crate) fn csv(&self) -> String {
        let mut text = format!("curve,{},{}\n", self.across, self.up);
        for curve in &self.curves {
            for (x, y) in &curve.points {
                writeln!(text, "\"{}\",{x},{y:.4}", curve.name).expect("a string takes all");
            }
        }
        text
    }

    /// Writes both files.
    pub(crate) fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).expect("the folder can be made");
        let file = |ending| folder.join(format!("{}.{ending}", self.name));
        std::fs::write(file("csv"), self.csv()).expect("the folder takes files");
        std::fs::write(file("svg"), self.svg()).expect("the folder takes files");
    }

    fn svg(&self) -> String {
        let points = || self.curves.iter().flat_map(|curve| curve.points.iter());
        let (across, up) = (Axis::of(points().map(|p| p.0)), Axis::of(points().map(|p| p.1)));
        let [left, right, above, below] = MARGINS;
        let place = |(x, y): (f64, f64)| {
            let width = SIZE.0 - left - right;
            let height = SIZE.1 - above - below;
            (left + across.part(x) * width, above + (1.0 - up.part(y)) * height)
        };
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            SIZE.0, SIZE.1
        );
        let mut text = |at: (f64, f64), anchor: &str, colour: &str, words: &str| {
            writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}\
                 </text>",
                at.0, at.1
            )
            .expect("a string takes all");
        };
        text((left, 20.0), "start", "black", self.title);
        text((SIZE.0 - right, SIZE.1 - 8.0), "end", "black", self.across);
        text((8.0, above - 2.0), "start", "black", self.up);
        for mark in across.marks() {
            let (x, _) = place((mark, up.low));
            text((x, SIZE.1 - below + 16.0), "middle", "#444", &short(mark));
        }
        for mark in up.marks() {
            let (_, y) = place((across.low, mark));
            text((left - 6.0, y + 4.0), "end", "#444", &short(mark));
        }
        let mut labels: Vec<(f64, usize)> = (self.curves.iter().enumerate())
            .filter_map(|(index, curve)| Some((place(*curve.points.last()?).1, index)))
            .collect();
        labels.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut lowest = f64::MIN;
        for (y, index) in labels {
            lowest = y.max(lowest + 14.0);
            let at = (SIZE.0 - right + 6.0, lowest + 4.0);
            text(at, "start", COLOURS[index % COLOURS.len()], &self.curves[index].name);
        }
        for mark in across.marks() {
            line(&mut svg, "#ddd", &[place((mark, up.low)), place((mark, up.high))]);
        }
        for mark in up.marks() {
            line(&mut svg, "#ddd", &[place((across.low, mark)), place((across.high, mark))]);
        }
        for (index, curve) in self.curves.iter().enumerate() {
            let points: Vec<_> = curve.points.iter().map(|&point| place(point)).collect();
            line(&mut svg, COLOURS[index % COLOURS.len()], &points);
        }
        svg + "</svg>\n"
    }
}

fn line(svg: &mut String, colour: &str, points: &[(f64, f64)]) {
    let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let points = points.join(" ");
    writeln!(svg, "<polyline fill=\"none\" stroke=\"{colour}\" points=\"{points}\"/>")
        .expect("a string takes all");
}

/// A logarithmic axis, from a power of ten to another.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = values
            .fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
        let low = 10_f64.powf(low.log10().floor());
        Axis { low, high: 10_f64.powf(high.log10().ceil()).max(low * 10.0) }
    }

    fn part(&self, value: f64) -> f64 {
        (value / self.low).log10() / (self.high / self.low).log10()
    }

    fn marks(&self) -> Vec<f64> {
        let first = self.low.log10().round() as i32;
        let last = self.high.log10().round() as i32;
        (first..=last).map(|power| 10_f64.powi(power)).collect()
    }
}

fn short(mark: f64) -> String {
    match mark {
        mark if mark >= 1e6 => format!("{}M", mark / 1e6),
        mark if mark >= 1e3 => format!("{}k", mark / 1e3),
        mark => format!("{mark}"),
    }
}
