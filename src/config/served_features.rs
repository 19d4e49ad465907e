//! The table `[served_features]`, whose keys make sense together or not at all.

use super::{
    fault::{Fault, Faults},
    keys::{self, KEYS},
    reader::Reader,
};
use crate::{bundle::store::BundleUrl, served_features::Options};
use std::path::Path;

const TABLE: &str = "served_features";

/// The options of served features; none if they are off.
pub(super) fn read(reader: &mut Reader<'_>, folder: &Path) -> Option<Options> {
    let files = reader.path_in(folder, &keys::SERVED_FEATURES_FOLDER);
    let is_on = files.is_some();
    let upload_to = reader.get(&keys::SERVED_FEATURES_UPLOAD_TO);
    let options = Options {
        folder: files.unwrap_or_default(),
        upload_to: parse_url(&upload_to, &mut reader.faults),
        rate: reader.get(&keys::SERVED_FEATURES_PERCENT),
        sample_by: reader.get(&keys::SERVED_FEATURES_SAMPLE_BY),
        rotate_bytes: reader.get(&keys::SERVED_FEATURES_ROTATE_MB),
        rotate_every: reader.get(&keys::SERVED_FEATURES_ROTATE_SECONDS),
        max_disk_bytes: reader.get(&keys::SERVED_FEATURES_MAX_DISK_MB),
        queue_bytes: reader.get(&keys::SERVED_FEATURES_QUEUE_MB) as usize,
    };
    if options.rotate_bytes > options.max_disk_bytes {
        let reason = "is more than served_features.max_disk_mb, so no file would ever be that large";
        reader.faults.push(Fault::new(keys::SERVED_FEATURES_ROTATE_MB.description.name, reason));
    }
    if !is_on {
        check_unused(reader);
    }
    is_on.then_some(options)
}

fn parse_url(text: &str, faults: &mut Faults) -> Option<BundleUrl> {
    if text.is_empty() {
        return None;
    }
    // The reason does not repeat the URL, which may hold a password.
    BundleUrl::parse(text)
        .map_err(|error| faults.push(Fault::new(keys::SERVED_FEATURES_UPLOAD_TO.description.name, error.to_string())))
        .ok()
}

/// Whoever sets a key of this table means to sample. A default may be written: `midemb config print` writes them all.
fn check_unused(reader: &mut Reader<'_>) {
    let keys = KEYS.iter().filter(|key| key.table() == TABLE);
    let set: Vec<_> = keys.filter(|key| reader.texts.get(key.name).is_some_and(|text| text != key.default)).collect();
    for key in set {
        let reason = format!("needs {}, too", keys::SERVED_FEATURES_FOLDER.description.name);
        reader.faults.push(Fault::new(key.name, reason));
    }
}
