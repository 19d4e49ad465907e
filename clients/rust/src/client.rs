//! The calls of a ranking service.

use crate::{
    Error, RetryPolicy, Tls,
    connection::Address,
    deadline::{Deadline, is_local_timeout},
    proto::{
        GetMidEmbRequest, GetMidEmbResponse, GetModelInfoRequest, GetModelInfoResponse, Item, Tensor, WarmItemsRequest,
        WarmItemsResponse, mid_emb_service_client::MidEmbServiceClient,
    },
    replicas::{Replica, Replicas},
    resend::{self, Resend},
    retry::{Attempts, Failure},
};
use std::{sync::Arc, time::Duration};
use tokio_stream::Stream;
use tonic::{Response, Status, transport::Channel};

const GET_MID_EMB: &str = "GetMidEmb";
const WARM_ITEMS: &str = "WarmItems";
const GET_MODEL_INFO: &str = "GetModelInfo";

/// Ids remembered per replica by default: 10 MB where ids have 36 characters.
const DEFAULT_REMEMBERED_ITEMS: usize = 100_000;
const WARM_UP_CHUNK: usize = 64;

/// Asks one or several replicas for mid-embs. Clones share the connections and the memory of which texts were sent.
#[derive(Debug, Clone)]
pub struct Client {
    replicas: Arc<Replicas>,
    retry: RetryPolicy,
}

/// Options of a [`Client`] that is not connected yet.
#[derive(Debug, Clone)]
pub struct Builder {
    addresses: Vec<String>,
    tls: Option<Tls>,
    retry: RetryPolicy,
    max_remembered_items: usize,
}

impl Builder {
    /// Uses TLS for every address.
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Sets how often and how fast calls are sent again.
    #[must_use]
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// The client remembers for at most this many items per replica that it has sent their text; each takes about 100 bytes.
    /// 0 sends every text every time.
    #[must_use]
    pub fn remembered_items(mut self, max_items: usize) -> Self {
        self.max_remembered_items = max_items;
        self
    }

    /// Connects to every address, and fails if none can be reached. The client tries the unreachable ones again with later
    /// calls.
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

    /// Connects when the first call is made. It must be called within a tokio runtime nevertheless.
    pub fn connect_lazily(self) -> Result<Client, Error> {
        let replica = |address: Address| Replica::new(&address, address.connect_lazily(), self.max_remembered_items);
        let replicas = self.addresses()?.into_iter().map(replica).collect();
        Ok(Client { replicas: Arc::new(Replicas::new(replicas)), retry: self.retry })
    }

    /// The addresses, of which there is at least one.
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
    /// Starts with the defaults. `addresses` has one `host:port` or URL per replica.
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
    /// Give every item with its text where you have it: the client decides whether to send it. Within `deadline` the
    /// call is sent again where that is safe, and rows that are unknown to the replica are asked for again with their text.
    /// Rows that are not ready by then are `NOT_IN_TIME`; the server goes on encoding them for a later call.
    pub async fn get_mid_emb(
        &self,
        request: &GetMidEmbRequest,
        deadline: Duration,
    ) -> Result<GetMidEmbResponse, Error> {
        let deadline = Deadline::after(deadline);
        let first = self.page(request, Texts::Unsent, None, deadline).await?;
        let resend = Resend::of(request, &first.sent, &first.answer);
        let Some(again) = resend.request(request, &first.answer) else { return Ok(first.answer) };
        match self.page(&again, Texts::All, Some(first.replica), deadline).await {
            Ok(second) => Ok(resend.merge(first.answer, second.answer)),
            // The first answer has usable rows, which the error would throw away.
            Err(_) => Ok(first.answer),
        }
    }

    /// One page with as many attempts as the policy allows, the first of them to `preferred` unless that replica is avoided.
    async fn page<'a>(
        &'a self,
        request: &GetMidEmbRequest,
        texts: Texts,
        preferred: Option<&'a Replica>,
        deadline: Deadline,
    ) -> Result<Page<'a>, Error> {
        let mut attempts = Attempts::new(GET_MID_EMB, self.retry, deadline);
        let mut preferred = preferred.filter(|replica| !replica.is_avoided());
        loop {
            let replica = preferred.take().unwrap_or_else(|| self.replicas.best());
            let sent = match texts {
                Texts::All => request.clone(),
                Texts::Unsent => GetMidEmbRequest {
                    user_id: request.user_id.clone(),
                    history: replica.sent_texts.strip(&request.history),
                    candidates: replica.sent_texts.strip(&request.candidates),
                    model: request.model.clone(),
                    outputs: request.outputs.clone(),
                    dtype: request.dtype,
                    history_actions: request.history_actions.clone(),
                },
            };
            let call = async { replica.service().get_mid_emb(deadline.request(sent.clone())).await };
            match answer_of(replica, deadline, call).await {
                Ok(answer) => {
                    check_rows(&sent, &answer)?;
                    resend::note(&replica.sent_texts, &sent, &answer);
                    return Ok(Page { replica, sent, answer });
                }
                Err(status) => attempts.wait_after(status, self.replicas.availability()).await?,
            }
        }
    }

    /// What is served: models, dimensions, limits. Replicas under one config all say the same.
    pub async fn get_model_info(&self, deadline: Duration) -> Result<GetModelInfoResponse, Error> {
        let deadline = Deadline::after(deadline);
        let mut attempts = Attempts::new(GET_MODEL_INFO, self.retry, deadline);
        loop {
            let replica = self.replicas.best();
            let call = async { replica.service().get_model_info(deadline.request(GetModelInfoRequest {})).await };
            match answer_of(replica, deadline, call).await {
                Ok(answer) => return Ok(answer),
                Err(status) => attempts.wait_after(status, self.replicas.availability()).await?,
            }
        }
    }

    /// Sends items with their texts to every replica, ahead of traffic, one replica after the other. A replica takes items as
    /// fast as it encodes them, so this call has no deadline, and it is not sent again when it fails.
    pub async fn warm_items(&self, items: impl Into<Arc<[Item]>>) -> Vec<Warmed> {
        let items = items.into();
        let mut warmed = Vec::with_capacity(self.replicas.all().len());
        for replica in self.replicas.all() {
            let answer = replica.service().warm_items(warm_up_chunks(Arc::clone(&items))).await;
            let result = answer.map(Response::into_inner).map_err(Error::failed(WARM_ITEMS));
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
        self.replicas.best().service()
    }
}

/// The items as a stream of messages. Each is copied when the connection has room for it.
fn warm_up_chunks(items: Arc<[Item]>) -> impl Stream<Item = WarmItemsRequest> {
    let starts = (0..items.len()).step_by(WARM_UP_CHUNK);
    tokio_stream::iter(starts.map(move |start| {
        let end = items.len().min(start + WARM_UP_CHUNK);
        WarmItemsRequest { items: items[start..end].to_vec() }
    }))
}

/// Which texts a request carries.
#[derive(Debug, Clone, Copy)]
enum Texts {
    /// Those that the replica has not been sent.
    Unsent,
    /// All that the caller gave. A resend may go to another replica, which may have forgotten its items too.
    All,
}

/// One request as it was sent, and its answer.
struct Page<'a> {
    replica: &'a Replica,
    sent: GetMidEmbRequest,
    answer: GetMidEmbResponse,
}

/// An answer has one status and one row for each candidate, whatever the caller goes on to do with them.
fn check_rows(sent: &GetMidEmbRequest, answer: &GetMidEmbResponse) -> Result<(), Error> {
    let n_candidates = sent.candidates.len();
    let has_rows = |tensor: &Tensor| tensor.shape.first().is_some_and(|n_rows| *n_rows as usize == n_candidates);
    let mut tensors = [&answer.mid_emb, &answer.cvr, &answer.item_emb].into_iter().flatten();
    if answer.statuses.len() == n_candidates && tensors.all(has_rows) {
        return Ok(());
    }
    Err(Error::Rows { n_candidates, n_statuses: answer.statuses.len() })
}

/// Makes a call, and records whether the replica took it.
async fn answer_of<T>(
    replica: &Replica,
    deadline: Deadline,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    let in_flight = replica.start_call();
    let answer = deadline.answer(call).await;
    match &answer {
        // The replica may be gone or merely slow. Keep-alive pings find out which.
        Err(status) if is_local_timeout(status) => drop(in_flight),
        Err(status) if Failure::of(status) == Failure::Unanswered => in_flight.was_not_taken(),
        _ => in_flight.was_answered(),
    }
    answer
}
