//! Micro-benchmarks of the work of a hot W1 request (history 80, candidates 500, ids alone) outside its graphs.
//!
//!     cd benches && cargo bench --bench hot_path [-- NAME]
//!
//! Times are those of one whole request. The catalogue has a million items where that matters, so that look-ups miss the
//! processor's caches as they do in production.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark that cannot go on says so")]

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use midemb::{
    cache::{CacheName, known_items::KnownItems, users::HistoryHasher, vectors::VectorCache},
    config::{Settings, settings::Limits},
    domain::{
        DType, Item, ItemKey, ItemText, Matrix, MidEmbResponse, ModelRef, Priority, RowStatus, TextDigest, TowerDigest,
        UserKey, Vector, all_finite,
    },
    wire::{decode, encode, raw::RawMessage},
};
use midemb_client::proto;
use prost::Message;
use std::{
    hint::black_box,
    path::Path,
    sync::{Arc, LazyLock},
    time::Instant,
};

const N_CATALOGUE: usize = 1_000_000;
const N_HISTORY: usize = 80;
const N_CANDIDATES: usize = 500;
const DIM: usize = 64;
/// An item embedding and an adapted content embedding.
const RECORD_DIM: usize = 128;
/// The defaults.
static LIMITS: LazyLock<Limits> = LazyLock::new(|| {
    let config = "[[models]]\nname = \"learn\"\nbundle = \"bundle\"\n";
    Settings::from_text(config, Path::new("midemb.toml")).unwrap().limits
});

fn id(i: usize) -> String {
    format!("item-{i:>09}")
}

fn text(i: usize) -> ItemText {
    ItemText::titled(&format!("a title of usual length, number {i}"))
}

/// `n` items of the catalogue, different ones each time.
fn draw(n: usize) -> Vec<usize> {
    (0..n).map(|_| fastrand::usize(..N_CATALOGUE)).collect()
}

fn message() -> proto::GetMidEmbRequest {
    let items = |n| draw(n).into_iter().map(|i| proto::Item { id: id(i), text: None }).collect();
    proto::GetMidEmbRequest {
        user_id: "a user".to_owned(),
        history: items(N_HISTORY),
        candidates: items(N_CANDIDATES),
        ..Default::default()
    }
}

fn wire(c: &mut Criterion) {
    let message = RawMessage(message().encode_to_vec().into());
    c.bench_function("decode", |b| b.iter(|| decode::request(&message, Instant::now(), &LIMITS).unwrap()));
    let answer = MidEmbResponse {
        model: Arc::new(ModelRef { name: "learn".to_owned(), version: "1".to_owned(), digest: "0".repeat(64) }),
        statuses: vec![RowStatus::Ok; N_CANDIDATES],
        history_statuses: vec![RowStatus::Ok; N_HISTORY],
        n_history_used: N_HISTORY,
        mid_emb: Some(Matrix { n_cols: DIM, data: vec![0.5; N_CANDIDATES * DIM] }),
        cvr: None,
        user_emb: None,
        item_emb: None,
    };
    for (name, dtype) in [("encode f32", DType::F32), ("encode f16", DType::F16), ("encode bf16", DType::Bf16)] {
        c.bench_function(name, |b| {
            let encode = |answer| encode::response(answer, dtype).encode_to_vec();
            b.iter_batched(|| answer.clone(), encode, BatchSize::SmallInput);
        });
    }
}

fn look_ups(c: &mut Criterion) {
    let known = KnownItems::new(1 << 40, 8192);
    let items = VectorCache::new(CacheName::Item, 1 << 40);
    let tower = TowerDigest::from_bytes([7; 16]);
    for i in 0..N_CATALOGUE {
        let resolved = known.resolve(vec![Item { id: &id(i), text: Some(Ok(text(i))) }], Priority::Request);
        let text = resolved[0].as_ref().unwrap().digest;
        items.insert(ItemKey { part: tower, text }, Vector::from(vec![i as f32; RECORD_DIM]));
    }
    let page = || draw(N_HISTORY + N_CANDIDATES).into_iter().map(id).collect::<Vec<_>>();
    c.bench_function("known items", |b| {
        let resolve = |ids: Vec<String>| {
            let page = ids.iter().map(|id| Item { id, text: None }).collect();
            known.resolve(page, Priority::Request)
        };
        b.iter_batched(page, resolve, BatchSize::SmallInput)
    });
    let keys = || {
        let texts = draw(N_HISTORY + N_CANDIDATES).into_iter().map(|i| TextDigest::of(&text(i)));
        texts.map(|text| ItemKey { part: tower, text }).collect::<Vec<_>>()
    };
    c.bench_function("item cache, gathered", |b| {
        let gather = |keys: Vec<ItemKey>| {
            let mut gathered = Matrix::zeros(keys.len(), DIM);
            items.read_many(&keys, |i, item| gathered.row_mut(i).copy_from_slice(&item.unwrap()[..DIM]));
            gathered
        };
        b.iter_batched(keys, gather, BatchSize::SmallInput);
    });
    // The baseline for `read_many`.
    c.bench_function("item cache, gathered one by one", |b| {
        let gather = |keys: Vec<ItemKey>| {
            let mut gathered = Matrix::zeros(keys.len(), DIM);
            let rows: Vec<Vector> = keys.iter().map(|key| items.get(key).unwrap()).collect();
            rows.iter().enumerate().for_each(|(i, item)| gathered.row_mut(i).copy_from_slice(&item[..DIM]));
            gathered
        };
        b.iter_batched(keys, gather, BatchSize::SmallInput);
    });
}

fn digests(c: &mut Criterion) {
    let texts: Vec<ItemText> = (0..N_CANDIDATES).map(text).collect();
    c.bench_function("text digests of a page", |b| {
        b.iter(|| texts.iter().map(TextDigest::of).for_each(|digest| _ = black_box(digest)));
    });
    let history: Vec<TextDigest> = texts[..N_HISTORY].iter().map(TextDigest::of).collect();
    c.bench_function("user key", |b| b.iter(|| user_key(&history)));
}

fn user_key(history: &[TextDigest]) -> UserKey {
    let mut key = HistoryHasher::new(TowerDigest::from_bytes([7; 16]));
    history.iter().for_each(|text| key.add(*text, Some(1)));
    key.finish()
}

fn checks(c: &mut Criterion) {
    let answer = vec![0.5_f32; N_CANDIDATES * DIM];
    c.bench_function("answer checked", |b| b.iter(|| all_finite(black_box(&answer))));
    // The baseline for `all_finite`.
    c.bench_function("answer checked, one by one", |b| {
        b.iter(|| black_box(&answer).iter().all(|x| x.is_finite()));
    });
}

criterion_group!(benches, wire, digests, look_ups, checks);
criterion_main!(benches);
