//! Traces that a server recorded: which items requests asked for, as ids and text digests.
//!
//! A trace has one JSON object per line, with `history` and `candidates` as lists of `[id, digest]`; a digest is `null` where
//! the server did not know the item's text. `midemb serve --record-trace` writes it.

use anyhow::{Context, bail};
use serde::Deserialize;
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

/// One line of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct TracedRequest {
    /// Oldest first.
    pub(crate) history: Vec<TracedItem>,
    /// In the request's order.
    pub(crate) candidates: Vec<TracedItem>,
}

/// An item's id and its text's digest in hex, where the text was known.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct TracedItem(pub(crate) String, pub(crate) Option<String>);

/// The first `max_requests` requests of a trace, at least one, each with a candidate. A last line that was cut off, as a killed
/// server leaves it, is ignored.
pub(crate) fn read(path: &Path, max_requests: usize) -> anyhow::Result<Vec<TracedRequest>> {
    let name = || format!("trace {}", path.display());
    let mut lines = BufReader::new(File::open(path).with_context(name)?);
    // Bytes, because a line may be cut off in the middle of a character.
    let (mut requests, mut line) = (Vec::new(), Vec::new());
    while requests.len() < max_requests && lines.read_until(b'\n', &mut line).with_context(name)? > 0 {
        let n_line = requests.len() + 1;
        match serde_json::from_slice::<TracedRequest>(&line) {
            Ok(request) if request.candidates.is_empty() => bail!("{} line {n_line} has no candidates", name()),
            Ok(request) => requests.push(request),
            Err(_) if !line.ends_with(b"\n") => break,
            Err(error) => return Err(error).with_context(|| format!("{} line {n_line}", name())),
        }
        line.clear();
    }
    if requests.is_empty() {
        bail!("{} holds no requests", name());
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "{\"at_ms\":1,\"history\":[[\"a\",\"6b8b\"]],\"candidates\":[[\"b\",null]]}\n";

    fn read_text(text: impl AsRef<[u8]>, max_requests: usize) -> anyhow::Result<Vec<TracedRequest>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path(), max_requests)
    }

    #[test]
    fn requests_are_read_up_to_the_bound_and_to_a_line_that_was_cut_off() {
        let requests = read_text(format!("{LINE}{LINE}{{\"at_ms\":2,\"hist"), 9).unwrap();
        let item = |id: &str, digest: Option<&str>| TracedItem(id.to_owned(), digest.map(str::to_owned));
        let expected = TracedRequest { history: vec![item("a", Some("6b8b"))], candidates: vec![item("b", None)] };
        assert_eq!(requests, [expected.clone(), expected]);
        assert_eq!(read_text(LINE.repeat(3), 2).unwrap().len(), 2);
    }

    /// The server's own reader had the same fault: a trace that ended in the middle of a character was refused as a whole.
    #[test]
    fn a_trace_may_be_cut_off_in_the_middle_of_a_character() {
        let cut = "{\"at_ms\":2,\"history\":[[\"\u{e9}".as_bytes();
        assert_eq!(read_text([LINE.as_bytes(), &cut[..cut.len() - 1]].concat(), 9).unwrap().len(), 1);
    }

    #[test]
    fn a_file_that_is_not_a_trace_is_refused_with_its_line() {
        let error = |text: &str| format!("{:#}", read_text(text, 9).unwrap_err());
        assert!(error("").contains("holds no requests"));
        assert!(error(&format!("{LINE}userId,movieId\n")).contains("line 2"));
        assert!(error("{\"history\":[],\"candidates\":[]}\n").contains("line 1 has no candidates"));
        assert!(read(Path::new("/nowhere"), 1).unwrap_err().to_string().contains("/nowhere"));
    }
}
