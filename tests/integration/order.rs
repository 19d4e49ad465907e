//! Which config is in force when several come at once: the one that came last, whichever way it came.

use crate::{
    harness::{PATIENCE, Server, eventually, fixture, midemb, reencoded, retrained},
    lifecycle::{push, replace, status, with_bundle},
};
use midemb_client::proto::PushConfigResponse;
use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread,
};
use tempfile::TempDir;

/// Serves a bundle over HTTP, and answers nothing before [`GatedStore::open`]. It runs until the test process ends.
pub(crate) struct GatedStore {
    /// Where the bundle is.
    pub(crate) url: String,
    gate: mpsc::Sender<()>,
}

impl GatedStore {
    pub(crate) fn of(bundle: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/bundle", listener.local_addr().unwrap());
        let (gate, opened) = mpsc::channel();
        thread::spawn(move || {
            // An error means that the test is over.
            if opened.recv().is_err() {
                return;
            }
            for stream in listener.incoming().map_while(Result::ok) {
                // A client that disconnects is not a failure of the store.
                drop(answer(&stream, &bundle));
            }
        });
        GatedStore { url, gate }
    }

    pub(crate) fn open(&self) {
        self.gate.send(()).unwrap();
    }
}

fn answer(mut stream: &TcpStream, bundle: &Path) -> std::io::Result<()> {
    let mut head = String::new();
    let mut reader = BufReader::new(stream);
    while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head)? > 0 {}
    let name = head.split(' ').nth(1).unwrap_or_default().trim_start_matches("/bundle/");
    let bytes = std::fs::read(bundle.join(name))?;
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n", bytes.len())?;
    write!(stream, "last-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n")?;
    stream.write_all(&bytes)
}

/// Starts a push that hangs in the fetch of its bundle until the store is opened.
async fn start_push(
    server: &Server,
    store: &GatedStore,
) -> tokio::task::JoinHandle<Result<PushConfigResponse, tonic::Status>> {
    let config = with_bundle(server, Path::new(&store.url));
    let expected_digest = status(server).await.config.unwrap().digest;
    let mut admin = server.admin().await;
    let request = midemb_client::proto::PushConfigRequest { config, expected_digest, dry_run: false };
    let pushing = tokio::spawn(async move { admin.push_config(request).await.map(tonic::Response::into_inner) });
    eventually("the push fetches its bundle", async || {
        status(server).await.push.is_some_and(|push| push.steps.last().is_some_and(|step| step.step == "fetch"))
    })
    .await;
    pushing
}

/// Gives the server time to do what it should not do, without a clock: some calls back and forth.
async fn some_calls(server: &Server) {
    for _ in 0..300 {
        status(server).await;
    }
}

async fn version(server: &Server) -> String {
    status(server).await.models[0].model.clone().unwrap().version
}

/// SIGHUP used to read the config before it waited for the push, and put the older one in force after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_during_a_push_does_not_undo_it() {
    let server = Server::start();
    // From the answer to the first one on, the server has looked at its file and handles the next one at once.
    server.signal("HUP");
    assert_eq!(server.wait_for_log("push ended")["result"], "unchanged");
    let store = GatedStore::of(retrained());
    let pushing = start_push(&server, &store).await;
    server.signal("HUP");
    server.signal("HUP");
    some_calls(&server).await;
    store.open();
    assert_eq!(tokio::time::timeout(PATIENCE, pushing).await.unwrap().unwrap().unwrap().result, "applied");
    let ended = server.wait_for_log("push ended");
    assert_eq!(ended["trigger"], "push", "{ended}");
    let ended = server.wait_for_log("push ended");
    assert_eq!((&ended["trigger"], &ended["result"]), (&"signal".into(), &"unchanged".into()), "{ended}");
    assert_eq!(version(&server).await, "2");
    assert!(server.file.with_extension("pushed.toml").exists(), "a restart would find the older config");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_edited_during_a_push_wins_and_so_it_does_at_a_restart() {
    let server = Server::start();
    let store = GatedStore::of(retrained());
    let pushing = start_push(&server, &store).await;
    replace(&server.file, &with_bundle(&server, &reencoded()));
    some_calls(&server).await;
    store.open();
    assert_eq!(tokio::time::timeout(PATIENCE, pushing).await.unwrap().unwrap().unwrap().result, "applied");
    assert_eq!(server.wait_for_log("push ended")["trigger"], "push");
    let ended = server.wait_for_log("push ended");
    assert_eq!((&ended["trigger"], &ended["result"]), (&"file".into(), &"applied".into()), "{ended}");
    assert_eq!(version(&server).await, "3");
    let (folder, file) = server.stop();
    assert_eq!(version(&Server::start_from(folder, file)).await, "3");
}

/// A file that could not be read for a second used to count as changed when it was back.
#[tokio::test]
async fn a_file_that_is_gone_for_a_while_changes_nothing() {
    let server = Server::start();
    push(&server, with_bundle(&server, &retrained())).await.unwrap();
    let away = server.file.with_extension("away");
    std::fs::rename(&server.file, &away).unwrap();
    let refused = server.wait_for_log("push refused");
    assert!(refused["reason"].as_str().unwrap().contains("cannot be read"), "{refused}");
    std::fs::rename(&away, &server.file).unwrap();
    some_calls(&server).await;
    server.signal("HUP");
    let ended = server.wait_for_log("push ended");
    assert_eq!((&ended["trigger"], &ended["result"]), (&"signal".into(), &"unchanged".into()), "{ended}");
    assert_eq!(version(&server).await, "2");
    assert!(server.file.with_extension("pushed.toml").exists(), "a restart would find the older config");
    let triggers: Vec<String> = status(&server).await.pushes.into_iter().map(|push| push.trigger).collect();
    assert_eq!(triggers.iter().filter(|trigger| *trigger == "file").count(), 1, "{triggers:?}");
}

/// A push over a file that cannot be read is still found by a restart when the file is back.
#[tokio::test]
async fn a_config_that_is_pushed_while_the_file_is_gone_survives_a_restart() {
    let server = Server::start();
    let config = with_bundle(&server, &retrained());
    let away = server.file.with_extension("away");
    std::fs::rename(&server.file, &away).unwrap();
    assert_eq!(push(&server, config).await.unwrap().result, "applied");
    std::fs::rename(&away, &server.file).unwrap();
    let (folder, file) = server.stop();
    assert_eq!(version(&Server::start_from(folder, file)).await, "2");
}

/// Where the config is a symlink, its folder has no event when the target changes.
#[tokio::test]
async fn the_target_of_a_symlink_is_seen_when_it_is_edited_and_when_it_is_replaced() {
    let (folder, path) = crate::harness::config(&fixture(), "");
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("midemb.toml");
    std::fs::copy(&path, &target).unwrap();
    std::fs::remove_file(&path).unwrap();
    symlink(&target, &path).unwrap();
    let server = serve(folder, path);
    std::fs::write(&target, with_bundle(&server, &retrained())).unwrap();
    assert_eq!(server.wait_for_log("push ended")["trigger"], "file");
    assert_eq!(version(&server).await, "2");
    replace(&target, &with_bundle(&server, &reencoded()));
    assert_eq!(server.wait_for_log("push ended")["trigger"], "file");
    assert_eq!(version(&server).await, "3");
}

fn serve(folder: TempDir, file: PathBuf) -> Server {
    let mut serve = midemb();
    serve.arg("serve").arg("--config").arg(&file);
    Server::spawn(serve, folder, file)
}

/// A container often has its config as a single file that is mounted. Mounting needs privileges; without them, there is nothing
/// to see here that the test of the symlink does not show.
#[tokio::test]
async fn a_file_that_is_mounted_alone_is_seen_when_it_is_edited() {
    let (folder, path) = crate::harness::config(&fixture(), "");
    let elsewhere = tempfile::tempdir().unwrap();
    let source = elsewhere.path().join("midemb.toml");
    std::fs::copy(&path, &source).unwrap();
    let mounted = Command::new("mount").arg("--bind").arg(&source).arg(&path).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return;
    }
    let server = serve(folder, path.clone());
    std::fs::write(&source, with_bundle(&server, &retrained())).unwrap();
    let ended = server.wait_for_log("push ended");
    assert!(Command::new("umount").arg(&path).status().unwrap().success());
    assert_eq!((&ended["trigger"], version(&server).await.as_str()), (&"file".into(), "2"));
}
