//! Handles of series that every request updates.
//!
//! Looking a series up by its labels costs more than updating it, so each thread keeps the handles that it has used. This is only
//! for labels from closed sets: a kept handle would outlive the series of a former model.

use super::recorder;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use std::{cell::RefCell, thread::LocalKey};

/// A metric with at most two labels. All values come from the program's text, so addresses are compared, not characters.
#[derive(Debug, Clone, Copy)]
struct SeriesKey {
    metric: &'static str,
    values: [&'static str; 2],
}

impl SeriesKey {
    fn is(&self, other: &SeriesKey) -> bool {
        std::ptr::eq(self.metric, other.metric)
            && std::ptr::eq(self.values[0], other.values[0])
            && std::ptr::eq(self.values[1], other.values[1])
    }
}

type Handles<T> = RefCell<Vec<(SeriesKey, T)>>;

thread_local! {
    static COUNTERS: Handles<Counter> = const { RefCell::new(Vec::new()) };
    static GAUGES: Handles<Gauge> = const { RefCell::new(Vec::new()) };
    static HISTOGRAMS: Handles<Histogram> = const { RefCell::new(Vec::new()) };
}

/// Increments a counter with two labels.
pub(super) fn increment(metric: &'static str, labels: [(&'static str, &'static str); 2], n: u64) {
    let [(first, first_value), (second, second_value)] = labels;
    let series = SeriesKey { metric, values: [first_value, second_value] };
    let look_up = || counter!(metric, first => first_value, second => second_value);
    update(&COUNTERS, series, look_up, |counter| counter.increment(n));
}

/// Adds to a gauge with one label.
pub(super) fn add(metric: &'static str, (label, value): (&'static str, &'static str), n: f64) {
    let series = SeriesKey { metric, values: [value, ""] };
    update(&GAUGES, series, || gauge!(metric, label => value), |gauge| gauge.increment(n));
}

/// Records a value in a histogram with one label.
pub(super) fn record(metric: &'static str, (label, value): (&'static str, &'static str), recorded: f64) {
    let series = SeriesKey { metric, values: [value, ""] };
    update(&HISTOGRAMS, series, || histogram!(metric, label => value), |histogram| histogram.record(recorded));
}

fn update<T>(handles: &'static LocalKey<Handles<T>>, series: SeriesKey, look_up: impl Fn() -> T, update: impl Fn(&T)) {
    // Without a recorder a look-up gives a handle that does nothing, and one may still be installed.
    if !recorder::is_installed() {
        return update(&look_up());
    }
    let updated = handles.try_with(|handles| {
        let mut handles = handles.borrow_mut();
        let known = handles.iter().position(|(known, _)| known.is(&series));
        let i = known.unwrap_or_else(|| {
            handles.push((series, look_up()));
            handles.len() - 1
        });
        update(&handles[i].1);
    });
    // A thread that ends has no handles any more.
    if updated.is_err() {
        update(&look_up());
    }
}
