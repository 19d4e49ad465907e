//! Tests from outside: they run the real binary on free ports, with the fixture bundle or the shipped one, and talk to it
//! over sockets. They are one test binary, so that there is one to link.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, reason = "a failed step has to fail its test")]

mod actions;
mod admin_guard;
mod allocations;
mod architecture;
mod bad_input;
mod batch_dependence;
mod bundle_files;
mod caching;
mod commands;
mod deadlines;
mod documentation;
mod draining;
mod golden;
mod harness;
mod hostile_peers;
mod lifecycle;
mod log_readers;
mod onnx;
mod order;
mod process_environment;
mod prometheus;
mod python_client;
mod refused_pushes;
mod refused_starts;
mod restarts;
mod rust_client;
mod served_features;
mod stores;
