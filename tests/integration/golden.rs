//! Answers over the wire equal what PyTorch computed when the bundle was exported.

use crate::harness::{PATIENCE, Server, eventually, films, fixture, floats, page, rows, shipped, statuses};
use midemb::{
    bundle,
    bundle::LoadOptions,
    domain::{Action, ActionCodes, TextFields},
    inference::{ProviderChoice, Runtime},
    towers::{
        scoring::{Score, ScoreDims, ScoreInput, UserInput, score_all},
        user_tower::History,
    },
};
use midemb_client::proto::{self, FlushCacheRequest, Item};
use serde::Deserialize;
use std::{path::Path, sync::OnceLock, time::Instant};

#[derive(Deserialize)]
struct Golden {
    items: Vec<GoldenItem>,
    users: Vec<GoldenUser>,
    pairs: Vec<GoldenPair>,
}

#[derive(Deserialize)]
struct GoldenItem {
    text: TextFields,
    item: Vec<f32>,
    adapted: Vec<f32>,
}

#[derive(Deserialize)]
struct GoldenUser {
    history: Vec<usize>,
    #[serde(default)]
    actions: Vec<Action>,
    user: Vec<f32>,
}

#[derive(Deserialize)]
struct GoldenPair {
    user: usize,
    item: usize,
    mid_emb: Vec<f32>,
    cvr: f32,
}

fn assert_near(what: &str, found: &[f32], golden: &[f32]) {
    assert_eq!(found.len(), golden.len(), "{what}");
    let difference = found.iter().zip(golden).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference <= 1e-4 && found.iter().all(|x| x.is_finite()), "{what} differs by {difference}");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let cosine = dot(found, golden) / (dot(found, found) * dot(golden, golden)).sqrt();
    assert!(found.len() == 1 || cosine > 0.99999, "{what} has cosine {cosine}");
}

fn golden_item(i: usize, item: &GoldenItem) -> Item {
    let TextFields { title, category, brand, price, keywords, attributes } = item.text.clone();
    let text = proto::ItemText { title, category, brand, price, keywords, attributes };
    Item { id: format!("golden-{i}"), text: Some(text) }
}

async fn over_the_wire(bundle: &Path) {
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(bundle.join("golden.json")).unwrap()).unwrap();
    let server = Server::start_with(bundle, "");
    let mut client = server.client().await;
    let items: Vec<Item> = golden.items.iter().enumerate().map(|(i, item)| golden_item(i, item)).collect();
    for (i, user) in golden.users.iter().enumerate() {
        let history = user.history.iter().map(|j| items[*j].clone()).collect();
        let history_actions = user.actions.iter().map(|action| *action as i32).collect();
        let request = proto::GetMidEmbRequest { history_actions, ..page(history, items.clone()) };
        let answer = client.get_mid_emb(request).await.unwrap().into_inner();
        assert!(statuses(&answer).iter().all(|status| *status == "OK"), "{:?}", statuses(&answer));
        assert_eq!(answer.history_used as usize, user.history.len());
        assert_near(&format!("user {i}"), &floats(&answer.user_emb), &user.user);
        let (item_emb, mid_emb, cvr) = (rows(&answer.item_emb), rows(&answer.mid_emb), floats(&answer.cvr));
        for (j, item) in golden.items.iter().enumerate() {
            assert_near(&format!("item {j}"), &item_emb[j], &item.item);
        }
        let mut n_pairs = 0;
        for pair in golden.pairs.iter().filter(|pair| pair.user == i) {
            assert_near(&format!("mid_emb of user {i}, item {}", pair.item), &mid_emb[pair.item], &pair.mid_emb);
            assert_near(&format!("cvr of user {i}, item {}", pair.item), &cvr[pair.item..=pair.item], &[pair.cvr]);
            n_pairs += 1;
        }
        assert!(n_pairs > 0, "user {i} has no golden pair");
    }
}

#[tokio::test]
async fn the_fixture_bundle_answers_as_pytorch_did() {
    over_the_wire(&fixture()).await;
}

#[tokio::test]
async fn the_shipped_bundle_answers_as_pytorch_did() {
    over_the_wire(&shipped()).await;
}

/// ONNX Runtime allows one environment per process.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::load(None, ProviderChoice::Cpu).unwrap())
}

/// Token ids and content embeddings are not on the wire. Here every stage is compared, each from the golden result of the stage
/// before it.
#[test]
fn every_stage_of_both_bundles_is_within_tolerance() {
    for folder in [fixture(), shipped()] {
        let (_, reports) = bundle::verify(&folder, runtime()).unwrap();
        let stages: Vec<&str> = reports.iter().map(|report| report.stage).collect();
        let (batched, golden): (Vec<&str>, Vec<&str>) = stages.iter().partition(|stage| stage.ends_with(" in batches"));
        assert_eq!(golden, ["token_ids", "content", "item", "adapted", "user", "mid_emb", "cvr"]);
        assert_eq!(batched.len(), 4, "{batched:?}");
        for report in reports {
            assert!(report.n_vectors >= 4, "{report:?}");
            assert!(report.max_absolute <= 1e-4 && report.min_cosine > 0.99999, "{report:?}");
        }
    }
}

/// Users with histories of every length, known users, a new user and a request without candidates. Scored in one batch, each
/// gets what it gets alone, and what PyTorch computed.
#[tokio::test]
async fn requests_that_are_scored_together_get_what_each_gets_alone() {
    for folder in [fixture(), shipped()] {
        let golden: Golden =
            serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
        let options = LoadOptions { served_name: "learn".to_owned(), n_threads: 1, batch_requests: 0 };
        let files = bundle::load::check_files(&folder, None).unwrap();
        let model = bundle::load(files, &options, runtime(), &[], &|_| ()).unwrap().start().unwrap().model;
        let manifest = &model.manifest;
        let dims = ScoreDims { user: manifest.user_dims(), mid: manifest.cvr.dim };
        let codes = ActionCodes::of(&manifest.history.actions);
        let history_of = |user: &GoldenUser| History {
            adapted: user.history.iter().flat_map(|j| golden.items[*j].adapted.clone()).collect(),
            actions: codes.map_or_else(Vec::new, |codes| codes.of_history(&user.actions, user.history.len())),
        };
        let mut inputs: Vec<ScoreInput> = Vec::new();
        for (i, user) in golden.users.iter().enumerate() {
            let history = history_of(user);
            let items = golden.items.iter().take(i + 1).flat_map(|item| item.item.clone()).collect();
            inputs.push(ScoreInput { user: UserInput::History(history), items });
            let items = golden.items[0].item.clone();
            inputs.push(ScoreInput { user: UserInput::Known(user.user.clone().into()), items });
        }
        let history = history_of(&golden.users[0]);
        inputs.push(ScoreInput { user: UserInput::History(history), items: Vec::new() });
        inputs.push(ScoreInput { user: UserInput::History(History::default()), items: golden.items[0].item.clone() });
        assert!(golden.users.iter().any(|user| user.history.len() > 1), "no history needs padding");

        let all = inputs.clone();
        let score = move |graphs: &mut _| {
            let alone: Vec<_> = all.iter().flat_map(|input| score_all(graphs, vec![input.clone()], dims)).collect();
            (alone, score_all(graphs, all, dims))
        };
        let (alone, together) = model.towers.run(Instant::now() + PATIENCE, score).await.unwrap();
        assert_eq!(together.len(), inputs.len());
        for (i, (alone, together)) in alone.into_iter().zip(together).enumerate() {
            let (alone, together): (Score, Score) = (alone.unwrap(), together.unwrap());
            assert_near(&format!("user of request {i}"), &together.user, &alone.user);
            match (alone.fused, together.fused) {
                (Some(alone), Some(together)) => {
                    assert_near(&format!("mid_emb of request {i}"), &together.mid_emb.data, &alone.mid_emb.data);
                    assert_eq!(together.cvr.len(), inputs[i].items.len() / dims.user.user);
                    for (a, b) in together.cvr.iter().zip(&alone.cvr) {
                        assert_near("cvr", &[*a], &[*b]);
                    }
                }
                (None, None) => assert!(inputs[i].items.is_empty()),
                different => panic!("request {i}: {different:?}"),
            }
            if let Some(user) = golden.users.get(i / 2) {
                assert_near(&format!("user {}", i / 2), &together.user, &user.user);
            }
        }
    }
}

/// Sends all requests at the same time; returns their answers in order.
async fn ask_at_once(server: &Server, requests: &[proto::GetMidEmbRequest]) -> Vec<proto::GetMidEmbResponse> {
    let client = server.client().await;
    let calls: Vec<_> = requests
        .iter()
        .map(|request| {
            let (mut client, request) = (client.clone(), request.clone());
            tokio::spawn(async move { client.get_mid_emb(request).await })
        })
        .collect();
    let mut answers = Vec::new();
    for call in calls {
        answers.push(call.await.unwrap().unwrap().into_inner());
    }
    answers
}

/// With one thread and many callers, requests wait and are scored together. The answers are those of a server without batches.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_scores_requests_together_answers_as_one_that_does_not() {
    let items = films("c", 40);
    let requests: Vec<_> = (0..60)
        .map(|i| {
            let candidates = items.iter().cycle().skip(i).take(1 + i % 30).cloned().collect();
            page(items[..i % 8].iter().rev().chain(&items[i % 20..i % 20 + i % 3]).cloned().collect(), candidates)
        })
        .collect();
    let mut answers = Vec::new();
    for batch_requests in [1, 16] {
        let more = format!("inference.threads = 1\ninference.batch_requests = {batch_requests}\ncache.user_mb = 1");
        let server = Server::start_with(&fixture(), &more);
        // From the second round on, everything but the user tower's results is cached, so requests wait for scoring.
        let mut answers_of_round = Vec::new();
        let mut n_rounds = 0;
        eventually("requests wait for each other, and are scored together if they may be", async || {
            n_rounds += 1;
            server.admin().await.flush_cache(FlushCacheRequest { cache: "user".to_owned() }).await.unwrap();
            answers_of_round = ask_at_once(&server, &requests).await;
            let scrape = server.scrape();
            let users = |part: &str| scrape.sum(&format!("midemb_batch_items_{part}"), &["stage=\"user_tower\""]);
            assert!(users("count") > 0.0);
            if batch_requests == 1 {
                assert_eq!(users("sum"), users("count"), "requests were scored together");
                return n_rounds == 2;
            }
            n_rounds >= 2 && users("sum") > users("count")
        })
        .await;
        answers.push(answers_of_round);
    }
    let [alone, together] = answers.try_into().unwrap();
    for (alone, together) in alone.iter().zip(&together) {
        assert_eq!(statuses(alone), statuses(together));
        assert_near("user", &floats(&together.user_emb), &floats(&alone.user_emb));
        assert_near("item", &floats(&together.item_emb), &floats(&alone.item_emb));
        assert_near("mid_emb", &floats(&together.mid_emb), &floats(&alone.mid_emb));
        for (a, b) in floats(&together.cvr).iter().zip(&floats(&alone.cvr)) {
            assert_near("cvr", &[*a], &[*b]);
        }
    }
}
