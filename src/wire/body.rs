//! The bodies of requests: one message in one piece, or a stream of messages that is forwarded.
//!
//! Whatever goes wrong here is the caller's doing and gets a status that says so: a caller that resets its call is CANCELLED, a
//! message that is cut off, missing or one too many is INVALID_ARGUMENT.

use super::{
    budget::{Budget, Share},
    drain_began,
};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use prost::bytes::{Buf, BufMut, BytesMut};
use std::{
    collections::VecDeque,
    error::Error,
    future::pending,
    mem,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, body::Body, codegen::Bytes};

/// A message's flag and its length, four bytes, go ahead of it.
const PREFIX: usize = 5;
/// What a call costs while its message is arriving, besides the message.
const CALL_BYTES: u64 = 4096;
/// Room for uploads is counted in units of this many bytes.
pub const UPLOAD_UNIT: usize = 1024;

/// The units of an upload of `n_bytes`.
pub fn upload_units(n_bytes: usize) -> usize {
    n_bytes.div_ceil(UPLOAD_UNIT)
}

/// Why a body was refused.
#[derive(Debug)]
pub(super) enum Refused {
    /// There is no room for it.
    Shed,
    /// The caller did something wrong, or left.
    Fault(Status),
}

/// The bounds of a call's one message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    pub(super) max_bytes: usize,
    pub(super) budget: &'a Arc<Budget>,
    pub(super) share: &'a Arc<Share>,
}

impl Message<'_> {
    /// Reads a body to its end and returns it with the prefix of its message. Holds the message's size of the budget until then.
    ///
    /// A body that arrives in one frame, as those of hot requests do, is not copied.
    pub(super) async fn read<B>(self, mut body: B) -> Result<Bytes, Refused>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let mut held = self.budget.take(self.share, CALL_BYTES).ok_or(Refused::Shed)?;
        let mut first = Bytes::new();
        let mut all = BytesMut::new();
        let mut n_expected = None;
        while let Some(data) = next_data(&mut body).await.map_err(Refused::Fault)? {
            if all.is_empty() && first.is_empty() {
                first = data;
            } else {
                all.put(mem::take(&mut first));
                all.put(data);
            }
            let received = if all.is_empty() { &first[..] } else { &all[..] };
            if n_expected.is_none() && received.len() >= PREFIX {
                let n_bytes = message_bytes(received, self.max_bytes).map_err(Refused::Fault)?;
                if !held.grow(n_bytes as u64) {
                    return Err(Refused::Shed);
                }
                if received.len() < PREFIX + n_bytes {
                    all.reserve(PREFIX + n_bytes - all.len());
                }
                n_expected = Some(PREFIX + n_bytes);
            }
            if n_expected.is_some_and(|n| received_bytes(&first, &all) > n) {
                return Err(Refused::Fault(Status::invalid_argument("request: more than one message was sent")));
            }
        }
        match (n_expected, received_bytes(&first, &all)) {
            (None, 0) => Err(Refused::Fault(Status::invalid_argument("request: no message was sent"))),
            (Some(expected), n) if n == expected => Ok(if all.is_empty() { first } else { all.freeze() }),
            _ => Err(Refused::Fault(cut_off())),
        }
    }
}

fn received_bytes(first: &Bytes, all: &BytesMut) -> usize {
    first.len() + all.len()
}

/// The length of the message behind a prefix.
fn message_bytes(mut prefix: &[u8], max: usize) -> Result<usize, Status> {
    match prefix.get_u8() {
        0 => {}
        1 => {
            let text = "compressed messages are not accepted: send them with grpc-encoding identity";
            return Err(Status::unimplemented(text));
        }
        flag => return Err(Status::invalid_argument(format!("request: {flag} is not a compression flag, use 0"))),
    }
    let n_bytes = prefix.get_u32() as usize;
    if n_bytes > max {
        let text = format!("the message has {n_bytes} bytes, at most {max} are allowed");
        return Err(Status::out_of_range(text));
    }
    Ok(n_bytes)
}

/// The next data of a body; none at its end.
async fn next_data<B>(body: &mut B) -> Result<Option<Bytes>, Status>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Ok(frame)) => {
                // Trailers, which are not data, mean nothing to a server.
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(error)) => {
                let error: Box<dyn Error + Send + Sync> = error.into();
                tracing::debug!(%error, "a caller ended its call while its message was arriving");
                return Err(Status::cancelled("the caller ended the call"));
            }
        }
    }
}

fn cut_off() -> Status {
    Status::invalid_argument("request: the message is cut off")
}

/// The rules of a stream of messages.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) max_bytes: usize,
    /// How long one message may take to arrive.
    pub(super) read: Duration,
    pub(super) deadline: Option<Instant>,
    /// The room for messages that have begun to arrive and are not processed yet.
    pub(super) room: Arc<Semaphore>,
    pub(super) draining: watch::Receiver<bool>,
}

/// The room that the messages of a stream take, oldest first. The handler takes one for each message that it gets, and drops it when
/// the message is processed.
#[derive(Debug, Clone, Default)]
pub struct HeldRoom(Arc<Mutex<VecDeque<OwnedSemaphorePermit>>>);

impl HeldRoom {
    /// The room of the oldest message that was not asked for yet.
    pub fn take(&self) -> Option<OwnedSemaphorePermit> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn put(&self, room: OwnedSemaphorePermit) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(room);
    }
}

type Frames = mpsc::Sender<Result<Frame<Bytes>, Status>>;

impl Upload {
    /// A body that yields what `body` yields, but ends with an error at the deadline, when a drain begins, or when a message does
    /// not arrive. It is read only while there is room for what it brings.
    pub(super) fn forward<B>(self, body: B) -> (Body, HeldRoom)
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>> + Send,
    {
        let (frames, forwarded) = mpsc::channel(1);
        let held = HeldRoom::default();
        tokio::spawn(self.run(body, frames, held.clone()));
        (Body::new(StreamBody::new(ReceiverStream::new(forwarded))), held)
    }

    async fn run<B>(mut self, body: B, frames: Frames, held: HeldRoom)
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let mut draining = self.draining.clone();
        let deadline = self.deadline;
        let ended = tokio::select! {
            ended = self.forward_all(body, &frames, &held) => ended,
            () = at(deadline) => Err(Status::deadline_exceeded("deadline exceeded before the stream ended")),
            () = drain_began(&mut draining) => Err(Status::unavailable("not serving: draining")),
            () = frames.closed() => Ok(()),
        };
        if let Err(status) = ended {
            // Fails if the handler has ended.
            let _ = frames.send(Err(status)).await;
        }
    }

    async fn forward_all<B>(&mut self, mut body: B, frames: &Frames, held: &HeldRoom) -> Result<(), Status>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let mut progress = Progress::default();
        let mut began = Instant::now();
        loop {
            let next = if progress.is_between_messages() {
                next_data(&mut body).await?
            } else {
                let data = tokio::time::timeout_at((began + self.read).into(), next_data(&mut body)).await;
                data.map_err(|_elapsed| self.too_slow())??
            };
            let Some(data) = next else { return if progress.is_between_messages() { Ok(()) } else { Err(cut_off()) } };
            if progress.is_between_messages() {
                began = Instant::now();
            }
            for n_bytes in progress.advance(&data, self.max_bytes)? {
                let units = upload_units(n_bytes) as u32;
                if let Ok(room) = Arc::clone(&self.room).acquire_many_owned(units).await {
                    held.put(room);
                }
                // Waiting for room is not the caller's doing.
                began = Instant::now();
            }
            if frames.send(Ok(Frame::data(data))).await.is_err() {
                return Ok(());
            }
        }
    }

    fn too_slow(&self) -> Status {
        let n_ms = self.read.as_millis();
        Status::deadline_exceeded(format!("a message did not arrive within {n_ms} ms (limits.read_ms)"))
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => pending().await,
    }
}

/// How far a stream of messages has come.
#[derive(Debug, Default)]
struct Progress {
    /// The part of the next prefix that has arrived.
    prefix: Vec<u8>,
    /// The bytes of the current message that have not arrived.
    n_missing: usize,
}

impl Progress {
    fn is_between_messages(&self) -> bool {
        self.prefix.is_empty() && self.n_missing == 0
    }

    /// Goes on by `data` and returns the lengths of the messages that begin in it.
    fn advance(&mut self, mut data: &[u8], max_bytes: usize) -> Result<Vec<usize>, Status> {
        let mut begun = Vec::new();
        while !data.is_empty() {
            if self.n_missing > 0 {
                let n = self.n_missing.min(data.len());
                data.advance(n);
                self.n_missing -= n;
                continue;
            }
            let n = (PREFIX - self.prefix.len()).min(data.len());
            self.prefix.extend_from_slice(&data[..n]);
            data.advance(n);
            if self.prefix.len() == PREFIX {
                self.n_missing = message_bytes(&self.prefix, max_bytes)?;
                begun.push(self.n_missing);
                self.prefix.clear();
            }
        }
        Ok(begun)
    }
}
