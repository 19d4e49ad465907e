//! Served features: a sample of what was answered, in Parquet files, to train a ranking model on exactly what it was served.
//!
//! In: requests as they are decoded ([`ServedFeatures::sample`]), and their answers as they are sent ([`ServedFeatures::offer`]).
//! Out: files in a local folder, one row per candidate, and objects in a store if one is configured. docs/served-features.md says
//! what a reader finds in them.
//!
//! `sampler` draws requests, [`sample`] is what is kept of one, `queue` holds those that wait, and the thread of `writer` turns them
//! into row groups (`schema`, `row_group`, `hybrid`) of files (`file`, `folder`), which `uploads` uploads.
//!
//! Invariants:
//! - Nothing here delays or fails an answer. A request that is not drawn costs a random number or a hash.
//! - What waits has a bound in bytes, and so has what is on the disk. What does not fit is dropped and counted.
//! - A file that a reader can see is complete, and its rows are of one bundle.
//! - Vectors are what was computed, in single precision, also for a caller that asked for less.
//!
//! Deliberately not here: removing old files, which belong to their reader, and compressing them.

mod file;
mod folder;
mod hybrid;
mod queue;
mod row_group;
pub mod sample;
mod sampler;
mod schema;
mod uploads;
mod writer;

#[cfg(test)]
mod stand_ins;

pub use sample::{SampledAnswer, SampledRequest, status_name};
pub use sampler::{Rate, SampleBy};

use crate::{
    bundle::store::{BundleUrl, UploadFolder},
    domain::MidEmbRequest,
    telemetry::events::{self, ServedFeaturesResult},
};
use queue::Queue;
use sample::Sample;
use sampler::{Sampler, random_id};
use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use uploads::Uploads;
use writer::Writer;

/// What a row group has of samples. More would make larger row groups, which readers like, and hold more of what was answered in
/// memory; less would make more of them.
const ROW_GROUP_BYTES: usize = 4 << 20;

/// The settings of `[served_features]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    #[expect(missing_docs, reason = "name and type say it all")]
    pub folder: PathBuf,
    /// Where finished files are uploaded to, if anywhere.
    pub upload_to: Option<BundleUrl>,
    /// How much is sampled at the start; [`ServedFeatures::set_rate`] changes it.
    pub rate: Rate,
    /// What is sampled as a whole.
    pub sample_by: SampleBy,
    /// The most bytes of a file, unless one row group has more.
    pub rotate_bytes: u64,
    /// How long a sample waits until it is in a finished file.
    pub rotate_every: Duration,
    /// The most bytes of all files in the folder.
    pub max_disk_bytes: u64,
    /// The most bytes of the samples that wait.
    pub queue_bytes: usize,
}

/// Samples requests and hands them to a thread that writes them.
#[derive(Debug)]
pub struct ServedFeatures {
    sampler: Sampler,
    queue: Arc<Queue>,
    /// Says once that everything is written.
    writing: Mutex<Receiver<()>>,
    uploads: Option<Uploads>,
}

impl ServedFeatures {
    /// Starts the writer. `store` is the opened `upload_to`.
    ///
    /// A folder that cannot be written does not fail the start: samples are lost, as they would be if its disk failed later.
    pub fn start(options: Options, store: Option<UploadFolder>) -> io::Result<Self> {
        events::served_features_started();
        let finished = Arc::new(Notify::new());
        let uploads = store.map(|store| Uploads::new(options.folder.clone(), store, Arc::clone(&finished)));
        let sampler = Sampler::new(options.rate, options.sample_by);
        let queue = Arc::new(Queue::new(options.queue_bytes, ROW_GROUP_BYTES, options.rotate_every));
        let writer = Writer::new(options, Arc::clone(&queue), finished);
        let (ended, writing) = channel();
        thread::Builder::new().name("features".to_owned()).spawn(move || writer.run(ended))?;
        Ok(ServedFeatures { sampler, queue, writing: Mutex::new(writing), uploads })
    }

    /// Samples at another rate from now on.
    pub fn set_rate(&self, rate: Rate) {
        self.sampler.set_rate(rate);
    }

    /// Copies what is written of a request, if it is drawn. `request_id` is the caller's own, if it sent one.
    pub fn sample(&self, request: &MidEmbRequest<'_>, request_id: Option<&str>) -> Option<Box<SampledRequest>> {
        if !self.sampler.draws(request.user_id) {
            return None;
        }
        let request_id = request_id.map_or_else(random_id, str::to_owned);
        Some(Box::new(SampledRequest::new(request, request_id)))
    }

    /// Hands a sampled request with its answer to the writer, or drops it if too much waits.
    pub fn offer(&self, request: SampledRequest, answer: SampledAnswer) {
        let n_rows = answer.statuses.len() as u64;
        if !self.queue.offer(Sample { request, answer }) {
            events::served_features_sampled(ServedFeaturesResult::QueueFull, 1, n_rows);
        }
    }

    /// Uploads finished files, if a store is configured. Never returns; drop the future to stop it.
    pub async fn upload(&self) {
        match &self.uploads {
            Some(uploads) => uploads.run().await,
            None => std::future::pending().await,
        }
    }

    /// Takes no more samples, writes what waits, closes the files and uploads them, for at most as long as this.
    pub async fn finish(self: &Arc<Self>, within: Duration) {
        let end_by = Instant::now() + within;
        let features = Arc::clone(self);
        // An error means that the runtime ends, and with it the process.
        let _ = tokio::task::spawn_blocking(move || features.finish_writing(end_by)).await;
        if let Some(uploads) = &self.uploads {
            uploads.run_once(end_by.saturating_duration_since(Instant::now())).await;
        }
    }

    fn finish_writing(&self, end_by: Instant) {
        self.queue.end();
        let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let left = end_by.saturating_duration_since(Instant::now());
        let ended = writing.recv_timeout(left);
        let n_requests = self.queue.n_waiting();
        match ended {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => tracing::warn!(
                n_requests,
                "served features are not written in time, the open files and what waits are lost"
            ),
            Err(RecvTimeoutError::Disconnected) => {
                tracing::error!(n_requests, "the thread that writes served features has ended, what waits is lost");
            }
        }
    }
}
