//! Graphs whose vectors depend on what else is in their batch do not serve, however few golden vectors their bundle has.

use crate::{
    harness::{BrokenBundle, midemb, run_to_end},
    onnx::{Graph, INT64, Outlet, Tensor, append, node},
};
use serde_json::{Value, json};

/// Replaces an output of the graph by its mean with the average of the batch, under the name "mixed". For a batch of one, both are
/// the same.
fn mix_batch(bundle: &BrokenBundle, file: &str, output: &str) {
    let axes = Tensor {
        dims: vec![1],
        data_type: INT64,
        int64_data: vec![0],
        name: "batch_axis".to_owned(),
        ..Tensor::default()
    };
    let nodes =
        vec![node("ReduceMean", &[output, "batch_axis"], "batch_mean"), node("Mean", &[output, "batch_mean"], "mixed")];
    let outlet = Outlet { name: "mixed".to_owned() };
    append(bundle, file, Graph { node: nodes, initializer: vec![axes], output: vec![outlet] });
    bundle.edit("manifest.toml", |manifest| {
        let quoted = format!("{output:?}");
        let is_its_line = |line: &&str| line.starts_with("outputs = ") && line.contains(&quoted);
        let line = manifest.lines().find(is_its_line).unwrap();
        manifest.replacen(line, &line.replace(&quoted, "\"mixed\""), 1)
    });
}

/// Leaves one golden item, and the user and pairs that need no other: too few to show that a vector depends on its batch.
fn leave_one_golden_item(bundle: &BrokenBundle) {
    let mut golden: Value = serde_json::from_slice(&std::fs::read(bundle.path("golden.json")).unwrap()).unwrap();
    let user = golden["users"].as_array().unwrap().iter().position(|user| user["history"] == json!([])).unwrap();
    let mut pairs = golden["pairs"].as_array().unwrap().clone();
    pairs.retain(|pair| pair["item"] == 0 && pair["user"] == user);
    pairs.iter_mut().for_each(|pair| pair["user"] = json!(0));
    golden["users"] = json!([golden["users"][user]]);
    golden["items"] = json!([golden["items"][0]]);
    golden["pairs"] = json!(pairs);
    bundle.replace("golden.json", golden.to_string().as_bytes());
}

#[track_caller]
fn assert_refused(bundle: &BrokenBundle, graph: &str) {
    let output = run_to_end(midemb().args(["bundle", "verify"]).arg(bundle.folder()));
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{line}");
    assert!(line.contains(&format!("the vectors of the {graph} depend on what else is in their batch")), "{line}");
    assert!(line.contains("dynamic quantisation"), "{line}");
}

/// An encoder that was quantised dynamically passed with one golden item, and served vectors that depended on whom a text was
/// first encoded with; with ten golden items it was refused for golden vectors, which nothing was wrong with.
#[test]
fn an_encoder_whose_vectors_depend_on_their_batch_is_refused() {
    let bundle = BrokenBundle::new();
    mix_batch(&bundle, "encoder.onnx", "content");
    assert_refused(&bundle, "encoder");
    leave_one_golden_item(&bundle);
    assert_refused(&bundle, "encoder");
}

#[test]
fn towers_whose_vectors_depend_on_their_batch_are_refused() {
    for (file, output, graph) in [
        ("item_tower.onnx", "item", "item tower"),
        ("item_tower.onnx", "adapted", "item tower"),
        ("user_tower.onnx", "user", "user tower"),
    ] {
        let bundle = BrokenBundle::new();
        mix_batch(&bundle, file, output);
        leave_one_golden_item(&bundle);
        assert_refused(&bundle, graph);
    }
}
