//! Tests with real sockets and the real client: a small http server serves the fixture bundle and injects faults.

use super::*;
use std::{
    collections::HashMap,
    fs,
    sync::Mutex,
    time::{Duration, SystemTime},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
    time::Instant,
};

/// How the server fails a request.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// Answers with this status.
    Status(u16),
    /// Disconnects after this many bytes of the file.
    Cut(usize),
    /// Never answers.
    Silence,
}

/// Serves a folder under `/bundle/` over HTTP/1.1, one request per connection.
struct Server {
    folder: TempDir,
    url: BundleUrl,
    shared: Arc<Mutex<Shared>>,
    /// Notified of every request that is never answered.
    silenced: Arc<Notify>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    requests: Vec<FileRequest>,
    /// The faults of each file's next requests, in reverse order.
    faults: HashMap<String, Vec<Fault>>,
    /// The last `authorization` header.
    authorization: Option<String>,
    /// Whether answers have an ETag; without one an interrupted transfer cannot be resumed.
    has_tags: bool,
}

#[derive(Debug)]
struct FileRequest {
    file: String,
    range: Option<String>,
}

impl Server {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(fixture()).unwrap().flatten() {
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = BundleUrl::parse(&format!("http://{}/bundle/", listener.local_addr().unwrap())).unwrap();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let silenced = Arc::new(Notify::new());
        let (root, state, notify) = (folder.path().to_path_buf(), shared.clone(), silenced.clone());
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (root, state, notify) = (root.clone(), state.clone(), notify.clone());
                // A client that disconnects is not a failure of the server.
                tokio::spawn(async move { drop(answer(stream, root, state, notify).await) });
            }
        });
        Server { folder, url, shared, silenced, task }
    }

    /// The files requested since the last call.
    fn requests(&self) -> Vec<String> {
        let requests = std::mem::take(&mut self.shared.lock().unwrap().requests);
        requests.into_iter().map(|request| request.file).collect()
    }

    fn fail(&self, file: &str, faults: &[Fault]) {
        self.shared.lock().unwrap().faults.insert(file.to_owned(), faults.iter().rev().copied().collect());
    }

    fn digest(&self) -> String {
        sha256_hex(&fs::read(self.folder.path().join("manifest.toml")).unwrap())
    }

    fn edit(&self, change: impl FnOnce(&mut toml::Table)) {
        let path = self.folder.path().join("manifest.toml");
        let mut manifest: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
        change(&mut manifest);
        fs::write(path, manifest.to_string()).unwrap();
    }

    /// Publishes another version, in which `file` has different bytes.
    fn publish(&self, file: &str, bytes: &[u8]) {
        fs::write(self.folder.path().join(file), bytes).unwrap();
        self.edit(|manifest| {
            let listed = entry(manifest, file);
            listed["sha256"] = sha256_hex(bytes).into();
            listed["bytes"] = (bytes.len() as i64).into();
        });
    }

    /// Stops the server and closes its connections.
    async fn stop(self) -> BundleUrl {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
        self.url
    }
}

async fn answer(stream: TcpStream, root: PathBuf, state: Arc<Mutex<Shared>>, silenced: Arc<Notify>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let header = |name: &str| {
        let mut pairs = lines[1..].iter().filter_map(|line| line.split_once(": "));
        pairs.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
    };
    let file = lines[0].split(' ').nth(1).unwrap().trim_start_matches("/bundle/").to_owned();
    let range = header("range");
    let (fault, tag) = {
        let mut state = state.lock().unwrap();
        state.requests.push(FileRequest { file: file.clone(), range: range.clone() });
        state.authorization = header("authorization");
        let fault = state.faults.get_mut(&file).and_then(Vec::pop);
        (fault, if state.has_tags { "etag: \"1\"\r\n" } else { "" })
    };
    let bytes = fs::read(root.join(&file));
    let status = match (fault, &bytes) {
        (Some(Fault::Silence), _) => {
            silenced.notify_one();
            std::future::pending().await
        }
        (Some(Fault::Status(status)), _) => status,
        (_, Err(_)) => 404,
        _ if range.is_some() => 206,
        _ => 200,
    };
    let all = if status < 300 { bytes? } else { b"<Error>\n  bad request\n</Error>".to_vec() };
    let start = range.map_or(0, |range| range["bytes=".len()..].split_once('-').unwrap().0.parse().unwrap());
    let end = if let Some(Fault::Cut(n)) = fault { start + n } else { all.len() };
    let head = format!(
        "HTTP/1.1 {status} x\r\nconnection: close\r\n{tag}content-length: {}\r\ncontent-range: bytes {start}-{}/{}\r\n\r\n",
        all.len() - start,
        all.len() - 1,
        all.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&all[start..end]).await?;
    stream.shutdown().await
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bundle")
}

fn entry<'a>(manifest: &'a mut toml::Table, file: &str) -> &'a mut toml::Value {
    let files = manifest["files"].as_array_mut().unwrap();
    files.iter_mut().find(|listed| listed["path"].as_str() == Some(file)).unwrap()
}

/// A store with an empty cache.
fn store() -> (TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path().join("cache"), Vec::new());
    (folder, store)
}

impl Store {
    async fn fetch_or_refuse(&self, url: &BundleUrl) -> Result<PathBuf, StoreError> {
        self.fetch(url, None, Fallback::Refuse, &|_, _| ()).await
    }

    fn folder(&self) -> PathBuf {
        self.cache.folder.clone()
    }
}

/// Bundles and work in progress: everything in the cache except its two subfolders.
fn bundles(store: &Store) -> Vec<String> {
    names(&store.folder()).into_iter().filter(|name| name != "files" && name != "latest").collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[track_caller]
fn assert_same_files(found: &Path, expected: &Path) {
    assert_eq!(names(found), names(expected));
    for name in names(expected) {
        assert!(fs::read(found.join(&name)).unwrap() == fs::read(expected.join(&name)).unwrap(), "{name} differs");
    }
}

/// Makes a file look two hours old.
fn age(path: &Path) {
    let old = SystemTime::now() - Duration::from_hours(2);
    fs::File::open(path).unwrap().set_modified(old).unwrap();
}

#[track_caller]
fn assert_line(error: &StoreError, parts: &[&str]) {
    let line = error.to_string();
    assert!(
        !line.contains('\n') && parts.iter().all(|part| line.contains(part)),
        "{line:?} does not contain {parts:?}"
    );
}

const ALL: [&str; 7] = [
    "manifest.toml",
    "cvr.onnx",
    "encoder.onnx",
    "golden.json",
    "item_tower.onnx",
    "tokenizer.json",
    "user_tower.onnx",
];

#[tokio::test]
async fn a_bundle_is_fetched_unchanged_and_only_once() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let reported = Mutex::new(Vec::new());
    let progress = |n, total| reported.lock().unwrap().push((n, total));
    let bundle = store.fetch(&server.url, None, Fallback::Refuse, &progress).await.unwrap();
    assert_same_files(&bundle, &fixture());
    assert_eq!(bundle, store.folder().join(server.digest()));
    assert_eq!(server.requests(), ALL);
    let reported = reported.into_inner().unwrap();
    let total = ALL[1..].iter().map(|file| fs::metadata(fixture().join(file)).unwrap().len()).sum();
    assert_eq!(reported.last(), Some(&(total, total)));
    assert!(reported.is_sorted() && reported.iter().all(|(_, n)| *n == total), "{reported:?}");

    assert_eq!(store.fetch_or_refuse(&server.url).await.unwrap(), bundle);
    assert_eq!(server.requests(), ["manifest.toml"]);
    assert_eq!(bundles(&store), [server.digest()]);
}

#[tokio::test]
async fn an_update_fetches_only_the_changed_files() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let first = store.fetch_or_refuse(&server.url).await.unwrap();
    server.requests();
    server.publish("cvr.onnx", b"another head");
    let second = store.fetch_or_refuse(&server.url).await.unwrap();
    assert_eq!(server.requests(), ["manifest.toml", "cvr.onnx"]);
    assert_same_files(&second, server.folder.path());
    assert_same_files(&first, &fixture());
}

#[tokio::test]
async fn a_failed_transfer_leaves_no_bundle_and_complete_files_are_kept() {
    let (server, (_folder, store)) = (Server::start().await, store());
    server.fail("encoder.onnx", &[Fault::Cut(1000)]);
    let error = store.fetch_or_refuse(&server.url).await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    assert_line(&error, &[&server.url.file("encoder.onnx"), "cannot be fetched"]);
    assert_eq!(bundles(&store), [""; 0]);
    server.requests();
    let bundle = store.fetch_or_refuse(&server.url).await.unwrap();
    let without_first: Vec<&str> = ALL.into_iter().filter(|file| *file != "cvr.onnx").collect();
    assert_eq!(server.requests(), without_first);
    assert_same_files(&bundle, &fixture());
}

#[tokio::test]
async fn an_interrupted_transfer_is_resumed_if_the_store_sends_etags() {
    let (server, (_folder, store)) = (Server::start().await, store());
    server.shared.lock().unwrap().has_tags = true;
    server.fail("encoder.onnx", &[Fault::Cut(1000)]);
    let bundle = store.fetch_or_refuse(&server.url).await.unwrap();
    assert_same_files(&bundle, &fixture());
    let shared = server.shared.lock().unwrap();
    let requests: Vec<_> = shared.requests.iter().filter(|request| request.file == "encoder.onnx").collect();
    assert!(requests.len() == 2 && requests[0].range.is_none() && requests[1].range.is_some(), "{requests:?}");
}

#[tokio::test]
async fn every_error_of_a_store_is_one_line_with_the_files_url() {
    let (server, (_folder, store)) = (Server::start().await, store());
    for (status, part) in [(401, "is denied"), (403, "is denied"), (404, "does not exist"), (400, "bad request")] {
        for file in ["manifest.toml", "tokenizer.json"] {
            server.fail(file, &[Fault::Status(status)]);
            let error = store.fetch_or_refuse(&server.url).await.unwrap_err();
            assert_line(&error, &[&server.url.file(file), part]);
        }
    }
    server.fail("user_tower.onnx", &[Fault::Status(500); 4]);
    server.requests();
    assert_line(&store.fetch_or_refuse(&server.url).await.unwrap_err(), &["user_tower.onnx cannot be fetched", "500"]);
    assert_eq!(server.requests().iter().filter(|file| *file == "user_tower.onnx").count(), 4, "not tried four times");
    assert_eq!(bundles(&store), [""; 0]);
    // A request that fails once is retried.
    server.fail("user_tower.onnx", &[Fault::Status(503)]);
    store.fetch_or_refuse(&server.url).await.unwrap();
}

#[tokio::test]
async fn a_file_that_differs_from_the_manifest_is_refused() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let path = server.folder.path().join("golden.json");
    let mut bytes = fs::read(&path).unwrap();
    let listed = format!("it has 100 bytes, the manifest says {} bytes", bytes.len());
    bytes[100] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let error = store.fetch_or_refuse(&server.url).await.unwrap_err();
    assert_line(&error, &["golden.json is not what the manifest lists: it has sha256 ", &sha256_hex(&bytes)]);
    fs::write(&path, &bytes[..100]).unwrap();
    assert_line(&store.fetch_or_refuse(&server.url).await.unwrap_err(), &[&listed]);
    assert_eq!(bundles(&store), [""; 0]);
    assert!(names(&store.folder().join("files")).iter().all(|name| is_digest(name)), "a partial file is left");
}

#[tokio::test]
async fn only_the_pinned_bundle_is_accepted_and_a_cached_one_needs_no_network() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let fetch =
        async |url: &BundleUrl, pinned: &str| store.fetch(url, Some(pinned), Fallback::LastServed, &|_, _| ()).await;
    let other = "0".repeat(64);
    let error = fetch(&server.url, &other).await.unwrap_err();
    assert_line(&error, &[server.url.as_str(), &server.digest(), &other, "pinned"]);
    assert_eq!(server.requests(), ["manifest.toml"]);
    for malformed in ["", "../../etc", &other.replace('0', "A")] {
        assert!(matches!(fetch(&server.url, malformed).await, Err(StoreError::Digest(_))));
    }
    let digest = server.digest();
    let bundle = fetch(&server.url, &digest).await.unwrap();
    server.requests();
    let (shared, url) = (server.shared.clone(), server.stop().await);
    assert_eq!(fetch(&url, &digest).await.unwrap(), bundle);
    assert!(shared.lock().unwrap().requests.is_empty());
    // The last bundle of the URL is not the pinned one.
    assert!(matches!(fetch(&url, &other).await, Err(StoreError::Unreachable { .. })));
}

#[tokio::test]
async fn without_the_store_a_start_uses_the_last_bundle_and_a_push_is_refused() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let at_start = async |url: &BundleUrl| store.fetch(url, None, Fallback::LastServed, &|_, _| ()).await;
    server.fail("manifest.toml", &[Fault::Status(403)]);
    assert!(matches!(at_start(&server.url).await, Err(StoreError::Denied { .. })), "no bundle has served yet");
    store.fetch_or_refuse(&server.url).await.unwrap();
    server.publish("cvr.onnx", b"another head");
    let last = store.fetch_or_refuse(&server.url).await.unwrap();
    let digest = last.file_name().unwrap().to_str().unwrap();
    store.remember(&server.url, digest).unwrap();
    // This version is fetched, but a later check refuses it.
    server.publish("cvr.onnx", b"a head that fails");
    assert_ne!(store.fetch_or_refuse(&server.url).await.unwrap(), last);
    // A half-published version does not prevent a start, either.
    server.publish("cvr.onnx", b"a third head");
    fs::remove_file(server.folder.path().join("cvr.onnx")).unwrap();
    assert_eq!(at_start(&server.url).await.unwrap(), last);
    let url = server.stop().await;
    assert_eq!(at_start(&url).await.unwrap(), last);
    assert_line(
        &store.fetch_or_refuse(&url).await.unwrap_err(),
        &["manifest.toml cannot be fetched", "Connection refused"],
    );
}

#[tokio::test]
async fn a_fetch_from_a_store_that_never_answers_fails_within_a_minute() {
    let (server, (_folder, store)) = (Server::start().await, store());
    server.fail("manifest.toml", &[Fault::Silence; 9]);
    let start = Instant::now();
    // After the first request, paused time advances only while every task waits.
    let pause_time = async {
        server.silenced.notified().await;
        tokio::time::pause();
    };
    let (fetched, ()) = tokio::join!(store.fetch_or_refuse(&server.url), pause_time);
    assert!(matches!(fetched, Err(StoreError::Unreachable { .. })));
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(30), "only {waited:?}");
    assert!(waited <= remote::MANIFEST_TIMEOUT + Duration::from_secs(5), "{waited:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_fetches_of_one_bundle_all_succeed() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let fetches: Vec<_> = (0..4)
        .map(|_| {
            let (store, url) = (Store::new(store.folder(), Vec::new()), server.url.clone());
            tokio::spawn(async move { store.fetch_or_refuse(&url).await })
        })
        .collect();
    for fetch in fetches {
        assert_same_files(&fetch.await.unwrap().unwrap(), &fixture());
    }
    assert_eq!(bundles(&store), [server.digest()]);
    assert_eq!(names(&store.folder().join("files")).len(), ALL.len() - 1);
}

#[tokio::test]
async fn a_dropped_fetch_leaves_no_partial_bundle() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let second_file_started = Notify::new();
    // The first file has 4606 bytes and is complete when bytes of the second one arrive.
    let progress = |n: u64, _| {
        if n > 4606 {
            second_file_started.notify_one();
        }
    };
    server.fail("golden.json", &[Fault::Silence]);
    tokio::select! {
        _ = store.fetch(&server.url, None, Fallback::Refuse, &progress) => panic!("golden.json was answered"),
        () = second_file_started.notified() => {}
    }
    assert_eq!(bundles(&store), [""; 0]);
    server.fail("golden.json", &[]);
    store.fetch_or_refuse(&server.url).await.unwrap();
    assert_eq!(server.requests().iter().filter(|file| *file == "cvr.onnx").count(), 1);
}

#[tokio::test]
async fn a_manifest_with_invalid_paths_or_digests_is_refused() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let original = fs::read_to_string(server.folder.path().join("manifest.toml")).unwrap();
    let spec = "part = \"golden\"\nbytes = 1\n";
    let zeros = "0".repeat(64);
    let cases = [
        (format!("path = \"../x\"\n{spec}sha256 = \"{zeros}\""), "leaves the bundle's folder"),
        (format!("path = \"/etc/x\"\n{spec}sha256 = \"{zeros}\""), "leaves the bundle's folder"),
        (format!("path = \"x\"\n{spec}sha256 = \"../../{}\"", &zeros[6..]), "not 64 characters of lower-case hex"),
        (format!("path = \"manifest.toml\"\n{spec}sha256 = \"{zeros}\""), "is the manifest itself"),
        (format!("path = \"./cvr.onnx\"\n{spec}sha256 = \"{zeros}\""), "leaves the bundle's folder"),
        (format!("path = \"cvr.onnx\"\n{spec}sha256 = \"{zeros}\""), "is listed twice"),
    ];
    for (more, part) in cases {
        fs::write(server.folder.path().join("manifest.toml"), format!("{original}\n[[files]]\n{more}\n")).unwrap();
        let error = store.fetch_or_refuse(&server.url).await.unwrap_err();
        assert_line(&error, &[&server.url.file("manifest.toml"), part]);
        assert_eq!(server.requests(), ["manifest.toml"]);
    }
    fs::write(server.folder.path().join("manifest.toml"), vec![b'#'; (1 << 20) + 1]).unwrap();
    assert_line(
        &store.fetch_or_refuse(&server.url).await.unwrap_err(),
        &["it has 1048577 bytes, at most 1048576 are read"],
    );
}

#[tokio::test]
async fn damaged_files_are_removed_and_fetched_again() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let (bundle, digest) = (store.fetch_or_refuse(&server.url).await.unwrap(), server.digest());
    assert_eq!(store.remove_damaged(&digest).unwrap(), 0);
    server.requests();
    // Damaged in place, as by a bad disk: the size stays the same.
    let mut bytes = fs::read(bundle.join("cvr.onnx")).unwrap();
    bytes[7] ^= 1;
    fs::write(bundle.join("cvr.onnx"), bytes).unwrap();
    assert_eq!(store.remove_damaged(&digest).unwrap(), 1);
    assert_eq!(bundles(&store), [""; 0]);
    assert_same_files(&store.fetch_or_refuse(&server.url).await.unwrap(), &fixture());
    assert_eq!(server.requests(), ["manifest.toml", "cvr.onnx"]);
    // A wrong size is found by the fetch itself.
    fs::write(bundle.join("golden.json"), "{").unwrap();
    assert_same_files(&store.fetch_or_refuse(&server.url).await.unwrap(), &fixture());
    assert_eq!(server.requests(), ["manifest.toml", "golden.json"]);
    fs::remove_file(bundle.join("manifest.toml")).unwrap();
    assert_same_files(&store.fetch_or_refuse(&server.url).await.unwrap(), &fixture());
    assert_eq!(server.requests(), ["manifest.toml"]);
    assert_eq!(bundles(&store), [digest]);
}

#[tokio::test]
async fn only_old_left_overs_are_removed() {
    let (server, (_folder, store)) = (Server::start().await, store());
    let (digest, end) = ("0".repeat(64), "0123456789abcdef");
    let folder = store.folder();
    fs::create_dir_all(folder.join("files")).unwrap();
    let foreign = [".new-bundle", "notes.part-1", "my.part-0123456789abcdef"];
    let left_over = [format!(".new-{digest}-{end}"), format!(".old-{digest}-{end}")];
    for name in foreign.into_iter().chain(left_over.iter().map(String::as_str)) {
        fs::create_dir(folder.join(name)).unwrap();
        age(&folder.join(name));
    }
    let part = format!("files/{digest}.part-{end}");
    let recent = format!("files/{digest}.part-{}", end.replace('0', "1"));
    for name in [&part, &recent] {
        fs::write(folder.join(name), "half").unwrap();
    }
    age(&folder.join(&part));
    store.fetch_or_refuse(&server.url).await.unwrap();
    assert!(foreign.iter().all(|name| folder.join(name).exists()));
    assert!(left_over.iter().all(|name| !folder.join(name).exists()));
    assert!(!folder.join(part).exists() && folder.join(recent).exists());
}

/// One large file may take hours, and nothing changes in the bundle's folder meanwhile.
#[tokio::test]
async fn what_another_process_has_fetched_for_hours_is_not_removed() {
    let (_folder, store) = store();
    let theirs = store.cache.start_bundle(&"a".repeat(64)).unwrap();
    let in_progress = names(&store.folder()).into_iter().find(|name| name.starts_with(".new-")).unwrap();
    age(&store.folder().join(&in_progress));
    let ours = store.cache.start_bundle(&"b".repeat(64)).unwrap();
    assert!(store.folder().join(&in_progress).exists(), "the folder that another process fills was removed");
    drop((theirs, ours));
    assert!(!names(&store.folder()).iter().any(|name| name.starts_with(".new-")));
}

#[tokio::test]
async fn pruning_keeps_the_bundles_in_use_and_the_newest_five() {
    let (server, (_folder, store)) = (Server::start().await, store());
    assert_eq!(store.prune(&[]).unwrap(), Pruned::default(), "there is no cache yet");
    let mut digests = Vec::new();
    for i in 0..8_u64 {
        server.publish("cvr.onnx", format!("head {i}").as_bytes());
        let bundle = store.fetch_or_refuse(&server.url).await.unwrap();
        let time = SystemTime::now() - Duration::from_secs(10_000 - i);
        fs::File::open(&bundle).unwrap().set_modified(time).unwrap();
        digests.push(server.digest());
    }
    let folder = store.folder();
    // A folder that is named like a bundle but is none, and a foreign file.
    fs::create_dir(folder.join("f".repeat(64))).unwrap();
    fs::write(folder.join("files/README"), "hands off").unwrap();
    for name in names(&folder.join("files")) {
        age(&folder.join("files").join(name));
    }
    let recent = sha256_hex(b"head 1");
    fs::File::open(folder.join("files").join(&recent)).unwrap().set_modified(SystemTime::now()).unwrap();

    assert_eq!(store.prune(&digests[..1]).unwrap(), Pruned { n_bundles: 2, n_files: 1 });
    let mut left: Vec<String> =
        digests.iter().enumerate().filter(|(i, _)| ![1, 2].contains(i)).map(|(_, d)| d.clone()).collect();
    left.push("f".repeat(64));
    left.sort();
    assert_eq!(bundles(&store), left);
    let files = names(&folder.join("files"));
    assert!(files.contains(&"README".to_owned()) && files.contains(&recent));
    assert!(!files.contains(&sha256_hex(b"head 2")) && files.contains(&sha256_hex(b"head 0")));
    assert_eq!(store.prune(&digests[..1]).unwrap(), Pruned::default());
}

#[tokio::test]
async fn the_error_names_a_cache_folder_that_cannot_be_written() {
    let server = Server::start().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let store = Store::new(file.path().join("cache"), Vec::new());
    let error = store.fetch_or_refuse(&server.url).await.unwrap_err();
    assert!(matches!(error, StoreError::Disk { .. }));
    assert_line(&error, &[&file.path().join("cache").display().to_string(), "Not a directory"]);
}

#[test]
fn a_disk_error_stops_the_sender() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path().to_path_buf());
    drop(cache.start_bundle(&"0".repeat(64)).unwrap());
    let text = fs::read_to_string(fixture().join("manifest.toml")).unwrap();
    let file = Manifest::parse(&text).unwrap().files.swap_remove(0);
    let (sender, receiver) = mpsc::channel(1);
    fs::remove_dir(folder.path().join("files")).unwrap();
    let error = cache.receive(&file, receiver).map(|received| received.n_bytes).unwrap_err();
    assert!(matches!(error, StoreError::Disk { .. }), "{error:?}");
    assert!(sender.try_send(b"piece").is_err(), "the sender was not stopped");
}

#[tokio::test]
async fn credentials_are_sent_to_the_store_and_shown_nowhere() {
    let server = Server::start().await;
    let folder = tempfile::tempdir().unwrap();
    let options =
        vec![("Http_Authorization".to_owned(), "Bearer s3cret".to_owned()), ("TERM".to_owned(), "x".to_owned())];
    let store = Store::new(folder.path().to_path_buf(), options);
    assert!(!format!("{store:?}").contains("s3cret"));
    server.fail("golden.json", &[Fault::Status(403)]);
    let error = store.fetch_or_refuse(&server.url).await.unwrap_err();
    assert!(!format!("{error:?} {error}").contains("s3cret"));
    assert_eq!(server.shared.lock().unwrap().authorization.as_deref(), Some("Bearer s3cret"));

    for url in
        ["http://me:s3cret@host/b", "s3://s3cret@bucket/b", "https://host/b?sig=s3cret", "az://c:s3cret@account/b"]
    {
        let error = BundleUrl::parse(url).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("s3cret"), "{error}");
    }
    for (name, value) in [("AWS_ENDPOINT", "127.0.0.1:9000"), ("aws_endpoint_url", "http://me:s3cret@127.0.0.1:9000")] {
        let options = vec![(name.to_owned(), value.to_owned())];
        let store = Store::new(folder.path().to_path_buf(), options);
        let error = store.fetch_or_refuse(&BundleUrl::parse("s3://bucket/b").unwrap()).await.unwrap_err();
        assert!(matches!(error, StoreError::Options { .. }));
        assert_line(&error, &["s3://bucket/b cannot be opened: ", &name.to_lowercase()]);
        assert!(!error.to_string().contains("s3cret"), "{error}");
    }
}

/// Over http, S3 requests have the bucket's name in the path, and they are signed.
#[tokio::test]
async fn a_bundle_is_fetched_from_an_s3_bucket_behind_an_http_endpoint() {
    let server = Server::start().await;
    server.shared.lock().unwrap().has_tags = true;
    let folder = tempfile::tempdir().unwrap();
    let endpoint = server.url.as_str().trim_end_matches("/bundle").to_owned();
    let options = [
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "eu-central-1"),
        ("AWS_ENDPOINT", &endpoint),
        ("AWS_ALLOW_HTTP", "true"),
    ];
    let options = options.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let mut https_only = options.clone();
    https_only.pop();
    // With the bucket `bundle` and no prefix, the paths are those that the server serves.
    let url = BundleUrl::parse("s3://bundle").unwrap();
    let error = Store::new(folder.path().to_path_buf(), https_only).fetch_or_refuse(&url).await.unwrap_err();
    assert_line(&error, &["s3://bundle/manifest.toml cannot be fetched"]);
    let bundle = Store::new(folder.path().to_path_buf(), options).fetch_or_refuse(&url).await.unwrap();
    assert_same_files(&bundle, &fixture());
    let signed = server.shared.lock().unwrap().authorization.clone().unwrap();
    assert!(signed.contains("Credential=key/") && signed.contains("/eu-central-1/s3/"), "{signed}");
}

#[test]
fn a_source_is_a_folder_or_a_url() {
    let base = Path::new("/etc/midemb");
    let parse = |text| Source::parse(text, base);
    assert_eq!(parse("models/a"), Ok(Source::Folder("/etc/midemb/models/a".into())));
    assert_eq!(parse("/srv/a"), Ok(Source::Folder("/srv/a".into())));
    for (text, shown) in [
        ("s3://bucket/models/a/", "s3://bucket/models/a"),
        ("S3://bucket", "s3://bucket"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("az://container/a", "az://container/a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("https://host:8443/a//", "https://host:8443/a"),
        ("http://host", "http://host"),
    ] {
        let source = parse(text).unwrap();
        assert!(matches!(source, Source::Url(_)), "{text}");
        assert_eq!(source.to_string(), shown);
    }
    for (text, reason) in [
        ("", "is empty"),
        ("ftp://host/a", "has the scheme \"ftp\""),
        ("file:///srv/a", "has the scheme \"file\""),
        ("s3:///a", "names no bucket"),
        ("http://", "is not a URL"),
        ("http://host/a#b", "a fragment"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
}
