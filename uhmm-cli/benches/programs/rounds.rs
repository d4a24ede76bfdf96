//! Medians, and how sure one can be of them.

/// Returns the median.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Returns what a side took beside another: the median of the one divided by that of the other, and
/// an interval of 95 percent for the median of the rounds' ratios. That holds whatever the
/// distribution: the count of values below the median is binomial.
pub(crate) fn compare(subject: &[f64], beside: &[f64]) -> (f64, (f64, f64)) {
    let mut ratios: Vec<f64> = subject.iter().zip(beside).map(|(a, b)| a / b).collect();
    ratios.sort_by(f64::total_cmp);
    let count = ratios.len() as f64;
    let aside = 0.98 * count.sqrt();
    let low = (count / 2.0 - aside).floor().max(0.0) as usize;
    let high = ((count / 2.0 + aside).ceil() as usize).min(ratios.len() - 1);
    (median(subject) / median(beside), (ratios[low], ratios[high]))
}
