//! Bad input gets a typed error or a row status, and the next request is served.

use crate::harness::{ALL_OUTPUTS, Server, film, films, page, rows, statuses};
use midemb_client::proto::{
    ExportCacheRequest, FlushCacheRequest, GetMidEmbRequest, GetMidEmbResponse, GetModelInfoRequest, Item, ItemText,
};
use prost::Message;
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
};
use tonic_types::StatusExt;

/// Sends bytes unchanged.
#[derive(Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Vec<u8>;
    type Decode = GetMidEmbResponse;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        RawCodec
    }

    fn decoder(&mut self) -> Self {
        RawCodec
    }
}

impl Encoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, bytes: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(buffer, &bytes);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = GetMidEmbResponse;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<GetMidEmbResponse>, Status> {
        GetMidEmbResponse::decode(buffer).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

async fn send_raw(server: &Server, bytes: Vec<u8>) -> Status {
    let mut grpc = Grpc::new(server.channel().await);
    grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/midemb.v1.MidEmbService/GetMidEmb");
    grpc.unary(Request::new(bytes), path, RawCodec).await.unwrap_err()
}

async fn assert_serves(server: &Server) {
    let answer = server.client().await.get_mid_emb(page(films("h", 2), films("c", 3))).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 3]);
}

async fn violations(server: &Server, request: GetMidEmbRequest) -> Vec<(String, String)> {
    let status = server.client().await.get_mid_emb(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let details = status.get_details_bad_request().expect("BadRequest details");
    assert!(details.field_violations.iter().all(|v| status.message().contains(&v.description)), "{status:?}");
    details.field_violations.into_iter().map(|v| (v.field, v.description)).collect()
}

#[tokio::test]
async fn requests_that_break_the_contract_name_the_field_and_the_bound() {
    let server = Server::start();
    let valid = || page(vec![], films("c", 1));
    let one = |field: &str, description: &str| vec![(field.to_owned(), description.to_owned())];
    let cases = [
        (GetMidEmbRequest { candidates: vec![], ..valid() }, one("candidates", "is empty, at least one is required")),
        (
            GetMidEmbRequest { history: films("h", 2), history_actions: vec![1], ..valid() },
            one("history_actions", "has 1 entries, it must be empty or have one per history item (2)"),
        ),
        (
            GetMidEmbRequest { history: films("h", 2), history_actions: vec![1, 9], ..valid() },
            one("history_actions[1]", "9 is not an action, use 0 to 8"),
        ),
        (GetMidEmbRequest { candidates: vec![film("", "x")], ..valid() }, one("candidates[0].id", "is empty")),
        (
            GetMidEmbRequest { history: vec![film("a", "x"), film("", "y")], ..valid() },
            one("history[1].id", "is empty"),
        ),
        (
            GetMidEmbRequest { candidates: vec![film("a", "x"); 10_001], ..valid() },
            one("candidates", "has 10001 items, at most 10000 are allowed"),
        ),
        (
            GetMidEmbRequest { history: vec![film("a", "x"); 1001], ..valid() },
            one("history", "has 1001 items, at most 1000 are allowed"),
        ),
        (GetMidEmbRequest { dtype: 99, ..valid() }, one("dtype", "99 is not an element type, use 0 to 3")),
        (GetMidEmbRequest { outputs: vec![1, 99], ..valid() }, one("outputs[1]", "99 is not an output, use 1 to 4")),
        (GetMidEmbRequest { outputs: vec![0], ..valid() }, one("outputs[0]", "0 is not an output, use 1 to 4")),
    ];
    for (request, expected) in cases {
        assert_eq!(violations(&server, request).await, expected);
        assert_serves(&server).await;
    }
    let refused = ["method=\"GetMidEmb\"", "code=\"INVALID_ARGUMENT\""];
    assert_eq!(server.scrape().sum("midemb_requests_total", &refused), 10.0);
}

#[tokio::test]
async fn a_model_that_is_not_served_is_not_found() {
    let server = Server::start();
    let request = GetMidEmbRequest { model: "lerna".to_owned(), ..page(vec![], films("c", 1)) };
    let status = server.client().await.get_mid_emb(request).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "no model named \"lerna\" is served"));
    // The name came back whole, in a header that was too long for the client: RESOURCE_EXHAUSTED in place of NOT_FOUND.
    let request = GetMidEmbRequest { model: "é".repeat(12_000), ..page(vec![], films("c", 1)) };
    let status = server.client().await.get_mid_emb(request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "{status:?}");
    let cache = "c".repeat(12_000);
    let mut admin = server.admin().await;
    let status = admin.flush_cache(FlushCacheRequest { cache: cache.clone() }).await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().len() < 1024, "{status:?}");
    let status = admin.export_cache(ExportCacheRequest { cache, model: String::new() }).await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().len() < 1024, "{status:?}");
    let named = GetMidEmbRequest { model: "learn".to_owned(), ..page(vec![], films("c", 1)) };
    assert_eq!(server.client().await.get_mid_emb(named).await.unwrap().into_inner().model.unwrap().name, "learn");
}

#[tokio::test]
async fn unusual_text_is_encoded_like_any_other() {
    let server = Server::start();
    let titles =
        ["🎬🍿 👩‍👩‍👧", "سلام دنیا \u{202e}abc", "nul\0inside", "{{ title }} {% raw %}", "e\u{301}\u{301}", "\u{feff}", " "];
    let candidates: Vec<Item> = titles.iter().enumerate().map(|(i, title)| film(&format!("odd-{i}"), title)).collect();
    let answer = server.client().await.get_mid_emb(page(candidates.clone(), candidates)).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 7]);
    let mid_emb = rows(&answer.mid_emb);
    assert!(mid_emb.iter().flatten().all(|x| x.is_finite()));
    assert_ne!(mid_emb[0], mid_emb[1]);
    let odd_ids = vec![Item { id: "id\0\u{202e}🎬".to_owned(), ..film("", "x") }];
    let answer = server.client().await.get_mid_emb(page(vec![], odd_ids)).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"]);
}

#[tokio::test]
async fn text_that_cannot_be_used_affects_only_its_own_row() {
    let server = Server::start();
    let long = film("long", &"a".repeat(1 << 20));
    let many = ItemText { keywords: vec!["k".to_owned(); 9000], ..ItemText::default() };
    let empty = Item { id: "empty".to_owned(), text: Some(ItemText::default()) };
    let candidates = vec![
        film("a", "Alpha"),
        long.clone(),
        empty,
        Item { id: "many".to_owned(), text: Some(many) },
        film("b", "Beta"),
    ];
    let answer = server.client().await.get_mid_emb(page(vec![long], candidates)).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK", "INVALID_ITEM", "INVALID_ITEM", "INVALID_ITEM", "OK"]);
    assert_eq!(answer.history_statuses, [4]);
    let mid_emb = rows(&answer.mid_emb);
    assert!(mid_emb[1..4].iter().flatten().all(|x| *x == 0.0));
    assert!(mid_emb[0].iter().any(|x| *x != 0.0) && mid_emb[4].iter().any(|x| *x != 0.0));
    assert_serves(&server).await;
}

#[tokio::test]
async fn a_megabyte_of_text_within_the_byte_limit_is_cut_at_the_token_limit() {
    let server = Server::start_with(
        &crate::harness::fixture(),
        "limits.max_text_bytes = 1048576\nlimits.default_deadline_ms = 60000",
    );
    let candidates = vec![film("long", &"a".repeat((1 << 20) - 5)), film("short", "a")];
    let answer = server.client().await.get_mid_emb(page(vec![], candidates)).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 2]);
    assert!(server.scrape().sum("midemb_batch_tokens_sum", &[]) <= 2.0 * 48.0, "an item had more than max_tokens");
}

#[tokio::test]
async fn bytes_that_are_not_a_message_are_an_invalid_argument() {
    let server = Server::start();
    // Field 1 (user_id) with two bytes that are not UTF-8.
    let invalid_utf8 = send_raw(&server, vec![0x0a, 0x02, 0xc3, 0x28]).await;
    assert_eq!(invalid_utf8.code(), Code::InvalidArgument, "{invalid_utf8:?}");
    assert!(invalid_utf8.message().contains("UTF-8"), "{invalid_utf8:?}");
    // A length beyond the end of the message.
    let truncated = send_raw(&server, vec![0x0a, 0xff, 0xff, 0xff, 0x0f]).await;
    assert_eq!(truncated.code(), Code::InvalidArgument, "{truncated:?}");
    assert_serves(&server).await;
    let refused = ["method=\"GetMidEmb\"", "code=\"INVALID_ARGUMENT\""];
    assert_eq!(server.scrape().sum("midemb_requests_total", &refused), 2.0);
}

#[tokio::test]
async fn a_message_of_100_mb_is_refused_before_it_is_read() {
    let server = Server::start();
    let before = server.scrape().sum("process_resident_memory_bytes", &[]);
    let status = send_raw(&server, vec![0; 100 << 20]).await;
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    assert_serves(&server).await;
    let grown = server.scrape().sum("process_resident_memory_bytes", &[]) - before;
    assert!(grown < 64e6, "the server grew by {grown} bytes");
}

/// 7 million empty items in 14 MB: within the size limit, and over a gigabyte if it were decoded.
#[tokio::test]
async fn a_small_message_of_millions_of_entries_is_refused_before_it_is_decoded() {
    let server = Server::start();
    let before = server.scrape().sum("process_resident_memory_bytes", &[]);
    let status = send_raw(&server, [0x1a, 0x00].repeat(7_000_000)).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let grown = server.scrape().sum("process_resident_memory_bytes", &[]) - before;
    assert!(grown < 128e6, "the server grew by {grown} bytes");
    assert_serves(&server).await;
}

#[tokio::test]
async fn a_thousand_broken_messages_leave_a_server_that_serves() {
    let server = Server::start();
    let valid = page(films("h", 3), films("c", 5)).encode_to_vec();
    let mut grpc = Grpc::new(server.channel().await);
    let path = PathAndQuery::from_static("/midemb.v1.MidEmbService/GetMidEmb");
    let mut random = fastrand::Rng::with_seed(7);
    let mut n_refused = 0;
    for _ in 0..1000 {
        let mut bytes = valid.clone();
        for _ in 0..random.usize(1..8) {
            let place = random.usize(..bytes.len());
            bytes[place] = random.u8(..);
        }
        bytes.truncate(random.usize(..=bytes.len()));
        grpc.ready().await.unwrap();
        if let Err(status) = grpc.unary(Request::new(bytes), path.clone(), RawCodec).await {
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
            n_refused += 1;
        }
    }
    assert!(n_refused > 100, "only {n_refused} of 1000 broken messages were refused");
    assert_serves(&server).await;
}

#[tokio::test]
async fn half_precision_answers_are_the_same_vectors() {
    let server = Server::start();
    let mut client = server.client().await;
    let request = page(films("h", 4), films("c", 6));
    let full = client.get_mid_emb(request.clone()).await.unwrap().into_inner();
    let exact: Vec<f32> = crate::harness::floats(&full.mid_emb);
    for (dtype, tolerance) in [(2, 1e-3), (3, 1e-2)] {
        let answer = client.get_mid_emb(GetMidEmbRequest { dtype, ..request.clone() }).await.unwrap().into_inner();
        let tensor = answer.mid_emb.unwrap();
        assert_eq!((tensor.dtype, tensor.shape.as_slice()), (dtype, [6, 12].as_slice()));
        let halves = tensor.data.chunks_exact(2).map(|b| match dtype {
            2 => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
            _ => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        });
        let far = halves.zip(&exact).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f32::max);
        assert!(far > 0.0 && far < tolerance, "dtype {dtype} is off by {far}");
    }
}

#[tokio::test]
async fn an_answer_has_only_the_outputs_that_were_requested() {
    let server = Server::start();
    let mut client = server.client().await;
    for output in ALL_OUTPUTS {
        let request = GetMidEmbRequest { outputs: vec![output.into()], ..page(films("h", 2), films("c", 3)) };
        let answer = client.get_mid_emb(request).await.unwrap().into_inner();
        let present =
            [answer.mid_emb.is_some(), answer.cvr.is_some(), answer.user_emb.is_some(), answer.item_emb.is_some()];
        assert_eq!(present, ALL_OUTPUTS.map(|o| o == output));
        assert_eq!(statuses(&answer), ["OK"; 3]);
    }
    let default = GetMidEmbRequest { outputs: vec![], ..page(vec![], films("c", 3)) };
    let answer = client.get_mid_emb(default).await.unwrap().into_inner();
    assert_eq!((answer.mid_emb.unwrap().shape, answer.cvr, answer.user_emb), (vec![3, 12], None, None));
}

#[tokio::test]
async fn model_info_describes_what_is_served() {
    let server = Server::start();
    let info = server.client().await.get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
    let model = &info.models[0];
    let dims = [model.content_dim, model.user_dim, model.item_dim, model.mid_dim, model.max_history, model.max_tokens];
    assert_eq!(dims, [32, 16, 16, 12, 8, 48]);
    assert_eq!((model.share, model.provider.as_str()), (100, "cpu"));
    assert_eq!((model.encoder_digest.len(), model.tower_digest.len()), (32, 32));
    assert_ne!(model.encoder_digest, model.tower_digest);
    let manifest = std::fs::read(crate::harness::fixture().join("manifest.toml")).unwrap();
    assert_eq!(model.model.as_ref().unwrap().digest, midemb::domain::digest::sha256_hex(&manifest));
    assert_eq!(info.limits.unwrap().max_candidates, 10_000);
    assert_eq!(info.server_version, env!("CARGO_PKG_VERSION"));
}
