//! Caches that files of vectors and snapshots are read into.

use crate::scratch::Scratch;
use midemb::{
    cache::{
        CacheLimits, Caches,
        snapshot::{Imported, Restored, Served, restore, write},
    },
    domain::{EncoderDigest, TowerDigest},
};

/// The only model whose vectors are read: small, so that a file of a few hundred bytes can hold some.
pub const SERVED: Served = Served {
    encoder: EncoderDigest::from_bytes([0xe1; 16]),
    content_dim: 4,
    tower: TowerDigest::from_bytes([0x70; 16]),
    record_dim: 2,
};

/// Empty caches that hold everything that an input can contain.
pub fn empty_caches() -> Caches {
    Caches::new(CacheLimits {
        content_bytes: 1 << 22,
        item_bytes: 1 << 22,
        user_bytes: 1 << 20,
        known_items_bytes: 1 << 22,
        max_text_bytes: 64,
    })
}

/// How many content embeddings, item records and known items there are.
pub fn n_entries(caches: &Caches) -> [u64; 3] {
    [caches.contents.measure(), caches.items.measure(), caches.known_items.measure()].map(|usage| usage.n_entries)
}

/// Restores the one snapshot that is in `folder`.
pub fn restored(folder: &Scratch, caches: &Caches) -> Restored {
    restore(&folder.path(""), caches, &[SERVED])
}

/// Asserts that caches which were read from a file say so, and that a snapshot of them restores the same in the same order.
pub fn check_read(caches: &Caches, imported: Imported) {
    let [n_contents, n_items, n_known] = n_entries(caches);
    let n_entries_read = n_contents + n_items + n_known;
    // A file may hold a text or an id twice.
    assert!(n_entries_read <= imported.n_entries, "{n_entries_read} entries of {imported:?}");
    assert_eq!(n_entries_read == 0, imported.n_entries == 0, "{imported:?}");
    if n_entries_read == 0 {
        return;
    }
    let (folder, again) = (Scratch::new(), empty_caches());
    let written = write(&folder.path(""), caches, &[SERVED]).unwrap();
    let restored = restored(&folder, &again);
    assert!(restored.refused.is_empty(), "what was written is refused: {:?}", restored.refused);
    assert_eq!((restored.counts, restored.n_skipped), (written.counts, 0));
    assert_eq!(n_entries(&again), n_entries(caches));
    assert_same_vectors(caches, &again);
}

fn assert_same_vectors(caches: &Caches, again: &Caches) {
    let keys = caches.contents.hottest_keys();
    assert_eq!(again.contents.hottest_keys(), keys);
    assert_eq!(bits(again.contents.peek_many(&keys)), bits(caches.contents.peek_many(&keys)));
    let keys = caches.items.hottest_keys();
    assert_eq!(again.items.hottest_keys(), keys);
    assert_eq!(bits(again.items.peek_many(&keys)), bits(caches.items.peek_many(&keys)));
    let texts = |caches: &Caches| caches.known_items.hottest().into_iter().map(|known| (known.id, known.digest));
    assert!(texts(caches).eq(texts(again)), "known items are restored in another order, or others");
}

fn bits(vectors: Vec<Option<midemb::domain::Vector>>) -> Vec<Option<Vec<u32>>> {
    let bits_of = |vector: midemb::domain::Vector| vector.iter().map(|value| value.to_bits()).collect();
    vectors.into_iter().map(|vector| vector.map(bits_of)).collect()
}
