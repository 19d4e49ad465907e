//! `AdminService`: status, config pushes and rollbacks, and the caches. It has its own listener; [`super::operator`]
//! authenticates its callers.

use super::{
    body::HeldRoom,
    drain_began, encode,
    operator::Operator,
    proto::{self, admin_service_server::AdminService},
    receive::shed,
    services::{model_info, shadow_info},
    status::{self, to_status},
};
use crate::{
    bundle::Model,
    cache::{
        CacheName, Caches,
        snapshot::{self, Exported},
    },
    domain::{
        bounded_text::cut,
        error::{Error, FieldViolation, ShedReason},
    },
    inference::background::{self, Urgency},
    lifecycle::{InForce, Lifecycle, Push, PushError, PushResult, Report, journal::StepReport},
    pipeline::Pipeline,
};
use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, UNIX_EPOCH},
};
use tokio::{
    runtime::Handle,
    sync::{
        OwnedSemaphorePermit, Semaphore,
        mpsc::{self, error::SendTimeoutError},
        watch,
    },
    task::JoinError,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// The handlers of `AdminService`.
#[derive(Debug, Clone)]
pub struct Admin {
    caches: Arc<Caches>,
    pipeline: Arc<Pipeline>,
    lifecycle: Arc<Lifecycle>,
    started: Instant,
    /// The permit to export or import a cache. Each may hold as much memory as the caches do, so one runs at a time.
    transfers: Arc<Semaphore>,
    draining: watch::Receiver<bool>,
}

/// The most bytes of a name that a message repeats.
const MAX_NAME_BYTES: usize = 128;
/// How long the receiver of an export may leave a chunk unread.
const EXPORT_PATIENCE: Duration = Duration::from_secs(30);
/// Chunks of an exported file that may wait to be sent.
const CHUNKS_AHEAD: usize = 4;

impl Admin {
    /// Creates the handlers. An export ends when `draining` becomes true.
    pub fn new(
        caches: Arc<Caches>,
        pipeline: Arc<Pipeline>,
        lifecycle: Arc<Lifecycle>,
        draining: watch::Receiver<bool>,
    ) -> Self {
        let transfers = Arc::new(Semaphore::new(1));
        Admin { caches, pipeline, lifecycle, started: Instant::now(), transfers, draining }
    }

    /// The turn of an export or import; it is refused while another one runs.
    fn transfer(&self, method: &'static str) -> Result<OwnedSemaphorePermit, Status> {
        let turn = Arc::clone(&self.transfers).try_acquire_owned();
        turn.map_err(|_taken| to_status(method)(shed(ShedReason::Streams)))
    }

    fn config_info(&self, config: &InForce) -> proto::ConfigInfo {
        proto::ConfigInfo {
            digest: config.digest.clone(),
            file: self.lifecycle.file().display().to_string(),
            pushed_file: config.pushed_file.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
            models: config.models.all().map(|model| encode::model(&model.reference)).collect(),
        }
    }

    /// The model with this name, or the first model if the name is empty.
    fn model(&self, name: &str) -> Result<Arc<Model>, Error> {
        let models = self.pipeline.registry.current()?;
        let matches = |model: &&Arc<Model>| name.is_empty() || model.reference.name == name;
        models.all().find(matches).cloned().ok_or_else(|| Error::model_not_found(name))
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn get_status(
        &self,
        _request: Request<proto::GetStatusRequest>,
    ) -> Result<Response<proto::GetStatusResponse>, Status> {
        let models = self.pipeline.registry.current().ok();
        let caches = self.caches.measure().map(|usage| proto::CacheStatus {
            cache: usage.cache.to_owned(),
            entries: usage.n_entries,
            bytes: usage.n_bytes,
            max_bytes: usage.max_bytes,
        });
        let live = models.iter().flat_map(|models| &models.live).map(model_info);
        let shadows = models.iter().flat_map(|models| &models.shadows).map(shadow_info);
        Ok(Response::new(proto::GetStatusResponse {
            ready: models.is_some(),
            models: live.chain(shadows).collect(),
            caches: caches.into(),
            uptime_seconds: self.started.elapsed().as_secs(),
            config: self.lifecycle.in_force().map(|config| self.config_info(&config)),
            previous: self.lifecycle.previous().map(|config| self.config_info(&config)),
            push: self.lifecycle.journal.running().map(push_report),
            pushes: self.lifecycle.journal.past().into_iter().map(push_report).collect(),
        }))
    }

    async fn push_config(
        &self,
        request: Request<proto::PushConfigRequest>,
    ) -> Result<Response<proto::PushConfigResponse>, Status> {
        let who = Operator::of(&request);
        let proto::PushConfigRequest { config, expected_digest, dry_run } = request.into_inner();
        if expected_digest.is_empty() {
            let description =
                "is empty; it must be the digest of the config in force, which GetStatus returns".to_owned();
            return Err(invalid_argument("PushConfig", "expected_digest", description));
        }
        let push = Push { text: config, who, expected_digest, is_dry_run: dry_run };
        let lifecycle = Arc::clone(&self.lifecycle);
        // A separate task, so that a push continues if its caller disconnects.
        let joined = tokio::spawn(async move { lifecycle.push(push).await }).await;
        let PushResult { outcome, in_force, report, .. } = flatten_push_result(joined)?;
        Ok(Response::new(proto::PushConfigResponse {
            result: outcome.as_str().to_owned(),
            config: Some(self.config_info(&in_force)),
            report: Some(push_report(report)),
        }))
    }

    async fn rollback(
        &self,
        request: Request<proto::RollbackRequest>,
    ) -> Result<Response<proto::RollbackResponse>, Status> {
        let who = Operator::of(&request);
        let expected = Some(request.into_inner().expected_digest).filter(|digest| !digest.is_empty());
        let lifecycle = Arc::clone(&self.lifecycle);
        let joined = tokio::spawn(async move { lifecycle.rollback(&who, expected.as_deref()).await }).await;
        let PushResult { in_force, report, warning, .. } = flatten_push_result(joined)?;
        Ok(Response::new(proto::RollbackResponse {
            config: Some(self.config_info(&in_force)),
            report: Some(push_report(report)),
            warning: warning.map(|warning| warning.message()).unwrap_or_default(),
        }))
    }

    async fn flush_cache(
        &self,
        request: Request<proto::FlushCacheRequest>,
    ) -> Result<Response<proto::FlushCacheResponse>, Status> {
        let who = Operator::of(&request);
        let name = request.into_inner().cache;
        let cache = match (name.as_str(), CacheName::parse(&name)) {
            ("", _) => None,
            (_, Some(cache)) => Some(cache),
            (_, None) => {
                let names = CacheName::ALL.map(CacheName::as_str).join(", ");
                let description =
                    format!("{:?} is not the name of a cache, use one of: {names}", cut(&name, MAX_NAME_BYTES));
                return Err(invalid_argument("FlushCache", "cache", description));
            }
        };
        let caches = Arc::clone(&self.caches);
        let flush = move || {
            let entries_removed = cache.map_or_else(|| caches.flush_all(), |cache| caches.flush(cache));
            tracing::info!(who, cache = name, entries_removed, "cache flushed");
            entries_removed
        };
        // Freeing millions of entries must not block an I/O thread.
        let flushed = background::run(Urgency::GivesWay, flush).await;
        let entries_removed = flushed.map_err(|error| internal("FlushCache", error))?;
        Ok(Response::new(proto::FlushCacheResponse { entries_removed }))
    }

    type ExportCacheStream = ReceiverStream<Result<proto::CacheChunk, Status>>;

    async fn export_cache(
        &self,
        request: Request<proto::ExportCacheRequest>,
    ) -> Result<Response<Self::ExportCacheStream>, Status> {
        let who = Operator::of(&request);
        let proto::ExportCacheRequest { cache, model } = request.into_inner();
        let kind = match CacheName::parse(&cache) {
            Some(CacheName::Content) => VectorKind::Content,
            Some(CacheName::Item) => VectorKind::Item,
            _ => {
                let description =
                    format!("{:?} cannot be exported, use \"content\" or \"item\"", cut(&cache, MAX_NAME_BYTES));
                return Err(invalid_argument("ExportCache", "cache", description));
            }
        };
        let model = self.model(&model).map_err(to_status("ExportCache"))?;
        let turn = self.transfer("ExportCache")?;
        let (chunks, stream) = mpsc::channel(CHUNKS_AHEAD);
        let (caches, runtime) = (Arc::clone(&self.caches), Handle::current());
        let mut draining = self.draining.clone();
        tokio::spawn(async move {
            let mut out = ChunkWriter { chunks: chunks.clone(), runtime };
            let export = move || export(&caches, &model, kind, &mut out);
            let exported = tokio::select! {
                exported = background::run(Urgency::GivesWay, export) => exported,
                // The writer stops at its next chunk that nobody reads, at the latest.
                () = drain_began(&mut draining) => return end_export(&chunks, Status::unavailable("not serving: draining")).await,
            };
            drop(turn);
            let status = match exported {
                Ok(Ok(Exported { n_entries, n_bytes })) => {
                    tracing::info!(who, cache, n_entries, n_bytes, "cache exported");
                    // The receiver knows by the end of the stream that it has everything.
                    return;
                }
                Ok(Err(error)) => {
                    tracing::warn!(who, cache, %error, "cache export was interrupted");
                    Status::deadline_exceeded(format!("the export was interrupted: {error}"))
                }
                Err(error) => internal("ExportCache", error),
            };
            end_export(&chunks, status).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn import_cache(
        &self,
        request: Request<Streaming<proto::CacheChunk>>,
    ) -> Result<Response<proto::ImportCacheResponse>, Status> {
        let who = Operator::of(&request);
        let turn = self.transfer("ImportCache")?;
        let room = request.extensions().get::<HeldRoom>().cloned().unwrap_or_default();
        let mut chunks = request.into_inner();
        // A file with more entries than a cache holds would evict its own entries.
        let usages = self.caches.measure();
        let max_bytes = usages.iter().map(|usage| usage.max_bytes).max().unwrap_or_default().saturating_mul(2);
        let mut file = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            // The file has a bound of its own.
            drop(room.take());
            if (file.len() + chunk.data.len()) as u64 > max_bytes {
                let description =
                    format!("the file has more than {max_bytes} bytes, twice the capacity of the largest cache");
                return Err(invalid_argument("ImportCache", "data", description));
            }
            file.extend_from_slice(&chunk.data);
        }
        let (caches, served) = (Arc::clone(&self.caches), self.lifecycle.cached_parts());
        // The thread ends what it has begun, also for a caller that has left, and nobody else may begin before.
        let import = move || {
            let imported = snapshot::import(&file, &caches, &served);
            drop((file, turn));
            imported
        };
        let imported =
            background::run(Urgency::GivesWay, import).await.map_err(|error| internal("ImportCache", error))?;
        let imported = imported.map_err(|reason| invalid_argument("ImportCache", "data", reason.to_string()))?;
        let (cache, entries, skipped) = (imported.kind.as_str(), imported.n_entries, imported.n_skipped);
        tracing::info!(who, cache, entries, skipped, "cache imported");
        Ok(Response::new(proto::ImportCacheResponse { cache: cache.to_owned(), entries, skipped }))
    }
}

/// The kinds of vectors that can be exported.
#[derive(Debug, Clone, Copy)]
enum VectorKind {
    Content,
    Item,
}

/// Writes all cached vectors of one kind that `model` uses. Blocks.
fn export(caches: &Caches, model: &Model, kind: VectorKind, out: &mut ChunkWriter) -> io::Result<Exported> {
    let manifest = &model.manifest;
    match kind {
        VectorKind::Content => snapshot::export(out, &caches.contents, model.encoder.digest(), manifest.encoder.dim),
        VectorKind::Item => {
            let width = manifest.item_tower.record_dims().width();
            snapshot::export(out, &caches.items, model.tower_digest, width)
        }
    }
}

/// The status of a failed export or import. Operators may see its cause, which `to_status` only logs.
fn internal(method: &'static str, error: background::BackgroundError) -> Status {
    let message = error.to_string();
    Status::new(to_status(method)(Error::internal("cache", error)).code(), message)
}

fn invalid_argument(method: &'static str, field: &str, description: String) -> Status {
    to_status(method)(Error::InvalidArgument(vec![FieldViolation { field: field.to_owned(), description }]))
}

/// The result of a push or a rollback that ran in its own task.
fn flatten_push_result(joined: Result<Result<PushResult, PushError>, JoinError>) -> Result<PushResult, Status> {
    let result = joined.unwrap_or_else(|panicked| Err(PushError::Failed(panicked.to_string())));
    result.map_err(|error| status::from_push_error(&error))
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

fn push_report(report: Report) -> proto::PushReport {
    let began = report.began.duration_since(UNIX_EPOCH).unwrap_or_default();
    let step = |step: StepReport| proto::PushStep {
        step: step.step.as_str().to_owned(),
        subject: step.subject,
        took_ms: millis(step.took),
        result: step.status.as_str().to_owned(),
    };
    proto::PushReport {
        trigger: report.trigger.as_str().to_owned(),
        who: report.who,
        began_unix_ms: millis(began),
        took_ms: millis(report.took),
        digest_before: report.digest_before,
        digest: report.digest,
        result: report.result.to_owned(),
        reason: report.reason,
        steps: report.steps.into_iter().map(step).collect(),
        done: report.progress.done,
        total: report.progress.total,
    }
}

/// Ends an export that is not complete with an error, as soon as the receiver reads that far: the file must not look whole.
async fn end_export(chunks: &mpsc::Sender<Result<proto::CacheChunk, Status>>, status: Status) {
    // Fails if the receiver has disconnected.
    let _ = chunks.send(Err(status)).await;
}

/// Sends a file in chunks as it is written. Blocks while the receiver is slower than the writer, up to [`EXPORT_PATIENCE`] for a
/// chunk: the vectors to write stay in memory until then, whatever the caches evict.
struct ChunkWriter {
    chunks: mpsc::Sender<Result<proto::CacheChunk, Status>>,
    runtime: Handle,
}

impl io::Write for ChunkWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        const MAX_CHUNK: usize = 1 << 20;
        let data = &data[..data.len().min(MAX_CHUNK)];
        let chunk = proto::CacheChunk { data: data.to_vec().into() };
        let sent = self.runtime.block_on(self.chunks.send_timeout(Ok(chunk), EXPORT_PATIENCE));
        match sent {
            Ok(()) => Ok(data.len()),
            Err(SendTimeoutError::Timeout(_)) => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "its receiver does not read"))
            }
            Err(SendTimeoutError::Closed(_)) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_operator_sees_why_an_export_failed() {
        let exported: Result<(), _> = background::run(Urgency::Normal, || panic!("no such cache")).await;
        let status = internal("ExportCache", exported.unwrap_err());
        assert_eq!((status.code(), status.message()), (tonic::Code::Internal, "the job panicked: no such cache"));
    }

    /// An export that nobody read kept a thread, and all vectors of its cache.
    #[tokio::test(start_paused = true)]
    async fn an_export_that_nobody_reads_ends() {
        use io::Read;
        let (chunks, mut unread) = mpsc::channel(CHUNKS_AHEAD);
        let mut out = ChunkWriter { chunks, runtime: Handle::current() };
        let began = tokio::time::Instant::now();
        let export = move || io::copy(&mut io::repeat(7).take(1 << 30), &mut out);
        let error = background::run(Urgency::Normal, export).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!((EXPORT_PATIENCE..EXPORT_PATIENCE * 2).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert_eq!(std::iter::from_fn(|| unread.try_recv().ok()).count(), CHUNKS_AHEAD);
    }
}
