//! Bundles from an S3 store (moto, on a loopback port), over a connection that breaks where a test wants it to.

use crate::{
    harness::{PATIENCE, Server, config, films, fixture, midemb, page, retrained, root, statuses},
    lifecycle::{model, push, status, with_bundle, with_models},
};
use midemb::domain::digest::sha256_hex;
use midemb_client::proto::RollbackRequest;
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
};
use tempfile::TempDir;
use tonic::Code;

/// moto checks no signature, but reads from this header which service is called.
const AUTHORIZATION: &str =
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
const V1: &str = "s3://bundles/prod/v1";
const V2: &str = "s3://bundles/prod/v2";
const ENCODER: &str = "encoder.onnx";
const USER_TOWER: &str = "user_tower.onnx";

/// A store with a bucket `bundles`, killed when dropped.
pub(crate) struct Moto {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Moto {
    pub(crate) fn start() -> Self {
        let program = root().join(".venv/bin/moto_server");
        assert!(program.exists(), "{} is missing: run `make test-setup`", program.display());
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", "0"]).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (sender, addresses) = mpsc::channel();
        // It logs every request, and would block on a full pipe if nobody read them.
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some((_, address)) = line.split_once("Running on http://") {
                    drop(sender.send(address.trim().to_owned()));
                }
            }
        });
        let address = addresses.recv_timeout(PATIENCE).expect("moto never logged its address");
        let moto = Moto { child, address: address.parse().unwrap() };
        moto.put("bundles", b"");
        moto
    }

    fn agent() -> ureq::Agent {
        ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).proxy(None).build().into()
    }

    fn put(&self, path: &str, bytes: &[u8]) {
        let put = Self::agent().put(format!("http://{}/{path}", self.address)).header("authorization", AUTHORIZATION);
        put.header("content-type", "application/octet-stream").send(bytes).unwrap();
    }

    /// What is at `path`, which begins with the bucket and may have a query.
    pub(crate) fn get(&self, path: &str) -> Vec<u8> {
        let get = Self::agent().get(format!("http://{}/{path}", self.address)).header("authorization", AUTHORIZATION);
        get.call().unwrap().body_mut().read_to_vec().unwrap()
    }

    /// Uploads the files of `bundle` to `url`.
    fn upload(&self, bundle: &Path, url: &str) {
        let prefix = url.strip_prefix("s3://").unwrap();
        for entry in std::fs::read_dir(bundle).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            self.put(&format!("{prefix}/{name}"), &std::fs::read(&path).unwrap());
        }
    }

    /// A store with the fixture bundle at [`V1`] and the retrained one at [`V2`].
    fn with_two_versions() -> Self {
        let moto = Self::start();
        moto.upload(&fixture(), V1);
        moto.upload(&retrained(), V2);
        moto
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // The process may have ended by itself, so errors are expected.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the proxy does with the next request.
enum State {
    Up,
    /// Connections are closed without an answer.
    Down,
    /// The answer that has this file is cut off. Then the proxy goes into the state in the box.
    Breaks(&'static str, Box<State>),
}

/// How much of an answer passes before it is cut off: its head and a part of the file.
const N_BYTES_BEFORE_BREAK: u64 = 30_000;

/// A proxy between a server and a store, which records what the server fetches. It runs until the test process ends.
#[derive(Clone)]
struct Proxy {
    address: SocketAddr,
    store: SocketAddr,
    state: Arc<Mutex<State>>,
    gets: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    fn to(moto: &Moto) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (state, gets) = (Arc::new(Mutex::new(State::Up)), Arc::default());
        let proxy = Proxy { address: listener.local_addr().unwrap(), store: moto.address, state, gets };
        let accepting = proxy.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let proxy = accepting.clone();
                // An error says that one side closed its connection, which some tests provoke.
                thread::spawn(move || drop(proxy.forward(&client)));
            }
        });
        proxy
    }

    /// Forwards one request and its answer. moto closes the connection after each.
    fn forward(&self, mut client: &TcpStream) -> io::Result<u64> {
        let (mut head, mut reader) = (String::new(), BufReader::new(client));
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(0);
            }
        }
        let path = head.split(' ').nth(1).unwrap();
        let Some(n_bytes) = self.n_bytes_to_pass(path) else { return Ok(0) };
        self.gets.lock().unwrap().push(path.to_owned());
        let mut store = TcpStream::connect(self.store)?;
        store.write_all(head.as_bytes())?;
        io::copy(&mut store.take(n_bytes), &mut client)
    }

    /// How many bytes of the answer may pass; `None` if there is to be no answer.
    fn n_bytes_to_pass(&self, path: &str) -> Option<u64> {
        let mut state = self.state.lock().unwrap();
        match std::mem::replace(&mut *state, State::Down) {
            State::Down => None,
            State::Breaks(file, next) if path.ends_with(file) => {
                *state = *next;
                Some(N_BYTES_BEFORE_BREAK)
            }
            unchanged => {
                *state = unchanged;
                Some(u64::MAX)
            }
        }
    }

    fn set(&self, state: State) {
        *self.state.lock().unwrap() = state;
    }

    /// How many requests for the file under this URL were answered at least in part.
    fn n_gets(&self, url: &str, file: &str) -> usize {
        let path = format!("/{}/{file}", url.strip_prefix("s3://").unwrap());
        self.gets.lock().unwrap().iter().filter(|got| **got == path).count()
    }
}

/// Starts a server whose S3 endpoint is `address`.
pub(crate) fn serve((folder, file): (TempDir, PathBuf), address: SocketAddr) -> Server {
    let mut serve = midemb();
    serve.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "s3cret").env("AWS_REGION", "us-east-1");
    serve.env("AWS_ENDPOINT", format!("http://{address}")).env("AWS_ALLOW_HTTP", "true");
    serve.env("NO_PROXY", "127.0.0.1").arg("serve").arg("--config").arg(&file);
    Server::spawn(serve, folder, file)
}

/// The version of the model that answers a page of candidates.
async fn version(server: &Server) -> String {
    let answer = server.client().await.get_mid_emb(page(films("h", 3), films("c", 5))).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 5]);
    answer.model.unwrap().version
}

fn with_url(server: &Server, url: &str) -> String {
    with_bundle(server, Path::new(url))
}

fn digest_of(bundle: &Path) -> String {
    sha256_hex(&std::fs::read(bundle.join("manifest.toml")).unwrap())
}

/// Pushes a config that must be refused; returns the reason, which is one line.
async fn refused(server: &Server, config: String) -> String {
    let refused = push(server, config).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(!refused.message().contains('\n') && !refused.message().contains("s3cret"), "{refused:?}");
    refused.message().to_owned()
}

fn names(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The digests of the bundles beside the config file. Fails if one is incomplete, or if other files were left there.
fn complete_bundles(server: &Server) -> Vec<String> {
    let folder = server.file.parent().unwrap().join("bundles");
    let (mut bundles, rest): (Vec<_>, Vec<_>) = names(&folder).into_iter().partition(|name| name.len() == 64);
    assert!(rest.iter().all(|name| ["files", "latest"].contains(&name.as_str())), "{rest:?} was left");
    for bundle in &bundles {
        let bytes =
            |file: &str| std::fs::read(folder.join(bundle).join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let manifest: toml::Table = String::from_utf8(bytes("manifest.toml")).unwrap().parse().unwrap();
        let files = manifest["files"].as_array().unwrap();
        assert_eq!((sha256_hex(&bytes("manifest.toml")), files.len()), (bundle.clone(), 6));
        for file in files {
            assert_eq!(sha256_hex(&bytes(file["path"].as_str().unwrap())), file["sha256"].as_str().unwrap());
        }
    }
    // A file whose transfer was interrupted has a longer name, until its writer removes it.
    for file in names(&folder.join("files")).iter().filter(|name| name.len() == 64) {
        assert_eq!(sha256_hex(&std::fs::read(folder.join("files").join(file)).unwrap()), *file);
    }
    bundles.sort();
    bundles
}

fn sorted<const N: usize>(mut digests: [String; N]) -> [String; N] {
    digests.sort();
    digests
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_serves_from_a_store_and_an_update_of_the_towers_fetches_no_encoder() {
    let moto = Moto::with_two_versions();
    let proxy = Proxy::to(&moto);
    let server = serve(config(Path::new(V1), ""), proxy.address);
    assert_eq!(version(&server).await, "1");
    assert_eq!((proxy.n_gets(V1, "manifest.toml"), proxy.n_gets(V1, ENCODER), proxy.n_gets(V1, USER_TOWER)), (1, 1, 1));

    let pushed = push(&server, with_url(&server, V2)).await.unwrap();
    assert_eq!(pushed.result, "applied");
    let steps = pushed.report.unwrap().steps;
    let fetch = steps.iter().find(|step| step.step == "fetch").expect("the report has no step for the fetch");
    assert_eq!((fetch.subject.as_str(), fetch.result.as_str()), ("learn", "ok"));
    assert_eq!(version(&server).await, "2");
    assert_eq!((proxy.n_gets(V2, USER_TOWER), proxy.n_gets(V2, "cvr.onnx")), (1, 1));
    assert_eq!(
        (proxy.n_gets(V2, ENCODER), proxy.n_gets(V2, "tokenizer.json")),
        (0, 0),
        "the encoder was fetched again"
    );
    assert_eq!(complete_bundles(&server), sorted([digest_of(&fixture()), digest_of(&retrained())]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_store_that_fails_during_a_fetch_changes_nothing_and_complete_files_are_kept() {
    let moto = Moto::with_two_versions();
    let proxy = Proxy::to(&moto);
    let server = serve(config(Path::new(V1), ""), proxy.address);
    proxy.set(State::Breaks(USER_TOWER, Box::new(State::Down)));
    let reason = refused(&server, with_url(&server, V2)).await;
    assert!(reason.contains("s3://bundles/prod/v2/user_tower.onnx cannot be fetched: "), "{reason}");
    let last = status(&server).await.pushes.remove(0);
    let step = last.steps.last().unwrap();
    assert_eq!((step.step.as_str(), step.result.as_str()), ("fetch", "failed"));
    assert_eq!((version(&server).await.as_str(), complete_bundles(&server)), ("1", vec![digest_of(&fixture())]));

    proxy.set(State::Up);
    assert_eq!(push(&server, with_url(&server, V2)).await.unwrap().result, "applied");
    assert_eq!(version(&server).await, "2");
    let n_gets = |file| proxy.n_gets(V2, file);
    assert_eq!((n_gets(USER_TOWER), n_gets("item_tower.onnx"), n_gets("cvr.onnx"), n_gets(ENCODER)), (2, 1, 1, 0));
    assert_eq!(complete_bundles(&server), sorted([digest_of(&fixture()), digest_of(&retrained())]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_transfer_that_is_cut_off_once_is_repeated() {
    let moto = Moto::with_two_versions();
    let proxy = Proxy::to(&moto);
    proxy.set(State::Breaks(ENCODER, Box::new(State::Breaks(USER_TOWER, Box::new(State::Up)))));
    let server = serve(config(Path::new(V1), ""), proxy.address);
    assert_eq!(version(&server).await, "1");
    assert_eq!((proxy.n_gets(V1, ENCODER), proxy.n_gets(V1, USER_TOWER), proxy.n_gets(V1, "cvr.onnx")), (2, 2, 1));
    assert_eq!(complete_bundles(&server), [digest_of(&fixture())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_its_store_a_server_starts_with_the_last_bundle_of_its_url_and_refuses_pushes() {
    let current = "s3://bundles/prod/current";
    let moto = Moto::with_two_versions();
    moto.upload(&fixture(), current);
    let store = moto.address;
    let server = serve(config(Path::new(current), ""), store);
    moto.upload(&retrained(), current);
    server.signal("HUP");
    assert_eq!(server.wait_for_log("push ended")["result"], "applied");
    assert_eq!(version(&server).await, "2");
    let stopped = server.stop();
    drop(moto);

    let server = serve(stopped, store);
    let warning = server.start_log.iter().find(|line| line["level"] == "WARN").expect("no warning was logged");
    assert_eq!(warning["message"], "bundle cannot be fetched, its last version serves");
    assert_eq!((&warning["url"], &warning["digest"]), (&current.into(), &digest_of(&retrained()).into()));
    assert_eq!(version(&server).await, "2");
    for url in [V1, V2, current] {
        let reason = refused(&server, with_url(&server, url)).await;
        assert!(reason.contains(&format!("{url}/manifest.toml cannot be fetched: ")), "{reason}");
    }
    assert_eq!(version(&server).await, "2");
}

/// The bundle behind a URL may be another one by now, so a restart used to fetch again what was rolled back.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn after_a_rollback_a_restart_serves_the_bundle_that_was_rolled_back_to() {
    let current = "s3://bundles/prod/current";
    let moto = Moto::start();
    moto.upload(&fixture(), current);
    let server = serve(config(Path::new(current), ""), moto.address);
    moto.upload(&retrained(), current);
    server.signal("HUP");
    assert_eq!(server.wait_for_log("push ended")["result"], "applied");
    assert_eq!(version(&server).await, "2");
    let rolled_back = server.admin().await.rollback(RollbackRequest::default()).await.unwrap().into_inner();
    let in_force = rolled_back.config.unwrap();
    assert_eq!((rolled_back.warning.as_str(), in_force.models[0].version.as_str()), ("", "1"));
    let pushed_file = std::fs::read_to_string(server.file.with_extension("pushed.toml")).unwrap();
    assert!(pushed_file.contains(&format!("digest = {:?}", digest_of(&fixture()))), "{pushed_file}");
    assert_eq!(server.wait_for_log("push ended")["trigger"], "rollback");
    server.signal("HUP");
    assert_eq!(server.wait_for_log("push ended")["result"], "unchanged", "SIGHUP undid a rollback");

    let server = serve(server.stop(), moto.address);
    assert_eq!(version(&server).await, "1");
    assert_eq!(status(&server).await.config.unwrap().digest, in_force.digest);
    assert_eq!(push(&server, with_url(&server, current)).await.unwrap().result, "applied", "the URL's own bundle");
    assert_eq!(version(&server).await, "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_pinned_digest_is_checked_and_needs_no_store_if_its_bundle_is_on_disk() {
    let moto = Moto::with_two_versions();
    let proxy = Proxy::to(&moto);
    let server = serve(config(Path::new(V1), ""), proxy.address);
    let pinned = |url: &str, digest: &str| {
        with_models(&server, &[model("learn", Path::new(url), &format!("digest = {digest:?}"))])
    };
    let (first, second) = (digest_of(&fixture()), digest_of(&retrained()));
    let reason = refused(&server, pinned(V2, &"0".repeat(64))).await;
    assert!(reason.contains(&format!("{V2} holds the bundle {second}, but {} is pinned", "0".repeat(64))), "{reason}");
    assert_eq!((version(&server).await.as_str(), complete_bundles(&server)), ("1", vec![first.clone()]));

    assert_eq!(push(&server, pinned(V2, &second)).await.unwrap().result, "applied");
    assert_eq!(version(&server).await, "2");
    proxy.set(State::Down);
    assert_eq!(push(&server, pinned(V1, &first)).await.unwrap().result, "applied");
    assert_eq!(version(&server).await, "1");
}
