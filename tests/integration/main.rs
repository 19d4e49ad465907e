//! Everything that is tested from outside: the real binary, over real sockets on ports of its own, on the fixture bundle
//! and on the shipped one. One binary, so that it links once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, reason = "a test that cannot go on says so")]

mod admin_guard;
mod architecture;
mod bad_input;
mod caching;
mod commands;
mod deadlines;
mod documentation;
mod draining;
mod golden;
mod harness;
mod lifecycle;
mod prometheus;
mod python_client;
mod refused_pushes;
mod refused_starts;
mod restarts;
mod rust_client;
mod stores;
