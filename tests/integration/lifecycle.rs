//! Configs that come into force under traffic: pushed, edited on disk, reread on SIGHUP, and rolled back.

use crate::harness::{
    BrokenBundle, Server, eventually, films, fixture, floats, ids, midemb, page, reencoded, retrained, rows, statuses,
};
use midemb_client::proto::{
    GetMidEmbRequest, GetMidEmbResponse, GetStatusRequest, GetStatusResponse, PushConfigRequest, PushConfigResponse,
    RollbackRequest,
};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use tonic::{Code, Status};

/// The server's config with other models: one `[[models]]` table per entry of `models`.
pub(crate) fn with_models(server: &Server, models: &[String]) -> String {
    let text = std::fs::read_to_string(&server.file).unwrap();
    let rest = text.split("[[models]]").next().unwrap();
    rest.to_owned() + &models.iter().map(|model| format!("[[models]]\n{model}\n")).collect::<String>()
}

/// The keys of one `[[models]]` table; `more` has further ones.
pub(crate) fn model(name: &str, bundle: &Path, more: &str) -> String {
    format!("name = {name:?}\nbundle = {:?}\n{more}", bundle.display().to_string())
}

/// The server's config with another bundle.
pub(crate) fn with_bundle(server: &Server, bundle: &Path) -> String {
    with_models(server, &[model("learn", bundle, "")])
}

pub(crate) async fn status(server: &Server) -> GetStatusResponse {
    server.admin().await.get_status(GetStatusRequest {}).await.unwrap().into_inner()
}

/// Pushes a config on top of the one in force.
pub(crate) async fn push(server: &Server, config: String) -> Result<PushConfigResponse, Status> {
    let expected_digest = status(server).await.config.unwrap().digest;
    let request = PushConfigRequest { config, expected_digest, dry_run: false };
    server.admin().await.push_config(request).await.map(tonic::Response::into_inner)
}

async fn ask(server: &Server, request: GetMidEmbRequest) -> GetMidEmbResponse {
    server.client().await.get_mid_emb(request).await.unwrap().into_inner()
}

fn version(answer: &GetMidEmbResponse) -> &str {
    &answer.model.as_ref().unwrap().version
}

/// The answer of a server that was started with this bundle.
async fn answer_of(bundle: &Path) -> GetMidEmbResponse {
    ask(&Server::start_with(bundle, ""), page(films("h", 5), films("c", 9))).await
}

fn assert_same(found: &GetMidEmbResponse, expected: &GetMidEmbResponse) {
    assert_eq!((&found.model, statuses(found)), (&expected.model, statuses(expected)));
    for (a, b) in floats(&found.mid_emb).iter().zip(floats(&expected.mid_emb)) {
        assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    }
}

#[tokio::test]
async fn a_pushed_tower_serves_at_once_and_encodes_nothing() {
    let server = Server::start();
    let request = page(films("h", 5), films("c", 9));
    let before = ask(&server, request.clone()).await;
    let n_encoded = server.scrape().n_encoded();
    let pushed = push(&server, with_bundle(&server, &retrained())).await.unwrap();
    assert_eq!(pushed.result, "applied");
    let steps: Vec<_> = pushed.report.unwrap().steps.into_iter().map(|step| (step.step, step.result)).collect();
    let names: Vec<&str> = steps.iter().map(|(step, _)| step.as_str()).collect();
    let expected =
        ["parse", "validate", "digests", "golden", "graphs", "golden", "warm", "replay", "persist", "swap", "drain"];
    assert_eq!(names, expected);
    assert!(steps.iter().all(|(_, result)| result == "ok"), "{steps:?}");

    let misses =
        |server: &Server| server.scrape().sum("midemb_cache_lookups_total", &["cache=\"item\"", "result=\"miss\""]);
    let n_misses = misses(&server);
    let after = ask(&server, page(ids(&request.history), ids(&request.candidates))).await;
    assert_same(&after, &answer_of(&retrained()).await);
    assert_ne!(rows(&before.mid_emb), rows(&after.mid_emb));
    assert_eq!(server.scrape().n_encoded(), n_encoded, "the encoder ran, although only the towers changed");
    assert_eq!(misses(&server), n_misses, "item embeddings of the new tower were not computed before the swap");

    let scrape = server.scrape();
    assert_eq!(scrape.sum("midemb_reloads_total", &["result=\"applied\""]), 2.0, "the start and the push");
    assert_eq!(scrape.sum("midemb_model_info", &["version=\"1\""]), 0.0);
    assert_eq!(scrape.sum("midemb_model_info", &["version=\"2\""]), 1.0);
    assert_eq!(scrape.sum("midemb_config_info", &[]), 1.0);
    assert_eq!(scrape.sum("midemb_requests_total", &["method=\"GetMidEmb\"", "version=\"2\""]), 1.0);
}

#[tokio::test]
async fn a_new_encoder_encodes_hot_items_before_it_serves() {
    let server = Server::start();
    let request = page(films("h", 5), films("c", 9));
    ask(&server, request.clone()).await;
    push(&server, with_bundle(&server, &reencoded())).await.unwrap();
    let n_encoded = server.scrape().n_encoded();
    let after = ask(&server, page(ids(&request.history), ids(&request.candidates))).await;
    assert_same(&after, &answer_of(&reencoded()).await);
    assert_eq!(server.scrape().n_encoded(), n_encoded, "hot items were not encoded before the swap");
}

#[tokio::test]
async fn a_rollback_loads_nothing_and_a_second_one_undoes_it() {
    let server = Server::start();
    let request = page(films("h", 5), films("c", 9));
    let first = ask(&server, request.clone()).await;
    let nothing = server.admin().await.rollback(RollbackRequest::default()).await.unwrap_err();
    assert_eq!(
        (nothing.code(), nothing.message()),
        (Code::FailedPrecondition, "there is no previous config to roll back to")
    );
    push(&server, with_bundle(&server, &retrained())).await.unwrap();
    let second = ask(&server, request.clone()).await;
    let in_force = status(&server).await.config.unwrap();
    assert!(in_force.pushed_file.ends_with("midemb.pushed.toml"), "{in_force:?}");

    let has_loaded = |log: &[serde_json::Value]| log.iter().any(|line| line["message"] == "model loaded");
    let mut push_log = server.log_until("push ended");
    while push_log.last().unwrap()["trigger"] != "push" {
        push_log = server.log_until("push ended");
    }
    assert!(has_loaded(&push_log), "{push_log:?}");

    let roll_back =
        async || server.admin().await.rollback(RollbackRequest::default()).await.map(tonic::Response::into_inner);
    let rolled_back = roll_back().await.unwrap();
    assert_eq!(rolled_back.warning, "");
    assert_eq!(rolled_back.config.unwrap().pushed_file, "", "the config file's own text is in force again");
    let rollback_log = server.log_until("push ended");
    assert_eq!(rollback_log.last().unwrap()["trigger"], "rollback");
    assert!(!has_loaded(&rollback_log), "a rollback loaded models: {rollback_log:?}");
    assert!(!server.file.with_extension("pushed.toml").exists());
    assert_same(&ask(&server, request.clone()).await, &first);
    roll_back().await.unwrap();
    assert_same(&ask(&server, request.clone()).await, &second);
    assert!(server.file.with_extension("pushed.toml").exists());

    let wrong = RollbackRequest { expected_digest: "0".repeat(64) };
    assert_eq!(server.admin().await.rollback(wrong).await.unwrap_err().code(), Code::Aborted);
    let pushes = status(&server).await.pushes;
    let results: Vec<_> = pushes.iter().map(|push| (push.trigger.as_str(), push.result.as_str())).collect();
    let expected = [
        ("rollback", "refused"),
        ("rollback", "rolled_back"),
        ("rollback", "rolled_back"),
        ("push", "applied"),
        ("rollback", "refused"),
        ("start", "applied"),
    ];
    assert_eq!(results, expected);
}

/// Replaces a file as editors do: by writing another one and renaming it.
pub(crate) fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, file).unwrap();
}

#[tokio::test]
async fn a_changed_file_comes_into_force_even_behind_a_symlink_that_is_swapped() {
    // Kubernetes mounts a ConfigMap like this: the file is a link into ..data, which is a link to a folder that is replaced.
    let (folder, path) = crate::harness::config(&fixture(), "");
    let text = std::fs::read_to_string(&path).unwrap();
    let data = |name: &str| folder.path().join(name);
    let publish = |name: &str, text: &str| {
        std::fs::create_dir(data(name)).unwrap();
        std::fs::write(data(name).join("midemb.toml"), text).unwrap();
        std::os::unix::fs::symlink(name, data("..data_tmp")).unwrap();
        std::fs::rename(data("..data_tmp"), data("..data")).unwrap();
    };
    std::fs::remove_file(&path).unwrap();
    publish("..2026_1", &text);
    std::os::unix::fs::symlink("..data/midemb.toml", &path).unwrap();
    let mut serve = midemb();
    serve.arg("serve").arg("--config").arg(&path);
    let server = Server::spawn(serve, folder, path);

    let folder = server.file.parent().unwrap().to_path_buf();
    let text = with_bundle(&server, &retrained());
    std::fs::create_dir(folder.join("..2026_2")).unwrap();
    std::fs::write(folder.join("..2026_2/midemb.toml"), &text).unwrap();
    std::os::unix::fs::symlink("..2026_2", folder.join("..data_tmp")).unwrap();
    std::fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
    assert_eq!(server.wait_for_log("push ended")["trigger"], "file");
    assert_eq!(version(&ask(&server, page(vec![], films("c", 1))).await), "2");
}

#[tokio::test]
async fn a_file_edited_after_a_push_wins_and_sighup_rereads_it() {
    let server = Server::start();
    server.signal("HUP");
    assert_eq!(server.wait_for_log("push ended")["result"], "unchanged");
    push(&server, with_bundle(&server, &retrained())).await.unwrap();
    server.wait_for_log("push ended");
    server.signal("HUP");
    assert_eq!(server.wait_for_log("push ended")["result"], "unchanged", "SIGHUP undid a push");
    let edited = with_bundle(&server, &reencoded());
    replace(&server.file, &edited);
    let ended = server.wait_for_log("push ended");
    assert_eq!((&ended["trigger"], &ended["result"]), (&"file".into(), &"applied".into()));
    assert_eq!(version(&ask(&server, page(vec![], films("c", 1))).await), "3");
    assert!(!server.file.with_extension("pushed.toml").exists(), "the pushed config would win at a restart");

    replace(&server.file, "nonsense");
    let refused = server.wait_for_log("push refused");
    assert!(refused["reason"].as_str().unwrap().contains("midemb.toml"), "{refused}");
    assert_eq!(version(&ask(&server, page(vec![], films("c", 1))).await), "3");
}

#[tokio::test]
async fn sighup_loads_another_bundle_that_was_put_in_the_same_folder() {
    let bundle = BrokenBundle::new();
    let server = Server::start_with(bundle.folder(), "");
    let copy = |from: &Path| {
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, bundle.path(path.file_name().unwrap().to_str().unwrap())).unwrap();
        }
    };
    for (from, expected) in [(retrained(), "2"), (fixture(), "1"), (retrained(), "2")] {
        copy(&from);
        server.signal("HUP");
        let ended = server.wait_for_log("push ended");
        assert_eq!((&ended["trigger"], &ended["result"]), (&"signal".into(), &"applied".into()));
        assert_eq!(version(&ask(&server, page(vec![], films("c", 1))).await), expected);
    }
    let rolled_back = server.admin().await.rollback(RollbackRequest::default()).await.unwrap().into_inner();
    assert_eq!(rolled_back.config.unwrap().models[0].version, "1");
    assert!(rolled_back.warning.contains("a restart would find another bundle in"), "{}", rolled_back.warning);
}

#[tokio::test]
async fn an_experiment_keeps_its_users_and_a_request_may_name_its_model() {
    let server = Server::start();
    let models = |shares: [u8; 2]| {
        [("a", fixture(), shares[0]), ("b", retrained(), shares[1])]
            .map(|(name, bundle, share)| model(name, &bundle, &format!("share = {share}")))
    };
    push(&server, with_models(&server, &models([50, 50]))).await.unwrap();
    let mut client = server.client().await;
    let mut users_of = async |name: &str| {
        let mut users = Vec::new();
        for i in 0..200 {
            let request = GetMidEmbRequest { user_id: format!("u{i}"), ..page(vec![], films("c", 1)) };
            let answer = client.get_mid_emb(request).await.unwrap().into_inner();
            if answer.model.unwrap().name == name {
                users.push(i);
            }
        }
        users
    };
    let half = users_of("b").await;
    assert!((60..140).contains(&half.len()), "{} of 200 users", half.len());
    let canary = push(&server, with_models(&server, &models([20, 80]))).await.unwrap();
    let steps: Vec<_> = canary.report.unwrap().steps.into_iter().map(|step| step.step).collect();
    assert!(!steps.contains(&"graphs".to_owned()), "models that already serve were loaded again: {steps:?}");
    let most = users_of("b").await;
    assert!(
        half.iter().all(|user| most.contains(user)) && most.len() > half.len(),
        "a greater share took users away from the canary"
    );

    let named =
        GetMidEmbRequest { model: "a".to_owned(), user_id: format!("u{}", most[0]), ..page(vec![], films("c", 1)) };
    assert_eq!(ask(&server, named).await.model.unwrap().name, "a");
    let salted = "routing.salt = \"next\"\n".to_owned() + &with_models(&server, &models([20, 80]));
    push(&server, salted).await.unwrap();
    assert_ne!(users_of("b").await, most, "another salt routed the same users to the model");
    let replaced = GetMidEmbRequest { model: "learn".to_owned(), ..page(vec![], films("c", 1)) };
    assert_eq!(server.client().await.get_mid_emb(replaced).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_shadow_is_compared_and_never_answers() {
    let server = Server::start();
    let config = |shadow: &Path| {
        with_models(&server, &[model("learn", &fixture(), ""), model("next", shadow, "shadow_of = \"learn\"")])
    };
    push(&server, config(&retrained())).await.unwrap();
    let compared = |server: &Server| server.scrape().sum("midemb_shadow_requests_total", &["result=\"compared\""]);
    let answer = ask(&server, page(films("h", 3), films("c", 7))).await;
    assert_eq!(answer.model.unwrap().name, "learn");
    eventually("the shadow's answer is compared", async || compared(&server) == 1.0).await;
    let scrape = server.scrape();
    assert_eq!(scrape.sum("midemb_shadow_cosine_count", &["model=\"next\""]), 7.0);
    assert_eq!(scrape.sum("midemb_shadow_cvr_difference_count", &["model=\"next\""]), 7.0);
    let mean = scrape.sum("midemb_shadow_cosine_sum", &[]) / 7.0;
    assert!((-1.0..0.9999).contains(&mean), "other towers gave nearly the same vectors: mean cosine {mean}");
    let named = GetMidEmbRequest { model: "next".to_owned(), ..page(vec![], films("c", 1)) };
    assert_eq!(server.client().await.get_mid_emb(named).await.unwrap_err().code(), Code::NotFound);
    let shadow = status(&server).await.models.into_iter().find(|m| !m.shadow_of.is_empty()).unwrap();
    assert_eq!(
        (shadow.model.unwrap().name.as_str(), shadow.shadow_of.as_str(), shadow.shadow_percent),
        ("next", "learn", 100)
    );

    // A model that is its own shadow gives the same vectors.
    push(&server, config(&fixture())).await.unwrap();
    let before = server.scrape();
    ask(&server, page(films("h", 3), films("c", 7))).await;
    eventually("the second answer is compared", async || compared(&server) == 2.0).await;
    let sum = server.scrape().sum("midemb_shadow_cosine_sum", &[]) - before.sum("midemb_shadow_cosine_sum", &[]);
    assert!((sum - 7.0).abs() < 1e-4, "{sum}");
}

/// A series of every model name and every digest that was ever pushed used to stay for ever.
#[tokio::test]
async fn many_pushes_do_not_add_series() {
    let server = Server::start();
    let mut counts = Vec::new();
    for i in 0..8 {
        let name = format!("learn-{i}");
        push(&server, with_models(&server, &[model(&name, &fixture(), "")])).await.unwrap();
        assert_eq!(ask(&server, page(films("h", 2), films("c", 3))).await.model.unwrap().name, name);
        let text = server.scrape().0;
        counts.push(text.lines().filter(|line| line.starts_with("midemb_")).count());
        assert!(text.contains(&format!("model=\"{name}\"")), "{text}");
    }
    assert_eq!(counts[7], counts[3], "{counts:?}");
    let former = server.scrape();
    assert_eq!(
        former.sum("midemb_requests_total", &["model=\"learn-6\""]),
        1.0,
        "the one that a rollback would restore"
    );
    assert_eq!(former.sum("midemb_requests_total", &["model=\"learn-5\""]), 0.0);
}

const N_CALLERS: usize = 4;
const N_SWAPS: usize = 10;
const N_ANSWERS_PER_SWAP: usize = 20;

/// Two bundles alternate under load, and every answer comes from one of them as a whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_mixes_two_bundles_while_they_are_swapped_under_load() {
    let expected = [answer_of(&fixture()).await, answer_of(&retrained()).await];
    let server = Server::start();
    let (is_over, n_answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut callers = Vec::new();
    for _ in 0..N_CALLERS {
        let (mut client, expected) = (server.client().await, expected.clone());
        let (is_over, n_answered) = (Arc::clone(&is_over), Arc::clone(&n_answered));
        callers.push(tokio::spawn(async move {
            let mut versions = [0, 0];
            while !is_over.load(Ordering::Relaxed) {
                let answer = client.get_mid_emb(page(films("h", 5), films("c", 9))).await.unwrap().into_inner();
                let place = usize::from(version(&answer) == "2");
                assert_same(&answer, &expected[place]);
                versions[place] += 1;
                n_answered.fetch_add(1, Ordering::Relaxed);
            }
            versions
        }));
    }
    for round in 0..N_SWAPS {
        let bundle = if round % 2 == 0 { retrained() } else { fixture() };
        assert_eq!(push(&server, with_bundle(&server, &bundle)).await.unwrap().result, "applied");
        let n_before = n_answered.load(Ordering::Relaxed);
        eventually("calls are answered between two swaps", async || {
            n_answered.load(Ordering::Relaxed) >= n_before + N_ANSWERS_PER_SWAP
        })
        .await;
    }
    is_over.store(true, Ordering::Relaxed);
    let mut versions = [0, 0];
    for caller in callers {
        let counted = caller.await.unwrap();
        versions = [versions[0] + counted[0], versions[1] + counted[1]];
    }
    // After a swap, at most one answer per caller is still the old bundle's.
    let n_expected = N_SWAPS / 2 * (N_ANSWERS_PER_SWAP - N_CALLERS);
    assert!(versions.iter().all(|n| *n >= n_expected), "{versions:?}");
    assert_eq!(
        server.scrape().sum("midemb_requests_total", &["method=\"GetMidEmb\"", "code=\"OK\""]),
        n_answered.load(Ordering::Relaxed) as f64
    );
}
