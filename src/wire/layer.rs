//! Counts every call to our services, including calls that never reach a handler: invalid messages, messages over the size
//! limit, and callers that disconnect.

use super::{decode, peer::Peer, status::code_name};
use crate::{domain::ModelRef, telemetry::events};
use http::{Request, Response};
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

/// State that a handler shares with the layer around it.
#[derive(Debug, Clone)]
pub struct CallContext {
    /// When the call's headers arrived, before its body was read and decoded.
    pub arrival: Instant,
    /// The caller's budget, if it sent one.
    timeout: Option<Duration>,
    /// The call's metadata, counted as HTTP/2 does: names, values, and 32 bytes for each entry.
    pub metadata_bytes: usize,
    /// Who calls.
    pub peer: Peer,
    model: Arc<OnceLock<Arc<ModelRef>>>,
}

impl Default for CallContext {
    /// A call that arrives now, from nobody.
    fn default() -> Self {
        CallContext {
            arrival: Instant::now(),
            timeout: None,
            metadata_bytes: 0,
            peer: Peer::default(),
            model: Arc::default(),
        }
    }
}

impl CallContext {
    fn new<B>(request: &Request<B>) -> Self {
        CallContext {
            arrival: Instant::now(),
            timeout: decode::timeout(request.headers()),
            metadata_bytes: request.headers().iter().map(|(key, value)| key.as_str().len() + value.len() + 32).sum(),
            peer: Peer::of(request.extensions()),
            model: Arc::default(),
        }
    }

    /// The context that the layer added to a request, or a new one.
    pub fn of<B>(request: &Request<B>) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_else(|| Self::new(request))
    }

    /// When the caller stops waiting; none if it did not say.
    pub fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|timeout| self.arrival + timeout)
    }

    /// When the caller stops waiting, or `default` after the call's arrival if it did not say.
    pub fn deadline_or(&self, default: Duration) -> Instant {
        self.deadline().unwrap_or(self.arrival + default)
    }

    /// Sets the model that answers, for the metric's label.
    pub fn set_model(&self, model: &Arc<ModelRef>) {
        // A request is routed only once, so the model cannot be set already.
        let _ = self.model.set(Arc::clone(model));
    }
}

/// A method that is counted.
pub(super) struct Method {
    path: &'static str,
    /// The metric's label.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
}

/// What the layers do with a method's calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One message, which is admitted before it is read.
    Scored,
    /// One message.
    Unary,
    /// A stream of messages.
    Upload,
}

/// The closed set of counted methods. Other calls (health, reflection, unknown paths) are not counted.
const METHODS: &[Method] = &[
    method("/midemb.v1.MidEmbService/GetMidEmb", "GetMidEmb", Kind::Scored),
    method("/midemb.v1.MidEmbService/WarmItems", "WarmItems", Kind::Upload),
    method("/midemb.v1.MidEmbService/GetModelInfo", "GetModelInfo", Kind::Unary),
    method("/midemb.v1.AdminService/GetStatus", "GetStatus", Kind::Unary),
    method("/midemb.v1.AdminService/FlushCache", "FlushCache", Kind::Unary),
    method("/midemb.v1.AdminService/PushConfig", "PushConfig", Kind::Unary),
    method("/midemb.v1.AdminService/Rollback", "Rollback", Kind::Unary),
    method("/midemb.v1.AdminService/ExportCache", "ExportCache", Kind::Unary),
    method("/midemb.v1.AdminService/ImportCache", "ImportCache", Kind::Upload),
];

const fn method(path: &'static str, name: &'static str, kind: Kind) -> Method {
    Method { path, name, kind }
}

impl Method {
    /// The method at `path`; none if it is not counted.
    pub(super) fn of(path: &str) -> Option<&'static Method> {
        METHODS.iter().find(|method| method.path == path)
    }
}

/// The most bytes of a call's metadata.
pub(super) const MAX_METADATA_BYTES: usize = 16 << 10;

/// Refuses a call with too much metadata. HTTP/2 itself would answer 431, which clients report as UNKNOWN.
fn check_metadata(context: &CallContext) -> Result<(), Status> {
    let n_bytes = context.metadata_bytes;
    if n_bytes > MAX_METADATA_BYTES {
        let text = format!("metadata: has {n_bytes} bytes, at most {MAX_METADATA_BYTES} are allowed");
        return Err(Status::invalid_argument(text));
    }
    Ok(())
}

/// Wraps a service with [`Counted`].
#[derive(Debug, Clone, Copy, Default)]
pub struct CountLayer;

impl<S> Layer<S> for CountLayer {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Counted { inner }
    }
}

/// A service whose calls are counted.
#[derive(Debug, Clone)]
pub struct Counted<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let context = CallContext::new(&request);
        let checked = check_metadata(&context);
        let method = Method::of(request.uri().path());
        let mut call =
            method.map(|method| Call { method: method.name, context: context.clone(), code: Code::Cancelled });
        if let Err(status) = checked {
            if let Some(call) = &mut call {
                call.code = status.code();
            }
            return Box::pin(async { Ok(status.into_http()) });
        }
        request.extensions_mut().insert(context);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut call = call;
            let response = answer.await?;
            if let Some(call) = &mut call {
                call.code = code_of(&response);
            }
            Ok(response)
        })
    }
}

/// A response without a body carries its status in the headers; a response with a body came from a handler that succeeded.
fn code_of<R>(response: &Response<R>) -> Code {
    response.headers().get("grpc-status").map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()))
}

/// Counts the call when dropped, also if the caller disconnects.
struct Call {
    method: &'static str,
    context: CallContext,
    code: Code,
}

impl Drop for Call {
    fn drop(&mut self) {
        let model = self.context.model.get().map(|model| &**model);
        events::request_finished(self.method, code_name(self.code), model, self.context.arrival.elapsed());
    }
}
