//! `AdminService`: what runs, and emptying caches. On its own listener.

use super::{
    proto::{self, admin_service_server::AdminService},
    services::{model_info, refuse},
};
use crate::{
    error::{Error, FieldViolation},
    pipeline::Pipeline,
};
use std::{sync::Arc, time::Instant};
use tonic::{Request, Response, Status};

/// The handlers of `AdminService`.
#[derive(Debug, Clone)]
pub struct Admin {
    pipeline: Arc<Pipeline>,
    started: Instant,
}

impl Admin {
    /// Handlers over `pipeline`.
    pub fn new(pipeline: Arc<Pipeline>) -> Self {
        Admin { pipeline, started: Instant::now() }
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn get_status(
        &self,
        _request: Request<proto::GetStatusRequest>,
    ) -> Result<Response<proto::GetStatusResponse>, Status> {
        let snapshot = self.pipeline.registry.current().ok();
        let caches = self.pipeline.measure().map(|contents| proto::CacheStatus {
            cache: contents.cache.to_owned(),
            entries: contents.n_entries,
            bytes: contents.n_bytes,
            max_bytes: contents.max_bytes,
        });
        Ok(Response::new(proto::GetStatusResponse {
            ready: snapshot.is_some(),
            models: snapshot.iter().flat_map(|snapshot| &snapshot.models).map(model_info).collect(),
            caches: caches.into(),
            uptime_seconds: self.started.elapsed().as_secs(),
        }))
    }

    async fn flush_cache(
        &self,
        request: Request<proto::FlushCacheRequest>,
    ) -> Result<Response<proto::FlushCacheResponse>, Status> {
        let name = request.into_inner().cache;
        let unknown = || {
            let description = format!("{name:?} is no cache, content, item, user and known_items are");
            refuse("FlushCache")(Error::InvalidArgument(vec![FieldViolation {
                field: "cache".to_owned(),
                description,
            }]))
        };
        let entries_removed =
            self.pipeline.flush(Some(name.as_str()).filter(|name| !name.is_empty())).ok_or_else(unknown)?;
        tracing::info!(cache = name, entries_removed, "cache flushed");
        Ok(Response::new(proto::FlushCacheResponse { entries_removed }))
    }
}
