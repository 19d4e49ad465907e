//! Traces of the items that requests ask for, for sizing the caches. They hold item ids and text digests, never text, and no
//! user ids.
//!
//! A trace is a file of JSON lines, one per request, in the order in which requests were resolved:
//!
//! ```json
//! {"at_ms":1764000000000,"history":[["tt0111161","6b8b…32 hex digits"]],"candidates":[["tt0068646",null]]}
//! ```
//!
//! `at_ms` is Unix time. An item is a pair of its id and the digest of its text; the digest is `null` if the text was unknown or
//! refused.
//! [`Recorder`] writes on a thread of its own and never delays a request: requests that the writer cannot keep up with are
//! left out and counted. The trace ends when the file reaches its size limit or a write fails.

use crate::{
    domain::{Item, KnownItem, RowStatus, TextDigest},
    telemetry::events,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{SystemTime, UNIX_EPOCH},
};
use thiserror::Error;

/// One line of a trace: the items of one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedRequest {
    /// Unix time in milliseconds.
    pub at_ms: u64,
    /// Oldest first.
    pub history: Vec<TracedItem>,
    /// In the request's order.
    pub candidates: Vec<TracedItem>,
}

/// An item's id, and its text's digest in hex if the text was known.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TracedItem(pub String, pub Option<String>);

/// Why a trace cannot be written or read.
#[derive(Debug, Error)]
pub enum TraceError {
    /// The file cannot be created, opened or read.
    #[error("trace {}: {source}", path.display())]
    #[expect(missing_docs, reason = "the fields are named in the message")]
    File { path: PathBuf, source: io::Error },
    /// A line is not a traced request. Lines are counted from 1.
    #[error("trace {} line {line}: {source}", path.display())]
    #[expect(missing_docs, reason = "the fields are named in the message")]
    Line { path: PathBuf, line: usize, source: serde_json::Error },
    /// The file contains no requests.
    #[error("trace {} contains no requests", path.display())]
    #[expect(missing_docs, reason = "the field is named in the message")]
    Empty { path: PathBuf },
}

/// Requests that may wait to be written.
const MAX_WAITING: usize = 256;
/// What they may occupy together. An id has any length that fits into a message, so their number is no bound.
const MAX_WAITING_BYTES: usize = 32 << 20;

enum Message {
    Request { at_ms: u64, history: ItemsToTrace, candidates: ItemsToTrace },
    End,
}

/// The bytes of the requests that wait.
#[derive(Debug, Clone, Default)]
struct WaitingBytes(Arc<AtomicUsize>);

impl WaitingBytes {
    /// Adds a request of `n_bytes`, unless there is no room for it.
    fn try_add(&self, n_bytes: usize) -> bool {
        let add = |waiting: usize| waiting.checked_add(n_bytes).filter(|sum| *sum <= MAX_WAITING_BYTES);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
    }

    fn remove(&self, n_bytes: usize) {
        self.0.fetch_sub(n_bytes, Ordering::Relaxed);
    }
}

/// Writes a trace on a thread of its own.
#[derive(Debug)]
pub struct Recorder {
    queue: SyncSender<Message>,
    waiting_bytes: WaitingBytes,
    has_ended: Arc<AtomicBool>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Recorder {
    /// Starts a new trace of at most `max_bytes`. Fails if the file exists: a trace is never overwritten.
    pub fn start(path: &Path, max_bytes: u64) -> Result<Self, TraceError> {
        let failed = |source| TraceError::File { path: path.to_path_buf(), source };
        // A trace is a record of what people did, so only its owner may read it.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        let (queue, waiting) = sync_channel(MAX_WAITING);
        let path = path.to_path_buf();
        let has_ended = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&has_ended);
        let waiting_bytes = WaitingBytes::default();
        let bytes = waiting_bytes.clone();
        let write = move || {
            let written = write_all(&waiting, &bytes, &file, max_bytes);
            ended.store(true, Ordering::Relaxed);
            match written {
                Ok(n_requests) => tracing::info!(path = %path.display(), n_requests, "trace ended"),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "trace ended: the file cannot be written")
                }
            }
        };
        let writer = thread::Builder::new().name("trace".to_owned()).spawn(write).map_err(failed)?;
        Ok(Recorder { queue, waiting_bytes, has_ended, writer: Mutex::new(Some(writer)) })
    }

    /// Whether the trace has ended, so that requests are no longer recorded.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// Records one request, or counts it as left out if the writer is behind.
    pub fn record(&self, history: ItemsToTrace, candidates: ItemsToTrace) {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_ms = since_epoch.as_millis() as u64;
        let n_bytes = history.n_bytes() + candidates.n_bytes();
        if !self.waiting_bytes.try_add(n_bytes) {
            events::trace_left_out();
            return;
        }
        match self.queue.try_send(Message::Request { at_ms, history, candidates }) {
            Ok(()) => events::trace_recorded(),
            Err(TrySendError::Full(_)) => {
                self.waiting_bytes.remove(n_bytes);
                events::trace_left_out();
            }
            // The writer has logged why it ended.
            Err(TrySendError::Disconnected(_)) => {}
        }
    }

    /// Writes the requests that wait, and ends the trace. Blocks until the file is written.
    pub fn finish(&self) {
        // An error means that the writer has already ended.
        let _ = self.queue.send(Message::End);
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            drop(writer.join());
        }
    }
}

/// The items of one request, to be recorded in a trace.
#[derive(Debug)]
pub struct ItemsToTrace(Vec<ItemToTrace>);

#[derive(Debug)]
struct ItemToTrace {
    id: String,
    digest: Option<TextDigest>,
}

impl ItemsToTrace {
    /// Copies the items' ids, before resolving takes the items.
    pub fn from_ids(items: &[Item<'_>]) -> Self {
        ItemsToTrace(items.iter().map(|item| ItemToTrace { id: item.id.to_owned(), digest: None }).collect())
    }

    /// Adds the text digests of the resolved items, one entry per item in the same order.
    pub fn with_digests(mut self, resolved: &[Result<KnownItem, RowStatus>]) -> Self {
        for (item, resolved) in self.0.iter_mut().zip(resolved) {
            item.digest = resolved.as_ref().ok().map(|known| known.digest);
        }
        self
    }

    /// What they occupy.
    fn n_bytes(&self) -> usize {
        self.0.iter().map(|item| size_of::<ItemToTrace>() + item.id.len()).sum()
    }

    fn into_traced(self) -> Vec<TracedItem> {
        let traced = |item: ItemToTrace| TracedItem(item.id, item.digest.map(|digest| digest.to_string()));
        self.0.into_iter().map(traced).collect()
    }
}

/// Returns the number of requests written.
fn write_all(
    waiting: &Receiver<Message>,
    waiting_bytes: &WaitingBytes,
    file: &File,
    max_bytes: u64,
) -> io::Result<u64> {
    let mut writer = BufWriter::new(file);
    let (mut n_requests, mut n_bytes) = (0, 0);
    let mut line = Vec::new();
    loop {
        // Flushed when no request waits, so that a reader finds whole lines while traffic pauses.
        let next = match waiting.try_recv() {
            Ok(next) => Some(next),
            Err(_) => {
                writer.flush()?;
                waiting.recv().ok()
            }
        };
        let Some(Message::Request { at_ms, history, candidates }) = next else { break };
        waiting_bytes.remove(history.n_bytes() + candidates.n_bytes());
        let request = TracedRequest { at_ms, history: history.into_traced(), candidates: candidates.into_traced() };
        line.clear();
        serde_json::to_writer(&mut line, &request)?;
        line.push(b'\n');
        n_bytes += line.len() as u64;
        if n_bytes > max_bytes {
            tracing::warn!(max_bytes, "the trace has reached its size limit");
            break;
        }
        writer.write_all(&line)?;
        n_requests += 1;
    }
    writer.flush()?;
    Ok(n_requests)
}

/// Reads the first `max_requests` requests of a trace; a trace without any is an error. A last line that is cut off, as a
/// killed process leaves it, is ignored.
pub fn read(path: &Path, max_requests: usize) -> Result<Vec<TracedRequest>, TraceError> {
    let failed = |source| TraceError::File { path: path.to_path_buf(), source };
    let mut lines = BufReader::new(File::open(path).map_err(failed)?);
    // Bytes, because a line may be cut off in the middle of a character.
    let (mut requests, mut line) = (Vec::new(), Vec::new());
    while requests.len() < max_requests && lines.read_until(b'\n', &mut line).map_err(failed)? > 0 {
        match serde_json::from_slice(&line) {
            Ok(request) => requests.push(request),
            Err(_) if !line.ends_with(b"\n") => break,
            Err(source) => {
                return Err(TraceError::Line { path: path.to_path_buf(), line: requests.len() + 1, source });
            }
        }
        line.clear();
    }
    if requests.is_empty() {
        return Err(TraceError::Empty { path: path.to_path_buf() });
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::known_items::KnownItems,
        domain::{ItemText, Priority},
    };
    use std::os::unix::fs::PermissionsExt;

    fn resolve(known: &KnownItems, items: Vec<Item<'_>>) -> ItemsToTrace {
        let to_trace = ItemsToTrace::from_ids(&items);
        to_trace.with_digests(&known.resolve(items, Priority::Request))
    }

    fn item<'a>(id: &'a str, title: Option<&str>) -> Item<'a> {
        Item { id, text: title.map(|title| Ok(ItemText::titled(title))) }
    }

    #[test]
    fn recorded_requests_are_read_back_without_their_texts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        let known = KnownItems::new(1 << 20, 100);
        let recorder = Recorder::start(&path, 1 << 20).unwrap();
        recorder.record(resolve(&known, vec![item("a", Some("Secret"))]), resolve(&known, vec![item("b", None)]));
        recorder.record(resolve(&known, vec![]), resolve(&known, vec![item("a", None)]));
        recorder.finish();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "others can read what people did");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("Secret"), "{text}");
        let requests = read(&path, usize::MAX).unwrap();
        assert_eq!(requests.len(), 2);
        let [TracedItem(a, Some(digest))] = requests[0].history.as_slice() else { panic!("{requests:?}") };
        assert_eq!((a.as_str(), digest.len()), ("a", 32));
        assert_eq!(requests[0].candidates, [TracedItem("b".to_owned(), None)]);
        assert_eq!(requests[1].candidates, [TracedItem("a".to_owned(), Some(digest.clone()))]);
        assert!(requests[0].at_ms > 1_700_000_000_000 && requests[1].at_ms >= requests[0].at_ms);
        assert_eq!(read(&path, 1).unwrap().len(), 1);
        assert!(matches!(Recorder::start(&path, 1), Err(TraceError::File { .. })), "a trace was overwritten");
    }

    #[test]
    fn a_full_trace_ends_with_a_whole_line_and_delays_no_request() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        let recorder = Recorder::start(&path, 300).unwrap();
        let known = KnownItems::new(1 << 20, 100);
        for _ in 0..1000 {
            recorder.record(resolve(&known, vec![]), resolve(&known, vec![item("a", None)]));
        }
        recorder.finish();
        recorder.finish();
        let n_requests = read(&path, usize::MAX).unwrap().len();
        assert!((1..10).contains(&n_requests), "{n_requests} requests in 300 bytes");
        assert!(std::fs::metadata(&path).unwrap().len() <= 300);
    }

    /// The queue was bounded in requests alone, and 256 of them could have 16 MB of ids each.
    #[test]
    fn requests_that_wait_have_a_bound_in_bytes() {
        let (queue, waiting) = sync_channel(MAX_WAITING);
        let (waiting_bytes, has_ended) = (WaitingBytes::default(), Arc::default());
        let recorder = Recorder { queue, waiting_bytes: waiting_bytes.clone(), has_ended, writer: Mutex::new(None) };
        let ids = |n_bytes: usize| ItemsToTrace::from_ids(&[item(&"i".repeat(n_bytes), None)]);
        for _ in 0..100 {
            recorder.record(ids(MAX_WAITING_BYTES / 8), ids(MAX_WAITING_BYTES / 8));
        }
        recorder.record(ids(1), ids(1));
        let file = tempfile::NamedTempFile::new().unwrap();
        drop(recorder);
        assert_eq!(write_all(&waiting, &waiting_bytes, file.as_file(), u64::MAX).unwrap(), 4);
        assert!(waiting_bytes.try_add(MAX_WAITING_BYTES), "bytes of written requests still count");
    }

    #[test]
    fn a_file_that_is_not_a_trace_is_refused_with_the_line_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        assert!(read(&path, 1).unwrap_err().to_string().contains("trace.jsonl"));
        std::fs::write(&path, "").unwrap();
        assert!(matches!(read(&path, 1), Err(TraceError::Empty { .. })));
        std::fs::write(&path, "{\"at_ms\":1,\"history\":[],\"candidates\":[]}\nuserId,movieId\n").unwrap();
        let error = read(&path, 9).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        std::fs::write(&path, "{\"at_ms\":1,\"history\":[],\"candidates\":[]}\n{\"at_ms\":2,\"hist").unwrap();
        assert_eq!(read(&path, 9).unwrap().len(), 1, "a cut-off line made the rest unreadable");
    }

    /// A trace that ended in the middle of a character was refused as a whole. Found by the fuzz target `trace`.
    #[test]
    fn a_trace_may_be_cut_off_at_any_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        let id = TracedItem("\u{e9}\u{1f3ac}".to_owned(), None);
        let whole = TracedRequest { at_ms: 1, history: vec![id.clone()], candidates: vec![id] };
        let line = format!("{}\n", serde_json::to_string(&whole).unwrap());
        for n_bytes in 0..line.len() - 1 {
            std::fs::write(&path, [line.as_bytes(), &line.as_bytes()[..n_bytes]].concat()).unwrap();
            assert_eq!(read(&path, 9).unwrap(), std::slice::from_ref(&whole), "{n_bytes} bytes of the second line");
        }
        std::fs::write(&path, [line.as_bytes(), b"\xff\n"].concat()).unwrap();
        assert!(read(&path, 9).unwrap_err().to_string().contains("line 2"), "bytes that are not UTF-8 have no line");
    }
}
