//! Bytes as `manifest.toml`: whatever is accepted names only files below its folder, and has digests.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use midemb::{
    bundle::{Manifest, digest},
    domain::item_text::Template,
};
use midemb_fuzz::with_peak;
use std::path::{Component, Path};

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(text) = std::str::from_utf8(data) else { return Corpus::Reject };
    let (manifest, peak) = with_peak(|| Manifest::parse(text));
    assert!(peak <= (1 << 18) + 1000 * text.len(), "{peak} bytes for a manifest of {}", text.len());
    match manifest {
        Ok(manifest) => check_accepted(&manifest),
        Err(error) => {
            let message = error.to_string();
            assert!(!message.is_empty() && !message.contains('\n'), "not one line: {message:?}");
        }
    }
    Corpus::Keep
});

fn check_accepted(manifest: &Manifest) {
    for file in &manifest.files {
        let path = Path::new("/bundle").join(&file.path);
        let is_inside = path.starts_with("/bundle") && !path.components().any(|part| part == Component::ParentDir);
        assert!(is_inside && path != Path::new("/bundle"), "{path:?} leaves the bundle's folder");
        assert_eq!(manifest.file(&file.path).map(|found| &found.path), Some(&file.path));
    }
    let mut other = manifest.clone();
    other.item_text.max_tokens ^= 1;
    assert_ne!(
        digest::encoder_digest(&other),
        digest::encoder_digest(manifest),
        "cached embeddings of another encoder"
    );
    assert_ne!(digest::tower_digest(&other), digest::tower_digest(manifest), "cached embeddings of another tower");
    assert_ne!(digest::user_tower_digest(&other), digest::user_tower_digest(manifest));
    // Its template is a program, so it is compiled but not run.
    drop(Template::new(&manifest.item_text.template));
}
