//! Receives the messages of every call within bounds of its own, and watches what the callers do with their answers.
//!
//! A `GetMidEmb` call that cannot be served in time is turned away when its headers arrive, before its message is read. Any other
//! reason to hold something for a caller ends here, too: a message has `limits.read_ms` to arrive and counts against
//! `limits.max_receiving_mb`; an answer has `limits.write_ms` to be read; a call ends at the deadline that its caller sent; a stream
//! may not pause for long; and no call that streams, ours or reflection's, outlives the start of a drain.

use super::{
    answer::{self, Sweeper},
    body,
    budget::Budget,
    layer::{CallContext, Kind, MAX_METADATA_BYTES, Method},
    status::{self, to_status},
};
use crate::{
    config::settings::Limits,
    domain::error::{Error, ShedReason},
    pipeline::{Pipeline, admission},
    telemetry::events,
};
use http::{Request, Response};
use http_body_util::Full;
use std::{
    future::Future,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, watch};
use tonic::{
    Status,
    body::Body,
    codegen::{BoxFuture, Bytes},
};
use tower::{Layer, Service};

/// The bounds on what all calls of a server hold while they are not being worked on.
#[derive(Debug, Clone)]
pub struct Budgets {
    /// `limits.max_receiving_mb`
    pub receiving: Arc<Budget>,
    /// `limits.max_decoded_mb`
    pub decoded: Arc<Budget>,
    /// `limits.max_unsent_mb`
    pub unsent: Arc<Budget>,
    /// `limits.max_warm_up_mb`, in units of [`body`].
    pub uploads: Arc<Semaphore>,
    /// Places for the streams of other services, such as reflection.
    others: Arc<Semaphore>,
}

/// An answer of this many bytes, or several of them, may always wait on one connection.
const LARGE_ANSWER: u64 = 64 << 20;
/// What the largest message takes of a budget beside its own bytes.
const MESSAGE_EXTRA: usize = body::CALL_BYTES + MAX_METADATA_BYTES + body::PREFIX;
/// Streams of other services that may be open on a listener.
const MAX_OTHER_STREAMS: usize = 64;
/// The longest message of another service.
const MAX_OTHER_MESSAGE: usize = 64 << 10;

impl Budgets {
    /// Budgets of `limits` for the listener of `MidEmbService`.
    pub fn new(limits: &Limits) -> Self {
        Self::of("receiving", limits)
    }

    /// Those for the listener of `AdminService`, so that no client keeps operators out.
    pub fn for_admin(limits: &Limits) -> Self {
        Self::of("receiving_admin", limits)
    }

    fn of(receiving: &'static str, limits: &Limits) -> Self {
        let message = limits.max_message_bytes;
        let one = (message + MESSAGE_EXTRA) as u64;
        let receiving = Budget::new(receiving, limits.max_receiving_bytes.max(one), one);
        let decoded = Budget::new("decoded", limits.max_decoded_bytes.max(2 * one), 2 * one);
        let unsent = Budget::new("unsent", limits.max_unsent_bytes, LARGE_ANSWER.min(limits.max_unsent_bytes));
        Budgets {
            receiving: Arc::new(receiving),
            decoded: Arc::new(decoded),
            unsent: Arc::new(unsent),
            uploads: Arc::new(body::upload_room(limits.max_warm_up_bytes as usize, message)),
            others: Arc::new(Semaphore::new(MAX_OTHER_STREAMS)),
        }
    }

    /// Sets the metrics of what is held now.
    pub fn measure(&self) {
        self.receiving.measure();
        self.decoded.measure();
        self.unsent.measure();
    }
}

/// Wraps a service with [`Received`].
#[derive(Debug, Clone)]
pub struct ReceiveLayer(Arc<Rules>);

/// What all calls of a listener share.
#[derive(Debug)]
struct Rules {
    /// Admits `GetMidEmb` calls; none on a listener that has no such method.
    pipeline: Option<Arc<Pipeline>>,
    limits: Limits,
    budgets: Budgets,
    sweeper: Sweeper,
    draining: watch::Receiver<bool>,
}

impl ReceiveLayer {
    /// For the listener of `MidEmbService`. Calls without a `grpc-timeout` have `limits.default_deadline`.
    pub fn new(pipeline: Arc<Pipeline>, limits: Limits, budgets: Budgets, draining: watch::Receiver<bool>) -> Self {
        Self::of(Some(pipeline), limits, budgets, draining)
    }

    /// For the listener of `AdminService`.
    pub fn for_admin(limits: Limits, budgets: Budgets, draining: watch::Receiver<bool>) -> Self {
        Self::of(None, limits, budgets, draining)
    }

    fn of(pipeline: Option<Arc<Pipeline>>, limits: Limits, budgets: Budgets, draining: watch::Receiver<bool>) -> Self {
        let sweeper = Sweeper::start(limits.write);
        ReceiveLayer(Arc::new(Rules { pipeline, limits, budgets, sweeper, draining }))
    }
}

impl<S> Layer<S> for ReceiveLayer {
    type Service = Received<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Received { inner, rules: Arc::clone(&self.0) }
    }
}

/// A service that gets a call's message in one piece, or a stream of messages that ends by itself.
#[derive(Debug, Clone)]
pub struct Received<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S, B> Service<Request<B>> for Received<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (rules, inner) = (Arc::clone(&self.rules), self.inner.clone());
        let context = CallContext::of(&request);
        match Method::of(request.uri().path()) {
            Some(Method { kind: Kind::Scored, name, .. }) => {
                let deadline = context.deadline_or(rules.limits.default_deadline);
                if let Err(error) = rules.check_admission(deadline) {
                    let refused = to_status(name)(error).into_http();
                    return Box::pin(async { Ok(refused) });
                }
                Box::pin(rules.unary(Call { method: name, context, deadline: Some(deadline) }, inner, request))
            }
            Some(Method { kind: Kind::Unary, name, .. }) => {
                let deadline = context.deadline();
                Box::pin(rules.unary(Call { method: name, context, deadline }, inner, request))
            }
            Some(Method { kind: Kind::Upload, name, .. }) => {
                let deadline = context.deadline();
                let upload = rules.upload(deadline);
                Box::pin(by_deadline(name, deadline, stream(upload, inner, request)))
            }
            None if HEALTH.contains(&request.uri().path()) => {
                let deadline = context.deadline();
                Box::pin(rules.unary(Call { method: "Health", context, deadline }, inner, request))
            }
            None => match rules.other_upload(context.deadline()) {
                Ok(upload) => Box::pin(stream(upload, inner, request)),
                Err(error) => {
                    let refused = status::from_error(&error).into_http();
                    Box::pin(async { Ok(refused) })
                }
            },
        }
    }
}

/// The methods of the health service. Each takes one message.
const HEALTH: [&str; 2] = ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];

/// A call of one message.
struct Call {
    method: &'static str,
    context: CallContext,
    deadline: Option<Instant>,
}

impl Rules {
    fn check_admission(&self, deadline: Instant) -> Result<(), Error> {
        if self.budgets.unsent.is_exhausted() {
            return Err(shed(ShedReason::UnsentAnswers));
        }
        self.pipeline.as_ref().map_or(Ok(()), |pipeline| pipeline.check_admission(deadline))
    }

    /// Answers a call of one message.
    async fn unary<S, B>(
        self: Arc<Self>,
        call: Call,
        mut inner: S,
        request: Request<B>,
    ) -> Result<Response<Body>, S::Error>
    where
        S: Service<Request<Body>, Response = Response<Body>>,
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let Call { method, context, deadline } = call;
        let (parts, body) = request.into_parts();
        let read_by = context.arrival + self.limits.read;
        let message = body::Message {
            max_bytes: self.limits.max_message_bytes,
            metadata_bytes: context.metadata_bytes,
            budget: &self.budgets.receiving,
            share: &context.peer.shares.receiving,
        };
        let ends = deadline.map_or(read_by, |deadline| deadline.min(read_by));
        let (message, held) = match tokio::time::timeout_at(ends.into(), message.read(body)).await {
            Ok(Ok(read)) => read,
            Ok(Err(body::Refused::Shed)) => return Ok(to_status(method)(shed(ShedReason::Receiving)).into_http()),
            Ok(Err(body::Refused::Fault(status))) => return Ok(status.into_http()),
            Err(_elapsed) if ends == read_by => return Ok(too_slow(self.limits.read).into_http()),
            Err(_elapsed) => return Ok(expired(method)),
        };
        let mut request = Request::from_parts(parts, Body::new(Full::new(message)));
        // Held until the handler has decoded the message.
        request.extensions_mut().insert(Arc::new(held));
        let answer = inner.call(request);
        let response = by_deadline(method, deadline, answer).await?;
        Ok(answer::watch(response, &self.sweeper))
    }

    /// The rules of our own streams.
    fn upload(&self, deadline: Option<Instant>) -> body::Upload {
        body::Upload {
            max_bytes: self.limits.max_message_bytes,
            read: self.limits.read,
            deadline,
            room: Some(Arc::clone(&self.budgets.uploads)),
            place: None,
            draining: self.draining.clone(),
        }
    }

    /// The rules of the streams of other services, and of calls to paths that nobody serves.
    fn other_upload(&self, deadline: Option<Instant>) -> Result<body::Upload, Error> {
        let place = Arc::clone(&self.budgets.others).try_acquire_owned();
        let place = place.map_err(|_none_left| shed(ShedReason::Streams))?;
        Ok(body::Upload { max_bytes: MAX_OTHER_MESSAGE, room: None, place: Some(place), ..self.upload(deadline) })
    }
}

/// Answers a call whose messages may go on for ever.
async fn stream<S, B>(upload: body::Upload, mut inner: S, request: Request<B>) -> Result<Response<Body>, S::Error>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let (mut parts, body) = request.into_parts();
    let (body, held) = upload.forward(body);
    parts.extensions.insert(held);
    inner.call(Request::from_parts(parts, body)).await
}

/// The error for a call that was shed for `reason`, which is counted.
pub(super) fn shed(reason: ShedReason) -> Error {
    events::shed(reason, 1);
    admission::shed(reason)
}

/// Ends a call at its deadline, if it has one.
async fn by_deadline<E>(
    method: &'static str,
    deadline: Option<Instant>,
    answer: impl Future<Output = Result<Response<Body>, E>>,
) -> Result<Response<Body>, E> {
    match deadline {
        None => answer.await,
        Some(deadline) => {
            tokio::time::timeout_at(deadline.into(), answer).await.unwrap_or_else(|_elapsed| Ok(expired(method)))
        }
    }
}

fn expired(method: &'static str) -> Response<Body> {
    events::request_failed(method, &Error::DeadlineExceeded);
    status::from_error(&Error::DeadlineExceeded).into_http()
}

fn too_slow(read: Duration) -> Status {
    Status::deadline_exceeded(format!("the message did not arrive within {} ms (limits.read_ms)", read.as_millis()))
}
