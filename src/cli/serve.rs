//! `midemb serve`.

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
    /// Record which items requests ask for into a new file: ids and digests, never text. `midemb bench w3-zipf --trace` and
    /// `midemb bench cache-curve --trace` read it.
    #[arg(long, value_name = "FILE")]
    record_trace: Option<PathBuf>,
    /// The trace ends at so many megabytes. A request of 580 items is about 30 KB.
    #[arg(long, value_name = "MB", default_value_t = 1024, requires = "record_trace")]
    record_trace_mb: u64,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    // Before the log is there: how it looks stands in the config.
    let desired = desired::read(&args.config)?;
    let settings = Settings::of_text(&desired.text, &args.config)?;
    logs::install(settings.log_format, &settings.log_filter)?;
    desired.log_origin();
    let recorder = Recorder::install()?;
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
        server::run(start, listeners, recorder, first(stop)).await?;
        Ok(())
    });
    // What is left has outlived its grace period, or is a load that nobody waits for any more.
    runtime.shutdown_background();
    if let Some(trace) = trace {
        trace.finish();
    }
    served
}

/// What a request costs in I/O is a sixth of it, or half where its user is known. More threads than that only take turns on
/// the cores with those that score, and each turn empties a core's caches.
fn io_threads(n_inference_threads: usize) -> usize {
    n_inference_threads.div_ceil(2)
}

async fn first([mut terminate, mut interrupt]: [Signal; 2]) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
