//! The client against a server in this process that sheds, drains or breaks as a test needs it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use midemb_client::{
    Client, Code, RetryPolicy, Status,
    proto::{
        GetMidEmbRequest, GetMidEmbResponse, GetModelInfoRequest, GetModelInfoResponse, Item, ItemText, RowStatus,
        WarmItemsRequest, WarmItemsResponse,
        mid_emb_service_server::{MidEmbService, MidEmbServiceServer},
    },
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Streaming,
    transport::{Server, server::TcpIncoming},
};
use tonic_types::{ErrorDetails, StatusExt};

/// Answers each call with the next of these errors; every row is OK once there are none.
#[derive(Clone, Default)]
struct Scripted {
    errors: Arc<Mutex<VecDeque<Status>>>,
    /// Whether it has forgotten all texts: then a candidate without text is unknown.
    has_forgotten: Arc<AtomicBool>,
    received: Arc<Mutex<Vec<Received>>>,
}

struct Received {
    request: GetMidEmbRequest,
    timeout_header: Option<String>,
}

#[tonic::async_trait]
impl MidEmbService for Scripted {
    async fn get_mid_emb(&self, request: Request<GetMidEmbRequest>) -> Result<Response<GetMidEmbResponse>, Status> {
        let header = request.metadata().get("grpc-timeout");
        let timeout_header = header.map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        let has_forgotten = self.has_forgotten.load(Ordering::SeqCst);
        let status = |item: &Item| match item.text.is_none() && has_forgotten {
            true => RowStatus::UnknownItem.into(),
            false => RowStatus::Ok.into(),
        };
        let statuses = request.candidates.iter().map(status).collect();
        self.received.lock().unwrap().push(Received { request, timeout_header });
        match self.errors.lock().unwrap().pop_front() {
            Some(error) => Err(error),
            None => Ok(Response::new(GetMidEmbResponse { statuses, ..Default::default() })),
        }
    }

    async fn warm_items(&self, _: Request<Streaming<WarmItemsRequest>>) -> Result<Response<WarmItemsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_model_info(&self, _: Request<GetModelInfoRequest>) -> Result<Response<GetModelInfoResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

impl Scripted {
    fn failing_with(errors: impl IntoIterator<Item = Status>) -> Self {
        Scripted { errors: Arc::new(Mutex::new(errors.into_iter().collect())), ..Scripted::default() }
    }

    /// Serves until the test ends.
    async fn address(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let served = Server::builder()
            .add_service(MidEmbServiceServer::new(self.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(served);
        address
    }

    fn n_calls(&self) -> usize {
        self.received.lock().unwrap().len()
    }
}

const DEADLINE: Duration = Duration::from_secs(30);

fn page() -> GetMidEmbRequest {
    let text = ItemText { title: "a film".to_owned(), ..ItemText::default() };
    let candidates = vec![Item { id: "a".to_owned(), text: Some(text) }];
    GetMidEmbRequest { user_id: "u".to_owned(), candidates, ..Default::default() }
}

/// The value of a `grpc-timeout` header, which tonic writes in the unit that it fits in: `n`, `u`, `m` or `S`.
fn micros(header: &str) -> u64 {
    let (number, unit) = header.split_at(header.len() - 1);
    let number: u64 = number.parse().unwrap();
    match unit {
        "n" => number / 1000,
        "u" => number,
        "m" => number * 1000,
        "S" => number * 1_000_000,
        _ => panic!("unexpected unit in {header}"),
    }
}

fn shed(delay: Duration) -> Status {
    Status::with_error_details(Code::ResourceExhausted, "busy", ErrorDetails::with_retry_info(Some(delay)))
}

#[tokio::test]
async fn a_call_that_was_shed_comes_back_when_the_server_asked_it_to() {
    let server = Scripted::failing_with([shed(Duration::from_millis(50)), Status::unavailable("draining")]);
    let client = Client::connect([server.address().await]).await.unwrap();
    let start = Instant::now();
    let answer = client.get_mid_emb(&page(), DEADLINE).await.unwrap();
    assert_eq!((answer.statuses, server.n_calls()), (vec![1], 3));
    assert!(start.elapsed() >= Duration::from_millis(50));
}

#[tokio::test]
async fn a_fault_of_the_server_or_of_the_caller_is_not_sent_again() {
    for status in [Status::internal("a fault"), Status::invalid_argument("no candidates"), Status::not_found("model")] {
        let server = Scripted::failing_with([status.clone()]);
        let client = Client::connect([server.address().await]).await.unwrap();
        let error = client.get_mid_emb(&page(), DEADLINE).await.unwrap_err();
        assert_eq!((error.code(), server.n_calls()), (Some(status.code()), 1));
    }
}

#[tokio::test]
async fn attempts_are_bounded_and_each_carries_the_time_that_is_left() {
    let server = Scripted::failing_with(vec![Status::unavailable("starting"); 9]);
    let retry = RetryPolicy { max_attempts: 3, ..RetryPolicy::default() };
    let client = Client::builder([server.address().await]).retry(retry).connect().await.unwrap();
    let error = client.get_mid_emb(&page(), DEADLINE).await.unwrap_err();
    assert_eq!(error.to_string(), "GetMidEmb: Unavailable: starting");
    let received = server.received.lock().unwrap();
    assert_eq!(received.len(), 3);
    let remaining: Vec<u64> = received.iter().map(|call| micros(call.timeout_header.as_deref().unwrap())).collect();
    assert!(remaining.is_sorted_by(|earlier, later| earlier > later), "{remaining:?}");
    assert!(u128::from(remaining[0]) <= DEADLINE.as_micros());
}

#[tokio::test]
async fn a_replica_that_is_starting_costs_one_attempt_and_the_other_answers() {
    let starting = Scripted::failing_with(vec![Status::unavailable("starting"); 100]);
    let ready = Scripted::default();
    let client = Client::connect([starting.address().await, ready.address().await]).await.unwrap();
    for _ in 0..50 {
        client.get_mid_emb(&page(), DEADLINE).await.unwrap();
    }
    assert_eq!(ready.n_calls(), 50);
    assert!(starting.n_calls() < 25, "the starting replica got {} of 50 calls", starting.n_calls());
}

#[tokio::test]
async fn a_text_is_sent_once_per_replica() {
    let server = Scripted::default();
    let client = Client::connect([server.address().await]).await.unwrap();
    for _ in 0..3 {
        client.get_mid_emb(&page(), DEADLINE).await.unwrap();
    }
    let received = server.received.lock().unwrap();
    let has_text: Vec<bool> = received.iter().map(|call| call.request.candidates[0].text.is_some()).collect();
    assert_eq!(has_text, [true, false, false]);
}

#[tokio::test]
async fn texts_are_sent_again_whichever_replica_has_forgotten_them() {
    let servers = [Scripted::default(), Scripted::default()];
    let addresses = [servers[0].address().await, servers[1].address().await];
    let client = Client::connect(addresses).await.unwrap();
    while servers.iter().any(|server| server.n_calls() < 2) {
        client.get_mid_emb(&page(), DEADLINE).await.unwrap();
    }
    // Both have received the text by now, and both forget it, as after a rolling restart.
    for server in &servers {
        server.has_forgotten.store(true, Ordering::SeqCst);
    }
    for _ in 0..10 {
        let answer = client.get_mid_emb(&page(), DEADLINE).await.unwrap();
        assert_eq!(answer.statuses().collect::<Vec<_>>(), [RowStatus::Ok]);
    }
}
