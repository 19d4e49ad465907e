//! A client of midemb for ranking services and operators.
//!
//! [`Client`] asks for mid-embs. It follows the rules of the wire contract, so that its caller does not have to:
//!
//! - **Text is sent once.** Give every item with its text. A replica that has seen the text is sent the id alone; a row that
//!   comes back `UNKNOWN_ITEM` is asked for again with its text, once, and merged into the answer.
//! - **What is safe is sent again**, a bounded number of times and never beyond the deadline: calls that a starting or
//!   draining replica did not take, and calls that were shed, after the delay that the server asked for.
//! - **[`Client::get_mid_emb`] and [`Client::get_model_info`] take a deadline**, which covers all attempts and travels with
//!   each as `grpc-timeout`. [`Client::warm_items`] and the calls of [`AdminClient`] have none: put `tokio::time::timeout`
//!   around them where you need one.
//! - **Several addresses share the load.** A call goes to the replica with the fewest calls in flight. When a replica cannot
//!   be reached, the call goes to another one at once, and a single call per second probes whether it is back.
//!
//! [`Tensor`](proto::Tensor) gives its numbers as `f32` slices, without a copy where the received bytes allow it.
//! [`AdminClient`] is for operators: status, pushes, rollbacks and caches.
//!
//! ```no_run
//! use midemb_client::{Client, proto::{GetMidEmbRequest, Item, ItemText, RowStatus}};
//! use std::time::Duration;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect(["10.0.0.1:50051", "10.0.0.2:50051"]).await?;
//! let film = |id: &str, title: &str| Item {
//!     id: id.to_owned(),
//!     text: Some(ItemText { title: title.to_owned(), ..Default::default() }),
//! };
//! let request = GetMidEmbRequest {
//!     user_id: "u1".to_owned(),
//!     history: vec![film("tt0111161", "The Shawshank Redemption")],
//!     candidates: vec![film("tt0068646", "The Godfather"), film("tt0114709", "Toy Story")],
//!     ..Default::default()
//! };
//! let answer = client.get_mid_emb(&request, Duration::from_millis(50)).await?;
//! let mid_emb = answer.mid_emb.as_ref().ok_or("no mid-emb")?.matrix()?;
//! for (row, status) in mid_emb.rows().zip(answer.statuses()) {
//!     if status == RowStatus::Ok {
//!         println!("{row:?}");
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Features: `serde` derives `Serialize` on the messages that [`AdminClient::get_status`] and [`AdminClient::push_config`]
//! answer with, `clap` makes [`AdminAccess`] the flags of a command, and `test-server` adds the generated server traits, for
//! tests that answer calls themselves.

mod admin;
mod client;
mod connection;
mod deadline;
mod error;
mod replicas;
mod resend;
mod retry;
mod sent_texts;
mod tensor;

pub use admin::{AdminAccess, AdminClient, Export};
pub use client::{Builder, Client, Warmed};
pub use connection::Tls;
pub use error::Error;
pub use retry::RetryPolicy;
pub use tensor::{Matrix, TensorError};
pub use tonic::{Code, Status, transport::Channel};

/// The messages and stubs that are generated from `proto/midemb/v1/midemb.proto`, which documents them.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::too_many_lines, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("midemb.v1");
}
