//! What the fuzz targets share: how much memory an input costs, files for readers that take a path, and a service that serves
//! the fixture bundle.

#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

pub mod scratch;
pub mod service;
pub mod vectors;

use peak_alloc::PeakAlloc;
use std::path::Path;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Runs `work`, and returns its result and the most bytes that it held at a time. Other threads' bytes count, too. Memory of
/// C++ libraries does not.
pub fn with_peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let result = work();
    (result, ALLOCATOR.peak_usage().saturating_sub(before))
}

/// The fixture bundle of the server's tests.
pub fn bundle() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/bundle"))
}
