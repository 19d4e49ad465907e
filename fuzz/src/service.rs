//! `MidEmbService` with all of its layers, over the fixture bundle: what a connection would call, without the connection.

use crate::bundle;
use http::{HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use midemb::{
    bundle::{LoadOptions, ModelSet, ServedModel, load::check_files, load::load},
    cache::{CacheLimits, Caches},
    config::settings::Limits,
    inference::{ProviderChoice, Runtime},
    pipeline::Pipeline,
    wire::{
        layer::{CountLayer, Counted},
        proto::mid_emb_service_server::MidEmbServiceServer,
        receive::{Budgets, ReceiveLayer, Received},
        services::MidEmb,
    },
};
use midemb_client::proto::{GetMidEmbResponse, WarmItemsResponse};
use prost::{Message, bytes::Bytes};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::sync::watch;
use tonic::{Code, body::Body};
use tower::{Layer, Service};

/// Small enough that an input of a few kilobytes can exceed them.
pub const LIMITS: Limits = Limits {
    max_candidates: 64,
    max_history: 32,
    max_text_bytes: 256,
    max_message_bytes: 1 << 16,
    max_in_flight: 1,
    max_encoding: 1,
    read: Duration::from_secs(3600),
    write: Duration::from_secs(3600),
    max_receiving_bytes: 1 << 20,
    max_decoded_bytes: 1 << 20,
    max_unsent_bytes: 1 << 20,
    max_warm_up_bytes: 1 << 20,
    // No machine is so slow that a row is late.
    default_deadline: Duration::from_secs(3600),
};

/// The name of the only model.
pub const MODEL: &str = "learn";

type Layered = Counted<Received<MidEmbServiceServer<MidEmb>>>;

/// A service and the thread that runs its calls.
#[derive(Debug)]
pub struct MidEmbCaller {
    runtime: tokio::runtime::Runtime,
    service: Layered,
    caches: Arc<Caches>,
    _never_drains: watch::Sender<bool>,
}

/// What a call was answered with.
#[derive(Debug)]
pub struct Answer<T> {
    /// The gRPC status.
    pub code: Code,
    /// Its message, empty if the call succeeded.
    pub message: String,
    /// The response, as the Rust client reads it; none if the call failed.
    pub response: Option<T>,
}

impl MidEmbCaller {
    /// Loads the fixture bundle and starts its threads.
    pub fn start() -> Self {
        let limits = CacheLimits {
            content_bytes: 1 << 22,
            item_bytes: 1 << 22,
            user_bytes: 1 << 22,
            known_items_bytes: 1 << 22,
            max_text_bytes: LIMITS.max_text_bytes,
        };
        let caches = Arc::new(Caches::new(limits));
        let pipeline = Arc::new(Pipeline::new(Arc::clone(&caches), LIMITS.max_in_flight, LIMITS.max_encoding));
        pipeline.registry.install(Arc::new(models()));
        let (never_drains, draining) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let entered = runtime.enter();
        let budgets = Budgets::new(&LIMITS);
        let handlers = MidEmb::new(Arc::clone(&pipeline), LIMITS, budgets.clone(), draining.clone());
        let handlers = MidEmbServiceServer::new(handlers).max_decoding_message_size(LIMITS.max_message_bytes);
        let service = CountLayer.layer(ReceiveLayer::new(pipeline, LIMITS, budgets, draining).layer(handlers));
        drop(entered);
        MidEmbCaller { runtime, service, caches, _never_drains: never_drains }
    }

    /// Empties all caches, so that an input's result does not depend on the inputs before it.
    pub fn forget(&self) {
        self.caches.flush_all();
    }

    /// Calls `GetMidEmb` with these bytes as its message.
    pub fn get_mid_emb(&mut self, message: &[u8]) -> Answer<GetMidEmbResponse> {
        self.call("/midemb.v1.MidEmbService/GetMidEmb", Body::new(Full::new(framed(message))))
    }

    /// Calls `WarmItems` with these bytes, messages and what is between them, in pieces of `n_bytes` as its body.
    pub fn warm_items(&mut self, body: &[u8], n_bytes: usize) -> Answer<WarmItemsResponse> {
        let pieces: Vec<Bytes> = body.chunks(n_bytes).map(Bytes::copy_from_slice).collect();
        let frames = pieces.into_iter().map(|piece| Ok::<_, Infallible>(Frame::data(piece)));
        self.call("/midemb.v1.MidEmbService/WarmItems", Body::new(StreamBody::new(tokio_stream::iter(frames))))
    }

    fn call<T: Message + Default>(&mut self, path: &'static str, body: Body) -> Answer<T> {
        let mut request = Request::new(body);
        *request.uri_mut() = http::Uri::from_static(path);
        *request.method_mut() = http::Method::POST;
        request.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        self.runtime.block_on(async {
            let answered = self.service.call(request).await;
            answer(answered.unwrap()).await
        })
    }
}

/// A message as the body of a gRPC call: not compressed, its length, its bytes.
fn framed(message: &[u8]) -> Bytes {
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    frame.into()
}

async fn answer<T: Message + Default>(response: Response<Body>) -> Answer<T> {
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap();
    // A call that failed has its status in the headers.
    let trailers = body.trailers().cloned().unwrap_or_default();
    let header = |name: &str| trailers.get(name).or(head.headers.get(name));
    let code = header("grpc-status").map_or(Code::Unknown, |code| Code::from_bytes(code.as_bytes()));
    let message = header("grpc-message").map(|text| String::from_utf8_lossy(text.as_bytes()).into_owned());
    let bytes = body.to_bytes();
    let response = bytes.get(5..).map(|message| T::decode(message).unwrap());
    Answer { code, message: message.unwrap_or_default(), response }
}

fn models() -> ModelSet {
    let runtime = Runtime::load(None, ProviderChoice::Cpu).unwrap();
    let options = LoadOptions { served_name: MODEL.to_owned(), n_threads: 1, batch_requests: 0 };
    let files = check_files(bundle(), None).unwrap();
    let loaded = load(files, &options, &runtime, &[], &|_step| ()).unwrap();
    let model = Arc::new(loaded.start().unwrap().model);
    ModelSet::new(vec![ServedModel { model, share: 100 }], Vec::new(), "")
}
