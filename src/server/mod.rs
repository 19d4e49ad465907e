//! The server: three listeners, health checks, and a graceful shutdown.
//!
//! On start it binds its listeners, answers health checks with NOT_SERVING and requests with UNAVAILABLE, and puts the first
//! config in force ([`crate::lifecycle`]); then it serves and watches for new configs. On shutdown it reports NOT_SERVING,
//! accepts no new connections, lets accepted requests finish within `server.drain_seconds`, and writes the caches to disk in
//! what is left of that time and a few seconds more.

mod http;

use crate::{
    cache::{CacheLimits, Caches, snapshot::keeper::SnapshotKeeper},
    config::{Settings, settings::AdminGuard},
    lifecycle::{
        Desired, Lifecycle, PushError,
        watch::{ConfigSource, run as watch_config},
    },
    pipeline::{Pipeline, item_trace},
    telemetry::recorder::Recorder,
    wire::{
        admin::Admin,
        admit::AdmitLayer,
        layer::CountLayer,
        operator::Guard,
        proto::{self, admin_service_server::AdminServiceServer, mid_emb_service_server::MidEmbServiceServer},
        services::MidEmb,
    },
};
use std::{
    fs,
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use thiserror::Error;
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic_health::{ServingStatus, server::HealthReporter};

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
    /// A listener failed while serving.
    #[error("serving: {0}")]
    Serve(#[from] tonic::transport::Error),
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

/// A peer that vanished is detected within the sum of the two, so that it holds up neither requests nor a drain.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the last snapshot may take beyond `server.drain_seconds`: docs/operating.md says which grace period follows.
const LAST_SNAPSHOT_RESERVE: Duration = Duration::from_secs(5);

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
    let caches = Arc::new(Caches::new(cache_limits(&settings)));
    let pipeline = Arc::new(Pipeline::new(Arc::clone(&caches), settings.limits.max_in_flight).with_trace(trace));
    let snapshot_keeper = |folder: &PathBuf| Arc::new(SnapshotKeeper::new(Arc::clone(&caches), folder.clone()));
    let snapshots = settings.snapshot_folder.as_ref().map(snapshot_keeper);
    let config_source = ConfigSource::open(&file).map_err(ServerError::Signal)?;
    let (set_draining, draining) = watch::channel(false);
    let lifecycle =
        Arc::new(Lifecycle::new(Arc::clone(&pipeline), snapshots.clone(), file, settings.clone(), draining.clone()));
    let addresses = addresses(&listeners);
    tokio::spawn(recorder.clone().keep_up());
    let state = http::State {
        recorder,
        caches: Arc::clone(&caches),
        pipeline: Arc::clone(&pipeline),
        draining: draining.clone(),
    };
    tokio::spawn(http::serve(listeners.metrics, state));
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::NotServing).await;
    let grpc = keep_alive(Server::builder())
        .layer(CountLayer)
        .layer(AdmitLayer::new(Arc::clone(&pipeline), settings.limits.default_deadline))
        .add_service(health_service)
        .add_service(mid_emb_service(&settings, &pipeline, draining.clone()))
        .add_service(reflection_v1())
        .add_service(reflection_v1alpha())
        .serve_with_incoming_shutdown(incoming(listeners.grpc), drain_begins(draining.clone()));
    let admin = Admin::new(caches, Arc::clone(&pipeline), Arc::clone(&lifecycle));
    let admin = admin_builder(&settings.admin_guard)?
        .layer(CountLayer)
        .add_service(AdminServiceServer::with_interceptor(admin, Guard::new(settings.admin_guard.token_file.clone())))
        .add_service(reflection_v1())
        .serve_with_incoming_shutdown(incoming(listeners.admin), drain_begins(draining));
    let mut serving = tokio::spawn(async { tokio::try_join!(grpc, admin) });

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

    tokio::select! {
        () = &mut shutdown => {}
        // A listener failed.
        served = &mut serving => return served?.map(|_| ()).map_err(ServerError::from),
    }
    let end_by = Instant::now() + settings.drain + LAST_SNAPSHOT_RESERVE;
    set_health(&health, ServingStatus::NotServing).await;
    set_draining.send_replace(true);
    end_health_watches(health).await;
    tracing::info!(drain_seconds = settings.drain.as_secs(), "draining");
    let drained = tokio::time::timeout(settings.drain, serving).await;
    if let Some(snapshots) = snapshots {
        snapshots.write_last(lifecycle.cached_parts(), end_by.saturating_duration_since(Instant::now())).await;
    }
    match drained {
        Ok(served) => {
            served??;
            tracing::info!("stopped");
        }
        Err(_elapsed) => tracing::warn!("stopped while requests were still in flight after server.drain_seconds"),
    }
    Ok(())
}

/// Detects peers that vanished and closes their connections.
fn keep_alive(server: Server) -> Server {
    server
        .tcp_nodelay(true)
        .tcp_keepalive(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// The builder of the admin server, with TLS if the config names a certificate.
fn admin_builder(guard: &AdminGuard) -> Result<Server, ServerError> {
    let builder = keep_alive(Server::builder());
    let Some((certificate, key)) = &guard.certificate else { return Ok(builder) };
    let certificate = read_tls_file("admin.tls_cert", certificate)?;
    let key = read_tls_file("admin.tls_key", key)?;
    let mut tls = ServerTlsConfig::new().identity(Identity::from_pem(certificate, key));
    if let Some(authority) = &guard.client_ca {
        tls = tls.client_ca_root(Certificate::from_pem(read_tls_file("admin.tls_client_ca", authority)?));
    }
    Server::builder()
        .tls_config(tls)
        .map_err(|source| ServerError::Tls { key: "admin.tls_cert", source: source.into() })
}

fn read_tls_file(key: &'static str, path: &Path) -> Result<Vec<u8>, ServerError> {
    fs::read(path).map_err(|error| {
        let source = format!("{} cannot be read: {error}", path.display()).into();
        ServerError::Tls { key, source }
    })
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

fn addresses(listeners: &Listeners) -> [String; 3] {
    [&listeners.grpc, &listeners.admin, &listeners.metrics]
        .map(|listener| listener.local_addr().map_or_else(|_| String::new(), |address| address.to_string()))
}

/// Connections with Nagle's delay off.
fn incoming(listener: TcpListener) -> impl tokio_stream::Stream<Item = io::Result<tokio::net::TcpStream>> {
    use tokio_stream::StreamExt;
    TcpListenerStream::new(listener).map(|stream| {
        let stream = stream?;
        stream.set_nodelay(true)?;
        Ok(stream)
    })
}

async fn drain_begins(mut draining: watch::Receiver<bool>) {
    // An error means that the sender was dropped with the server, which is a reason to stop, too.
    let _ = draining.wait_for(|is_draining| *is_draining).await;
}

fn mid_emb_service(
    settings: &Settings,
    pipeline: &Arc<Pipeline>,
    draining: watch::Receiver<bool>,
) -> MidEmbServiceServer<MidEmb> {
    MidEmbServiceServer::new(MidEmb::new(Arc::clone(pipeline), settings.limits, draining))
        .max_decoding_message_size(settings.limits.max_message_bytes)
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
