//! What PyTorch gave in training is what comes back over the wire.

use crate::harness::{Server, fixture, floats, page, rows, shipped, statuses};
use midemb::{
    bundle,
    domain::ItemText,
    inference::{ProviderChoice, Runtime},
    wire::proto::{self, Item},
};
use serde::Deserialize;
use std::{path::Path, sync::OnceLock};

#[derive(Deserialize)]
struct Golden {
    items: Vec<GoldenItem>,
    users: Vec<GoldenUser>,
    pairs: Vec<GoldenPair>,
}

#[derive(Deserialize)]
struct GoldenItem {
    text: ItemText,
    item: Vec<f32>,
}

#[derive(Deserialize)]
struct GoldenUser {
    history: Vec<usize>,
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
    let ItemText { title, category, brand, price, keywords, attributes } = item.text.clone();
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
        let answer = client.get_mid_emb(page(history, items.clone())).await.unwrap().into_inner();
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

/// ONNX Runtime allows one environment a process.
fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::load(None, ProviderChoice::Cpu).unwrap())
}

/// Token ids and content are not on the wire: here the stages are compared one by one, each from the golden result before.
#[test]
fn every_stage_of_both_bundles_is_within_tolerance() {
    for folder in [fixture(), shipped()] {
        let (_, reports) = bundle::verify(&folder, runtime()).unwrap();
        let stages: Vec<&str> = reports.iter().map(|report| report.stage).collect();
        assert_eq!(stages, ["token_ids", "content", "item", "user", "mid_emb", "cvr"]);
        for report in reports {
            assert!(report.n_vectors >= 4, "{report:?}");
            assert!(report.max_absolute <= 1e-4 && report.min_cosine > 0.99999, "{report:?}");
        }
    }
}
