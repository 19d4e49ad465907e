//! The calls of a ranking service.

use crate::{
    Error, RetryPolicy, Tls,
    connection::Address,
    deadline::Deadline,
    proto::{
        GetMidEmbRequest, GetMidEmbResponse, GetModelInfoRequest, GetModelInfoResponse, Item, WarmItemsRequest,
        WarmItemsResponse, mid_emb_service_client::MidEmbServiceClient,
    },
    replicas::{Replica, Replicas},
    resend::{self, Resend},
    retry::{Attempts, Failure},
};
use std::{sync::Arc, time::Duration};
use tonic::{Status, transport::Channel};

const GET_MID_EMB: &str = "GetMidEmb";
const WARM_ITEMS: &str = "WarmItems";
const GET_MODEL_INFO: &str = "GetModelInfo";

/// Ids remembered for each replica unless said otherwise: 10 MB where ids have 36 characters.
const DEFAULT_REMEMBERED_ITEMS: usize = 100_000;
const WARM_UP_CHUNK: usize = 64;

/// Asks one or several replicas for mid-embs. Clones share the connections and what is remembered.
#[derive(Debug, Clone)]
pub struct Client {
    replicas: Arc<Replicas>,
    retry: RetryPolicy,
}

/// How a [`Client`] is to be made.
#[derive(Debug, Clone)]
pub struct Builder {
    addresses: Vec<String>,
    tls: Option<Tls>,
    retry: RetryPolicy,
    max_remembered_items: usize,
}

impl Builder {
    /// TLS to every address.
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// How often and how fast calls are sent again.
    #[must_use]
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// The number of items per replica whose texts are remembered as sent; an id with its bookkeeping takes about 100 bytes.
    /// With 0, every text is sent every time.
    #[must_use]
    pub fn remembered_items(mut self, max_items: usize) -> Self {
        self.max_remembered_items = max_items;
        self
    }

    /// Connects to every address; an error where none can be reached. Those that cannot be reached yet are tried again with
    /// later calls.
    pub async fn connect(self) -> Result<Client, Error> {
        let mut replicas = Vec::with_capacity(self.addresses.len());
        let (mut n_connected, mut first_error) = (0, None);
        for address in self.addresses()? {
            let channel = match address.connect().await {
                Ok(channel) => {
                    n_connected += 1;
                    channel
                }
                Err(error) => {
                    first_error.get_or_insert(error);
                    address.connect_lazily()
                }
            };
            replicas.push(Replica::new(&address, channel, self.max_remembered_items));
        }
        match first_error {
            Some(error) if n_connected == 0 => Err(error),
            _ => Ok(Client { replicas: Arc::new(Replicas::new(replicas)), retry: self.retry }),
        }
    }

    /// Returns at once and connects with the first calls. Must be called within a tokio runtime.
    pub fn connect_lazily(self) -> Result<Client, Error> {
        let replica = |address: Address| Replica::new(&address, address.connect_lazily(), self.max_remembered_items);
        let replicas = self.addresses()?.into_iter().map(replica).collect();
        Ok(Client { replicas: Arc::new(Replicas::new(replicas)), retry: self.retry })
    }

    /// The parsed addresses, of which there must be at least one.
    fn addresses(&self) -> Result<Vec<Address>, Error> {
        if self.addresses.is_empty() {
            return Err(Error::NoAddress);
        }
        self.addresses.iter().map(|address| Address::new(address, self.tls.as_ref())).collect()
    }
}

/// What a warm-up did on one replica.
#[derive(Debug)]
pub struct Warmed {
    /// The replica.
    pub address: String,
    /// How many items were encoded, were cached already, were invalid, or failed.
    pub result: Result<WarmItemsResponse, Error>,
}

impl Client {
    /// Starts with the defaults. An address is `host:port` or a URL: one for each replica.
    pub fn builder<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Builder {
        Builder {
            addresses: addresses.into_iter().map(Into::into).collect(),
            tls: None,
            retry: RetryPolicy::default(),
            max_remembered_items: DEFAULT_REMEMBERED_ITEMS,
        }
    }

    /// Connects with the defaults.
    pub async fn connect<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Result<Self, Error> {
        Client::builder(addresses).connect().await
    }

    /// The mid-emb of every candidate, in order.
    ///
    /// Give every item with its text where you have it: whether it travels is this client's concern. Within `deadline` the
    /// call is sent again where that is safe, and rows that are unknown to the replica are asked for again with their text.
    /// Rows that are not ready by then are `NOT_IN_TIME`; the server goes on encoding them for a later call.
    pub async fn get_mid_emb(
        &self,
        request: &GetMidEmbRequest,
        deadline: Duration,
    ) -> Result<GetMidEmbResponse, Error> {
        let deadline = Deadline::after(deadline);
        let first = self.page(request, Texts::IfNew, deadline).await?;
        let resend = Resend::of(request, &first.sent, &first.answer);
        let Some(again) = resend.request(request) else { return Ok(first.answer) };
        match self.page(&again, Texts::Always, deadline).await {
            Ok(second) => Ok(resend.merge(first.answer, second.answer)),
            // What the first answer holds is worth more than the error.
            Err(_) => Ok(first.answer),
        }
    }

    /// One page with as many attempts as the policy allows.
    async fn page(&self, request: &GetMidEmbRequest, texts: Texts, deadline: Deadline) -> Result<Page, Error> {
        let mut attempts = Attempts::new(GET_MID_EMB, self.retry, deadline);
        loop {
            let replica = self.replicas.pick();
            let sent = match texts {
                Texts::Always => request.clone(),
                Texts::IfNew => GetMidEmbRequest {
                    user_id: request.user_id.clone(),
                    history: replica.sent_texts.strip(&request.history),
                    candidates: replica.sent_texts.strip(&request.candidates),
                    model: request.model.clone(),
                    outputs: request.outputs.clone(),
                    dtype: request.dtype,
                },
            };
            let under_way = replica.call_under_way();
            let call = async { replica.service().get_mid_emb(deadline.request(sent.clone())).await };
            let answer = deadline.answer(call).await;
            drop(under_way);
            match note_reachability(replica, deadline, answer) {
                Ok(answer) => {
                    resend::note(&replica.sent_texts, &sent, &answer);
                    return Ok(Page { sent, answer });
                }
                Err(status) => attempts.wait_after(status).await?,
            }
        }
    }

    /// What is served: models, dimensions, limits. Replicas under one config all say the same.
    pub async fn get_model_info(&self, deadline: Duration) -> Result<GetModelInfoResponse, Error> {
        let deadline = Deadline::after(deadline);
        let mut attempts = Attempts::new(GET_MODEL_INFO, self.retry, deadline);
        loop {
            let replica = self.replicas.pick();
            let under_way = replica.call_under_way();
            let call = async { replica.service().get_model_info(deadline.request(GetModelInfoRequest {})).await };
            let answer = deadline.answer(call).await;
            drop(under_way);
            match note_reachability(replica, deadline, answer) {
                Ok(answer) => return Ok(answer),
                Err(status) => attempts.wait_after(status).await?,
            }
        }
    }

    /// Sends items with their texts to every replica, ahead of traffic, one replica after the other. A replica takes items as
    /// fast as it encodes them, so there is no deadline.
    pub async fn warm_items(&self, items: &[Item]) -> Vec<Warmed> {
        let items: Arc<[Item]> = items.into();
        let mut warmed = Vec::with_capacity(self.replicas.all().len());
        for replica in self.replicas.all() {
            let shared = Arc::clone(&items);
            let starts = (0..items.len()).step_by(WARM_UP_CHUNK);
            let chunks = starts.map(move |start| {
                let end = shared.len().min(start + WARM_UP_CHUNK);
                WarmItemsRequest { items: shared[start..end].to_vec() }
            });
            let answer = replica.service().warm_items(tokio_stream::iter(chunks)).await;
            let result = answer.map(tonic::Response::into_inner).map_err(Error::failed(WARM_ITEMS));
            // The counts do not say which items were refused.
            if result.as_ref().is_ok_and(|answer| answer.invalid + answer.failed == 0) {
                replica.sent_texts.remember(items.iter());
            }
            warmed.push(Warmed { address: replica.address.clone(), result });
        }
        warmed
    }

    /// The generated client of one replica, for calls that nothing should be added to: load generators and tests.
    pub fn service(&self) -> MidEmbServiceClient<Channel> {
        self.replicas.pick().service()
    }
}

/// One request as it was sent, and its answer.
struct Page {
    sent: GetMidEmbRequest,
    answer: GetMidEmbResponse,
}

/// Which texts travel with a request.
#[derive(Debug, Clone, Copy)]
enum Texts {
    /// Those that the replica has not been sent yet.
    IfNew,
    /// All of them, whichever replica the call goes to: a replica has forgotten some, and others may have, too.
    Always,
}

/// Notes whether a replica takes calls. A deadline that passed says nothing about that: the replica may be slow or gone.
fn note_reachability<T>(replica: &Replica, deadline: Deadline, answer: Result<T, Status>) -> Result<T, Status> {
    match &answer {
        Err(status) if deadline.explains(status) => {}
        Err(status) if Failure::of(status) == Failure::NotTaken => replica.did_not_take_a_call(),
        _ => replica.has_answered(),
    }
    answer
}
