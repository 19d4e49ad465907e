//! The server: three listeners, health checks, and a graceful shutdown.
//!
//! On start it binds its listeners, answers health checks with NOT_SERVING and requests with UNAVAILABLE, and puts the first
//! config in force ([`crate::lifecycle`]); then it serves and watches for new configs. On shutdown it reports NOT_SERVING,
//! accepts no new connections, lets accepted requests finish within `server.drain_seconds`, and writes the caches and
//! the served features to disk in what is left of that time and a few seconds more.

mod connection;
mod http;
mod listener;
mod tls;

use crate::{
    bundle::store::{BundleUrl, StoreError, UploadFolder},
    cache::{CacheLimits, Caches, snapshot::keeper::SnapshotKeeper},
    config::{Settings, store_options},
    lifecycle::{
        Desired, Lifecycle, PushError,
        watch::{ConfigSource, run as watch_config},
    },
    pipeline::{Pipeline, item_trace},
    served_features::ServedFeatures,
    telemetry::recorder::Recorder,
    wire::{
        admin::Admin,
        layer::CountLayer,
        operator::Guard,
        proto::{self, admin_service_server::AdminServiceServer, mid_emb_service_server::MidEmbServiceServer},
        receive::{Budgets, ReceiveLayer},
        services::MidEmb,
    },
};
use listener::{Accepting, accept};
use std::{
    future::Future,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use thiserror::Error;
use tls::Tls;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::Layer;

/// Why a server cannot start or fails while it runs.
#[derive(Debug, Error)]
pub enum ServerError {
    /// A listener cannot be bound to its address. `key` is the config key.
    #[error("{key} = {address}: {source}")]
    #[expect(missing_docs, reason = "the fields are explained above or by their names")]
    Bind { key: &'static str, address: SocketAddr, source: io::Error },
    /// The first config cannot be put in force.
    #[error(transparent)]
    Start(#[from] PushError),
    /// No handler for SIGHUP can be installed.
    #[error("SIGHUP cannot be handled: {0}")]
    Signal(io::Error),
    /// TLS of the admin listener cannot be set up. `key` is the config key.
    #[error("{key}: {source}")]
    #[expect(missing_docs, reason = "the fields are explained above or by their names")]
    Tls { key: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    /// The store of the served features cannot be opened.
    #[error("served_features.upload_to: {0}")]
    Upload(#[from] StoreError),
    /// The thread that writes served features cannot be started.
    #[error("the thread of served_features: {0}")]
    Thread(io::Error),
    /// A background task failed.
    #[error("server task: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// The three bound listeners.
#[derive(Debug)]
pub struct Listeners {
    /// `server.listen`
    pub grpc: TcpListener,
    /// `admin.listen`
    pub admin: TcpListener,
    /// `telemetry.metrics_listen`
    pub metrics: TcpListener,
}

impl Listeners {
    /// Binds all three listeners to their configured addresses.
    pub async fn bind(settings: &Settings) -> Result<Self, ServerError> {
        Ok(Listeners {
            grpc: bind("server.listen", settings.server_listen).await?,
            admin: bind("admin.listen", settings.admin_listen).await?,
            metrics: bind("telemetry.metrics_listen", settings.metrics_listen).await?,
        })
    }
}

/// Operators need a handful, which clients of the main listener must not take.
const MAX_ADMIN_CONNECTIONS: usize = 256;
/// How long the last snapshot and the last served features may take beyond `server.drain_seconds`: docs/operating.md says which
/// grace period follows.
const LAST_FILES_RESERVE: Duration = Duration::from_secs(5);

async fn bind(key: &'static str, address: SocketAddr) -> Result<TcpListener, ServerError> {
    TcpListener::bind(address).await.map_err(|source| ServerError::Bind { key, address, source })
}

/// The inputs of a server's start.
#[derive(Debug)]
pub struct Start {
    /// The path of the config file.
    pub file: PathBuf,
    /// The config to put in force.
    pub desired: Desired,
    /// The settings of `desired`.
    pub settings: Settings,
    /// Records which items requests ask for, if they are traced.
    pub trace: Option<Arc<item_trace::Recorder>>,
}

/// Serves until `shutdown` completes and accepted requests are answered.
pub async fn run(
    start: Start,
    listeners: Listeners,
    recorder: Recorder,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServerError> {
    let Start { file, desired, settings, trace } = start;
    listener::raise_open_files(settings.max_connections);
    let [slots, admin_slots] = [settings.max_connections, MAX_ADMIN_CONNECTIONS].map(|n| Arc::new(Semaphore::new(n)));
    let caches = Arc::new(Caches::new(cache_limits(&settings)));
    let served_features = start_served_features(&settings)?;
    let pipeline = new_pipeline(&settings, &caches).with_trace(trace);
    let pipeline = Arc::new(pipeline.with_served_features(served_features.clone()));
    let snapshot_keeper = |folder: &PathBuf| Arc::new(SnapshotKeeper::new(Arc::clone(&caches), folder.clone()));
    let snapshots = settings.snapshot_folder.as_ref().map(snapshot_keeper);
    let config_source = ConfigSource::open(&file).map_err(ServerError::Signal)?;
    let (set_draining, draining) = watch::channel(false);
    let lifecycle = Lifecycle::new(Arc::clone(&pipeline), snapshots.clone(), file, settings.clone(), draining.clone());
    let lifecycle = Arc::new(lifecycle);
    let addresses = [&listeners.grpc, &listeners.admin, &listeners.metrics].map(listener::address);
    let (budgets, admin_budgets) = (Budgets::new(&settings.limits), Budgets::for_admin(&settings.limits));
    tokio::spawn(recorder.clone().keep_up());
    let state = http::State {
        recorder,
        caches: Arc::clone(&caches),
        pipeline: Arc::clone(&pipeline),
        budgets: budgets.clone(),
        admin_receiving: Arc::clone(&admin_budgets.receiving),
        draining: draining.clone(),
    };
    tokio::spawn(http::serve(listeners.metrics, state, settings.limits.write));
    let options = |listener, tls| connection::Options {
        listener,
        tls,
        max_streams: settings.max_streams,
        write: settings.limits.write,
        draining: draining.clone(),
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::NotServing).await;
    let mid_emb = MidEmb::new(Arc::clone(&pipeline), settings.limits, budgets.clone(), draining.clone());
    let receive = ReceiveLayer::new(pipeline.clone(), settings.limits, budgets, draining.clone());
    let grpc = Routes::new(health_service)
        .add_service(MidEmbServiceServer::new(mid_emb).max_decoding_message_size(settings.limits.max_message_bytes))
        .add_service(reflection_v1())
        .add_service(reflection_v1alpha());
    let admin = Admin::new(caches, Arc::clone(&pipeline), Arc::clone(&lifecycle), draining.clone());
    let admin = admin_routes(admin, &settings);
    let admin_receive = ReceiveLayer::for_admin(settings.limits, admin_budgets, draining.clone());
    let grpc = CountLayer.layer(receive.layer(grpc.prepare()));
    let admin = CountLayer.layer(admin_receive.layer(admin.prepare()));
    let grpc = serve_grpc(listeners.grpc, grpc, &slots, options("main", None));
    let admin = serve_grpc(listeners.admin, admin, &admin_slots, options("admin", Tls::watch(&settings.admin_guard)?));
    let serving = tokio::spawn(async { tokio::join!(grpc, admin) });

    tokio::pin!(shutdown);
    tokio::select! {
        // A shutdown does not wait for models that are still loading.
        () = &mut shutdown => return Ok(()),
        started = lifecycle.start(desired) => started?,
    }
    set_health(&health, ServingStatus::Serving).await;
    let [grpc, admin, metrics] = addresses;
    tracing::info!(grpc, admin, metrics, "serving");
    tokio::spawn(watch_config(Arc::clone(&lifecycle), config_source));
    if let (Some(snapshots), Some(every)) = (snapshots.clone(), settings.snapshot_every) {
        let lifecycle = Arc::clone(&lifecycle);
        tokio::spawn(async move { snapshots.write_regularly(every, || lifecycle.cached_parts()).await });
    }

    shutdown.await;
    let end_by = Instant::now() + settings.drain + LAST_FILES_RESERVE;
    set_health(&health, ServingStatus::NotServing).await;
    set_draining.send_replace(true);
    end_health_watches(health).await;
    tracing::info!(drain_seconds = settings.drain.as_secs(), "draining");
    let drained = tokio::time::timeout(settings.drain, serving).await;
    write_last_files(snapshots, served_features, &lifecycle, end_by).await;
    match drained {
        Ok(served) => {
            served?;
            tracing::info!("stopped");
        }
        Err(_elapsed) => tracing::warn!("stopped while requests were still in flight after server.drain_seconds"),
    }
    Ok(())
}

/// Writes what would be lost with the process.
async fn write_last_files(
    snapshots: Option<Arc<SnapshotKeeper>>,
    served_features: Option<Arc<ServedFeatures>>,
    lifecycle: &Lifecycle,
    end_by: Instant,
) {
    let left = end_by.saturating_duration_since(Instant::now());
    let write_caches = async {
        if let Some(snapshots) = snapshots {
            snapshots.write_last(lifecycle.cached_parts(), left).await;
        }
    };
    let write_features = async {
        if let Some(features) = served_features {
            features.finish(left).await;
        }
    };
    tokio::join!(write_caches, write_features);
}

/// Serves gRPC until a drain has begun and all connections are closed.
fn serve_grpc(
    listener: TcpListener,
    handler: impl connection::Handler,
    slots: &Arc<Semaphore>,
    options: connection::Options,
) -> impl Future<Output = ()> + Send + 'static {
    let accepting =
        Accepting { listener: options.listener, slots: Arc::clone(slots), draining: options.draining.clone() };
    let serve = move |stream, address, slot| connection::serve(stream, address, slot, handler.clone(), options.clone());
    accept(listener, accepting, serve)
}

/// What operators call, if they are who they say.
fn admin_routes(admin: Admin, settings: &Settings) -> Routes {
    let guard = Guard::new(settings.admin_guard.token_file.clone());
    Routes::new(AdminServiceServer::with_interceptor(admin, guard)).add_service(reflection_v1())
}

/// Starts to sample answers, if that is configured, and to upload the files.
fn start_served_features(settings: &Settings) -> Result<Option<Arc<ServedFeatures>>, ServerError> {
    let Some(options) = settings.served_features.clone() else { return Ok(None) };
    let open = |url: &BundleUrl| UploadFolder::open(url, &store_options());
    let store = options.upload_to.as_ref().map(open).transpose()?;
    let features = Arc::new(ServedFeatures::start(options, store).map_err(ServerError::Thread)?);
    let uploading = Arc::clone(&features);
    tokio::spawn(async move { uploading.upload().await });
    Ok(Some(features))
}

fn new_pipeline(settings: &Settings, caches: &Arc<Caches>) -> Pipeline {
    Pipeline::new(Arc::clone(caches), settings.limits.max_in_flight, settings.limits.max_encoding)
}

fn cache_limits(settings: &Settings) -> CacheLimits {
    CacheLimits {
        content_bytes: settings.content_cache_bytes,
        item_bytes: settings.item_cache_bytes,
        user_bytes: settings.user_cache_bytes,
        known_items_bytes: settings.known_items_bytes,
        max_text_bytes: settings.limits.max_text_bytes,
    }
}

/// Ends the streams of health watchers, which would hold up the drain. They have received NOT_SERVING.
async fn end_health_watches(mut health: HealthReporter) {
    health.clear_service_status("").await;
    health.clear_service_status("midemb.v1.MidEmbService").await;
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status("midemb.v1.MidEmbService", status).await;
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

#[expect(clippy::expect_used, reason = "the descriptors are compiled in, and a test serves reflection")]
fn reflection_v1()
-> tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection> {
    reflection().build_v1().expect("compiled-in descriptors")
}

#[expect(clippy::expect_used, reason = "the descriptors are compiled in, and a test serves reflection")]
fn reflection_v1alpha()
-> tonic_reflection::server::v1alpha::ServerReflectionServer<impl tonic_reflection::server::v1alpha::ServerReflection> {
    reflection().build_v1alpha().expect("compiled-in descriptors")
}
