//! Telemetry: the only module that uses the metrics macros.
//!
//! [`names`] lists every metric with its meaning. [`events`] has one function per event, which updates the metrics and, where an
//! operator should know, writes the log line; `handles` keeps the series that every request updates at hand. [`recorder`] installs the Prometheus recorder, runs its upkeep and renders it;
//! `series` forgets the series of former models and configs. [`logs`] sets up the log, whose lines [`log_queue`] hands to the
//! thread that writes them.

pub mod events;
mod handles;
pub mod log_queue;
pub mod logs;
pub mod names;
pub mod recorder;
mod series;
