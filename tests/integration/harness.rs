//! Starts the real binary on free ports, talks to it, reads its metrics, and stops it.
//!
//! No test sleeps, and none asserts how long something took. A test that has to wait for a state of the server uses
//! [`eventually`]; one that needs the server to be busy gives it work from [`long_films`], whose duration has a lower bound on
//! every machine.

use midemb_client::proto::{
    GetMidEmbRequest, GetMidEmbResponse, Item, ItemText, Output, Tensor, admin_service_client::AdminServiceClient,
    mid_emb_service_client::MidEmbServiceClient,
};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, ExitStatus, Output as ProcessOutput, Stdio},
    sync::mpsc,
    time::Duration,
};
use tempfile::TempDir;
use tonic::transport::Channel;

pub(crate) type Client = MidEmbServiceClient<Channel>;

/// Far longer than any step of any test takes. A step that takes longer has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Settings for tests in which the encoder has to be busy: see [`long_films`].
pub(crate) const ONE_CPU_THREAD: &str = "inference.provider = \"cpu\"\ninference.threads = 1";

/// Waits until `condition` holds, and fails the test after [`PATIENCE`]. `what` completes "it never happened that ...".
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !condition().await {
            tokio::task::yield_now().await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, holds).await;
    assert!(in_time.is_ok(), "it never happened that {what}");
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A tiny bundle, made for tests.
pub(crate) fn fixture() -> PathBuf {
    root().join("tests/fixtures/bundle")
}

/// The fixture bundle's encoder with other towers.
pub(crate) fn retrained() -> PathBuf {
    root().join("tests/fixtures/retrained")
}

/// A bundle whose encoder and towers both differ from the fixture bundle's.
pub(crate) fn reencoded() -> PathBuf {
    root().join("tests/fixtures/reencoded")
}

/// The bundle in `models/default`. `make setup` fetches its encoder's weights.
pub(crate) fn shipped() -> PathBuf {
    root().join("models/default")
}

/// The binary, without the settings in this process's environment.
pub(crate) fn midemb() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_midemb"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("MIDEMB__")) {
        command.env_remove(name);
    }
    command.current_dir(root()).env("RUST_BACKTRACE", "0");
    command
}

/// Runs the binary to its end.
pub(crate) fn run(arguments: &[&str]) -> ProcessOutput {
    midemb().args(arguments).output().unwrap()
}

/// Runs a command that has to end by itself, and fails the test if it does not within [`PATIENCE`].
pub(crate) fn run_to_end(command: &mut Command) -> ProcessOutput {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id();
    let (sender, output) = mpsc::channel();
    std::thread::spawn(move || drop(sender.send(child.wait_with_output())));
    output.recv_timeout(PATIENCE).map(Result::unwrap).unwrap_or_else(|_| {
        send_signal(id, "KILL");
        panic!("{command:?} did not end");
    })
}

pub(crate) fn send_signal(process: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Writes a config that serves `bundle` on free ports; returns its folder and its path. Unless `more` sets a default deadline,
/// it is [`PATIENCE`]: the servers of several tests share the machine, and only tests of deadlines should depend on one.
pub(crate) fn config(bundle: &Path, more: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("midemb.toml");
    let mut deadline = format!("limits.default_deadline_ms = {}", PATIENCE.as_millis());
    if more.contains("default_deadline_ms") {
        deadline.clear();
    }
    // A message may be held back for as long as a test needs.
    if !more.contains("read_ms") {
        deadline += &format!("\nlimits.read_ms = {}", PATIENCE.as_millis());
    }
    let text = format!(
        "server.listen = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n\
         telemetry.metrics_listen = \"127.0.0.1:0\"\ntelemetry.log_format = \"json\"\n{deadline}\n{more}\n\
         [[models]]\nname = \"learn\"\nbundle = {:?}\n",
        bundle.display().to_string()
    );
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

/// What the reader of a server's log does once the server serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogReader {
    /// It reads to the end.
    ReadsOn,
    /// It closes its end of the pipe.
    Leaves,
    /// It keeps the pipe open and reads no more, so the pipe becomes full.
    StopsReading,
}

/// A running server, killed when dropped.
pub(crate) struct Server {
    child: Child,
    /// The pipe that nobody reads any more.
    _unread: Option<BufReader<ChildStderr>>,
    /// Its config file.
    pub(crate) file: PathBuf,
    log: mpsc::Receiver<String>,
    /// The log lines up to and including "serving".
    pub(crate) start_log: Vec<Value>,
    pub(crate) grpc: String,
    pub(crate) admin: String,
    pub(crate) metrics: String,
    folder: Option<TempDir>,
}

impl Server {
    /// Serves the fixture bundle.
    pub(crate) fn start() -> Self {
        Self::start_with(&fixture(), "")
    }

    /// Serves `bundle` with `more` lines of config (dotted keys).
    pub(crate) fn start_with(bundle: &Path, more: &str) -> Self {
        Self::start_as(bundle, more, &[])
    }

    /// Serves `bundle` with `more` lines of config and further arguments of the command.
    pub(crate) fn start_as(bundle: &Path, more: &str, arguments: &[&str]) -> Self {
        let (folder, path) = config(bundle, more);
        let mut serve = midemb();
        serve.arg("serve").arg("--config").arg(&path).args(arguments);
        Self::spawn(serve, folder, path)
    }

    /// Serves the fixture bundle in a process that may have so many files open.
    pub(crate) fn start_with_open_files(n_files: u32) -> Self {
        let (folder, path) = config(&fixture(), "");
        let mut serve = Command::new("sh");
        let binary = midemb();
        serve.args(["-c", &format!("ulimit -n {n_files}; exec \"$@\""), "sh"]).arg(binary.get_program());
        serve.arg("serve").arg("--config").arg(&path).current_dir(root());
        Self::spawn(serve, folder, path)
    }

    /// Starts from an existing config. The folder is removed with the server.
    pub(crate) fn start_from(folder: TempDir, file: PathBuf) -> Self {
        let mut serve = midemb();
        serve.arg("serve").arg("--config").arg(&file);
        Self::spawn(serve, folder, file)
    }

    /// Serves the fixture bundle with `more` lines of config, to a log that is read as `reader` says.
    pub(crate) fn start_with_log_reader(more: &str, reader: LogReader) -> Self {
        let (folder, path) = config(&fixture(), more);
        let mut serve = midemb();
        serve.arg("serve").arg("--config").arg(&path);
        Self::spawn_with(serve, folder, path, reader)
    }

    /// Runs the command `serve`, whose config is `file`, and waits until it serves.
    pub(crate) fn spawn(serve: Command, folder: TempDir, file: PathBuf) -> Self {
        Self::spawn_with(serve, folder, file, LogReader::ReadsOn)
    }

    fn spawn_with(mut serve: Command, folder: TempDir, file: PathBuf, reader: LogReader) -> Self {
        let mut child = serve.stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = mpsc::channel();
        let reading = std::thread::spawn(move || {
            let mut line = String::new();
            while pipe.read_line(&mut line).is_ok_and(|n_bytes| n_bytes > 0) {
                let is_serving = line.contains("\"message\":\"serving\"");
                // The log is read to its end even after the test has dropped the receiver.
                drop(sender.send(line.trim_end().to_owned()));
                line.clear();
                if is_serving && reader != LogReader::ReadsOn {
                    return (reader == LogReader::StopsReading).then_some(pipe);
                }
            }
            None
        });
        let (grpc, admin, metrics) = (String::new(), String::new(), String::new());
        let (start_log, folder) = (Vec::new(), Some(folder));
        let mut server = Server { child, _unread: None, file, log, start_log, grpc, admin, metrics, folder };
        server.start_log = server.log_until("serving");
        if reader != LogReader::ReadsOn {
            server._unread = reading.join().unwrap();
        }
        let address = |name: &str| server.start_log.last().unwrap()[name].as_str().unwrap().to_owned();
        (server.grpc, server.admin, server.metrics) = (address("grpc"), address("admin"), address("metrics"));
        server
    }

    /// The first log line from now on with this message.
    pub(crate) fn wait_for_log(&self, message: &str) -> Value {
        self.log_until(message).pop().unwrap()
    }

    /// All log lines from now on, up to the first with this message.
    pub(crate) fn log_until(&self, message: &str) -> Vec<Value> {
        let mut lines = Vec::new();
        loop {
            let line =
                self.log.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("the server never logged {message:?}"));
            let Ok(line) = serde_json::from_str::<Value>(&line) else { panic!("not a JSON log line: {line}") };
            lines.push(line);
            if lines.last().unwrap()["message"] == message {
                return lines;
            }
        }
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.grpc)).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn client(&self) -> Client {
        Client::new(self.channel().await).max_decoding_message_size(64 << 20)
    }

    pub(crate) async fn admin(&self) -> AdminServiceClient<Channel> {
        let url = format!("http://{}", self.admin);
        AdminServiceClient::new(Channel::from_shared(url).unwrap().connect().await.unwrap())
    }

    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        http_get(&format!("http://{}{path}", self.metrics))
    }

    /// Reads `/metrics`.
    pub(crate) fn scrape(&self) -> Scrape {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        Scrape(text)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, name: &str) {
        send_signal(self.child.id(), name);
    }

    /// Ends the server with SIGTERM; returns its folder and its config file, for the next server to start from.
    pub(crate) fn stop(mut self) -> (TempDir, PathBuf) {
        self.signal("TERM");
        let (folder, file) = (self.folder.take().unwrap(), self.file.clone());
        assert!(self.wait().success());
        (folder, file)
    }

    /// Waits until the process ends by itself. Its log ends at the same time.
    pub(crate) fn wait(mut self) -> ExitStatus {
        loop {
            match self.log.recv_timeout(PATIENCE) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return self.child.wait().unwrap(),
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("the server did not end"),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process may have ended by itself, so errors are expected.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Calls `GetMidEmb`, and sends the message only when `message` receives it. The call's body ends when the sender is dropped.
pub(crate) async fn call_slowly(
    channel: Channel,
    message: tokio::sync::mpsc::Receiver<GetMidEmbRequest>,
    timeout: Option<Duration>,
) -> Result<GetMidEmbResponse, tonic::Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/midemb.v1.MidEmbService/GetMidEmb");
    let codec = tonic_prost::ProstCodec::<GetMidEmbRequest, GetMidEmbResponse>::default();
    let mut request = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(message));
    if let Some(timeout) = timeout {
        request.set_timeout(timeout);
    }
    grpc.client_streaming(request, path, codec).await.map(tonic::Response::into_inner)
}

pub(crate) fn http_get(url: &str) -> (u16, String) {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false).build().into();
    let mut response = agent.get(url).call().unwrap();
    (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
}

/// One reading of `/metrics`.
pub(crate) struct Scrape(pub(crate) String);

impl Scrape {
    /// The sum over the series of `name` that have all of `labels`, each written as `cache="item"`.
    pub(crate) fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let lines = self.0.lines().filter_map(|line| line.strip_prefix(name));
        let series = lines.filter(|rest| rest.starts_with('{') || rest.starts_with(' '));
        let matching = series.filter(|rest| labels.iter().all(|label| rest.contains(label)));
        matching.map(|rest| rest.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// How many calls wait for their messages.
    pub(crate) fn n_receiving(&self) -> f64 {
        self.sum("midemb_budget_calls", &["budget=\"receiving\""])
    }

    /// How many items the encoder has encoded.
    pub(crate) fn n_encoded(&self) -> f64 {
        self.sum("midemb_batch_items_sum", &["stage=\"encode\""])
    }
}

pub(crate) fn film(id: &str, title: &str) -> Item {
    let text = ItemText { title: title.to_owned(), category: "Drama".to_owned(), ..ItemText::default() };
    Item { id: id.to_owned(), text: Some(text) }
}

/// `n` items whose ids and texts start with `prefix`.
pub(crate) fn films(prefix: &str, n: usize) -> Vec<Item> {
    (0..n).map(|i| film(&format!("{prefix}-{i}"), &format!("{prefix} part {i}"))).collect()
}

/// `n` items whose texts are cut at the token limit of the shipped encoder, 128.
///
/// One of them takes that encoder 2.7 GFLOP (10.6 million weights in its layers, 2 FLOP per weight and token), which no core
/// does in less than 10 ms. So `n` of them keep a server with [`ONE_CPU_THREAD`] busy for at least `n` times 10 ms, however fast
/// the machine is.
pub(crate) fn long_films(prefix: &str, n: usize) -> Vec<Item> {
    let filler = "river ".repeat(150);
    (0..n).map(|i| film(&format!("{prefix}-{i}"), &format!("{prefix} part {i} {filler}"))).collect()
}

/// The same items without their texts.
pub(crate) fn ids(items: &[Item]) -> Vec<Item> {
    items.iter().map(|item| Item { id: item.id.clone(), text: None }).collect()
}

pub(crate) const ALL_OUTPUTS: [Output; 4] = [Output::MidEmb, Output::Cvr, Output::UserEmb, Output::ItemEmb];

pub(crate) fn page(history: Vec<Item>, candidates: Vec<Item>) -> GetMidEmbRequest {
    GetMidEmbRequest {
        user_id: "user".to_owned(),
        history,
        candidates,
        outputs: ALL_OUTPUTS.map(i32::from).to_vec(),
        ..Default::default()
    }
}

/// The candidates' statuses, without the prefix of the enum's names.
pub(crate) fn statuses(answer: &GetMidEmbResponse) -> Vec<&'static str> {
    answer.statuses().map(|status| status.as_str_name().trim_start_matches("ROW_STATUS_")).collect()
}

/// The history's statuses, without the prefix of the enum's names.
pub(crate) fn history_statuses(answer: &GetMidEmbResponse) -> Vec<&'static str> {
    answer.history_statuses().map(|status| status.as_str_name().trim_start_matches("ROW_STATUS_")).collect()
}

pub(crate) fn floats(tensor: &Option<Tensor>) -> Vec<f32> {
    let tensor = tensor.as_ref().expect("the answer has no such tensor");
    assert_eq!(tensor.dtype, 1, "not F32");
    let values: Vec<f32> = tensor.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values.len(), tensor.shape.iter().product::<u32>() as usize, "shape and data differ");
    values
}

pub(crate) fn rows(tensor: &Option<Tensor>) -> Vec<Vec<f32>> {
    let width = tensor.as_ref().unwrap().shape[1] as usize;
    floats(tensor).chunks(width).map(<[f32]>::to_vec).collect()
}

/// A copy of a bundle, for a test to damage.
pub(crate) struct BrokenBundle(TempDir);

impl BrokenBundle {
    /// A copy of the fixture bundle.
    pub(crate) fn new() -> Self {
        Self::of(&fixture())
    }

    pub(crate) fn of(bundle: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(bundle).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        BrokenBundle(folder)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    /// Rewrites a text file; fails the test if `change` changes nothing.
    pub(crate) fn edit(&self, file: &str, change: impl FnOnce(String) -> String) {
        let text = std::fs::read_to_string(self.path(file)).unwrap();
        let changed = change(text.clone());
        assert_ne!(text, changed, "nothing was changed");
        std::fs::write(self.path(file), changed).unwrap();
    }

    /// Overwrites a file and updates its digest in the manifest, so that the fault is found by a later check than that of the
    /// digests.
    pub(crate) fn replace(&self, file: &str, bytes: &[u8]) {
        std::fs::File::create(self.path(file)).unwrap().write_all(bytes).unwrap();
        let digest = midemb::domain::digest::sha256_hex(bytes);
        self.edit("manifest.toml", |manifest| {
            let mut manifest: toml::Table = manifest.parse().unwrap();
            for entry in manifest["files"].as_array_mut().unwrap() {
                if entry["path"].as_str() == Some(file) {
                    entry["sha256"] = digest.clone().into();
                    entry["bytes"] = (bytes.len() as i64).into();
                }
            }
            manifest.to_string()
        });
    }
}
