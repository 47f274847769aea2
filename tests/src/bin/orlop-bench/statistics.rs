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

/// The median of all rounds' ratios and the interval that 95 % of the medians of its resamples lie in. A resample takes rounds at
/// random, and of each as many of its ratios: what a round's ratios have in common is one observation. Seeded: the same rounds
/// give the same interval.
pub fn bootstrap(rounds: &[Vec<f64>]) -> Ratio {
    let mut random = StdRng::seed_from_u64(1);
    let mut resample = Vec::new();
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            resample.clear();
            for _ in rounds {
                let round = &rounds[random.random_range(0..rounds.len())];
                resample.extend(round.iter().map(|_| round[random.random_range(0..round.len())]));
            }
            median(&resample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    Ratio {
        median: median(&rounds.concat()),
        low: medians[RESAMPLES * 25 / 1000],
        high: medians[RESAMPLES * 975 / 1000],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_the_median_and_narrows() {
        let rounds = |count: u32| -> Vec<Vec<f64>> {
            let round = |index: u32| {
                (0..10).map(move |pair| 0.9 + 0.2 * f64::from(pair * count + index) / f64::from(10 * count))
            };
            (0..count).map(|index| round(index).collect()).collect()
        };
        let (few, many) = (bootstrap(&rounds(4)), bootstrap(&rounds(100)));
        assert!(few.low <= few.median && few.median <= few.high);
        assert!(many.high - many.low < few.high - few.low);
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn what_a_round_has_in_common_widens_the_interval() {
        // Ten pairs a round, each pair narrow around its round's own ratio, against the same ratios dealt to the rounds at random.
        let own = |round: u32| 0.95 + 0.01 * f64::from(round);
        let alike: Vec<Vec<f64>> = (0..10).map(|round| vec![own(round); 10]).collect();
        let dealt: Vec<Vec<f64>> = (0..10).map(|_| (0..10).map(own).collect()).collect();
        let (alike, dealt) = (bootstrap(&alike), bootstrap(&dealt));
        assert!(alike.high - alike.low > dealt.high - dealt.low);
    }
}
