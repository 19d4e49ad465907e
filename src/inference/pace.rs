//! How long work takes, measured on the work itself.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// A moving average over recent samples. If two threads race, one of their samples is lost, which does no harm.
#[derive(Debug, Default)]
pub struct Pace(AtomicU64);

/// A new sample contributes one part in this many to the average.
const SAMPLES: u64 = 16;

impl Pace {
    /// Adds a sample.
    pub fn record(&self, took: Duration) {
        let (old, took) = (self.0.load(Ordering::Relaxed), took.as_nanos() as u64);
        let new = if old == 0 { took } else { old - old / SAMPLES + took / SAMPLES };
        self.0.store(new, Ordering::Relaxed);
    }

    /// The average; zero before the first sample.
    pub fn average(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sample_is_the_average_and_a_new_one_counts_for_a_sixteenth() {
        let pace = Pace::default();
        assert_eq!(pace.average(), Duration::ZERO);
        pace.record(Duration::from_millis(16));
        assert_eq!(pace.average(), Duration::from_millis(16));
        pace.record(Duration::from_millis(32));
        assert_eq!(pace.average(), Duration::from_millis(17));
    }
}
