//! PCH, preference comprehension, and the CVR head: content embeddings in, user and item embeddings and mid-embs out.
//!
//! [`user_tower`], [`item_tower`] and [`fusion`] each run one graph on a pool thread. [`scoring`] is the job of a hot request: user
//! tower, then CVR graph. [`TowerGraphs`] is what each pool thread owns: all three small graphs, so that a hot request crosses
//! threads once.

pub mod fusion;
pub mod item_tower;
pub mod scoring;
pub mod user_tower;

use crate::inference::{Graph, Pool};

/// The three graphs that score a request; every pool thread has its own.
#[derive(Debug)]
pub struct TowerGraphs {
    /// History to user embedding.
    pub user: Graph,
    /// Content to item embedding.
    pub item: Graph,
    /// User and items to mid-emb.
    pub cvr: Graph,
}

/// The threads that score.
pub type TowerPool = Pool<TowerGraphs>;

/// Jobs that may wait to be scored. At under ten milliseconds a job, more would only be late.
pub const MAX_QUEUED: usize = 1024;
/// What metrics call the pool's queue.
pub const QUEUE: &str = "towers";
