//! Telemetry: the only place that knows the metrics macros.
//!
//! [`names`] lists every metric with its meaning; [`events`] has one function for each thing that happens, which emits
//! the metric and, where a person should read of it, the log line; [`recorder`] installs the Prometheus recorder, keeps it
//! up and renders it; [`logs`] sets up the log format.

pub mod events;
pub mod logs;
pub mod names;
pub mod recorder;
