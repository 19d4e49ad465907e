//! PCH, preference comprehension: content embeddings in, user and item embeddings out.
//!
//! [`user_tower`] and [`item_tower`] run their graphs on a pool thread; [`item_cache`] keeps what the item tower gave,
//! by everything it depends on, and
//! [`user_cache`] does the same for the users of sessions under way. [`TowerGraphs`] is what each pool thread owns: all three small graphs, so that a hot
//! request crosses threads once.

pub mod item_cache;
pub mod item_tower;
pub mod user_cache;
pub mod user_tower;

pub use item_cache::{ItemKey, TowerDigest};
pub use user_cache::{UserCache, UserKey};

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
