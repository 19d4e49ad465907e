//! Files appear complete and in time, within their bounds, and whatever the disk does.

use super::*;
use crate::served_features::{
    Rate, SampleBy,
    stand_ins::{model, page, read, text},
};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn options(folder: &Path) -> Options {
    Options {
        folder: folder.to_path_buf(),
        upload_to: None,
        rate: Rate::from_percent(100.0).unwrap(),
        sample_by: SampleBy::Request,
        rotate_bytes: 1 << 30,
        rotate_every: Duration::from_secs(3600),
        max_disk_bytes: 1 << 30,
        queue_bytes: 1 << 30,
    }
}

fn writer(options: Options) -> Writer {
    let queue = Arc::new(Queue::new(options.queue_bytes, 1 << 20, options.rotate_every));
    Writer::new(options, queue, Arc::default())
}

fn batch(samples: Vec<Sample>) -> Batch {
    Batch { samples, since: Some(Instant::now()), ..Batch::default() }
}

/// Writes each list of samples as a batch, and ends.
fn write_all(options: Options, batches: Vec<Vec<Sample>>) {
    let mut writer = writer(options);
    for samples in batches {
        writer.write(batch(samples));
    }
    writer.close_files(|_file, _now| true);
}

/// The requests of each finished file, oldest file first.
fn written(folder: &Path) -> Vec<BTreeSet<String>> {
    let files = folder::finished(folder).unwrap();
    files.iter().map(|path| read(path).iter().map(|row| text(row, "request_id")).collect()).collect()
}

fn all_written(folder: &Path) -> BTreeSet<String> {
    written(folder).into_iter().flatten().collect()
}

fn ids(requests: impl IntoIterator<Item = usize>) -> BTreeSet<String> {
    requests.into_iter().map(|i| format!("request-{i}")).collect()
}

fn n_files(folder: &Path) -> usize {
    let partitions = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    partitions.map(|partition| fs::read_dir(partition).unwrap().count()).sum()
}

#[test]
fn a_file_that_is_as_large_as_it_may_be_is_followed_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let rotate_bytes = 3 * page(0, 100).n_bytes() as u64;
    let batches = (0..10).map(|i| vec![page(i, 100)]).collect();
    write_all(Options { rotate_bytes, ..options(folder.path()) }, batches);
    let files = folder::finished(folder.path()).unwrap();
    assert!((4..=5).contains(&files.len()), "{} files", files.len());
    for file in files {
        let n_bytes = fs::metadata(&file).unwrap().len();
        // The metadata at the end of a file comes on top.
        assert!(n_bytes < rotate_bytes + 8192, "{n_bytes} bytes");
    }
    assert_eq!(all_written(folder.path()), ids(0..10));
}

#[test]
fn bundles_and_days_have_files_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut samples: Vec<Sample> = (0..6).map(|i| page(i, 2)).collect();
    samples[1].answer.model = model("another bundle's digest");
    samples[2].request.at_us = 1_000_000 * 86_400 * 366;
    write_all(options(folder.path()), vec![samples]);
    let mut files = written(folder.path());
    files.sort();
    assert_eq!(files, [ids([0, 3, 4, 5]), ids([1]), ids([2])]);
    assert!(folder.path().join("date=1971-01-02").is_dir());
}

#[test]
fn a_file_is_finished_when_its_first_sample_has_waited_long_enough() {
    let folder = tempfile::tempdir().unwrap();
    let rotate_every = Duration::from_secs(60);
    let mut writer = writer(Options { rotate_every, ..options(folder.path()) });
    let since = Instant::now();
    writer.write(Batch { samples: vec![page(0, 2)], since: Some(since), ..Batch::default() });
    writer.write(Batch { samples: vec![page(1, 2)], since: Some(since + rotate_every / 2), ..Batch::default() });
    let close_at: Vec<Instant> = writer.files.values().map(|file| file.close_at).collect();
    assert_eq!(close_at, [since + rotate_every]);
    writer.close_files(|file, now| file.close_at <= now);
    assert!(written(folder.path()).is_empty());
    writer.close_files(|file, now| file.close_at <= now + rotate_every);
    assert_eq!(written(folder.path()), [ids([0, 1])]);
}

/// The whole life of the thread: it waits, writes, and ends with everything written.
#[test]
fn the_thread_writes_what_waits_when_the_queue_ends() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(options(folder.path()));
    let queue = Arc::clone(&writer.queue);
    let (ended, writing) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || writer.run(ended));
    for i in 0..5 {
        assert!(queue.offer(page(i, 30)));
    }
    queue.end();
    writing.recv().expect("the thread ended without a word");
    thread.join().unwrap();
    assert_eq!(written(folder.path()), [ids(0..5)]);
}

#[test]
fn samples_beyond_the_disk_budget_are_dropped_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let n_bytes = page(0, 100).n_bytes() as u64;
    let max_disk_bytes = 4 * n_bytes;
    let mut writer = writer(Options { max_disk_bytes, rotate_bytes: n_bytes, ..options(folder.path()) });
    for i in 0..10 {
        writer.write(batch(vec![page(i, 100)]));
    }
    writer.close_files(|_file, _now| true);
    assert!(folder::n_bytes(folder.path()).unwrap() <= max_disk_bytes + 8192);
    let kept = all_written(folder.path());
    assert!((1..=4).contains(&kept.len()) && kept == ids(0..kept.len()), "{kept:?}");
    for file in folder::finished(folder.path()).unwrap() {
        fs::remove_file(file).unwrap();
    }
    // As if the folder had been measured a while ago.
    writer.used.measured = None;
    writer.write(batch(vec![page(10, 100)]));
    writer.close_files(|_file, _now| true);
    assert_eq!(all_written(folder.path()), ids([10]));
}

/// What earlier processes finished counts, and what they left unfinished is removed.
#[test]
fn a_start_removes_left_overs_and_measures_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    write_all(options(folder.path()), vec![vec![page(0, 100)]]);
    let left: PathBuf = {
        let mut killed = writer(options(folder.path()));
        killed.write(batch(vec![page(1, 100)]));
        let left = killed.files.values().next().unwrap().unfinished_path().to_owned();
        assert!(left.exists());
        // A killed process closes no file, and its locks are gone.
        left
    };
    assert!(left.exists());
    let mut writer = writer(Options { max_disk_bytes: 1, ..options(folder.path()) });
    writer.clean_up();
    assert!(!left.exists());
    assert_eq!(n_files(folder.path()), 1);
    let n_bytes = fs::metadata(&folder::finished(folder.path()).unwrap()[0]).unwrap().len();
    assert_eq!(writer.used.n_bytes, n_bytes);
}

/// A folder that cannot be written is what a disk that failed looks like.
#[test]
fn after_a_failure_nothing_is_tried_for_a_while_and_then_all_is_well_again() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("features");
    fs::write(&folder, "a file in place of the folder").unwrap();
    let mut writer = writer(options(&folder));
    writer.write(batch(vec![page(0, 2)]));
    let retry_at = writer.retry_at.expect("the failure went unnoticed");
    fs::remove_file(&folder).unwrap();
    writer.write(batch(vec![page(1, 2)]));
    assert_eq!(writer.retry_at, Some(retry_at), "a sample was tried during the pause");
    assert!(!folder.exists());
    writer.retry_at = Some(Instant::now());
    writer.write(batch(vec![page(2, 2)]));
    assert_eq!(writer.retry_at, None);
    writer.close_files(|_file, _now| true);
    assert_eq!(all_written(&folder), ids([2]));
}

/// What was written before the failure is kept, in a file that readers accept.
#[test]
fn a_file_that_fails_is_finished_with_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = writer(options(folder.path()));
    writer.write(batch(vec![page(0, 50)]));
    let (key, file) = writer.files.pop_first().unwrap();
    // The half of a row group, as a full disk leaves it.
    file.damage();
    writer.files.insert(key, file);
    writer.close_files(|_file, _now| true);
    assert_eq!(written(folder.path()), [ids([0])]);
}

#[test]
fn every_sample_is_counted_once_by_what_became_of_it() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let folder = tempfile::tempdir().unwrap();
    metrics::with_local_recorder(&recorder, || {
        events::served_features_started();
        let n_bytes = page(0, 100).n_bytes() as u64;
        let max_disk_bytes = 3 * n_bytes;
        let mut writer = writer(Options { max_disk_bytes, ..options(folder.path()) });
        for i in 0..5 {
            writer.write(batch(vec![page(i, 100)]));
        }
        writer.close_files(|_file, _now| true);
        writer.retry_at = Some(Instant::now() + PAUSE);
        writer.write(batch(vec![page(9, 7)]));
    });
    let text = recorder.handle().render();
    let n = |name: &str, result: &str| -> u64 {
        let series = format!("midemb_served_features_{name}_total{{result=\"{result}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&series)).unwrap().parse().unwrap()
    };
    let n_written = all_written(folder.path()).len() as u64;
    assert_eq!((n("requests", "written"), n("rows", "written")), (n_written, 100 * n_written));
    assert_eq!((n("requests", "disk_budget"), n("rows", "disk_budget")), (5 - n_written, 100 * (5 - n_written)));
    assert_eq!((n("requests", "failed"), n("rows", "failed"), n("requests", "queue_full")), (1, 7, 0));
    assert_eq!((n("files", "written"), n("files", "uploaded")), (1, 0));
}
