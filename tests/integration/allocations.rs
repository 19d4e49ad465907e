//! How often the path of a hot request allocates, from the message's bytes to the answer's, on the thread that serves it.

use crate::{
    golden::runtime,
    harness::{PATIENCE, films, fixture, ids, page},
};
use midemb::{
    bundle::{self, LoadOptions, ModelSet, ServedModel},
    cache::{CacheLimits, Caches},
    config::{Settings, settings::Limits},
    pipeline::Pipeline,
    wire::{decode, encode, raw::RawMessage},
};
use midemb_client::proto::GetMidEmbRequest;
use prost::Message;
use std::{
    path::Path,
    sync::{Arc, LazyLock},
    time::Instant,
};

/// The defaults.
static LIMITS: LazyLock<Limits> = LazyLock::new(|| {
    let config = "[[models]]\nname = \"learn\"\nbundle = \"bundle\"\n";
    Settings::from_text(config, Path::new("midemb.toml")).unwrap().limits
});

fn pipeline() -> (Arc<Pipeline>, Arc<Caches>) {
    let limits = CacheLimits {
        content_bytes: 16 << 20,
        item_bytes: 16 << 20,
        user_bytes: 16 << 20,
        known_items_bytes: 16 << 20,
        max_text_bytes: LIMITS.max_text_bytes,
    };
    let caches = Arc::new(Caches::new(limits));
    let pipeline = Arc::new(Pipeline::new(Arc::clone(&caches), LIMITS.max_in_flight, LIMITS.max_encoding));
    let options = LoadOptions { served_name: "learn".to_owned(), n_threads: 1, batch_requests: 0 };
    let files = bundle::load::check_files(&fixture(), None).unwrap();
    let model = Arc::new(bundle::load(files, &options, runtime(), &[], &|_| ()).unwrap().start().unwrap().model);
    pipeline.registry.install(Arc::new(ModelSet::new(vec![ServedModel { model, share: 100 }], Vec::new(), "")));
    (pipeline, caches)
}

/// Decodes a message, answers it, encodes the answer.
/// Returns how many history items were used.
fn answer(pipeline: &Arc<Pipeline>, tasks: &tokio::runtime::Runtime, message: &RawMessage) -> usize {
    let decoded = decode::request(message, Instant::now() + PATIENCE, &LIMITS).unwrap();
    let request = pipeline.prepare(decoded.request);
    let permit = pipeline.admit().unwrap();
    let answer = tasks.block_on(pipeline.get_mid_emb(permit, request, |_model| ())).unwrap();
    let n_history_used = answer.n_history_used;
    encode::response(answer, decoded.dtype).encode_to_vec();
    n_history_used
}

/// Requests that are measured. Whether moka allocates six times more to insert a user differs from one user to the next, so a few
/// requests could all be of one kind.
const N_MEASURED: usize = 55;

/// The fewest allocations of several requests with as many items, each of a user that was never seen: a cache's housekeeping is
/// nobody's request.
fn n_allocations(served: &(Arc<Pipeline>, Arc<Caches>), tasks: &tokio::runtime::Runtime, n_candidates: usize) -> u64 {
    let (pipeline, caches) = served;
    let raw = |page: GetMidEmbRequest| RawMessage(page.encode_to_vec().into());
    // A history of its own for each call, so that no user is cached.
    let (history, candidates) = (films(&format!("h{n_candidates}-"), 8), films("c", n_candidates));
    answer(pipeline, tasks, &raw(page(history.clone(), candidates.clone())));
    let n_users = || caches.users.measure().n_entries;
    let (n_known_users, mut fewest) = (n_users(), u64::MAX);
    for i in 1..=N_MEASURED {
        // Another order each time.
        let mut history = ids(&history);
        history[..7].rotate_left(i / 8);
        history.rotate_left(i % 8);
        let outputs = vec![1];
        let hot = raw(GetMidEmbRequest { outputs, ..page(history, ids(&candidates)) });
        let mut answered = None;
        let measured = allocation_counter::measure(|| answered = Some(answer(pipeline, tasks, &hot)));
        assert_eq!(answered, Some(8));
        fewest = fewest.min(measured.count_total);
    }
    assert_eq!(n_users() - n_known_users, N_MEASURED as u64, "a user was cached before its first request");
    fewest
}

/// Ids are read in place and records are copied once, so a page of a thousand items allocates as often as one of ten.
#[test]
fn a_hot_request_allocates_as_often_for_a_large_page_as_for_a_small_one() {
    let (served, tasks) = (pipeline(), tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    // What the first requests of a process leave behind is nobody's, either.
    n_allocations(&served, &tasks, 100);
    let (small, large) = (n_allocations(&served, &tasks, 10), n_allocations(&served, &tasks, 1000));
    assert_eq!(small, large, "allocations for 10 and for 1000 candidates");
    assert!(large <= 65, "{large} allocations");
}
