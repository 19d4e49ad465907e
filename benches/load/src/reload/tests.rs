//! The scenario against a server in this process that answers from two made-up bundles, correctly or with a fault.

use crate::args::Args;
use clap::Parser;
use midemb_client::proto::{
    CacheChunk, ConfigInfo, DType, ExportCacheRequest, FlushCacheRequest, FlushCacheResponse, GetMidEmbRequest,
    GetMidEmbResponse, GetModelInfoRequest, GetModelInfoResponse, GetStatusRequest, GetStatusResponse,
    ImportCacheResponse, ModelRef, PushConfigRequest, PushConfigResponse, PushReport, PushStep, RollbackRequest,
    RollbackResponse, RowStatus, Tensor, WarmItemsRequest, WarmItemsResponse,
    admin_service_server::{AdminService, AdminServiceServer},
    mid_emb_service_server::{MidEmbService, MidEmbServiceServer},
};
use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

/// What is wrong with every seventh answer once the references are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Its last row is the other bundle's.
    MixedRow,
    /// It names the other bundle.
    WrongName,
    /// It is an error.
    Failure,
    /// Every answer, from the start, is the same under both configs.
    Alike,
}

#[derive(Debug, Clone)]
struct State {
    fault: Fault,
    /// The config in force and the one before.
    configs: [String; 2],
    n_pushes: u64,
    n_rollbacks: u64,
    n_asked: u64,
    /// Pushes that expected another config to be in force.
    n_aborted: u64,
}

#[derive(Clone)]
struct Fake(Arc<Mutex<State>>);

const DIM: usize = 4;

fn config(name: &str) -> Option<ConfigInfo> {
    Some(ConfigInfo { digest: format!("config {name}"), ..Default::default() })
}

fn tensor(shape: &[usize], values: &[f32]) -> Option<Tensor> {
    let shape = shape.iter().map(|n| *n as u32).collect();
    let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Some(Tensor { dtype: DType::DtypeF32.into(), shape, data })
}

/// The numbers of one row: another bundle's or another user's are others.
fn row(bundle: &str, request: &GetMidEmbRequest, i: usize) -> [f32; DIM] {
    let text = format!("{bundle} {} {} {i}", request.user_id, request.history.len());
    let hash = blake3::hash(text.as_bytes());
    std::array::from_fn(|k| f32::from(hash.as_bytes()[k]) / 256.0)
}

#[tonic::async_trait]
impl MidEmbService for Fake {
    async fn get_mid_emb(&self, request: Request<GetMidEmbRequest>) -> Result<Response<GetMidEmbResponse>, Status> {
        let (request, mut state) = (request.into_inner(), self.0.lock().unwrap());
        state.n_asked += 1;
        let is_now = state.n_pushes > 3 && state.n_asked % 7 == 0;
        let fault = if is_now || state.fault == Fault::Alike { state.fault } else { Fault::None };
        let [in_force, other] = state.configs.clone();
        let named = if fault == Fault::WrongName { &other } else { &in_force };
        let mut bundles = vec![in_force.as_str(); request.candidates.len()];
        match fault {
            Fault::Failure => return Err(Status::internal("no")),
            Fault::MixedRow => *bundles.last_mut().unwrap() = other.as_str(),
            Fault::Alike => bundles.fill("one"),
            Fault::None | Fault::WrongName => {}
        }
        let rows: Vec<[f32; DIM]> = bundles.iter().enumerate().map(|(i, bundle)| row(bundle, &request, i)).collect();
        let cvr: Vec<f32> = rows.iter().map(|row| row[0]).collect();
        Ok(Response::new(GetMidEmbResponse {
            model: Some(ModelRef { digest: format!("bundle {named}"), ..Default::default() }),
            mid_emb: tensor(&[rows.len(), DIM], &rows.concat()),
            cvr: tensor(&[rows.len()], &cvr),
            statuses: vec![RowStatus::Ok.into(); rows.len()],
            history_statuses: vec![RowStatus::Ok.into(); request.history.len()],
            history_used: request.history.len() as u32,
            ..Default::default()
        }))
    }

    async fn warm_items(
        &self,
        request: Request<Streaming<WarmItemsRequest>>,
    ) -> Result<Response<WarmItemsResponse>, Status> {
        let (mut chunks, mut items) = (request.into_inner(), 0);
        while let Some(chunk) = chunks.message().await? {
            items += chunk.items.len() as u64;
        }
        Ok(Response::new(WarmItemsResponse { items, encoded: items, ..Default::default() }))
    }

    async fn get_model_info(&self, _: Request<GetModelInfoRequest>) -> Result<Response<GetModelInfoResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl AdminService for Fake {
    type ExportCacheStream = tokio_stream::Empty<Result<CacheChunk, Status>>;

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let config = config(&self.0.lock().unwrap().configs[0]);
        Ok(Response::new(GetStatusResponse { config, ..Default::default() }))
    }

    async fn push_config(&self, request: Request<PushConfigRequest>) -> Result<Response<PushConfigResponse>, Status> {
        let (request, mut state) = (request.into_inner(), self.0.lock().unwrap());
        if config(&state.configs[0]).unwrap().digest != request.expected_digest {
            state.n_aborted += 1;
            return Err(Status::aborted("another config is in force"));
        }
        let config = config(&request.config);
        if request.config == state.configs[0] {
            return Ok(Response::new(PushConfigResponse { result: "unchanged".to_owned(), config, report: None }));
        }
        state.n_pushes += 1;
        state.configs = [request.config, state.configs[0].clone()];
        let step = |step: &str| PushStep { step: step.to_owned(), took_ms: state.n_pushes, ..Default::default() };
        let steps = vec![step("graphs"), step("graphs"), step("swap")];
        let report = Some(PushReport { took_ms: 2 * state.n_pushes, steps, ..Default::default() });
        Ok(Response::new(PushConfigResponse { result: "applied".to_owned(), config, report }))
    }

    async fn rollback(&self, request: Request<RollbackRequest>) -> Result<Response<RollbackResponse>, Status> {
        let mut state = self.0.lock().unwrap();
        if config(&state.configs[0]).unwrap().digest != request.into_inner().expected_digest {
            return Err(Status::aborted("another config is in force"));
        }
        state.n_rollbacks += 1;
        state.configs.reverse();
        Ok(Response::new(RollbackResponse { config: config(&state.configs[0]), ..Default::default() }))
    }

    async fn flush_cache(&self, request: Request<FlushCacheRequest>) -> Result<Response<FlushCacheResponse>, Status> {
        assert_eq!(request.into_inner().cache, "user", "a hot benchmark keeps the other caches");
        Ok(Response::new(FlushCacheResponse::default()))
    }

    async fn export_cache(&self, _: Request<ExportCacheRequest>) -> Result<Response<Self::ExportCacheStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn import_cache(&self, _: Request<Streaming<CacheChunk>>) -> Result<Response<ImportCacheResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Answers every scrape with the same process metrics, on a thread that ends with the tests.
fn serve_metrics() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            lines.map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
            let body = "process_cpu_seconds_total 1\nprocess_resident_memory_bytes 100\n";
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        }
    });
    address
}

/// Runs the scenario, and gives its result and what the server saw.
async fn run(fault: Fault, more: &[&str]) -> (Result<(), String>, State) {
    let start = ["start".to_owned(), String::new()];
    let state = State { fault, configs: start, n_pushes: 0, n_rollbacks: 0, n_asked: 0, n_aborted: 0 };
    let fake = Fake(Arc::new(Mutex::new(state)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let served = Server::builder()
        .add_service(MidEmbServiceServer::new(fake.clone()))
        .add_service(AdminServiceServer::new(fake.clone()))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    let serving = tokio::spawn(served);
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| {
        let path = folder.path().join(name);
        std::fs::write(&path, name).unwrap();
        path.display().to_string()
    });
    let metrics = serve_metrics().to_string();
    let command = ["midemb-bench", "w7-reload", "--server", &address, "--admin", &address, "--metrics", &metrics];
    let sizes = ["--items", "30", "--history", "5", "--candidates", "10", "--requests", "40", "--different-pages", "8"];
    let pushes = ["--configs", &a, &b, "--pause-ms", "10"];
    let args = Args::parse_from([&command[..], &sizes, &pushes, more].concat());
    let result = crate::run(args).await.map_err(|error| format!("{error:#}"));
    serving.abort();
    let state = fake.0.lock().unwrap().clone();
    (result, state)
}

#[tokio::test]
async fn a_correct_server_passes_in_both_loops_and_is_left_with_the_first_config() {
    for pace in [&["--reloads", "20", "--json"][..], &["--reloads", "20", "--rate", "300"]] {
        let (result, state) = run(Fault::None, pace).await;
        assert_eq!(result, Ok(()));
        // Two for the references and one at the end, unless the first config is in force anyway.
        assert!((22..=23).contains(&state.n_pushes), "{state:?}");
        assert_eq!((state.n_rollbacks, state.n_aborted, state.configs[0].as_str()), (2, 0, "a"));
    }
}

#[tokio::test]
async fn mixed_answers_and_answers_under_a_wrong_name_are_found() {
    for fault in [Fault::MixedRow, Fault::WrongName] {
        // A rollback waits for a digest that this server may not name. Within 9 pushes there is none.
        let error = run(fault, &["--reloads", "9"]).await.0.unwrap_err();
        assert!(error.contains("while pushing, 0 of ") && error.contains("is not what that model"), "{error}");
        assert!(!error.contains(" 0 answers were mixed"), "{error}");
    }
}

#[tokio::test]
async fn failed_requests_are_found() {
    let error = run(Fault::Failure, &["--reloads", "9"]).await.0.unwrap_err();
    assert!(error.contains("requests failed, 0 answers were mixed") && error.contains("Internal: no"), "{error}");
    assert!(!error.contains(" 0 of "), "{error}");
}

#[tokio::test]
async fn bundles_that_answer_alike_are_refused() {
    let error = run(Fault::Alike, &[]).await.0.unwrap_err();
    assert_eq!(error, "two bundles answer alike: 8 of 8 pages cannot tell them apart");
}
