//! Cached results are not computed again, and identical work is done once.

use crate::harness::{BrokenBundle, Server, film, films, history_statuses, ids, page, rows, statuses};
use midemb::{
    cache::{CacheLimits, Caches},
    config::Settings,
    domain::{Digest, ItemKey},
    lifecycle::Lifecycle,
    pipeline::Pipeline,
    wire::{admin::Admin, proto as own_proto, proto::admin_service_server::AdminService},
};
use midemb_client::proto::{FlushCacheRequest, GetMidEmbRequest, GetStatusRequest, Item, WarmItemsRequest};
use std::{
    future::poll_fn,
    path::Path,
    pin::pin,
    sync::{Arc, mpsc},
    task::Poll,
    thread,
    time::Duration,
};

#[tokio::test]
async fn the_second_identical_request_runs_no_encoder_and_look_ups_add_up() {
    let server = Server::start();
    let mut client = server.client().await;
    let request = page(films("seen", 5), films("candidate", 20));
    let first = client.get_mid_emb(request.clone()).await.unwrap().into_inner();
    let cold = server.scrape();
    assert_eq!(cold.n_encoded(), 25.0);
    let second = client.get_mid_emb(request).await.unwrap().into_inner();
    let warm = server.scrape();
    assert_eq!(warm.n_encoded(), 25.0, "the second request was encoded again");
    assert_eq!(first.mid_emb, second.mid_emb);

    let lookups = |scrape: &crate::harness::Scrape, cache: &str, result: &str| {
        let (cache, result) = (format!("cache=\"{cache}\""), format!("result=\"{result}\""));
        scrape.sum("midemb_cache_lookups_total", &[&cache, &result])
    };
    // The first request looks up the user, the records of 5 history items and 20 candidates, and the content embeddings of those
    // that missed. The second one finds the user, so its history is not looked up, and never touches content.
    assert_eq!(lookups(&cold, "user", "miss"), 1.0);
    assert_eq!(lookups(&warm, "user", "hit"), 1.0);
    assert_eq!(lookups(&cold, "item", "miss"), 25.0);
    assert_eq!(lookups(&warm, "item", "hit"), 20.0);
    assert_eq!(lookups(&warm, "content", "miss"), 25.0);
    assert_eq!(warm.sum("midemb_cache_lookups_total", &["cache=\"user\""]), 2.0);
    assert_eq!(warm.sum("midemb_cache_lookups_total", &["cache=\"item\""]), 45.0);
    assert_eq!(warm.sum("midemb_cache_lookups_total", &["cache=\"content\""]), 25.0);
    assert_eq!(warm.sum("midemb_rows_total", &["status=\"ok\""]), 40.0);
    let answered = ["method=\"GetMidEmb\"", "code=\"OK\"", "model=\"learn\""];
    assert_eq!(warm.sum("midemb_requests_total", &answered), 2.0);
    assert_eq!(warm.sum("midemb_request_duration_seconds_count", &["method=\"GetMidEmb\""]), 2.0);
    assert_eq!(warm.sum("midemb_in_flight_requests", &[]), 0.0);
    assert_eq!(warm.sum("midemb_queue_depth", &[]), 0.0);
}

#[tokio::test]
async fn duplicates_of_one_request_are_encoded_once_and_answered_twice() {
    let server = Server::start();
    let twin = Item { id: "twin".to_owned(), ..film("a", "Alpha") };
    let candidates = vec![film("a", "Alpha"), film("b", "Beta"), film("a", "Alpha"), twin];
    let answer =
        server.client().await.get_mid_emb(page(vec![film("a", "Alpha")], candidates)).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 4]);
    let mid_emb = rows(&answer.mid_emb);
    assert_eq!(mid_emb[0], mid_emb[2]);
    assert_eq!(mid_emb[0], mid_emb[3], "the same text under another id gave another vector");
    assert_ne!(mid_emb[0], mid_emb[1]);
    assert_eq!(server.scrape().n_encoded(), 2.0);
}

#[tokio::test]
async fn identical_misses_of_many_requests_are_encoded_once() {
    let server = Server::start();
    let client = server.client().await;
    let requests = (0..16).map(|_| {
        let mut client = client.clone();
        tokio::spawn(
            async move { client.get_mid_emb(page(films("h", 8), films("cold", 100))).await.unwrap().into_inner() },
        )
    });
    for request in requests.collect::<Vec<_>>() {
        assert_eq!(statuses(&request.await.unwrap()), ["OK"; 100]);
    }
    let scrape = server.scrape();
    assert_eq!(scrape.n_encoded(), 108.0);
    assert_eq!(scrape.sum("midemb_cache_lookups_total", &["cache=\"content\"", "result=\"miss\""]), 108.0);
}

#[tokio::test]
async fn text_sent_once_is_remembered_and_the_newest_wins() {
    let server = Server::start();
    let mut client = server.client().await;
    let unknown = client.get_mid_emb(page(ids(&films("x", 1)), ids(&films("x", 1)))).await.unwrap().into_inner();
    assert_eq!((statuses(&unknown), history_statuses(&unknown)), (vec!["UNKNOWN_ITEM"], vec!["UNKNOWN_ITEM"]));
    assert_eq!(rows(&unknown.mid_emb)[0], [0.0; 12], "a row that is not OK is all zeros");
    assert_eq!(unknown.history_used, 0);

    let first = client.get_mid_emb(page(vec![], vec![film("x-0", "old text")])).await.unwrap().into_inner();
    let known = client.get_mid_emb(page(vec![], ids(&films("x", 1)))).await.unwrap().into_inner();
    assert_eq!(first.mid_emb, known.mid_emb);
    let changed = client.get_mid_emb(page(vec![], vec![film("x-0", "new text")])).await.unwrap().into_inner();
    assert_ne!(first.mid_emb, changed.mid_emb);
    let newest = client.get_mid_emb(page(vec![], ids(&films("x", 1)))).await.unwrap().into_inner();
    assert_eq!(newest.mid_emb, changed.mid_emb);
}

#[tokio::test]
async fn warmed_items_are_served_by_id_without_one_encoder_run() {
    let server = Server::start();
    let mut client = server.client().await;
    let items = films("warm", 300);
    let mut bad = vec![film("", "no id"), Item { id: "no text".to_owned(), text: None }, film("empty", "")];
    bad[2].text.as_mut().unwrap().category.clear();
    let chunks = vec![
        WarmItemsRequest { items: items.clone() },
        WarmItemsRequest { items: bad },
        WarmItemsRequest { items: items[..10].to_vec() },
    ];
    let warmed = client.warm_items(tokio_stream::iter(chunks)).await.unwrap().into_inner();
    assert_eq!(
        (warmed.items, warmed.encoded, warmed.already_cached, warmed.invalid, warmed.failed),
        (313, 300, 10, 3, 0)
    );
    assert_eq!(server.scrape().n_encoded(), 300.0);

    let answer = client.get_mid_emb(page(ids(&items[..8]), ids(&items))).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 300]);
    let scrape = server.scrape();
    assert_eq!(scrape.n_encoded(), 300.0);
    assert_eq!(scrape.sum("midemb_cache_lookups_total", &["cache=\"item\"", "result=\"miss\""]), 0.0);
}

/// Over the pages of one session, the user tower runs once per history, and again when anything about the history changes.
#[tokio::test]
async fn the_next_page_of_a_session_skips_the_user_tower_and_answers_the_same() {
    let server = Server::start();
    let mut client = server.client().await;
    let n_runs = || server.scrape().sum("midemb_batch_items_count", &["stage=\"user_tower\""]);
    let history = films("seen", 5);
    let first = client.get_mid_emb(page(history.clone(), films("a", 3))).await.unwrap().into_inner();
    assert_eq!(n_runs(), 1.0);
    // The history is sent by id, with an unknown item among it and with other candidates: its five vectors are the same.
    let mut again = ids(&history);
    again.insert(2, Item { id: "never seen".to_owned(), text: None });
    let mut candidates = films("b", 3);
    candidates.extend(films("a", 1));
    let second = client.get_mid_emb(page(again, candidates)).await.unwrap().into_inner();
    assert_eq!(n_runs(), 1.0, "the user tower ran again");
    assert_eq!((first.history_used, second.history_used), (5, 5));
    assert_eq!(history_statuses(&second), ["OK", "OK", "UNKNOWN_ITEM", "OK", "OK", "OK"]);
    assert_eq!(first.user_emb, second.user_emb);
    assert_eq!(rows(&first.mid_emb)[0], rows(&second.mid_emb)[3]);

    let mut changed = history.clone();
    changed[4] = film("seen-4", "another text under the same id");
    let third = client.get_mid_emb(page(changed, films("a", 3))).await.unwrap().into_inner();
    assert_eq!(n_runs(), 2.0);
    assert_ne!(first.user_emb, third.user_emb);
    // The requested output is cached, so not even the CVR graph runs.
    let user_alone = GetMidEmbRequest { outputs: vec![3], ..page(ids(&history[..4]), films("a", 1)) };
    for _ in 0..2 {
        let answer = client.get_mid_emb(user_alone.clone()).await.unwrap().into_inner();
        assert!(answer.user_emb.is_some() && answer.mid_emb.is_none());
    }
    let scrape = server.scrape();
    assert_eq!(scrape.sum("midemb_batch_items_count", &["stage=\"user_tower\""]), 3.0);
    assert_eq!(scrape.sum("midemb_batch_items_count", &["stage=\"cvr\""]), 3.0);
}

/// The messages of one stream are encoded concurrently, but their texts are remembered in order.
#[tokio::test]
async fn the_newest_text_of_a_warm_up_stream_wins() {
    let server = Server::start();
    let mut client = server.client().await;
    let versions = (0..50).map(|i| WarmItemsRequest { items: vec![film("same id", &format!("text {i}"))] });
    let warmed = client.warm_items(tokio_stream::iter(versions.collect::<Vec<_>>())).await.unwrap().into_inner();
    assert_eq!((warmed.items, warmed.encoded), (50, 50));
    let by_id = Item { id: "same id".to_owned(), text: None };
    let known = client.get_mid_emb(page(vec![], vec![by_id])).await.unwrap().into_inner();
    let newest = client.get_mid_emb(page(vec![], vec![film("another id", "text 49")])).await.unwrap().into_inner();
    assert_eq!(known.mid_emb, newest.mid_emb);
}

#[tokio::test]
async fn operators_see_the_caches_and_empty_them() {
    let server = Server::start();
    let mut client = server.client().await;
    // The golden check cached the content embeddings of its texts.
    let n_golden = server.scrape().sum("midemb_cache_entries", &["cache=\"content\""]) as u64;
    assert!(n_golden > 0);
    client.get_mid_emb(page(vec![], films("c", 30))).await.unwrap();
    let mut admin = server.admin().await;
    let status = admin.get_status(GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.ready);
    let entries: Vec<(&str, u64)> = status.caches.iter().map(|c| (c.cache.as_str(), c.entries)).collect();
    assert_eq!(entries, [("content", 30 + n_golden), ("item", 30), ("user", 1), ("known_items", 30)]);
    assert_eq!(server.scrape().sum("midemb_cache_entries", &["cache=\"item\""]), 30.0);

    let refused = admin.flush_cache(FlushCacheRequest { cache: "contents".to_owned() }).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    let flushed = admin.flush_cache(FlushCacheRequest { cache: String::new() }).await.unwrap().into_inner();
    assert_eq!(flushed.entries_removed, 91 + n_golden);
    let answer = client.get_mid_emb(page(vec![], films("c", 30))).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 30]);
    assert_eq!(server.scrape().n_encoded(), 60.0, "a cache was read after it was flushed");
}

#[tokio::test]
async fn only_the_newest_history_items_count_and_their_order_matters() {
    let server = Server::start();
    let mut client = server.client().await;
    // The fixture reads 8 history items.
    let history = films("h", 11);
    let long = client.get_mid_emb(page(history.clone(), films("c", 2))).await.unwrap().into_inner();
    let mut expected = vec!["NOT_USED"; 3];
    expected.extend(["OK"; 8]);
    assert_eq!(history_statuses(&long), expected);
    assert_eq!(long.history_used, 8);
    let newest = client.get_mid_emb(page(history[3..].to_vec(), films("c", 2))).await.unwrap().into_inner();
    assert_eq!(newest.user_emb, long.user_emb);
    let reversed = history[3..].iter().rev().cloned().collect();
    let reversed = client.get_mid_emb(page(reversed, films("c", 2))).await.unwrap().into_inner();
    assert_ne!(reversed.user_emb, long.user_emb);
    let empty = client.get_mid_emb(page(vec![], films("c", 2))).await.unwrap().into_inner();
    assert_eq!(empty.history_used, 0);
    assert_eq!(statuses(&empty), ["OK"; 2]);
    assert_ne!(empty.user_emb, long.user_emb);
}

/// A token id outside the encoder's vocabulary makes its graph fail.
#[tokio::test]
async fn a_text_that_the_encoder_fails_on_affects_only_its_own_row_and_is_not_cached() {
    let bundle = BrokenBundle::new();
    let tokenizer = std::fs::read_to_string(bundle.path("tokenizer.json")).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_str(&tokenizer).unwrap();
    let unknown = &mut tokenizer["model"]["vocab"]["Ġ24"];
    assert!(unknown.is_number(), "the fixture's vocabulary has changed");
    *unknown = 99_999.into();
    bundle.replace("tokenizer.json", tokenizer.to_string().as_bytes());
    let server = Server::start_with(bundle.folder(), "inference.threads = 1");
    let mut client = server.client().await;
    let mut candidates = films("part", 8);
    candidates.insert(3, film("bad", "number 24"));
    for n_failed in 1..=2 {
        let answer = client.get_mid_emb(page(vec![], candidates.clone())).await.unwrap().into_inner();
        let mut expected = ["OK"; 9];
        expected[3] = "FAILED";
        assert_eq!(statuses(&answer), expected);
        let rows = server.scrape().sum("midemb_rows_total", &["status=\"failed\""]);
        assert_eq!(rows, f64::from(n_failed), "the failure was cached, or other rows failed, too");
    }
}

/// A catalogue that is sent a second time runs no graph.
#[tokio::test]
async fn a_warm_up_of_cached_items_runs_neither_encoder_nor_item_tower() {
    let server = Server::start();
    let mut client = server.client().await;
    let items = films("catalogue", 40);
    let mut runs = Vec::new();
    for (n_encoded, n_cached) in [(40, 0), (0, 40)] {
        let chunk = WarmItemsRequest { items: items.clone() };
        let warmed = client.warm_items(tokio_stream::iter([chunk])).await.unwrap().into_inner();
        assert_eq!((warmed.encoded, warmed.already_cached, warmed.failed), (n_encoded, n_cached, 0), "{warmed:?}");
        let scrape = server.scrape();
        runs.push(
            ["encode", "item_tower"]
                .map(|stage| scrape.sum("midemb_batch_items_count", &[&format!("stage=\"{stage}\"")])),
        );
    }
    assert_eq!(runs[0], runs[1]);
}

fn admin(caches: &Arc<Caches>) -> Admin {
    let file = Path::new("midemb.toml");
    let settings = Settings::from_text("[[models]]\nname = 'a'\nbundle = 'a'\n", file).unwrap();
    let pipeline = Arc::new(Pipeline::new(Arc::clone(caches), 1, 1));
    let (_drain, draining) = tokio::sync::watch::channel(false);
    let lifecycle = Lifecycle::new(Arc::clone(&pipeline), None, file.to_path_buf(), settings, draining.clone());
    Admin::new(Arc::clone(caches), pipeline, Arc::new(lifecycle), draining)
}

/// A flush freed millions of entries on the I/O thread that read the call, which served nobody meanwhile.
#[tokio::test]
async fn a_flush_blocks_no_io_thread() {
    let bytes = 1 << 20;
    let caches = Arc::new(Caches::new(CacheLimits {
        content_bytes: bytes,
        item_bytes: bytes,
        user_bytes: bytes,
        known_items_bytes: bytes,
        max_text_bytes: 100,
    }));
    let key = ItemKey { part: Digest::from_bytes([1; 16]), text: Digest::from_bytes([2; 16]) };
    caches.items.insert(key, vec![0.5; 4].into());
    // A reader that holds the cache keeps the flush from its end.
    let ((held, is_held), (release, released)) = (mpsc::channel(), mpsc::channel::<()>());
    let items = caches.items.clone();
    let reader = thread::spawn(move || {
        items.read_many(&[key], |_, _| {
            held.send(()).unwrap();
            let _ = released.recv_timeout(Duration::from_secs(5));
        });
    });
    is_held.recv().unwrap();
    let request = own_proto::FlushCacheRequest { cache: "item".to_owned() };
    let admin = admin(&caches);
    let mut flush = pin!(admin.flush_cache(tonic::Request::new(request)));
    let is_waiting = poll_fn(|context| Poll::Ready(flush.as_mut().poll(context).is_pending())).await;
    assert!(is_waiting, "the cache was flushed by the thread that polls the call");
    release.send(()).unwrap();
    assert_eq!(flush.await.unwrap().into_inner().entries_removed, 1);
    reader.join().unwrap();
}
