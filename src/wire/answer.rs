//! Answers until their callers have read them.
//!
//! HTTP/2 takes an answer only as fast as the caller reads it, and the rest stays in memory here. Its size counts against
//! `limits.max_unsent_mb` until it is taken. An answer that is not taken within `limits.write_ms` is dropped, and its
//! call is reset as soon as the caller shows up again.

use super::budget::Held;
use crate::telemetry::events;
use http::Response;
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tonic::{Status, body::Body, codegen::Bytes};

/// The most bytes that HTTP/2 gets at once, which is one of its frames. It keeps what it got until the caller reads it, and nobody
/// counts that.
const CHUNK: usize = 16 << 10;
/// How often answers are looked at.
const SWEEP: Duration = Duration::from_millis(250);

/// Counts the answer in `response` as unread, by what `held` holds of the budget.
pub(super) fn hold<T>(response: &mut tonic::Response<T>, held: Held) {
    response.extensions_mut().insert(Arc::new(held));
}

/// Watches the answer of a call until it is read.
pub(super) fn watch(mut response: Response<Body>, sweeper: &Sweeper) -> Response<Body> {
    let Some(held) = response.extensions_mut().remove::<Arc<Held>>() else { return response };
    response.map(|body| {
        let unread = Arc::new(Mutex::new(Some(Unread { body, rest: Bytes::new(), _held: held })));
        sweeper.add(&unread);
        Body::new(Answer(unread))
    })
}

/// What the caller has not read yet.
#[derive(Debug)]
struct Unread {
    body: Body,
    /// The rest of a frame of `body`.
    rest: Bytes,
    _held: Arc<Held>,
}

type Shared = Mutex<Option<Unread>>;

fn lock(shared: &Shared) -> MutexGuard<'_, Option<Unread>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body of an answer. The [`Sweeper`] may take its contents away.
#[derive(Debug)]
struct Answer(Arc<Shared>);

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut shared = lock(&self.0);
        let Some(unread) = &mut *shared else {
            return Poll::Ready(Some(Err(Status::cancelled("the answer was not read in time"))));
        };
        if unread.rest.is_empty() {
            match ready!(Pin::new(&mut unread.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => unread.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                ended => return Poll::Ready(ended),
            }
        }
        let n = unread.rest.len().min(CHUNK);
        Poll::Ready(Some(Ok(Frame::data(unread.rest.split_to(n)))))
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.0).as_ref().is_some_and(|unread| unread.rest.is_empty() && unread.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// Drops answers that are not read in time. HTTP/2 does not ask for the body of a caller that reads nothing, so nobody else notices.
#[derive(Debug)]
pub(super) struct Sweeper {
    answers: Arc<Mutex<VecDeque<Watched>>>,
    patience: Duration,
}

/// An answer and when it has to be read by. All have the same time, so they are in the order of their ends.
#[derive(Debug)]
struct Watched {
    answer: Weak<Shared>,
    read_by: Instant,
}

impl Sweeper {
    /// Gives each answer `patience`. The task ends with the sweeper.
    pub(super) fn start(patience: Duration) -> Self {
        let answers: Arc<Mutex<VecDeque<Watched>>> = Arc::default();
        let swept = Arc::downgrade(&answers);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP.min(patience)).await;
                let Some(answers) = swept.upgrade() else { return };
                sweep(&answers, Instant::now());
            }
        });
        Sweeper { answers, patience }
    }

    fn add(&self, answer: &Arc<Shared>) {
        let watched = Watched { answer: Arc::downgrade(answer), read_by: Instant::now() + self.patience };
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).push_back(watched);
    }
}

fn sweep(answers: &Mutex<VecDeque<Watched>>, now: Instant) {
    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(oldest) = answers.front() {
        let is_read = oldest.answer.strong_count() == 0;
        if !is_read && oldest.read_by > now {
            break;
        }
        if let Some(answer) = oldest.answer.upgrade()
            && lock(&answer).take().is_some()
        {
            events::answer_dropped();
        }
        answers.pop_front();
    }
}
