//! The wall clock's steps. Waits and grace periods are kept as times of the wall clock, as containers' ends are; when that
//! is set, they move along, so that they last as long as they should.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

/// Less is the ordinary pace of a clock that is being adjusted.
const LEAST: SignedDuration = SignedDuration::from_secs(1);

/// Compares the wall clock with one that nobody sets.
#[derive(Debug)]
pub struct Clock {
    wall: Timestamp,
    steady: Instant,
}

impl Clock {
    /// Begins with these readings of both.
    pub fn new(wall: Timestamp, steady: Instant) -> Self {
        Self { wall, steady }
    }

    /// By how much the wall clock was set since the last call; zero when it was not.
    pub fn step(&mut self, wall: Timestamp, steady: Instant) -> SignedDuration {
        let passed: Duration = steady.saturating_duration_since(self.steady);
        let passed = SignedDuration::try_from(passed).unwrap_or(SignedDuration::MAX);
        let step = wall.duration_since(self.wall).saturating_sub(passed);
        *self = Self { wall, steady };
        if step.abs() < LEAST { SignedDuration::ZERO } else { step }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_steps_are_told_forward_and_backward() {
        let (wall, steady) = (Timestamp::from_second(1_000_000).unwrap(), Instant::now());
        let mut clock = Clock::new(wall, steady);
        let at = |seconds: i64| wall + SignedDuration::from_secs(seconds);
        let after = |seconds: u64| steady + Duration::from_secs(seconds);
        assert_eq!(clock.step(at(10), after(10)), SignedDuration::ZERO);
        assert_eq!(clock.step(at(7210), after(10)), SignedDuration::from_hours(2));
        assert_eq!(clock.step(at(7211), after(11)), SignedDuration::ZERO);
        assert_eq!(clock.step(at(-79_188), after(12)), SignedDuration::from_hours(-24));
    }
}
