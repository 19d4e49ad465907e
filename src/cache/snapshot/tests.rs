//! What was written is restored bit for bit and in order; a file that is not valid is refused with the reason; nothing panics.

use super::{write::PartsWriter, *};
use crate::{
    cache::{CacheLimits, vectors::VectorCache},
    domain::{ContentKey, Item, ItemKey, ItemText, Priority, TextDigest, Vector},
};
use proptest::prelude::*;
use safetensors::{Dtype, tensor::TensorView};
use std::{collections::HashMap, fs, os::unix::fs::PermissionsExt, sync::LazyLock};

const SERVED: Served = Served {
    encoder: EncoderDigest::from_bytes([0xe1; 16]),
    content_dim: 6,
    tower: TowerDigest::from_bytes([0x70; 16]),
    record_dim: 3,
};
const OLD_ENCODER: EncoderDigest = EncoderDigest::from_bytes([0xe0; 16]);

fn limits() -> CacheLimits {
    let bytes = 1 << 20;
    CacheLimits {
        content_bytes: bytes,
        item_bytes: bytes,
        user_bytes: bytes,
        known_items_bytes: bytes,
        max_text_bytes: 100,
    }
}

impl Caches {
    fn empty() -> Self {
        Caches::new(limits())
    }

    /// Entry `i` was read `i % 3` times. One more content embedding belongs to a model that is not served.
    fn filled(n: usize) -> Self {
        let caches = Caches::empty();
        caches.contents.insert(ContentKey { part: OLD_ENCODER, text: digest(0) }, vec![7.0; 6].into());
        for i in 0..n {
            let (content, item) = (content_key(i), item_key(i));
            caches.contents.insert_ahead(content, vector(i, 6));
            caches.items.insert_ahead(item, vector(i, 3));
            let id = format!("id-{i}");
            let known = Item { id: &id, text: Some(Ok(text(i))) };
            assert!(caches.known_items.resolve(vec![known], Priority::WarmUp)[0].is_ok());
            for _ in 0..i % 3 {
                assert!(caches.contents.get(&content).is_some() && caches.items.get(&item).is_some());
                assert!(caches.known_text(i).is_some());
            }
        }
        caches
    }

    /// The digest of the text that is known under the id of entry `i`.
    fn known_text(&self, i: usize) -> Option<TextDigest> {
        let id = format!("id-{i}");
        let items = vec![Item { id: &id, text: None }];
        self.known_items.resolve(items, Priority::Request).remove(0).ok().map(|known| known.digest)
    }

    fn n_entries(&self) -> [u64; 3] {
        [self.contents.measure(), self.items.measure(), self.known_items.measure()].map(|usage| usage.n_entries)
    }

    fn export(&self) -> Vec<u8> {
        let mut file = Vec::new();
        let exported = export(&mut file, &self.contents, SERVED.encoder, SERVED.content_dim).unwrap();
        assert_eq!(exported.n_bytes, file.len() as u64);
        file
    }

    fn import(&self, file: &[u8]) -> Result<Imported, ReadError> {
        import(file, self, &[SERVED])
    }
}

fn text(i: usize) -> ItemText {
    ItemText::new([&format!("title \"{i}\" – ü"), "", "", ""], &["a", ""], &[])
}

fn digest(i: usize) -> TextDigest {
    TextDigest::of(&text(i))
}

fn content_key(i: usize) -> ContentKey {
    ContentKey { part: SERVED.encoder, text: digest(i) }
}

fn item_key(i: usize) -> ItemKey {
    ItemKey { part: SERVED.tower, text: digest(i) }
}

/// A vector with values that a careless conversion would change.
fn vector(i: usize, dim: usize) -> Vector {
    let odd = [-0.0, f32::MIN_POSITIVE / 3.0, f32::MAX];
    (0..dim).map(|j| if j < 3 { odd[(i + j) % 3] } else { 1.0 / (i * dim + j) as f32 }).collect()
}

fn bits(vectors: &[Option<Vector>]) -> Vec<Vec<u32>> {
    vectors.iter().map(|vector| vector.iter().flat_map(|v| v.iter()).map(|value| value.to_bits()).collect()).collect()
}

/// The parts of a snapshot of `caches`, by name.
fn parts_of(caches: &Caches, max_bytes: usize) -> Vec<(String, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    PartsWriter::new(folder.path(), max_bytes).write(caches, &[SERVED]).unwrap();
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    folder::parts(folder.path()).unwrap().iter().map(|path| (name(path), fs::read(path).unwrap())).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A file of vectors as other programs write it, here with the safetensors crate's own writer.
/// `with` changes it, mostly to make it invalid.
struct ExternalFile {
    entries: HashMap<String, String>,
    tensors: Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>,
}

impl ExternalFile {
    fn new() -> Self {
        let entries = [
            ("format", "midemb-vectors"),
            ("format_version", "1"),
            ("kind", "content"),
            ("digest", &SERVED.encoder.to_string()),
            ("dim", "6"),
            ("n", "2"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
        let texts = [text(0), text(1)].map(|text| serde_json::to_vec(&text).unwrap());
        let ends = [texts[0].len() as u64, (texts[0].len() + texts[1].len()) as u64];
        let values: Vec<u8> =
            [vector(0, 6), vector(1, 6)].iter().flat_map(|v| bytemuck::cast_slice(v).to_vec()).collect();
        let tensors = vec![
            ("vectors", Dtype::F32, vec![2, 6], values),
            ("texts", Dtype::U8, vec![texts.concat().len()], texts.concat()),
            ("text_ends", Dtype::U64, vec![2], bytemuck::cast_slice(&ends).to_vec()),
        ];
        ExternalFile { entries: entries.into(), tensors }
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn entry(self, key: &str, value: &str) -> Self {
        self.with(|file| drop(file.entries.insert(key.to_owned(), value.to_owned())))
    }

    fn bytes(&self) -> Vec<u8> {
        let view = |(name, dtype, shape, data): &'_ (&'static str, _, Vec<usize>, Vec<u8>)| {
            (*name, TensorView::new(*dtype, shape.clone(), data).unwrap().data().to_vec(), *dtype, shape.clone())
        };
        let caches: Vec<_> = self.tensors.iter().map(view).collect();
        let views = caches
            .iter()
            .map(|(name, data, dtype, shape)| (*name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        safetensors::serialize(views, Some(self.entries.clone())).unwrap()
    }

    fn refusal(&self) -> String {
        let caches = Caches::empty();
        let reason = caches.import(&self.bytes()).unwrap_err().to_string();
        assert_eq!(caches.n_entries(), [0; 3], "a refused part was inserted: {reason}");
        assert!(!reason.contains('\n') && reason.len() < 400, "{reason}");
        reason
    }
}

#[test]
fn every_entry_is_restored_with_its_heat() {
    let (old, new) = (Caches::filled(50), Caches::empty());
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("created/by/the/writer");
    // Two models share their encoder and tower: their vectors are written once.
    let written = write(&folder, &old, &[SERVED, SERVED]).unwrap();
    let restored = restore(&folder, &new, &[SERVED]);
    assert!(restored.refused.is_empty(), "{restored:?}");
    let counts = Counts { n_contents: 50, n_items: 50, n_known_items: 50, n_bytes: written.counts.n_bytes };
    assert_eq!((written.counts, restored.counts), (counts, counts));
    assert_eq!(restored.snapshot.as_ref(), Some(&written.snapshot));
    assert_eq!((restored.n_skipped, written.not_removed.len()), (0, 0));

    let hottest = |caches: &Caches| -> Vec<ContentKey> {
        caches.contents.hottest_keys().into_iter().filter(|key| key.part == SERVED.encoder).collect()
    };
    assert_eq!(hottest(&new), hottest(&old));
    assert_eq!(hottest(&new)[0], content_key(47), "the hottest is the last of those that were read twice");
    assert_eq!(new.items.hottest_keys(), old.items.hottest_keys());
    assert_eq!(bits(&new.contents.peek_many(&hottest(&old))), bits(&old.contents.peek_many(&hottest(&old))));
    let keys = old.items.hottest_keys();
    assert_eq!(bits(&new.items.peek_many(&keys)), bits(&old.items.peek_many(&keys)));
    let known = |caches: &Caches| caches.known_items.hottest().into_iter().map(|k| (k.id, k.text)).collect::<Vec<_>>();
    assert_eq!(known(&new), known(&old));
    for i in 0..50 {
        assert_eq!(new.known_text(i), Some(digest(i)), "id-{i} is unknown after a restart");
    }
    assert_eq!(new.known_text(50), None);
}

#[test]
fn only_the_owner_can_read_the_files_and_only_known_items_hold_the_hash_key() {
    let folder = tempfile::tempdir().unwrap();
    let caches = Caches::filled(3);
    let snapshot = write(folder.path(), &caches, &[SERVED]).unwrap().snapshot;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&snapshot), 0o700);
    let files = folder::parts(&snapshot).unwrap();
    assert_eq!(files.len(), 3);
    for file in files {
        assert_eq!(mode(&file), 0o600);
        let has_key = String::from_utf8_lossy(&fs::read(&file).unwrap()).contains("id_hash_key");
        assert_eq!(has_key, file.ends_with("known_items-000000.safetensors"));
    }
}

#[test]
fn a_smaller_cache_keeps_the_hottest_entries() {
    let folder = tempfile::tempdir().unwrap();
    let old = Caches::filled(90);
    write(folder.path(), &old, &[SERVED]).unwrap();
    let room = 10 * VectorCache::<ItemKey>::entry_bytes(3);
    let new = Caches::new(CacheLimits { item_bytes: room, ..limits() });
    restore(folder.path(), &new, &[SERVED]);
    assert_eq!(new.items.hottest_keys(), old.items.hottest_keys()[..10]);
}

#[test]
fn parts_are_split_at_their_limit_and_restored_in_order() {
    let old = Caches::filled(50);
    // A content embedding has 40 bytes with its digest, so 12 fit into a part.
    let parts = parts_of(&old, 480);
    let n_parts = |kind: &str| parts.iter().filter(|(name, _)| name.starts_with(kind)).count();
    assert_eq!((n_parts("content-"), n_parts("item-")), (5, 3));
    assert!(n_parts("known_items-") > 5);
    for (name, file) in &parts {
        let (header, tensors) = safetensors::SafeTensors::read_metadata(file).unwrap();
        assert!(tensors.data_len() <= 480 && header < 1000, "{name}");
    }
    let new = Caches::empty();
    for (name, file) in parts.iter().rev() {
        assert!(new.import(file).is_ok(), "{name}");
    }
    assert_eq!(new.items.hottest_keys(), old.items.hottest_keys());
    assert_eq!(new.n_entries(), [50; 3]);
    assert!((0..50).all(|i| new.known_text(i).is_some()));
}

#[test]
fn a_new_snapshot_replaces_older_ones_and_leaves_other_files_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    // The clock went back since the first of these was written.
    for name in
        ["snapshot-900000000000000", "snapshot-000000000000001", ".new-000000000000002-1", "snapshot-1", ".new-x"]
    {
        fs::create_dir(path.join(name)).unwrap();
    }
    fs::write(path.join("notes.txt"), "").unwrap();
    let (old, new) = (Caches::filled(2), Caches::empty());
    let written = write(path, &old, &[SERVED]).unwrap();
    assert_eq!(names(path), [".new-x", "notes.txt", "snapshot-1", "snapshot-900000000000001"]);
    assert_eq!(written.snapshot, path.join("snapshot-900000000000001"));
    assert_eq!(restore(path, &new, &[SERVED]).counts, written.counts);
}

#[test]
fn the_previous_snapshot_is_kept_if_a_new_one_fails() {
    let folder = tempfile::tempdir().unwrap();
    let old = Caches::filled(2);
    let before = write(folder.path(), &old, &[SERVED]).unwrap();
    let full = folder::create(folder.path(), |new| -> Result<(), SnapshotError> {
        let parts = PartsWriter::new(new, PART_BYTES).write(&old, &[SERVED]).unwrap();
        assert_eq!(parts, before.counts);
        Err(SnapshotError { path: new.join("item"), source: io::ErrorKind::StorageFull.into() })
    });
    let error = full.unwrap_err().to_string();
    assert!(error.contains("/item: ") && error.contains("no storage space"), "{error}");
    assert_eq!(names(folder.path()), [before.snapshot.file_name().unwrap().to_str().unwrap()]);

    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = write(&file, &old, &[SERVED]).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cache snapshot {}", file.display())), "{error}");
    assert!(PartsWriter::new(&file, PART_BYTES).write(&old, &[SERVED]).unwrap_err().path.starts_with(&file));
    let mut full = fs::File::options().write(true).open("/dev/full").unwrap();
    let error = export(&mut full, &old.contents, SERVED.encoder, SERVED.content_dim).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

#[test]
fn a_refused_part_does_not_affect_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Caches::filled(5), Caches::empty());
    let snapshot = write(folder.path(), &old, &[SERVED]).unwrap().snapshot;
    let part =
        folder::parts(&snapshot).unwrap().into_iter().find(|path| path.to_str().unwrap().contains("item-")).unwrap();
    let mut file = fs::read(&part).unwrap();
    *file.last_mut().unwrap() ^= 1;
    fs::write(&part, file).unwrap();
    fs::write(snapshot.join("made-elsewhere.safetensors"), ExternalFile::new().bytes()).unwrap();
    let restored = restore(folder.path(), &new, &[SERVED]);
    let refused: Vec<_> = restored.refused.iter().map(|r| (r.file.clone(), r.reason.to_string())).collect();
    let no_checksum = "its metadata has no \"checksum\"".to_owned();
    let damaged = "it is damaged: its checksum does not match its content".to_owned();
    assert_eq!(refused, [(snapshot.join("made-elsewhere.safetensors"), no_checksum), (part, damaged)]);
    assert_eq!(new.n_entries(), [5, 0, 5]);
}

#[test]
fn a_missing_snapshot_is_not_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let caches = Caches::empty();
    for path in [folder.path().to_path_buf(), folder.path().join("none")] {
        let restored = restore(&path, &caches, &[SERVED]);
        assert!(restored.snapshot.is_none() && restored.refused.is_empty(), "{restored:?}");
    }
    fs::write(folder.path().join("file"), "").unwrap();
    let restored = restore(&folder.path().join("file"), &caches, &[SERVED]);
    assert!(matches!(restored.refused.as_slice(), [Refused { reason: ReadError::File(_), .. }]), "{restored:?}");
}

#[test]
fn vectors_of_another_model_or_size_are_refused() {
    let file = Caches::filled(3).export();
    let other = |served: Served| import(&file, &Caches::empty(), &[served]).unwrap_err().to_string();
    let foreign = other(Served { encoder: OLD_ENCODER, ..SERVED });
    assert_eq!(foreign, format!("no served model uses its content vectors, of {}", SERVED.encoder));
    let larger = other(Served { content_dim: 8, ..SERVED });
    assert_eq!(larger, "its metadata has dim \"6\", it must be 8");
    assert!(import(&file, &Caches::empty(), &[]).is_err());
    let zero = Served { content_dim: 0, ..SERVED };
    assert!(import(&ExternalFile::new().entry("dim", "0").bytes(), &Caches::empty(), &[zero]).is_err());
}

#[test]
fn known_items_are_not_mixed_with_items_under_another_key() {
    let parts = parts_of(&Caches::filled(3), PART_BYTES);
    let (_name, file) = parts.iter().find(|(name, _)| name.starts_with("known_items")).unwrap();
    let busy = Caches::filled(1);
    assert!(matches!(busy.import(file), Err(ReadError::HashKey(_))));
    assert_eq!((busy.n_entries()[2], busy.known_text(0)), (1, Some(digest(0))));
    busy.known_items.flush();
    let imported = Imported { kind: Kind::KnownItems, n_entries: 3, n_skipped: 0 };
    assert_eq!((busy.import(file).unwrap(), busy.known_text(2)), (imported, Some(digest(2))));

    let strict = Caches::new(CacheLimits { max_text_bytes: 10, ..limits() });
    assert_eq!(strict.import(file).unwrap(), Imported { n_entries: 0, n_skipped: 3, ..imported });
}

#[test]
fn a_file_made_elsewhere_may_have_texts_and_half_precision() {
    let caches = Caches::empty();
    let imported = Imported { kind: Kind::Content, n_entries: 2, n_skipped: 0 };
    assert_eq!(caches.import(&ExternalFile::new().bytes()).unwrap(), imported);
    let keys = [content_key(0), content_key(1)];
    assert_eq!(caches.contents.hottest_keys(), keys);
    assert_eq!(bits(&caches.contents.peek_many(&keys)), bits(&[Some(vector(0, 6)), Some(vector(1, 6))]));

    // These are the bits of 1.5 in each type.
    for (dtype, value) in [(Dtype::F16, 0x3e00_u16), (Dtype::BF16, 0x3fc0)] {
        let file = ExternalFile::new().with(|file| {
            file.tensors[0] = ("vectors", dtype, vec![2, 6], value.to_le_bytes().repeat(12));
        });
        let caches = Caches::empty();
        assert_eq!(caches.import(&file.bytes()).unwrap(), imported);
        assert_eq!(caches.contents.get(&keys[1]).as_deref(), Some([1.5; 6].as_slice()));
    }
}

#[test]
fn every_defect_of_a_file_is_reported_in_one_line() {
    let tensor = |i: usize, tensor: (&'static str, Dtype, Vec<usize>, Vec<u8>)| {
        ExternalFile::new().with(|file| file.tensors[i] = tensor).refusal()
    };
    let without = |i: usize| ExternalFile::new().with(|file| drop(file.tensors.remove(i))).refusal();
    let entry = |key: &str, value: &str| ExternalFile::new().entry(key, value).refusal();
    let nan = |value: f32| {
        ExternalFile::new().with(|file| file.tensors[0].3[44..].copy_from_slice(&value.to_le_bytes())).refusal()
    };
    let texts = |texts: &[u8], ends: [u64; 2]| {
        let file = ExternalFile::new().with(|file| {
            file.tensors[1] = ("texts", Dtype::U8, vec![texts.len()], texts.to_vec());
            file.tensors[2].3 = bytemuck::cast_slice(&ends).to_vec();
        });
        file.refusal()
    };
    let cases = [
        (entry("format_version", "2"), "its metadata has format_version \"2\", it must be 1"),
        (entry("format", "x\ny"), "its metadata has format \"x y\", it must be midemb-vectors"),
        (entry("kind", "user"), "its metadata has kind \"user\", it must be content, item or known_items"),
        (entry("n", "3"), "its metadata has n \"3\", it must be 2"),
        (entry("chekcsum", ""), "its metadata has an unknown entry \"chekcsum\""),
        (entry("checksum", "00"), "it is damaged: its checksum does not match its content"),
        (
            ExternalFile::new().with(|file| drop(file.entries.remove("digest"))).refusal(),
            "its metadata has no \"digest\"",
        ),
        (nan(f32::NAN), "vector 1 has a value that is not finite"),
        (nan(f32::INFINITY), "vector 1 has a value that is not finite"),
        (without(0), "it has no tensor \"vectors\""),
        (without(1), "it has no tensor \"texts\""),
        (without(2), "it has no tensor \"text_ends\""),
        (tensor(1, ("text", Dtype::U8, vec![1], vec![0])), "it has an unknown tensor \"text\""),
        (
            tensor(0, ("vectors", Dtype::F32, vec![2, 5], vec![0; 40])),
            "its tensor \"vectors\" is F32 [2, 5], it must be F32, F16 or BF16 [n, 6]",
        ),
        (
            tensor(0, ("vectors", Dtype::F64, vec![2, 6], vec![0; 96])),
            "its tensor \"vectors\" is F64 [2, 6], it must be F32, F16 or BF16 [n, 6]",
        ),
        (tensor(2, ("text_digests", Dtype::U8, vec![2, 16], vec![0; 32])), "it has an unknown tensor \"texts\""),
        (
            tensor(2, ("text_ends", Dtype::I64, vec![2], vec![0; 16])),
            "its tensor \"text_ends\" is I64 [2], it must be U64 [2]",
        ),
        (texts(b"{}{}", [2, 5]), "text 1 does not end after the previous text and within the texts"),
        (texts(b"{}{}", [5, 4]), "text 0 does not end after the previous text and within the texts"),
        (texts(b"{}{}", [3, 4]), "text 0 is not an item text: trailing characters at line 1 column 3"),
    ];
    for (found, expected) in cases {
        assert_eq!(found, expected);
    }
}

#[test]
fn a_header_with_wrong_sizes_is_refused_before_anything_is_allocated() {
    let file = |header: &str, data: &[u8]| [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    let tensor = |shape: &str, offsets: &str| {
        file(&format!("{{\"vectors\":{{\"dtype\":\"U8\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}"), b"1234")
    };
    let huge = 1_u64 << 61;
    // The sizes add up to more than 64 bits can hold, once the header's own size is added.
    let all: Vec<String> = (0..8_u64)
        .map(|i| (i * huge, if i < 7 { (i + 1) * huge } else { u64::MAX }))
        .map(|(start, end)| {
            format!("\"{start}\":{{\"dtype\":\"U8\",\"shape\":[{}],\"data_offsets\":[{start},{end}]}}", end - start)
        })
        .collect();
    let files = [
        u64::MAX.to_le_bytes().to_vec(),
        [&u64::MAX.to_le_bytes(), b"{}".as_slice()].concat(),
        [&60_000_u64.to_le_bytes(), b"{}".as_slice()].concat(),
        file("{}", b"x"),
        tensor("[4]", "[0,18446744073709551615]"),
        tensor("[18446744073709551615]", "[0,18446744073709551615]"),
        tensor("[4294967296,4294967296]", "[0,4]"),
        tensor("[5]", "[0,5]"),
        tensor("[3]", "[0,3]"),
        file(&format!("{{{}}}", all.join(",")), b""),
        Vec::new(),
        b"\x93NUMPY\x01\x00".to_vec(),
    ];
    for file in files {
        let reason = Caches::empty().import(&file).unwrap_err().to_string();
        assert!(!reason.contains("metadata has no"), "{reason}");
    }
}

static VALID_PARTS: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| parts_of(&Caches::filled(4), PART_BYTES));

/// The range of the spaces at the end of a header. They carry no meaning, and neither does other white space in their place.
fn padding(file: &[u8]) -> std::ops::Range<usize> {
    let end = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let n_spaces = file[..end].iter().rev().take_while(|byte| **byte == b' ').count();
    end - n_spaces..end
}

/// Flips each bit of each byte of each kind of part.
#[test]
fn one_flipped_bit_anywhere_is_refused() {
    let caches = Caches::empty();
    for (name, file) in VALID_PARTS.iter() {
        let (mut flipped, padding) = (file.clone(), padding(file));
        for i in (0..file.len()).filter(|i| !padding.contains(i)) {
            for bit in 0..8 {
                flipped[i] ^= 1 << bit;
                let taken = caches.import(&flipped);
                assert!(taken.is_err(), "{name}: the part was taken although bit {bit} of byte {i} was flipped");
                flipped[i] = file[i];
            }
        }
    }
    assert_eq!(caches.n_entries(), [0; 3]);
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Caches::empty().import(&bytes).is_err());
        let header = [(bytes.len() as u64).to_le_bytes().as_slice(), &bytes].concat();
        prop_assert!(Caches::empty().import(&header).is_err());
    }

    /// Includes a file without a checksum, which only the other checks can refuse.
    #[test]
    fn no_change_of_a_file_makes_the_reader_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        length in any::<prop::sample::Index>(),
        which in 0..4_usize,
    ) {
        let mut file = VALID_PARTS.get(which).map_or_else(|| ExternalFile::new().bytes(), |(_name, file)| file.clone());
        let (valid, padding) = (file.clone(), padding(&file));
        for (i, value) in &changes {
            let i = i.index(file.len());
            file[i] = *value;
        }
        let is_changed = (0..file.len()).any(|i| !padding.contains(&i) && file[i] != valid[i]);
        let taken = Caches::empty().import(&file);
        prop_assert!(taken.is_err() || !is_changed || which == VALID_PARTS.len(), "{taken:?}");
        let cut = length.index(file.len());
        prop_assert!(Caches::empty().import(&file[..cut]).is_err(), "cut off at {cut}");
    }
}
