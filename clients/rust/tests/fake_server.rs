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

/// Answers each call with the next of these errors; every row is OK once there are none, unless it has forgotten its items.
#[derive(Clone, Default)]
struct Scripted {
    errors: Arc<Mutex<VecDeque<Status>>>,
    /// Candidates without a text are unknown.
    has_forgotten: Arc<AtomicBool>,
    has_a_row_too_many: Arc<AtomicBool>,
    received: Arc<Mutex<Vec<Received>>>,
}

struct Received {
    request: GetMidEmbRequest,
    timeout_header: Option<String>,
}

impl Received {
    /// The time that was left, from a header such as `29998m`.
    fn timeout(&self) -> Duration {
        let header = self.timeout_header.as_deref().unwrap();
        let (number, unit) = header.split_at(header.len() - 1);
        let number: u64 = number.parse().unwrap();
        match unit {
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => panic!("{header}"),
        }
    }
}

#[tonic::async_trait]
impl MidEmbService for Scripted {
    async fn get_mid_emb(&self, request: Request<GetMidEmbRequest>) -> Result<Response<GetMidEmbResponse>, Status> {
        let header = request.metadata().get("grpc-timeout");
        let timeout_header = header.map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        let has_forgotten = self.has_forgotten.load(Ordering::Relaxed);
        let status = |item: &Item| match &item.text {
            None if has_forgotten => RowStatus::UnknownItem.into(),
            _ => RowStatus::Ok.into(),
        };
        let mut statuses: Vec<i32> = request.candidates.iter().map(status).collect();
        if self.has_a_row_too_many.load(Ordering::Relaxed) {
            statuses.push(RowStatus::Ok.into());
        }
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
    let timeouts: Vec<Duration> = received.iter().map(Received::timeout).collect();
    assert!(timeouts[0] <= DEADLINE && timeouts[0] > DEADLINE / 2, "{timeouts:?}");
    assert!(timeouts.is_sorted_by(|earlier, later| earlier > later), "{timeouts:?}");
}

#[tokio::test]
async fn a_replica_that_is_starting_costs_one_attempt_and_the_other_answers() {
    let starting = Scripted::failing_with(vec![Status::unavailable("starting"); 100]);
    let ready = Scripted::default();
    let client = Client::connect([starting.address().await, ready.address().await]).await.unwrap();
    let start = Instant::now();
    for _ in 0..50 {
        client.get_mid_emb(&page(), DEADLINE).await.unwrap();
    }
    assert_eq!(ready.n_calls(), 50);
    // A single call probes it after each second of cool-down, however slow this machine is.
    let n_cool_downs = start.elapsed().as_secs() as usize;
    assert!(starting.n_calls() <= 1 + n_cool_downs, "{} attempts in {:?}", starting.n_calls(), start.elapsed());
}

#[tokio::test]
async fn items_that_both_replicas_have_forgotten_are_known_after_one_resend() {
    let servers = [Scripted::default(), Scripted::default()];
    let client = Client::connect([servers[0].address().await, servers[1].address().await]).await.unwrap();
    // Both replicas are sent the text once.
    while servers.iter().any(|server| server.n_calls() == 0) {
        client.get_mid_emb(&page(), DEADLINE).await.unwrap();
    }
    // Whichever replica a resend goes to, its memory says that the text was sent: the draw must not matter.
    for _ in 0..20 {
        for server in &servers {
            server.has_forgotten.store(true, Ordering::Relaxed);
        }
        let answer = client.get_mid_emb(&page(), DEADLINE).await.unwrap();
        assert_eq!(answer.statuses, [RowStatus::Ok as i32]);
    }
    let n_unknown = |server: &Scripted| {
        let received = server.received.lock().unwrap();
        received.windows(2).filter(|pair| pair[0].request.candidates[0].text.is_none()).count()
    };
    assert!(servers.iter().any(|server| n_unknown(server) > 0), "the text was sent each time");
}

#[tokio::test]
async fn a_replica_that_was_too_slow_for_one_call_gets_the_next_one() {
    let server = Scripted::default();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let slow = silent.local_addr().unwrap().to_string();
    let client = Client::builder([slow, server.address().await]).connect_lazily().unwrap();
    let mut n_late = 0;
    for _ in 0..30 {
        match client.get_mid_emb(&page(), Duration::from_millis(20)).await {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.code(), Some(Code::DeadlineExceeded), "{error}");
                n_late += 1;
            }
        }
    }
    assert!(n_late > 1, "a replica was avoided because of a timeout of this client");
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
async fn an_answer_whose_rows_do_not_match_the_candidates_is_an_error() {
    let server = Scripted::default();
    server.has_a_row_too_many.store(true, Ordering::Relaxed);
    let client = Client::connect([server.address().await]).await.unwrap();
    let error = client.get_mid_emb(&page(), DEADLINE).await.unwrap_err();
    assert!(error.to_string().contains("1 candidates has 2 statuses"), "{error}");
}
