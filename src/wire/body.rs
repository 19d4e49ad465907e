//! The bodies of requests: one message in one piece, or a stream of messages that is forwarded.
//!
//! Whatever goes wrong here is the caller's doing and gets a status that says so: a caller that resets its call is CANCELLED, a
//! message that is cut off, missing or one too many is INVALID_ARGUMENT.

use super::{
    budget::{Budget, Held, Share},
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
pub(super) const PREFIX: usize = 5;
/// What a call or a message of a stream costs besides its bytes.
pub(super) const CALL_BYTES: usize = 4096;
/// The least room that a message gets before it has arrived.
const FIRST_ROOM: usize = 64 << 10;
/// Room for uploads is counted in units of this many bytes.
const UPLOAD_UNIT: usize = 1024;

/// Room for streamed messages of `max_bytes` together, but for one of `max_message_bytes` at least.
pub(super) fn upload_room(max_bytes: usize, max_message_bytes: usize) -> Semaphore {
    Semaphore::new(upload_units(max_message_bytes).max(max_bytes.div_ceil(UPLOAD_UNIT)))
}

/// The units of a message of `n_bytes`.
fn upload_units(n_bytes: usize) -> usize {
    (n_bytes + CALL_BYTES).div_ceil(UPLOAD_UNIT)
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
    /// The bytes of the call's metadata, which stay in memory until the message has arrived.
    pub(super) metadata_bytes: usize,
    pub(super) budget: &'a Arc<Budget>,
    pub(super) share: &'a Arc<Share>,
}

impl Message<'_> {
    /// Reads a body to its end and returns it with the prefix of its message, and with what it holds of the budget.
    ///
    /// A body that arrives in one frame, as those of hot requests do, is not copied.
    pub(super) async fn read<B>(self, mut body: B) -> Result<(Bytes, Held), Refused>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let of_call = (CALL_BYTES + self.metadata_bytes) as u64;
        let mut held = self.budget.take(self.share, of_call).ok_or(Refused::Shed)?;
        let mut first = Bytes::new();
        let mut all = BytesMut::new();
        let mut n_expected = None;
        let mut room = 0;
        while let Some(data) = next_data(&mut body).await.map_err(Refused::Fault)? {
            if all.is_empty() && first.is_empty() {
                first = data;
            } else {
                all.put(mem::take(&mut first));
                all.put(data);
            }
            let received = if all.is_empty() { &first[..] } else { &all[..] };
            if n_expected.is_none() && received.len() >= PREFIX {
                n_expected = Some(PREFIX + message_bytes(received, self.max_bytes).map_err(Refused::Fault)?);
            }
            let Some(n_expected) = n_expected else { continue };
            let n_received = received.len();
            if n_received > n_expected {
                return Err(Refused::Fault(Status::invalid_argument("request: more than one message was sent")));
            }
            // Twice what has arrived: a peer that only claims to send much gets little.
            let n_wanted = (2 * n_received).max(FIRST_ROOM).min(n_expected);
            if n_wanted > room {
                if !held.grow((n_wanted - room) as u64) {
                    return Err(Refused::Shed);
                }
                room = n_wanted;
                if n_received < n_expected {
                    all.reserve(room - all.len());
                }
            }
        }
        match (n_expected, first.len() + all.len()) {
            (None, 0) => Err(Refused::Fault(Status::invalid_argument("request: no message was sent"))),
            (Some(expected), n) if n == expected => Ok((if all.is_empty() { first } else { all.freeze() }, held)),
            _ => Err(Refused::Fault(cut_off())),
        }
    }
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

/// How long a stream may send nothing between two messages. Whoever keeps one open keeps others from opening theirs.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// The rules of a stream of messages.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) max_bytes: usize,
    /// How long one message may take to arrive.
    pub(super) read: Duration,
    pub(super) deadline: Option<Instant>,
    /// The room for messages that have begun to arrive and are not processed yet. None if its handler processes each at once.
    pub(super) room: Option<Arc<Semaphore>>,
    /// The stream's place among those that may be open, if they are counted.
    #[expect(dead_code, reason = "held for its drop, never read")]
    pub(super) place: Option<OwnedSemaphorePermit>,
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
        // The time that the caller has taken for the message that is arriving, or for the pause before the next one.
        let mut taken = Duration::ZERO;
        loop {
            let is_pause = progress.is_between_messages();
            let patience = if is_pause { MAX_PAUSE } else { self.read };
            // Waiting for room or for the handler is not the caller's doing, and not counted.
            let waits_since = Instant::now();
            let next = tokio::time::timeout(patience.saturating_sub(taken), next_data(&mut body)).await;
            let next = next.map_err(|_elapsed| if is_pause { too_long_a_pause() } else { self.too_slow() })??;
            let Some(mut data) = next else { return if is_pause { Ok(()) } else { Err(cut_off()) } };
            taken = if is_pause { Duration::ZERO } else { taken + waits_since.elapsed() };
            while !data.is_empty() {
                let step = progress.step(&data, self.max_bytes)?;
                if let (Some(n_bytes), Some(room)) = (step.begun, &self.room) {
                    // What belongs to earlier messages was forwarded, so that their room can become free meanwhile.
                    let units = upload_units(n_bytes) as u32;
                    if let Ok(room) = Arc::clone(room).acquire_many_owned(units).await {
                        held.put(room);
                    }
                    taken = Duration::ZERO;
                }
                if frames.send(Ok(Frame::data(data.split_to(step.n)))).await.is_err() {
                    return Ok(());
                }
            }
            if progress.is_between_messages() {
                taken = Duration::ZERO;
            }
        }
    }

    fn too_slow(&self) -> Status {
        let n_ms = self.read.as_millis();
        Status::deadline_exceeded(format!("a message did not arrive within {n_ms} ms (limits.read_ms)"))
    }
}

fn too_long_a_pause() -> Status {
    let seconds = MAX_PAUSE.as_secs();
    Status::deadline_exceeded(format!("the stream sent nothing for {seconds} s: end it, and open another one later"))
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

    /// Goes on by the beginning of `data`: by the rest of a message, or by a prefix.
    fn step(&mut self, data: &[u8], max_bytes: usize) -> Result<Step, Status> {
        if self.n_missing > 0 {
            let n = self.n_missing.min(data.len());
            self.n_missing -= n;
            return Ok(Step { n, begun: None });
        }
        let n = (PREFIX - self.prefix.len()).min(data.len());
        self.prefix.extend_from_slice(&data[..n]);
        if self.prefix.len() < PREFIX {
            return Ok(Step { n, begun: None });
        }
        self.n_missing = message_bytes(&self.prefix, max_bytes)?;
        self.prefix.clear();
        Ok(Step { n, begun: Some(self.n_missing) })
    }
}

/// A part of a stream's data.
#[derive(Debug)]
struct Step {
    /// Its bytes.
    n: usize,
    /// The length of the message whose prefix it completes.
    begun: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{Full, StreamBody};
    use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};

    fn framed(n_bytes: usize) -> Vec<u8> {
        [&[0], &(n_bytes as u32).to_be_bytes()[..], &vec![7; n_bytes]].concat()
    }

    fn upload(room: &Arc<Semaphore>, draining: watch::Receiver<bool>) -> Upload {
        let (max_bytes, read) = (1 << 20, Duration::from_secs(5));
        Upload { max_bytes, read, deadline: None, room: Some(Arc::clone(room)), place: None, draining }
    }

    /// A body that yields what is sent, and the sender.
    fn sent() -> (mpsc::UnboundedSender<Bytes>, impl http_body::Body<Data = Bytes, Error = Status> + Unpin) {
        let (data, received) = mpsc::unbounded_channel();
        (data, StreamBody::new(UnboundedReceiverStream::new(received).map(|data| Ok(Frame::data(data)))))
    }

    /// The room for a second message was awaited before the end of the first one was forwarded, which would have made room.
    #[tokio::test]
    async fn messages_that_share_a_frame_do_not_wait_for_each_other() {
        let (_draining, drains) = watch::channel(false);
        let room = Arc::new(upload_room(0, 600 << 10));
        let one = framed(600 << 10);
        let three = [&one[..], &one, &one].concat();
        let (mut body, held) = upload(&room, drains).forward(Full::new(Bytes::from(three)));
        let mut progress = Progress::default();
        let mut n_ended = 0;
        while let Some(data) = next_data(&mut body).await.unwrap() {
            let step = progress.step(&data, 1 << 20).unwrap();
            assert_eq!(step.n, data.len(), "a frame has parts of two messages");
            if step.begun.is_none() && progress.is_between_messages() {
                n_ended += 1;
                assert!(room.available_permits() < 600, "the message has no room");
                drop(held.take());
            }
        }
        assert_eq!(n_ended, 3);
        assert_eq!(room.available_permits(), upload_units(600 << 10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_may_pause_but_not_for_ever_and_its_messages_may_not_dawdle() {
        let (_draining, drains) = watch::channel(false);
        let room = Arc::new(upload_room(1 << 20, 0));
        for (sent_first, expected) in [
            (framed(10), "the stream sent nothing for 60 s: end it, and open another one later"),
            (framed(10)[..9].to_vec(), "a message did not arrive within 5000 ms (limits.read_ms)"),
        ] {
            let (data, body) = sent();
            let (mut forwarded, _held) = upload(&room, drains.clone()).forward(body);
            tokio::time::sleep(MAX_PAUSE - Duration::from_secs(1)).await;
            data.send(Bytes::from(sent_first)).unwrap();
            let status = loop {
                match forwarded.frame().await.unwrap() {
                    Ok(_) => {}
                    Err(status) => break status,
                }
            };
            assert_eq!((status.code(), status.message()), (tonic::Code::DeadlineExceeded, expected));
        }
    }

    /// A handler that takes its time with one message let the next one run out of its own.
    #[tokio::test(start_paused = true)]
    async fn waiting_for_the_handler_does_not_count_as_dawdling() {
        let (_draining, drains) = watch::channel(false);
        let room = Arc::new(upload_room(1 << 20, 0));
        let (data, body) = sent();
        let (mut forwarded, _held) = upload(&room, drains).forward(body);
        let message = framed(1000);
        for part in message.chunks(100) {
            data.send(Bytes::copy_from_slice(part)).unwrap();
        }
        let mut n_bytes = 0;
        while n_bytes < message.len() - 5 {
            tokio::time::sleep(Duration::from_secs(20)).await;
            n_bytes += next_data(&mut forwarded).await.unwrap().unwrap().len();
        }
        drop(data);
        n_bytes += next_data(&mut forwarded).await.unwrap().map_or(0, |data| data.len());
        assert_eq!(n_bytes, message.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_holds_little_more_than_what_has_arrived() {
        let budget = Arc::new(Budget::new("test", 1 << 24, 1 << 24));
        let message = framed(1 << 20);
        for (n_sent, most) in [(5, FIRST_ROOM), (100 << 10, 200 << 10), (message.len(), message.len())] {
            let (data, body) = sent();
            data.send(Bytes::copy_from_slice(&message[..n_sent])).unwrap();
            let share = Arc::default();
            let bounds = Message { max_bytes: 1 << 20, metadata_bytes: 0, budget: &budget, share: &share };
            let mut reading = std::pin::pin!(bounds.read(body));
            assert!(tokio::time::timeout(Duration::from_millis(1), &mut reading).await.is_err());
            let n_held = budget.n_used() as usize;
            assert!(n_held >= n_sent && n_held <= most + CALL_BYTES, "{n_held} bytes are held for {n_sent}");
            data.send(Bytes::copy_from_slice(&message[n_sent..])).unwrap();
            drop(data);
            let (read, held) = reading.await.unwrap();
            assert!(read == message && budget.n_used() as usize == message.len() + CALL_BYTES);
            drop(held);
            assert_eq!(budget.n_used(), 0);
        }
    }
}
