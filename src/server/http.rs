//! `/metrics` for Prometheus, `/livez` and `/readyz` for an orchestrator.

use crate::{cache::Caches, pipeline::Pipeline, telemetry::recorder::Recorder};
use axum::{
    Router,
    extract::State as Extract,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use std::sync::Arc;
use tokio::{net::TcpListener, sync::watch};

/// The state that the handlers read.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) recorder: Recorder,
    pub(super) caches: Arc<Caches>,
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) draining: watch::Receiver<bool>,
}

/// Serves until the process ends, so that metrics can be scraped during a drain.
pub(super) async fn serve(listener: TcpListener, state: State) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(state);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the metrics listener failed");
    }
}

async fn metrics(Extract(state): Extract<State>) -> impl IntoResponse {
    state.caches.measure();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.recorder.render())
}

async fn ready(Extract(state): Extract<State>) -> impl IntoResponse {
    if *state.draining.borrow() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n");
    }
    match state.pipeline.registry.current() {
        Ok(_) => (StatusCode::OK, "ready\n"),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "loading\n"),
    }
}
