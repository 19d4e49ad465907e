//! Graphs whose vectors depend on what else is in their batch do not serve, however few golden vectors their bundle has.

use crate::{
    harness::{BrokenBundle, midemb, run_to_end},
    onnx::{Graph, INT64, Outlet, Tensor, append, node},
};
use serde_json::{Value, json};

/// Replaces an output of the graph by its mean with the average of the batch, under the name "mixed". For a batch of one, both are
/// the same.
fn mix_batch(bundle: &BrokenBundle, file: &str, output: &str) {
    mix_batch_by(1, bundle, file, output);
}

/// The same, where the output itself counts `weight` times.
fn mix_batch_by(weight: usize, bundle: &BrokenBundle, file: &str, output: &str) {
    let mut mixed = vec![output; weight];
    mixed.push("batch_mean");
    let axes = Tensor {
        dims: vec![1],
        data_type: INT64,
        int64_data: vec![0],
        name: "batch_axis".to_owned(),
        ..Tensor::default()
    };
    let nodes = vec![node("ReduceMean", &[output, "batch_axis"], "batch_mean"), node("Mean", &mixed, "mixed")];
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

/// How far content may be from PyTorch's says nothing of how far it may be from itself.
#[test]
fn a_wide_tolerance_of_content_does_not_cover_dependence_on_the_batch() {
    let bundle = BrokenBundle::new();
    mix_batch_by(30, &bundle, "encoder.onnx", "content");
    let wide = "[encoder.tolerance]\nabsolute = 0.09\ncosine = 0.98\n\n[item_tower]\n";
    bundle.edit("manifest.toml", |manifest| manifest.replacen("[item_tower]\n", wide, 1));
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

/// Declared as such, the same encoder serves: each text has a run of its own, and its vectors are cached apart from those of a
/// server that batches.
#[test]
fn an_encoder_that_declares_its_dependence_gets_one_text_per_run() {
    let bundle = BrokenBundle::new();
    mix_batch(&bundle, "encoder.onnx", "content");
    let digest = || {
        let output = run_to_end(midemb().args(["bundle", "inspect"]).arg(bundle.folder()));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().find(|line| line.starts_with("encoder digest")).unwrap().to_owned()
    };
    let undeclared = digest();
    bundle.edit("manifest.toml", |manifest| manifest.replacen("[encoder]\n", "[encoder]\nbatching = \"alone\"\n", 1));
    assert_ne!(digest(), undeclared);
    let verified = run_to_end(midemb().args(["bundle", "verify"]).arg(bundle.folder()));
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}

/// What an encoder in another precision computes is as near as its manifest says, and the towers have no such leeway.
#[test]
fn the_golden_check_of_content_uses_the_tolerance_of_the_manifest() {
    let bundle = BrokenBundle::new();
    let mut golden: Value = serde_json::from_slice(&std::fs::read(bundle.path("golden.json")).unwrap()).unwrap();
    let value = golden["items"][0]["content"][0].as_f64().unwrap();
    golden["items"][0]["content"][0] = (value + 0.004).into();
    let verify = |golden: &Value, tolerance: &str| {
        let bundle = BrokenBundle::of(bundle.folder());
        bundle.replace("golden.json", golden.to_string().as_bytes());
        let table = format!("{tolerance}\n[item_tower]\n");
        bundle.edit("manifest.toml", |manifest| manifest.replacen("[item_tower]\n", &table, 1) + "\n");
        run_to_end(midemb().args(["bundle", "verify"]).arg(bundle.folder()))
    };
    let line = |output: std::process::Output| String::from_utf8(output.stderr).unwrap();
    let refused = line(verify(&golden, ""));
    assert!(refused.contains("content 0 differs from golden by 4.00e-3 (at most 1e-4)"), "{refused}");
    let wide = "[encoder.tolerance]\nabsolute = 0.005\ncosine = 0.99\n";
    // The item tower reads the golden content, which is not what PyTorch gave it.
    let towers = line(verify(&golden, wide));
    assert!(towers.contains("item 0 differs from golden"), "{towers}");
    for (tolerance, reason) in [
        ("absolute = 0.1\ncosine = 0.99", "encoder.tolerance.absolute is 0.1, it must be from 0 and below 0.1"),
        ("absolute = 0.01\ncosine = 1.0", "encoder.tolerance.cosine is 1, it must be from 0.98 and below 1"),
        ("absolute = 0.01\ncosine = 0.9", "encoder.tolerance.cosine is 0.9"),
    ] {
        let refused = line(verify(&golden, &format!("[encoder.tolerance]\n{tolerance}\n")));
        assert!(refused.contains(reason), "{refused}");
    }
}
