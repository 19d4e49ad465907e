//! Bytes as a part of a snapshot. The checksum is put right first, because no fuzzer finds one: a restore takes exactly what an
//! import takes.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::fuzz_target;
use midemb::cache::{Caches, snapshot::import};
use midemb_fuzz::{
    scratch::Scratch,
    vectors::{SERVED, check_read, empty_caches, n_entries, restored},
    with_peak,
};
use serde_json::Value;
use std::{collections::BTreeMap, fs, mem::discriminant, sync::LazyLock};

static CACHES: LazyLock<Caches> = LazyLock::new(empty_caches);
static FOLDER: LazyLock<Scratch> = LazyLock::new(|| {
    let folder = Scratch::new();
    fs::create_dir(folder.path("snapshot-000000000000001")).unwrap();
    folder
});

fuzz_target!(|data: &[u8]| {
    let signed = with_checksum(data);
    let part = signed.as_deref().unwrap_or(data);
    FOLDER.write("snapshot-000000000000001/part.safetensors", part);
    CACHES.flush_all();
    let (read, peak) = with_peak(|| restored(&FOLDER, &CACHES));
    assert!(peak <= (1 << 19) + 100 * part.len(), "{peak} bytes for a part of {}", part.len());
    assert!(read.snapshot.is_some());
    let taken = n_entries(&CACHES);
    CACHES.flush_all();
    let imported = import(part, &CACHES, &[SERVED]);
    match (read.refused.as_slice(), imported) {
        ([], Ok(imported)) => {
            assert_eq!(taken, n_entries(&CACHES));
            check_read(&CACHES, imported);
        }
        // Of two tensors at one place, the parser names either.
        ([refused], Err(reason)) => assert_eq!(discriminant(&refused.reason), discriminant(&reason), "{reason}"),
        ([refused], Ok(_)) if signed.is_none() => {
            assert_eq!(refused.reason.to_string(), "its metadata has no \"checksum\"")
        }
        (refused, imported) => panic!("restored with {refused:?}, imported with {imported:?}"),
    }
});

/// The file with the checksum that the format's documentation describes; none if its header is no JSON object with metadata.
fn with_checksum(file: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = file.split_first_chunk()?;
    let (header, data) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let mut header: Value = serde_json::from_slice(header).ok()?;
    let metadata = header.get_mut("__metadata__")?.as_object_mut()?;
    let entries: BTreeMap<&String, &str> =
        metadata.iter().map(|(key, value)| Some((key, value.as_str()?))).collect::<Option<_>>()?;
    let mut hasher = blake3::Hasher::new();
    for (key, value) in entries.into_iter().filter(|(key, _)| *key != "checksum") {
        hasher.update(format!("{key}={value}\n").as_bytes());
    }
    let checksum = hasher.update(data).finalize().to_hex().to_string();
    metadata.insert("checksum".to_owned(), Value::String(checksum));
    let header = serde_json::to_vec(&header).ok()?;
    Some([&(header.len() as u64).to_le_bytes(), header.as_slice(), data].concat())
}
