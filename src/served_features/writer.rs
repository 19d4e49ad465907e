//! The thread that writes samples to files.
//!
//! Nobody waits for it: while it is behind, or its disk stalls, the queue gets full and further samples are dropped. What it cannot
//! write is lost and counted. The first failure is logged, and after a pause it tries again.

use super::{
    Options,
    file::{Counts, OpenFile, WriteError},
    folder::{self, UtcTime},
    queue::{Batch, Queue},
    sample::Sample,
};
use crate::telemetry::events::{self, ServedFeaturesResult};
use std::{
    collections::BTreeMap,
    sync::{Arc, mpsc::Sender},
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// How long nothing is written after a failure.
const PAUSE: Duration = Duration::from_secs(5);
/// How often the folder is measured at most. Readers, uploads and other servers change what it holds.
const MEASURE_EVERY: Duration = Duration::from_secs(1);

/// The memory that is kept from one row group to the next.
const MAX_BUFFER_BYTES: usize = 16 << 20;

/// The rows of one file are of one bundle and one day.
type FileKey = (String, String);

pub(super) struct Writer {
    options: Options,
    queue: Arc<Queue>,
    files: BTreeMap<FileKey, OpenFile>,
    /// Notified of every file that is finished.
    finished: Arc<Notify>,
    used: Used,
    /// No attempt before then; set while writing fails.
    retry_at: Option<Instant>,
    /// The memory that row groups are encoded in.
    buffer: Vec<u8>,
}

/// What the folder holds.
#[derive(Default)]
struct Used {
    n_bytes: u64,
    measured: Option<Instant>,
}

impl Writer {
    pub(super) fn new(options: Options, queue: Arc<Queue>, finished: Arc<Notify>) -> Self {
        let (files, used, retry_at, buffer) = (BTreeMap::new(), Used::default(), None, Vec::new());
        Writer { options, queue, files, finished, used, retry_at, buffer }
    }

    /// Writes until the queue has ended, then closes all files and says so.
    pub(super) fn run(mut self, ended: Sender<()>) {
        self.clean_up();
        loop {
            let batch = self.queue.take(self.files.values().map(|file| file.close_at).min());
            let (n_bytes, is_last) = (batch.n_bytes, batch.is_last);
            self.write(batch);
            self.queue.release(n_bytes);
            self.close_files(|file, now| is_last || file.close_at <= now);
            if is_last {
                // Nobody may wait for it any more.
                let _ = ended.send(());
                return;
            }
        }
    }

    /// Removes what killed processes left, and finds what they finished.
    fn clean_up(&mut self) {
        // Whatever keeps the folder from being read keeps it from being written, which is then logged.
        if let Ok(n_files @ 1..) = folder::remove_left_overs(&self.options.folder) {
            tracing::info!(n_files, "unfinished files of served features removed");
        }
        self.measure();
    }

    fn write(&mut self, batch: Batch) {
        let mut by_file: BTreeMap<FileKey, Vec<Sample>> = BTreeMap::new();
        for sample in batch.samples {
            let date = UtcTime::from_micros(sample.request.at_us).date().to_owned();
            by_file.entry((sample.answer.model.digest.clone(), date)).or_default().push(sample);
        }
        let close_at = batch.since.unwrap_or_else(Instant::now) + self.options.rotate_every;
        for (key, samples) in by_file {
            self.write_samples(key, &samples, close_at);
        }
    }

    fn write_samples(&mut self, key: FileKey, samples: &[Sample], close_at: Instant) {
        let counts = Counts::of(samples);
        if self.retry_at.is_some_and(|retry_at| Instant::now() < retry_at) {
            return count(ServedFeaturesResult::Failed, counts);
        }
        let n_bytes = samples.iter().map(|sample| sample.n_bytes() as u64).sum();
        if !self.has_room(n_bytes) {
            return count(ServedFeaturesResult::DiskBudget, counts);
        }
        let was_failing = self.retry_at.is_some();
        match self.append(&key, samples, n_bytes, close_at) {
            Ok(()) if was_failing => {
                self.retry_at = None;
                tracing::info!(folder = %self.options.folder.display(), "served features are written again");
            }
            Ok(()) => {}
            Err(WriteError::Parquet(error)) => {
                count(ServedFeaturesResult::Failed, counts);
                tracing::error!(%error, n_rows = counts.n_rows, "served features cannot be encoded, these are lost");
            }
            Err(error @ WriteError::Disk(_)) => {
                count(ServedFeaturesResult::Failed, counts);
                // What was written before is kept if the disk still permits that.
                if let Some(file) = self.files.remove(&key) {
                    self.close(file);
                }
                self.fail(&error);
            }
        }
        if self.buffer.capacity() > MAX_BUFFER_BYTES {
            // One large page.
            self.buffer = Vec::new();
        }
    }

    fn append(&mut self, key: &FileKey, samples: &[Sample], n_bytes: u64, close_at: Instant) -> Result<(), WriteError> {
        let is_full = |file: &mut OpenFile| file.n_bytes + n_bytes > self.options.rotate_bytes;
        if let Some(file) = self.files.extract_if(.., |found, file| found == key && is_full(file)).next() {
            self.close(file.1);
        }
        if !self.files.contains_key(key) {
            let first = samples.first().map_or(0, |sample| sample.request.at_us);
            let file = OpenFile::create(&self.options.folder, &UtcTime::from_micros(first), &key.0, close_at)?;
            self.files.insert(key.clone(), file);
        }
        let Some(file) = self.files.get_mut(key) else { return Ok(()) };
        let n_bytes_before = file.n_bytes;
        file.append(samples, &mut self.buffer)?;
        self.used.n_bytes += file.n_bytes - n_bytes_before;
        events::served_features_measured(self.used.n_bytes);
        Ok(())
    }

    fn close_files(&mut self, is_due: impl Fn(&OpenFile, Instant) -> bool) {
        let now = Instant::now();
        let due: Vec<_> = self.files.extract_if(.., |_key, file| is_due(file, now)).collect();
        for (_key, file) in due {
            self.close(file);
        }
    }

    fn close(&mut self, file: OpenFile) {
        let counts = file.counts;
        if counts == Counts::default() {
            // Its first row group failed.
            return file.remove();
        }
        match file.close() {
            Ok(path) => {
                count(ServedFeaturesResult::Written, counts);
                events::served_features_file("written");
                tracing::debug!(path = %path.display(), n_rows = counts.n_rows, "file of served features written");
                self.finished.notify_one();
            }
            Err(error) => {
                count(ServedFeaturesResult::Failed, counts);
                self.fail(&error);
            }
        }
        self.measure();
    }

    /// Pauses, and logs the first failure.
    fn fail(&mut self, error: &WriteError) {
        if self.retry_at.replace(Instant::now() + PAUSE).is_none() {
            let folder = self.options.folder.display();
            tracing::error!(%folder, %error, "served features cannot be written, samples are lost until this is mended");
        }
    }

    /// Whether as many bytes fit into what the folder may hold.
    fn has_room(&mut self, n_bytes: u64) -> bool {
        let max_bytes = self.options.max_disk_bytes;
        if self.used.measured.is_none_or(|at| at.elapsed() >= MEASURE_EVERY) {
            self.measure();
        }
        self.used.n_bytes.saturating_add(n_bytes) <= max_bytes
    }

    fn measure(&mut self) {
        // If the folder cannot be read, it can hardly be written, and that is logged.
        if let Ok(n_bytes) = folder::n_bytes(&self.options.folder) {
            self.used = Used { n_bytes, measured: Some(Instant::now()) };
            events::served_features_measured(n_bytes);
        }
    }
}

fn count(result: ServedFeaturesResult, Counts { n_requests, n_rows }: Counts) {
    events::served_features_sampled(result, n_requests, n_rows);
}

#[cfg(test)]
mod tests;
