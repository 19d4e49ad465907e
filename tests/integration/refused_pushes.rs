//! Faulty pushes. Each is refused with its reason, and the config before it stays in force.

use crate::{
    harness::{BrokenBundle, PATIENCE, Server, eventually, films, fixture, page, reencoded, retrained, root, statuses},
    lifecycle::{model, push, status, with_bundle, with_models},
};
use midemb_client::proto::{PushConfigRequest, RollbackRequest};
use serde_json::Value;
use std::{path::Path, process::Command};
use tonic::Code;

/// What is wrong with a bundle, the bundle, the step that finds it, and a part of the reason.
type BrokenFiles = (&'static str, BrokenBundle, &'static str, &'static str);
/// What is wrong with a config, the config, the code of its refusal, the step that finds it, and a part of the reason.
type BrokenConfig = (&'static str, String, Code, &'static str, &'static str);

fn broken(break_it: impl FnOnce(&BrokenBundle)) -> BrokenBundle {
    let bundle = BrokenBundle::of(&retrained());
    break_it(&bundle);
    bundle
}

fn truncate(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

fn edit_golden(bundle: &BrokenBundle, change: impl FnOnce(&mut Value)) {
    let text = std::fs::read_to_string(bundle.path("golden.json")).unwrap();
    let mut golden = serde_json::from_str(&text).unwrap();
    change(&mut golden);
    bundle.replace("golden.json", golden.to_string().as_bytes());
}

/// A graph with NaN among its weights.
fn with_nan(path: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    // The weights are most of the file, so its middle is inside them. Floats whose bits are all ones are NaN, so alignment
    // does not matter.
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].copy_from_slice(&[0xff; 64]);
    bytes
}

/// Bundles whose files do not match their manifest.
fn broken_files() -> Vec<BrokenFiles> {
    let swap = |b: &BrokenBundle| {
        std::fs::rename(b.path("cvr.onnx"), b.path("t")).unwrap();
        std::fs::rename(b.path("item_tower.onnx"), b.path("cvr.onnx")).unwrap();
        std::fs::rename(b.path("t"), b.path("item_tower.onnx")).unwrap();
    };
    let remove = |file: &'static str| broken(move |b| std::fs::remove_file(b.path(file)).unwrap());
    let half = |file: &'static str| broken(move |b| truncate(&b.path(file)));
    let format = |b: &BrokenBundle| b.edit("manifest.toml", |m| m.replace("format = 2", "format = 1"));
    let history =
        |b: &BrokenBundle| b.edit("manifest.toml", |m| m.replace("max_history = 8\n", "max_history = 10000000\n"));
    vec![
        ("half a graph", half("user_tower.onnx"), "digests", "user_tower.onnx has a wrong digest"),
        ("two files swapped", broken(swap), "digests", "has a wrong digest"),
        ("no manifest", remove("manifest.toml"), "digests", "manifest.toml cannot be read"),
        ("half a manifest", half("manifest.toml"), "digests", "manifest.toml: "),
        ("a missing file", remove("tokenizer.json"), "digests", "tokenizer.json is missing"),
        (
            "a format that this server does not read",
            broken(format),
            "digests",
            "format is 1, this server reads format 2",
        ),
        (
            "a history that does not fit into memory",
            broken(history),
            "digests",
            "user_tower.max_history is 10000000, it must be from 1 to 100000",
        ),
    ]
}

/// Bundles with correct digests and another fault.
fn broken_models() -> Vec<BrokenFiles> {
    let bytes = |bundle: &Path, file: &str| std::fs::read(bundle.join(file)).unwrap();
    let swap = |b: &BrokenBundle| {
        b.replace("cvr.onnx", &bytes(&retrained(), "item_tower.onnx"));
        b.replace("item_tower.onnx", &bytes(&retrained(), "cvr.onnx"));
    };
    let golden = |change: fn(&mut Value)| broken(move |b| edit_golden(b, change));
    let encoder = |b: &BrokenBundle| b.replace("encoder.onnx", &bytes(&reencoded(), "encoder.onnx"));
    let nan = |b: &BrokenBundle| b.replace("item_tower.onnx", &with_nan(&b.path("item_tower.onnx")));
    let dims = |b: &BrokenBundle| b.edit("manifest.toml", |m| m.replace("dim = 12", "dim = 13"));
    let tokens = |b: &BrokenBundle| b.edit("manifest.toml", |m| m.replace("max_tokens = ", "max_tokens = 1"));
    let endless = |b: &BrokenBundle| {
        let (start, end) = ("{% for a in range(9999) %}".repeat(4), "{% endfor %}".repeat(4));
        b.edit("manifest.toml", |m| m.replace("template = \"", &format!("template = \"{start}{end}")));
    };
    let content: fn(&mut Value) = |golden| golden["items"][0]["content"][0] = 0.9.into();
    let ids: fn(&mut Value) = |golden| golden["items"][0]["token_ids"] = serde_json::json!([1, 2]);
    let cvr: fn(&mut Value) = |golden| golden["pairs"][0]["cvr"] = 0.987.into();
    let null: fn(&mut Value) = |golden| golden["users"][0]["user"][0] = Value::Null;
    vec![
        ("two files swapped, with matching digests", broken(swap), "graphs", "has no input named"),
        (
            "a graph that is no ONNX file",
            broken(|b| b.replace("cvr.onnx", b"no graph")),
            "graphs",
            "cvr.onnx cannot be loaded",
        ),
        ("another mid-emb width", broken(dims), "golden", "expected"),
        ("weights that are not finite", broken(nan), "golden", "item 0 is not finite"),
        ("golden cvr of another model", golden(cvr), "golden", "cvr 0 differs from golden by"),
        ("golden content of another encoder", golden(content), "golden", "content 0 differs from golden by"),
        ("golden ids of another tokenizer", golden(ids), "golden", "token_ids 0 are"),
        ("golden vectors that are no numbers", golden(null), "golden", "golden.json: invalid type: null"),
        ("another token limit", broken(tokens), "golden", "token_ids 0 are"),
        ("a template whose loops do not end", broken(endless), "golden", "one text takes more than 20000000 steps"),
        ("the encoder of another bundle", broken(encoder), "golden", "content 0 differs from golden by"),
    ]
}

/// Configs whose bundle is not where they say.
fn broken_places(server: &Server) -> Vec<BrokenConfig> {
    let refused = Code::FailedPrecondition;
    let of = |bundle: &Path| with_bundle(server, bundle);
    let url = |url: &str| with_models(server, &[format!("name = \"learn\"\nbundle = {url:?}")]);
    let pinned = with_models(server, &[model("learn", &retrained(), &format!("digest = {:?}", "0".repeat(64)))]);
    let (file, dead) = (root().join("Cargo.toml"), "http://127.0.0.1:1/bundle");
    vec![
        ("no such folder", of(Path::new("/nowhere")), refused, "digests", "/nowhere/manifest.toml cannot be read"),
        ("a folder that is a file", of(&file), refused, "digests", "Cargo.toml/manifest.toml cannot be read"),
        ("another bundle than the pinned one", pinned, refused, "digests", "the config asks for 0000"),
        ("a store that does not answer", url(dead), refused, "fetch", dead),
        (
            "a kind of store that is not supported",
            url("ftp://host/bundle"),
            Code::InvalidArgument,
            "parse",
            "models[0].bundle",
        ),
    ]
}

fn broken_configs(server: &Server) -> Vec<BrokenConfig> {
    let (refused, invalid) = (Code::FailedPrecondition, Code::InvalidArgument);
    let good = with_bundle(server, &retrained());
    let two = |shares: [u8; 2], names: [&str; 2]| {
        let entry = |i: usize| model(names[i], &fixture(), &format!("share = {}", shares[i]));
        with_models(server, &[entry(0), entry(1)])
    };
    let shadow = model("next", &retrained(), "shadow_of = \"lear\"");
    let shadow = with_models(server, &[model("learn", &fixture(), ""), shadow]);
    let port = good.replace("server.listen = \"127.0.0.1:0\"", "server.listen = \"127.0.0.1:1\"");
    let above = |line: &str| format!("{line}\n{good}");
    let deep = format!("\"a{}\" = 1", ".a".repeat(60_000));
    vec![
        ("shares of 99", two([50, 49], ["a", "b"]), invalid, "parse", "the shares add up to 99, not to 100"),
        ("two models with one name", two([50, 50], ["a", "a"]), invalid, "parse", "\"a\" is taken by another model"),
        ("no model", with_models(server, &[]), invalid, "parse", "no model is configured"),
        ("an unknown key", above("cache.item_mbs = 3"), invalid, "parse", "unknown key, did you mean cache.item_mb?"),
        ("out of bounds", above("reload.warm_seconds = -1"), invalid, "parse", "\"-1\" is not a whole number"),
        ("no TOML", "[server\n".to_owned(), invalid, "parse", "midemb.toml: "),
        // The first two of these used to end the process; the third hid its bundle from the code that pins digests.
        (
            "a key that is a path to a huge list",
            above("\"a[1000000000000000]\" = 1"),
            invalid,
            "parse",
            "line 1: the key \"a[1000000000000000]\" is not a name",
        ),
        ("a key that is a path to deep tables", above(&deep), invalid, "parse", "line 1: the key \"a.a.a."),
        (
            "a key that is a path to a model",
            above("\"models[0]\".name = \"learn\""),
            invalid,
            "parse",
            "line 1: the key \"models[0]\" is not a name",
        ),
        ("another port", port, refused, "validate", "from \"127.0.0.1:0\" to \"127.0.0.1:1\" without a restart"),
        ("another cache", above("cache.item_mb = 3"), refused, "validate", "cache.item_mb: cannot change"),
        (
            "a shadow of a model that does not exist",
            shadow,
            invalid,
            "parse",
            "\"lear\" is not the name of a model that answers",
        ),
    ]
}

#[tokio::test]
async fn faulty_pushes_are_refused_with_their_reason_and_the_server_keeps_serving() {
    let server = Server::start();
    let request = page(films("h", 3), films("c", 5));
    let first = server.client().await.get_mid_emb(request.clone()).await.unwrap().into_inner();
    let bundles: Vec<BrokenFiles> = broken_files().into_iter().chain(broken_models()).collect();
    let pushed = |(what, bundle, step, reason): &BrokenFiles| {
        (*what, with_bundle(&server, bundle.folder()), Code::FailedPrecondition, *step, *reason)
    };
    let cases = bundles.iter().map(pushed).chain(broken_places(&server)).chain(broken_configs(&server));
    let mut n_cases = 0.0;
    for (what, config, code, step, reason) in cases {
        let refused = push(&server, config).await.expect_err(what);
        let message = refused.message();
        assert!(refused.code() == code && message.contains(reason), "{what}: {:?}: {message}", refused.code());
        assert!(!message.contains('\n'), "{what}: not one line: {message}");
        let status = status(&server).await;
        let last = &status.pushes[0];
        assert_eq!((last.result.as_str(), last.reason.as_str()), ("refused", message), "{what}");
        let at = last.steps.last().map(|step| (step.step.as_str(), step.result.as_str()));
        assert_eq!(at, Some((step, "failed")), "{what}");
        assert!(status.push.is_none() && status.ready, "{what}");
        let answer = server.client().await.get_mid_emb(request.clone()).await.unwrap().into_inner();
        assert_eq!((&answer.model, &answer.mid_emb), (&first.model, &first.mid_emb), "{what}");
        n_cases += 1.0;
    }
    assert_eq!(n_cases, 35.0);
    assert!(!server.file.with_extension("pushed.toml").exists(), "a refused config was kept");
    assert_eq!(server.scrape().sum("midemb_reloads_total", &["result=\"refused\""]), n_cases);
    let good = with_bundle(&server, &retrained());
    assert_eq!(push(&server, good).await.unwrap().result, "applied", "a good push after the faulty ones");
}

#[tokio::test]
async fn a_config_that_cannot_be_saved_is_not_put_in_force() {
    // A disk of one page has room for the config, but not for a second one beside it.
    let folder = tempfile::tempdir().unwrap();
    let mount = |arguments: &[&str]| Command::new(arguments[0]).args(&arguments[1..]).arg(folder.path()).status();
    let mounted = mount(&["mount", "-t", "tmpfs", "-o", "size=4k", "midemb-test"]).is_ok_and(|status| status.success());
    let server = Server::start();
    let config = with_bundle(&server, &retrained());
    // Mounting needs privileges. So the first case works without: a folder is where the file should go.
    let in_the_way = server.file.with_extension("pushed.toml");
    std::fs::create_dir(&in_the_way).unwrap();
    std::fs::write(in_the_way.join("full"), "").unwrap();
    let refused = push(&server, config.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("midemb.pushed.toml cannot be updated"), "{}", refused.message());
    assert_eq!(status(&server).await.models[0].model.as_ref().unwrap().version, "1");
    if mounted {
        let (small, path) = (folder.path().to_path_buf(), folder.path().join("midemb.toml"));
        std::fs::copy(&server.file, &path).unwrap();
        let mut serve = crate::harness::midemb();
        serve.arg("serve").arg("--config").arg(&path);
        let full = Server::spawn(serve, tempfile::tempdir().unwrap(), path);
        let refused = push(&full, config + &"# a long comment\n".repeat(500)).await.unwrap_err();
        assert!(refused.message().contains("No space left"), "{}", refused.message());
        assert_eq!(status(&full).await.models[0].model.as_ref().unwrap().version, "1");
        assert!(!small.join("midemb.pushed.toml").exists());
        drop(full);
        assert!(mount(&["umount"]).unwrap().success());
    }
    std::fs::remove_dir_all(&in_the_way).unwrap();
    assert_eq!(push(&server, with_bundle(&server, &retrained())).await.unwrap().result, "applied");
}

#[tokio::test]
async fn a_push_to_another_config_than_the_one_in_force_is_refused() {
    let server = Server::start();
    let before = status(&server).await.config.unwrap().digest;
    push(&server, with_bundle(&server, &retrained())).await.unwrap();
    let late = PushConfigRequest { config: with_bundle(&server, &fixture()), expected_digest: before, dry_run: false };
    let mut admin = server.admin().await;
    let refused = admin.push_config(late.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    assert!(refused.message().contains("read it and push again"), "{}", refused.message());
    let blind = admin.push_config(PushConfigRequest { expected_digest: String::new(), ..late }).await.unwrap_err();
    assert_eq!(blind.code(), Code::InvalidArgument);
    assert_eq!(status(&server).await.models[0].model.as_ref().unwrap().version, "2");
}

#[tokio::test]
async fn a_dry_run_finds_what_is_wrong_and_changes_nothing() {
    let server = Server::start();
    let expected_digest = status(&server).await.config.unwrap().digest;
    let dry = |config| PushConfigRequest { config, expected_digest: expected_digest.clone(), dry_run: true };
    let mut admin = server.admin().await;
    let checked = admin.push_config(dry(with_bundle(&server, &retrained()))).await.unwrap().into_inner();
    assert_eq!((checked.result.as_str(), checked.config.unwrap().digest), ("checked", expected_digest.clone()));
    assert!(admin.push_config(dry(with_bundle(&server, Path::new("/nowhere")))).await.is_err());
    let status = status(&server).await;
    assert!(status.previous.is_none() && status.models[0].model.as_ref().unwrap().version == "1");
    assert!(!server.file.with_extension("pushed.toml").exists());
}

/// Starts a push whose store accepts connections and never answers. The push hangs until the test drops the listener.
async fn a_push_that_hangs(
    server: &Server,
) -> (std::net::TcpListener, tokio::task::JoinHandle<Result<(), tonic::Status>>) {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("name = \"learn\"\nbundle = \"http://{}/bundle\"", silent.local_addr().unwrap());
    let config = with_models(server, &[url]);
    let expected_digest = status(server).await.config.unwrap().digest;
    let mut admin = server.admin().await;
    let pushing = tokio::spawn(async move {
        admin.push_config(PushConfigRequest { config, expected_digest, dry_run: false }).await.map(drop)
    });
    eventually("the push fetches its bundle", async || {
        status(server).await.push.is_some_and(|push| push.steps.last().is_some_and(|step| step.step == "fetch"))
    })
    .await;
    (silent, pushing)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn during_a_push_another_push_is_refused_and_a_rollback_is_not() {
    let server = Server::start();
    push(&server, with_bundle(&server, &retrained())).await.unwrap();
    let (silent, pushing) = a_push_that_hangs(&server).await;
    let second = push(&server, with_bundle(&server, &fixture())).await.unwrap_err();
    assert_eq!(second.code(), Code::Aborted);
    assert!(second.message().contains("another push is running, started by 127.0.0.1"), "{}", second.message());
    let rolled_back = server.admin().await.rollback(RollbackRequest::default()).await.unwrap().into_inner();
    assert_eq!(rolled_back.config.unwrap().models[0].version, "1");
    let answer = server.client().await.get_mid_emb(page(vec![], films("c", 2))).await.unwrap().into_inner();
    assert_eq!((statuses(&answer), answer.model.unwrap().version.as_str()), (vec!["OK"; 2], "1"));
    drop(silent);
    let refused = tokio::time::timeout(PATIENCE, pushing).await.unwrap().unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert_eq!(push(&server, with_bundle(&server, &retrained())).await.unwrap().result, "applied");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_during_a_push_ends_both() {
    let server = Server::start();
    let (_silent, pushing) = a_push_that_hangs(&server).await;
    server.signal("TERM");
    let refused = tokio::time::timeout(PATIENCE, pushing).await.unwrap().unwrap().unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "the server is draining"));
    assert!(server.wait().success());
}

/// What `GetStatus` may return however pushes fail: far below the 4 MiB that a gRPC client takes.
const MAX_STATUS_BYTES: usize = 256 << 10;
const MAX_MESSAGE_BYTES: usize = 1024;

/// Forty pushes with a key of megabytes used to make the status and the log grow by megabytes each, until no client could
/// read the status.
#[tokio::test]
async fn no_text_of_an_operator_makes_the_status_the_log_or_a_refusal_large() {
    let server = Server::start();
    let good = with_bundle(&server, &retrained());
    let long = "k".repeat(240 << 10);
    let many: String = (0..15_000).map(|i| format!("key{i} = 1\n")).collect();
    let with_value = |key: &str, value: &str| format!("{key} = {value:?}\n{good}");
    let named = with_models(&server, &[model(&long, &fixture(), "")]);
    let models: Vec<String> = (0..3_000).map(|i| model(&format!("m{i}"), Path::new("/nowhere"), "share = 1")).collect();
    let nowhere = with_bundle(&server, &Path::new("/nowhere").join(&long));
    let pushes = [
        ("a long unknown key", with_value(&long, "")),
        ("a long value", with_value("cache.item_mb", &long)),
        ("a long value of a frozen key", with_value("snapshot.folder", &long)),
        ("many unknown keys", format!("{many}{good}")),
        ("many models", with_models(&server, &models)),
        ("a long name", named),
        ("a long folder", nowhere),
        ("no TOML", format!("{long} 1")),
        ("a long config", format!("# {}\n{good}", "k".repeat(3 << 20))),
    ];
    let n_pushes = pushes.len();
    for (what, config) in pushes {
        let refused = push(&server, config).await.expect_err(what);
        assert!(refused.message().len() <= MAX_MESSAGE_BYTES, "{what}: {} bytes", refused.message().len());
        // A status with too much in its trailers reaches the client as another error.
        assert!(
            matches!(refused.code(), Code::InvalidArgument | Code::FailedPrecondition),
            "{what}: {:?}: {}",
            refused.code(),
            refused.message()
        );
        let line = server.wait_for_log("push refused").to_string();
        assert!(line.len() < 16 << 10, "{what}: a log line of {} bytes", line.len());
    }
    let stale = PushConfigRequest { config: good.clone(), expected_digest: long, dry_run: false };
    let refused = server.admin().await.push_config(stale).await.unwrap_err();
    assert!(refused.code() == Code::Aborted && refused.message().len() <= MAX_MESSAGE_BYTES, "{:?}", refused.code());
    let status = status(&server).await;
    assert_eq!(status.pushes.len(), n_pushes + 2, "the start, and every refusal");
    let n_bytes = prost::Message::encoded_len(&status);
    assert!(n_bytes <= MAX_STATUS_BYTES, "a status of {n_bytes} bytes");
    assert_eq!(push(&server, good).await.unwrap().result, "applied");
}
