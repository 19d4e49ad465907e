//! Bytes as the golden file of a bundle, compared with the fixture's graphs: whatever it holds, its check ends with an error or
//! with as many comparisons as it has vectors.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::{Corpus, fuzz_target};
use midemb::{
    bundle::{
        Manifest, digest, golden,
        load::{BundleError, read_manifest},
    },
    content::{EncoderModel, Tokenizer},
    domain::item_text::Template,
    inference::{Graph, ProviderChoice, Runtime, SharedWeights},
    towers::TowerGraphs,
};
use midemb_fuzz::{bundle, scratch::Scratch};
use std::{
    path::Path,
    sync::{LazyLock, Mutex},
};

static CHECKED: LazyLock<Mutex<CheckedModel>> = LazyLock::new(|| Mutex::new(CheckedModel::load()));
static FOLDER: LazyLock<Scratch> = LazyLock::new(Scratch::new);

struct CheckedModel {
    manifest: Manifest,
    encoder: EncoderModel,
    graph: Graph,
    towers: TowerGraphs,
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let mut checked = CHECKED.lock().unwrap();
    let CheckedModel { manifest, encoder, graph, towers } = &mut *checked;
    FOLDER.write(&manifest.golden.file, data);
    let Ok(golden) = golden::read(&FOLDER.path(""), manifest) else { return Corpus::Keep };
    let n_items = golden.texts().count();
    let encoded = golden::check_encoder(&golden, encoder, graph);
    if let Ok((reports, contents)) = encoded {
        assert_eq!(contents.len(), n_items);
        assert!(reports.iter().all(|report| report.n_vectors >= n_items));
    }
    match golden::check_towers(&golden, manifest, towers) {
        Ok(reports) => assert!(reports.iter().all(|report| report.n_vectors > 0)),
        Err(error) => assert!(matches!(error, BundleError::Golden(_) | BundleError::Graph(_)), "{error}"),
    }
    Corpus::Keep
});

impl CheckedModel {
    fn load() -> Self {
        let manifest = read_manifest(bundle()).unwrap().manifest;
        let runtime = Runtime::load(None, ProviderChoice::Cpu).unwrap();
        let mut weights = SharedWeights::new(&runtime, 1);
        let mut read = |file: &str, inputs: &[String], outputs: &[String]| {
            Graph::load(&runtime, &mut weights, &bundle().join(file), inputs, outputs).unwrap()
        };
        let graph = read(&manifest.encoder.file, &manifest.encoder.inputs, &manifest.encoder.outputs);
        let towers = TowerGraphs {
            user: read(&manifest.user_tower.file, &manifest.user_tower.inputs, &manifest.user_tower.outputs),
            item: read(&manifest.item_tower.file, &manifest.item_tower.inputs, &manifest.item_tower.outputs),
            cvr: read(&manifest.cvr.file, &manifest.cvr.inputs, &manifest.cvr.outputs),
        };
        let encoder = encoder(&manifest, bundle());
        CheckedModel { manifest, encoder, graph, towers }
    }
}

fn encoder(manifest: &Manifest, folder: &Path) -> EncoderModel {
    EncoderModel {
        template: Template::new(&manifest.item_text.template).unwrap(),
        tokenizer: Tokenizer::load(&folder.join(&manifest.encoder.tokenizer), manifest.item_text.max_tokens).unwrap(),
        pad_id: manifest.encoder.pad_id,
        dim: manifest.encoder.dim,
        digest: digest::encoder_digest(manifest),
    }
}
