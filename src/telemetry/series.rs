//! The series of the metrics, by the model or config that they are of, so that those of former ones can be forgotten.
//!
//! The labels of most metrics come from closed sets. But every push may bring a new digest, version or name, and the exporter
//! keeps every series for ever. So the series of each model and each config are kept in a recorder of their own, which is
//! dropped once that model or config is neither in force nor what a rollback would restore.

use super::names::{Kind, METRICS};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, SharedString, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusRecorder};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

/// The labels that say of which model or config a series is.
const OWNER_LABELS: [&str; 3] = ["model", "name", "digest"];

/// A model or a config, by the values of its labels in one metric.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Owner(String);

impl Owner {
    /// The owner of series with these values of [`OWNER_LABELS`], in the order of the metric's labels; none if all are empty.
    pub(super) fn new<'a>(values: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let values: Vec<&str> = values.into_iter().filter(|value| !value.is_empty()).collect();
        (!values.is_empty()).then(|| Owner(values.join("\0")))
    }

    fn of(key: &Key) -> Option<Self> {
        let is_owner = |label: &&metrics::Label| OWNER_LABELS.contains(&label.key());
        Owner::new(key.labels().filter(is_owner).map(metrics::Label::value))
    }
}

/// Keeps all series.
#[derive(Debug)]
pub(super) struct Series {
    /// Those that are of no model and no config.
    common: PrometheusRecorder,
    owned: RwLock<HashMap<Owner, PrometheusRecorder>>,
}

impl Series {
    pub(super) fn new() -> Result<Self, BuildError> {
        Ok(Series { common: new_recorder()?, owned: RwLock::default() })
    }

    /// Forgets the series of all models and configs but these.
    pub(super) fn forget_all_but(&self, kept: &HashSet<Owner>) {
        self.owned.write().unwrap_or_else(PoisonError::into_inner).retain(|owner, _| kept.contains(owner));
    }

    /// All series in the text format of Prometheus, which wants those of one metric together.
    pub(super) fn render(&self) -> String {
        let mut metrics: BTreeMap<String, Rendered> = BTreeMap::new();
        add_rendered(&mut metrics, &self.common.handle().render());
        for recorder in self.owned().values() {
            add_rendered(&mut metrics, &recorder.handle().render());
        }
        metrics.into_values().map(|metric| format!("{}{}\n", metric.head, metric.samples)).collect()
    }

    /// Drains the histograms, which keep their samples until then.
    pub(super) fn run_upkeep(&self) {
        self.common.handle().run_upkeep();
        for recorder in self.owned().values() {
            recorder.handle().run_upkeep();
        }
    }

    fn owned(&self) -> RwLockReadGuard<'_, HashMap<Owner, PrometheusRecorder>> {
        self.owned.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn register<T>(&self, key: &Key, register: impl Fn(&PrometheusRecorder) -> T) -> T {
        let Some(owner) = Owner::of(key) else { return register(&self.common) };
        if let Some(recorder) = self.owned().get(&owner) {
            return register(recorder);
        }
        // The same recorder was built at the start, so it cannot fail here.
        let Ok(new) = new_recorder() else { return register(&self.common) };
        let mut owned = self.owned.write().unwrap_or_else(PoisonError::into_inner);
        register(owned.entry(owner).or_insert(new))
    }
}

impl metrics::Recorder for Series {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, description: SharedString) {
        self.common.describe_counter(name, unit, description);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, description: SharedString) {
        self.common.describe_gauge(name, unit, description);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, description: SharedString) {
        self.common.describe_histogram(name, unit, description);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.register(key, |recorder| recorder.register_counter(key, metadata))
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.register(key, |recorder| recorder.register_gauge(key, metadata))
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        self.register(key, |recorder| recorder.register_histogram(key, metadata))
    }
}

/// A recorder that knows the buckets and descriptions of all our metrics.
fn new_recorder() -> Result<PrometheusRecorder, BuildError> {
    use metrics::Recorder;
    let mut builder = PrometheusBuilder::new();
    for metric in METRICS {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)?;
        }
    }
    let recorder = builder.build_recorder();
    for metric in METRICS {
        let (name, help) = (KeyName::from_const_str(metric.name), SharedString::const_str(metric.help));
        match metric.kind {
            Kind::Counter => recorder.describe_counter(name, None, help),
            Kind::Gauge => recorder.describe_gauge(name, None, help),
            Kind::Histogram(_) => recorder.describe_histogram(name, None, help),
        }
    }
    Ok(recorder)
}

/// One metric as text.
#[derive(Default)]
struct Rendered {
    /// The lines `# HELP` and `# TYPE`.
    head: String,
    samples: String,
}

/// Adds the metrics in `text`, which one recorder rendered.
fn add_rendered(metrics: &mut BTreeMap<String, Rendered>, text: &str) {
    for block in text.split("\n\n").map(str::trim).filter(|block| !block.is_empty()) {
        let is_head = |line: &&str| line.starts_with('#');
        let head: String = block.lines().take_while(is_head).map(|line| format!("{line}\n")).collect();
        let name = head.split(' ').nth(2).unwrap_or_default().to_owned();
        let metric = metrics.entry(name).or_default();
        metric.head = head;
        for line in block.lines().skip_while(is_head) {
            metric.samples += line;
            metric.samples.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{events, names};
    use std::time::Duration;

    fn call(series: &Series, name: &str) {
        let model = crate::domain::ModelRef { name: name.to_owned(), version: "1".to_owned(), digest: "d".repeat(64) };
        metrics::with_local_recorder(series, || {
            events::request_finished("GetMidEmb", "OK", Some(&model), Duration::ZERO)
        });
    }

    fn owners(names: &[&str]) -> HashSet<Owner> {
        names.iter().filter_map(|name| Owner::new([*name, &"d".repeat(12)])).collect()
    }

    #[test]
    fn series_of_former_models_are_forgotten_and_those_of_no_model_never() {
        let series = Series::new().unwrap();
        metrics::with_local_recorder(&series, || {
            events::request_finished("GetMidEmb", "NOT_FOUND", None, Duration::ZERO)
        });
        call(&series, "kept");
        call(&series, "former");
        let has = |text: &str, label: &str| {
            text.lines().any(|line| line.starts_with(names::REQUESTS) && line.contains(label))
        };
        let all = series.render();
        assert!(["model=\"kept\"", "model=\"former\"", "NOT_FOUND"].iter().all(|label| has(&all, label)), "{all}");
        series.forget_all_but(&owners(&["kept"]));
        let rest = series.render();
        assert!(has(&rest, "model=\"kept\"") && has(&rest, "NOT_FOUND"), "{rest}");
        assert!(!rest.contains("former"), "{rest}");
    }

    /// Parsers refuse a metric that is described twice, or whose series do not stand together.
    #[test]
    fn the_series_of_one_metric_stand_together_under_one_description() {
        let series = Series::new().unwrap();
        for name in ["a", "b", "c"] {
            call(&series, name);
        }
        let text = series.render();
        for metric in [names::REQUESTS, names::REQUEST_DURATION] {
            assert_eq!(text.matches(&format!("# TYPE {metric} ")).count(), 1, "{text}");
            assert_eq!(text.matches(&format!("# HELP {metric} ")).count(), 1, "{text}");
            let block = text.split("\n\n").find(|block| block.contains(&format!("# TYPE {metric} "))).unwrap();
            assert!(["\"a\"", "\"b\"", "\"c\""].iter().all(|name| block.contains(name)), "{block}");
        }
    }
}
