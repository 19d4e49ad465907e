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
    inference::{Graph, GraphError, GraphSource, ProviderChoice, Runtime, SharedWeights, Slice, WeightFiles},
    towers::TowerGraphs,
};
use midemb_fuzz::bundle;
use std::{
    fs,
    path::Path,
    sync::{LazyLock, Mutex},
};

static CHECKED: LazyLock<Mutex<CheckedModel>> = LazyLock::new(|| Mutex::new(CheckedModel::load()));

struct CheckedModel {
    manifest: Manifest,
    encoder: EncoderModel,
    graph: Graph,
    towers: TowerGraphs,
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let mut checked = CHECKED.lock().unwrap();
    let CheckedModel { manifest, encoder, graph, towers } = &mut *checked;
    let Ok(golden) = golden::parse(data, Path::new("golden.json")) else { return Corpus::Keep };
    let n_items = golden.texts().count();
    // Token ids of another tokenizer may be beyond the encoder's table, so they are compared first, as a load does.
    if golden::check_tokens(&golden, encoder).is_ok()
        && let Ok((report, contents)) = golden::check_content(&golden, encoder, manifest.encoder.tolerance, graph)
    {
        assert_eq!(contents.len(), n_items);
        assert!(report.n_vectors >= n_items);
    }
    match golden::check_towers(&golden, manifest, towers) {
        Ok(reports) => assert!(reports.iter().all(|report| report.n_vectors > 0)),
        Err(error) => assert!(matches!(error, BundleError::Golden(_) | BundleError::Graph(_)), "{error}"),
    }
    Corpus::Keep
});

/// The fixture's graphs hold their own weights.
struct NoOthers;

impl WeightFiles for NoOthers {
    type Error = GraphError;

    fn size(&self, location: &str) -> Result<u64, GraphError> {
        panic!("the fixture's graphs read {location}")
    }

    fn read(&self, location: &str, _slices: &mut [Slice<'_>]) -> Result<(), GraphError> {
        panic!("the fixture's graphs read {location}")
    }
}

impl CheckedModel {
    fn load() -> Self {
        let manifest = read_manifest(bundle()).unwrap().manifest;
        let runtime = Runtime::load(None, ProviderChoice::Cpu).unwrap();
        let weights = SharedWeights::new(&runtime, 1);
        let read = |file: &str, inputs: &[String], outputs: &[String]| {
            let path = bundle().join(file);
            let source = GraphSource::new(&weights, &path, fs::read(&path).unwrap(), &NoOthers).unwrap();
            Graph::load(&runtime, &source, inputs, outputs).unwrap()
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
        tokenizer: tokenizer(manifest, folder),
        pad_id: manifest.encoder.pad_id,
        dim: manifest.encoder.dim,
        batching: manifest.encoder.batching,
        digest: digest::encoder_digest(manifest),
    }
}

fn tokenizer(manifest: &Manifest, folder: &Path) -> Tokenizer {
    let path = folder.join(&manifest.encoder.tokenizer);
    Tokenizer::parse(&fs::read(&path).unwrap(), &path, manifest.item_text.max_tokens).unwrap()
}
