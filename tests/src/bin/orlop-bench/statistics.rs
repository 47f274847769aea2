//! Ratios from paired slices, and how sure they are.

use rand::{Rng, SeedableRng, rngs::StdRng};

/// A ratio with its bootstrap interval.
#[derive(Debug, Clone, Copy)]
pub struct Ratio {
    /// The median of the pairs' ratios.
    pub median: f64,
    /// Lower end of the 95 % interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

const RESAMPLES: usize = 2000;

/// The middle of a list; 0 for an empty one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[length / 2],
        length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
    }
}

/// The median of ratios and the interval that 95 % of the medians of its resamples lie in. Seeded: the same pairs give the
/// same interval.
pub fn bootstrap(ratios: &[f64]) -> Ratio {
    let mut random = StdRng::seed_from_u64(1);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let resample: Vec<f64> = ratios
                .iter()
                .map(|_| ratios[random.random_range(0..ratios.len())])
                .collect();
            median(&resample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    Ratio {
        median: median(ratios),
        low: medians[RESAMPLES * 25 / 1000],
        high: medians[RESAMPLES * 975 / 1000],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_the_median_and_narrows() {
        let few: Vec<f64> = (0..10).map(|index| 0.9 + 0.02 * f64::from(index)).collect();
        let many: Vec<f64> = (0..1000).map(|index| 0.9 + 0.0002 * f64::from(index)).collect();
        let (few, many) = (bootstrap(&few), bootstrap(&many));
        assert!(few.low <= few.median && few.median <= few.high);
        assert!(many.high - many.low < few.high - few.low);
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
    }
}
