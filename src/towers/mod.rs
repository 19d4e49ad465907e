//! PCH (preference comprehension) and the CVR head: content embeddings in; item records, user embeddings and mid-embs out.
//!
//! [`user_tower`], [`item_tower`] and [`fusion`] each run one graph on a pool thread. [`scoring`] is the job of a hot request:
//! user tower, then CVR graph. Each pool thread owns a [`TowerGraphs`], all three small graphs, so that a hot request crosses
//! threads only once.

pub mod fusion;
pub mod item_tower;
pub mod scoring;
pub mod user_tower;

use crate::inference::{Graph, Pool};

/// The three graphs that score requests. Every pool thread has its own.
#[derive(Debug)]
pub struct TowerGraphs {
    /// History of adapted items to user embedding.
    pub user: Graph,
    /// Content to item record.
    pub item: Graph,
    /// User and items to mid-emb.
    pub cvr: Graph,
}

/// The threads that run [`TowerGraphs`].
pub type TowerPool = Pool<TowerGraphs>;

/// The most jobs that wait to be scored. A job takes under ten milliseconds, so jobs beyond this number would be late anyway.
pub const MAX_QUEUED: usize = 1024;
/// The name of the pool's queue in metrics.
pub const QUEUE: &str = "towers";
