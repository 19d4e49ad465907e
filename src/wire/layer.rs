//! Counts every call to our services, including calls that never reach a handler: invalid messages, messages over the size
//! limit, and callers that disconnect.

use super::status::code_name;
use crate::{domain::ModelRef, telemetry::events};
use http::{Request, Response};
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Instant,
};
use tonic::Code;
use tower::{Layer, Service};

/// State that a handler shares with the layer around it.
#[derive(Debug, Clone)]
pub struct CallContext {
    /// When the call's headers arrived, before its body was read and decoded.
    pub arrival: Instant,
    model: Arc<OnceLock<Arc<ModelRef>>>,
}

impl CallContext {
    fn new() -> Self {
        CallContext { arrival: Instant::now(), model: Arc::default() }
    }

    /// The context in a request's extensions, or a new one if the layer did not add any.
    pub fn of(extensions: &http::Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_else(Self::new)
    }

    /// Sets the model that answers, for the metric's label.
    pub fn set_model(&self, model: &Arc<ModelRef>) {
        // A request is routed only once, so the model cannot be set already.
        let _ = self.model.set(Arc::clone(model));
    }
}

/// A method that is counted.
pub(super) struct Method {
    pub(super) path: &'static str,
    /// The metric's label.
    pub(super) name: &'static str,
}

/// The method that needs admission.
pub(super) const GET_MID_EMB: Method = Method { path: "/midemb.v1.MidEmbService/GetMidEmb", name: "GetMidEmb" };

/// The closed set of counted methods. Other calls (health, reflection, unknown paths) are not counted.
const METHODS: &[Method] = &[
    GET_MID_EMB,
    Method { path: "/midemb.v1.MidEmbService/WarmItems", name: "WarmItems" },
    Method { path: "/midemb.v1.MidEmbService/GetModelInfo", name: "GetModelInfo" },
    Method { path: "/midemb.v1.AdminService/GetStatus", name: "GetStatus" },
    Method { path: "/midemb.v1.AdminService/FlushCache", name: "FlushCache" },
    Method { path: "/midemb.v1.AdminService/PushConfig", name: "PushConfig" },
    Method { path: "/midemb.v1.AdminService/Rollback", name: "Rollback" },
    Method { path: "/midemb.v1.AdminService/ExportCache", name: "ExportCache" },
    Method { path: "/midemb.v1.AdminService/ImportCache", name: "ImportCache" },
];

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

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let Some(method) = METHODS.iter().find(|method| method.path == request.uri().path()) else {
            return Box::pin(self.inner.call(request));
        };
        let context = CallContext::new();
        request.extensions_mut().insert(context.clone());
        let call = Call { method: method.name, context, code: Code::Cancelled };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut call = call;
            let response = answer.await?;
            call.code = code_of(&response);
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
