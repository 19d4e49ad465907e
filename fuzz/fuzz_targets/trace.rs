//! Bytes as a trace: what was read is written so that it is read again, and a trace that ends anywhere keeps its whole lines.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::fuzz_target;
use midemb::pipeline::item_trace::{TraceError, TracedRequest, read};
use midemb_fuzz::{scratch::Scratch, with_peak};
use std::sync::LazyLock;

static FOLDER: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.write("trace.jsonl", data);
    let (requests, peak) = with_peak(|| read(&path, usize::MAX));
    assert!(peak <= (1 << 16) + 100 * data.len(), "{peak} bytes for a trace of {}", data.len());
    let Ok(requests) = requests else { return };
    assert!(!requests.is_empty());
    assert_eq!(read(&path, 1).unwrap(), requests[..1]);

    let mut lines = Vec::new();
    for request in &requests {
        serde_json::to_writer(&mut lines, request).unwrap();
        lines.push(b'\n');
    }
    assert_eq!(read(&FOLDER.write("again.jsonl", &lines), usize::MAX).unwrap(), requests);
    // The end of a trace is where a killed process left it.
    let end = lines.len() - 1 - data.len() % lines.len().min(64);
    check_cut(&lines[..end], &requests);
});

fn check_cut(lines: &[u8], requests: &[TracedRequest]) {
    let n_ended = lines.iter().filter(|byte| **byte == b'\n').count();
    match read(&FOLDER.write("cut.jsonl", lines), usize::MAX) {
        // A last line that lacks only its end is whole.
        Ok(kept) => assert!(kept.len() >= n_ended.max(1) && requests.starts_with(&kept)),
        Err(error) => assert!(n_ended == 0 && matches!(error, TraceError::Empty { .. }), "{error}"),
    }
}
