//! What survives a restart: a pushed config, and the caches.

use crate::{
    harness::{Server, films, fixture, ids, midemb, page, reencoded, retrained, run, statuses},
    lifecycle::{push, status, with_bundle},
};
use std::path::Path;

fn snapshotting() -> Server {
    Server::start_with(&fixture(), "snapshot.folder = \"snapshot\"\nsnapshot.interval_seconds = 0")
}

fn lookups(server: &Server, cache: &str, result: &str) -> f64 {
    let (cache, result) = (format!("cache={cache:?}"), format!("result={result:?}"));
    server.scrape().sum("midemb_cache_lookups_total", &[&cache, &result])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_pushed_config_is_in_force_after_a_restart_until_the_file_changes() {
    let server = Server::start();
    push(&server, with_bundle(&server, &retrained())).await.unwrap();
    let digest = status(&server).await.config.unwrap().digest;
    let edited = with_bundle(&server, &reencoded());
    let (folder, file) = server.stop();
    let server = Server::start_from(folder, file);
    let config = status(&server).await.config.unwrap();
    assert_eq!((config.digest, config.models[0].version.as_str()), (digest, "2"));
    assert!(config.pushed_file.ends_with("midemb.pushed.toml"), "{}", config.pushed_file);

    let (folder, file) = server.stop();
    std::fs::write(&file, edited).unwrap();
    let server = Server::start_from(folder, file);
    let config = status(&server).await.config.unwrap();
    assert_eq!((config.models[0].version.as_str(), config.pushed_file.as_str()), ("3", ""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_first_request_after_a_restart_finds_everything() {
    let server = snapshotting();
    let request = page(films("h", 8), films("c", 40));
    let before = server.client().await.get_mid_emb(request.clone()).await.unwrap().into_inner();
    let (folder, file) = server.stop();
    let server = Server::start_from(folder, file);
    // Ids without texts: the texts survived the restart, too.
    let known = page(ids(&request.history), ids(&request.candidates));
    let after = server.client().await.get_mid_emb(known).await.unwrap().into_inner();
    assert_eq!(statuses(&after), ["OK"; 40]);
    assert_eq!((&after.mid_emb, &after.item_emb), (&before.mid_emb, &before.item_emb));
    assert_eq!(server.scrape().n_encoded(), 0.0);
    assert_eq!((lookups(&server, "item", "hit"), lookups(&server, "item", "miss")), (48.0, 0.0));
    assert_eq!(server.scrape().sum("midemb_snapshots_total", &["result=\"restored\""]), 1.0);
}

/// The files of the snapshot beside this config file.
fn parts(file: &Path) -> Vec<std::path::PathBuf> {
    let folder = file.parent().unwrap().join("snapshot");
    let mut entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let snapshot = entries.find(|path| path.is_dir()).unwrap();
    std::fs::read_dir(snapshot).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_damaged_part_is_refused_and_the_rest_is_restored() {
    let server = snapshotting();
    server.client().await.get_mid_emb(page(vec![], films("c", 20))).await.unwrap();
    let (folder, file) = server.stop();
    let item =
        parts(&file).into_iter().find(|part| part.file_name().unwrap().to_str().unwrap().starts_with("item")).unwrap();
    let mut bytes = std::fs::read(&item).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&item, bytes).unwrap();
    let server = Server::start_from(folder, file);
    assert_eq!(server.scrape().sum("midemb_snapshots_total", &["result=\"refused\""]), 1.0);
    let answer = server.client().await.get_mid_emb(page(vec![], ids(&films("c", 20)))).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 20]);
    assert_eq!(server.scrape().n_encoded(), 0.0, "content embeddings were not restored");
    assert_eq!(lookups(&server, "item", "miss"), 20.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_snapshot_of_other_models_is_not_restored() {
    let server = snapshotting();
    server.client().await.get_mid_emb(page(vec![], films("c", 20))).await.unwrap();
    let edited = with_bundle(&server, &reencoded());
    let (folder, file) = server.stop();
    std::fs::write(&file, edited).unwrap();
    let server = Server::start_from(folder, file);
    assert!(server.scrape().sum("midemb_snapshots_total", &["result=\"refused\""]) >= 2.0);
    let answer = server.client().await.get_mid_emb(page(vec![], ids(&films("c", 20)))).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 20], "texts do not depend on a model");
    assert_eq!(server.scrape().n_encoded(), 20.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_snapshot_is_written_on_a_timer() {
    let server = Server::start_with(&fixture(), "snapshot.folder = \"snapshot\"\nsnapshot.interval_seconds = 1");
    server.client().await.get_mid_emb(page(vec![], films("c", 5))).await.unwrap();
    server.wait_for_log("caches written");
    server.signal("KILL");
    assert!(!parts(&server.file).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn exported_vectors_are_imported_by_another_server() {
    let (here, there) = (Server::start(), Server::start());
    here.client().await.get_mid_emb(page(vec![], films("c", 30))).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = |cache: &str| folder.path().join(format!("{cache}.safetensors"));
    for cache in ["content", "item"] {
        let mut export = midemb();
        export.args(["cache", "export", "--admin", &here.admin, "--cache", cache, "--out"]).arg(file(cache));
        let export = export.output().unwrap();
        assert!(export.status.success(), "{}", String::from_utf8_lossy(&export.stderr));
        let mut import = midemb();
        let import = import.args(["cache", "import", "--admin", &there.admin]).arg(file(cache)).output().unwrap();
        assert!(import.status.success(), "{}", String::from_utf8_lossy(&import.stderr));
    }
    let answer = there.client().await.get_mid_emb(page(vec![], films("c", 30))).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 30]);
    assert_eq!((there.scrape().n_encoded(), lookups(&there, "item", "hit")), (0.0, 30.0));

    let other = Server::start_with(&reencoded(), "");
    let foreign = run(&["cache", "import", "--admin", &other.admin, &file("item").display().to_string()]);
    let line = String::from_utf8(foreign.stderr).unwrap();
    assert!(!foreign.status.success() && line.contains("no served model") && line.lines().count() == 1, "{line}");
}
