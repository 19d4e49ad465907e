//! Admits or sheds `GetMidEmb` calls as soon as their headers arrive: a message that cannot be served in time is neither
//! read nor decoded, and a call whose message arrives too slowly ends at its deadline.

use super::{
    decode,
    layer::{CallContext, GET_MID_EMB},
    services::to_status,
    status,
};
use crate::{domain::error::Error, pipeline::Pipeline, telemetry::events};
use http::{Request, Response};
use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tower::{Layer, Service};

/// Wraps a service with [`Admitted`].
#[derive(Debug, Clone)]
pub struct AdmitLayer {
    pipeline: Arc<Pipeline>,
    default_deadline: Duration,
}

impl AdmitLayer {
    /// Admits calls to `pipeline`; calls without a `grpc-timeout` get `default_deadline`.
    pub fn new(pipeline: Arc<Pipeline>, default_deadline: Duration) -> Self {
        AdmitLayer { pipeline, default_deadline }
    }
}

impl<S> Layer<S> for AdmitLayer {
    type Service = Admitted<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Admitted { inner, admit: self.clone() }
    }
}

/// A service that receives only admitted calls. The permit is held until the call is answered.
#[derive(Debug, Clone)]
pub struct Admitted<S> {
    inner: S,
    admit: AdmitLayer,
}

impl<S, B, R> Service<Request<B>> for Admitted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if request.uri().path() != GET_MID_EMB.path {
            return Box::pin(self.inner.call(request));
        }
        let arrival = CallContext::of(request.extensions()).arrival;
        let deadline = decode::deadline(request.headers(), arrival, self.admit.default_deadline);
        let permit = match self.admit.pipeline.admit(deadline) {
            Ok(permit) => permit,
            Err(error) => {
                let response = to_status(GET_MID_EMB.name)(error).into_http();
                return Box::pin(async { Ok(response) });
            }
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let _permit = permit;
            tokio::time::timeout_at(deadline.into(), answer).await.unwrap_or_else(|_elapsed| {
                events::request_failed(GET_MID_EMB.name, &Error::DeadlineExceeded);
                Ok(status::from_error(&Error::DeadlineExceeded).into_http())
            })
        })
    }
}
