//! Digests: derives the digests that the caches key vectors by from the manifest.

use super::manifest::{FileSpec, Manifest, Part};
use crate::{
    content::encoder::Batching,
    domain::{EncoderDigest, TowerDigest},
};
use sha2::{Digest, Sha256};

/// The digest of everything that a content embedding depends on besides the text.
pub fn encoder_digest(manifest: &Manifest) -> EncoderDigest {
    let mut hasher = part_hasher(manifest, Part::Encoder);
    hash_str(&mut hasher, &manifest.item_text.template);
    hasher.update((manifest.item_text.max_tokens as u64).to_le_bytes());
    hasher.update(manifest.encoder.pad_id.to_le_bytes());
    hash_ports(&mut hasher, &manifest.encoder.inputs, &manifest.encoder.outputs);
    // A graph that scales its activations over the whole batch gives other vectors in batches.
    if manifest.encoder.batching == Batching::Alone {
        hash_str(&mut hasher, "alone");
    }
    EncoderDigest::from_sha256(hasher)
}

/// The digest of everything that a user embedding depends on besides the history's texts and actions. The user tower reads what
/// the item tower made of each item.
pub fn user_tower_digest(manifest: &Manifest) -> TowerDigest {
    let mut hasher = part_hasher(manifest, Part::UserTower);
    hasher.update(tower_digest(manifest).as_bytes());
    hash_ports(&mut hasher, &manifest.user_tower.inputs, &manifest.user_tower.outputs);
    for action in &manifest.history.actions {
        hash_str(&mut hasher, action.as_str());
    }
    TowerDigest::from_sha256(hasher)
}

/// The digest of everything that an item record depends on besides the text.
pub fn tower_digest(manifest: &Manifest) -> TowerDigest {
    let mut hasher = part_hasher(manifest, Part::ItemTower);
    hasher.update(encoder_digest(manifest).as_bytes());
    hash_ports(&mut hasher, &manifest.item_tower.inputs, &manifest.item_tower.outputs);
    TowerDigest::from_sha256(hasher)
}

fn part_hasher(manifest: &Manifest, part: Part) -> Sha256 {
    let mut files: Vec<&FileSpec> = manifest.files.iter().filter(|file| file.part == part).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let mut hasher = Sha256::new();
    for file in files {
        hash_str(&mut hasher, &file.path);
        hash_str(&mut hasher, &file.sha256);
    }
    hasher
}

/// Hashes the names of a graph's inputs and outputs.
fn hash_ports(hasher: &mut Sha256, inputs: &[String], outputs: &[String]) {
    for port in inputs.iter().chain(outputs) {
        hash_str(hasher, port);
    }
}

fn hash_str(hasher: &mut Sha256, text: &str) {
    hasher.update((text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}
