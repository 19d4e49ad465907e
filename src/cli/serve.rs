//! `midemb serve`: settings, logs and metrics first, then the server until a signal ends it.

use crate::{
    config::Settings,
    lifecycle::desired,
    pipeline::item_trace,
    server::{self, Listeners, Start},
    telemetry::{logs, recorder::Recorder},
};
use std::{path::PathBuf, sync::Arc};
use tokio::signal::unix::{Signal, SignalKind, signal};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The config file; `deploy/midemb.toml` is one to start from.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Record which items requests ask for into a new file: ids and digests, never text. `midemb-bench w3-zipf --trace`
    /// and `midemb cache-curve --trace` read it.
    #[arg(long, value_name = "FILE")]
    record_trace: Option<PathBuf>,
    /// The size in megabytes at which the trace ends. A request of 580 items is about 30 KB.
    #[arg(long, value_name = "MB", default_value_t = 1024, requires = "record_trace")]
    record_trace_mb: u64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    // Read before the log is installed, as the config says how log lines look.
    let desired = desired::read(&args.config)?;
    let settings = Settings::from_text(&desired.text, &args.config)?;
    // First, as it counts log lines that are lost.
    let recorder = Recorder::install()?;
    let _log_thread = logs::install(settings.log_format, &settings.log_filter)?;
    desired.log_origin();
    logs::install_panic_hook();
    let trace = args.record_trace.as_deref().map(|path| item_trace::Recorder::start(path, args.record_trace_mb << 20));
    let trace = trace.transpose()?.map(Arc::new);
    let serving = trace.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(io_threads(settings.n_threads))
        .thread_name("io")
        .enable_all()
        .build()?;
    let served = runtime.block_on(async {
        let stop = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
        let listeners = Listeners::bind(&settings).await?;
        let start = Start { desired, file: args.config.clone(), settings, trace: serving };
        server::run(start, listeners, recorder, any_of(stop)).await?;
        Ok(())
    });
    // Tasks that are left have outlived their grace period, or load a model that is not needed any more.
    runtime.shutdown_background();
    if let Some(trace) = trace {
        trace.finish();
    }
    served
}

/// I/O is a sixth of a request's cost, or half where its user is cached. More I/O threads than this would only share the cores
/// with the threads that score, and every switch costs a core the contents of its caches.
fn io_threads(n_inference_threads: usize) -> usize {
    n_inference_threads.div_ceil(2)
}

async fn any_of([mut terminate, mut interrupt]: [Signal; 2]) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
