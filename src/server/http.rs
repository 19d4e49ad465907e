//! `/metrics` for Prometheus, `/livez` and `/readyz` for an orchestrator.

use super::listener::{Accepting, accept, with_patience};
use crate::{
    cache::Caches,
    pipeline::Pipeline,
    telemetry::recorder::Recorder,
    wire::{budget::Budget, receive::Budgets},
};
use axum::{
    Router,
    extract::State as Extract,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};

/// Prometheus and an orchestrator need a handful.
const MAX_CONNECTIONS: usize = 256;
/// A connection that sends no request for this long is closed. Longer than the usual intervals of scrapes and probes.
const IDLE: Duration = Duration::from_secs(90);

/// The state that the handlers read.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) recorder: Recorder,
    pub(super) caches: Arc<Caches>,
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) budgets: Budgets,
    pub(super) admin_receiving: Arc<Budget>,
    pub(super) draining: watch::Receiver<bool>,
}

/// Serves until the process ends, so that metrics can be scraped during a drain. A peer that takes nothing of its answer for the time
/// `write` loses its connection.
pub(super) async fn serve(listener: TcpListener, state: State, write: Duration) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(state);
    // It never drains, so the sender lives as long as the process.
    let (_never, draining) = watch::channel(false);
    let accepting = Accepting { listener: "metrics", slots: Arc::new(Semaphore::new(MAX_CONNECTIONS)), draining };
    accept(listener, accepting, move |stream, _address, slot| {
        let router = TowerToHyperService::new(router.clone());
        async move {
            let _slot = slot;
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(IDLE);
            if let Err(error) = server.serve_connection(TokioIo::new(with_patience(stream, write)), router).await {
                tracing::debug!(listener = "metrics", %error, "connection failed");
            }
        }
    })
    .await;
}

async fn metrics(Extract(state): Extract<State>) -> impl IntoResponse {
    state.caches.measure();
    state.budgets.measure();
    state.admin_receiving.measure();
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
