//! Starts that must fail: one clear line, and an exit code that says what kind of fault it is.

use crate::harness::{BrokenBundle, config, fixture, midemb, run_to_end};
use std::path::Path;

/// Starts a server that must not come up; returns its exit code and its error line.
fn refused(bundle: &Path, more: &str) -> (i32, String) {
    let (_folder, path) = config(bundle, more);
    let output = run_to_end(midemb().arg("serve").arg("--config").arg(&path));
    let text = String::from_utf8(output.stderr).unwrap();
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("midemb: error: ")).collect();
    assert_eq!(errors.len(), 1, "not exactly one error line: {text}");
    assert_eq!(text.lines().next_back(), Some(errors[0]), "the reason is not the last line: {text}");
    (output.status.code().unwrap(), errors[0].trim_start_matches("midemb: error: ").to_owned())
}

#[track_caller]
fn assert_refused(bundle: &BrokenBundle, expected: &str) {
    let (code, line) = refused(bundle.folder(), "");
    assert_eq!(code, 4, "{line}");
    assert!(line.starts_with("model \"learn\": ") && line.contains(expected), "{line:?} does not say {expected:?}");
}

#[test]
fn an_unknown_config_key() {
    let (code, line) = refused(&fixture(), "limits.max_candidate = 3\nserver.drain_seconds = -1");
    assert_eq!(code, 2);
    assert!(line.contains("limits.max_candidate: unknown key, did you mean"), "{line}");
    assert!(line.contains("server.drain_seconds: \"-1\" is not a whole number from 0 to 3600"), "{line}");
}

#[test]
fn a_missing_config_file() {
    let output = run_to_end(midemb().args(["serve", "--config", "/nowhere/midemb.toml"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nowhere/midemb.toml cannot be read"));
}

#[test]
fn a_missing_library() {
    let (code, line) = refused(&fixture(), "inference.onnxruntime = \"/nowhere/libonnxruntime.so\"");
    assert_eq!(code, 3);
    assert!(line.contains("/nowhere/libonnxruntime.so") && line.contains("make setup"), "{line}");
}

#[test]
fn a_file_that_is_no_library() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "not an ELF file").unwrap();
    let (code, line) = refused(&fixture(), &format!("inference.onnxruntime = {:?}", file.path().display().to_string()));
    assert_eq!(code, 3);
    assert!(line.contains("ONNX Runtime cannot be loaded") && line.contains("make setup"), "{line}");
}

#[test]
fn cuda_on_a_machine_without_a_gpu() {
    if std::path::Path::new("/dev/nvidia0").exists() {
        return;
    }
    let (code, line) = refused(&fixture(), "inference.provider = \"cuda\"");
    assert_eq!(code, 3);
    assert!(line.contains("CUDA provider cannot be used"), "{line}");
}

#[test]
fn an_address_that_is_in_use() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (_folder, path) = config(&fixture(), "");
    let address = taken.local_addr().unwrap().to_string();
    let serve = run_to_end(midemb().args(["serve", "--config"]).arg(path).env("MIDEMB__SERVER__LISTEN", &address));
    assert_eq!(serve.status.code(), Some(1));
    let line = String::from_utf8(serve.stderr).unwrap();
    assert!(line.contains(&format!("server.listen = {address}: ")), "{line}");
}

#[test]
fn a_missing_bundle() {
    let (code, line) = refused(Path::new("/nowhere"), "");
    assert_eq!(code, 4);
    assert!(line.contains("/nowhere/manifest.toml cannot be read"), "{line}");
}

#[test]
fn a_corrupted_graph() {
    let bundle = BrokenBundle::new();
    let mut bytes = std::fs::read(bundle.path("cvr.onnx")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(bundle.path("cvr.onnx"), &bytes).unwrap();
    assert_refused(&bundle, "cvr.onnx has a wrong digest");
}

#[test]
fn a_graph_that_is_no_onnx_file() {
    let bundle = BrokenBundle::new();
    bundle.replace("item_tower.onnx", b"not a graph");
    assert_refused(&bundle, "item_tower.onnx cannot be loaded");
}

#[test]
fn a_wrong_digest() {
    let bundle = BrokenBundle::new();
    let digest = midemb::domain::digest::sha256_hex(&std::fs::read(bundle.path("user_tower.onnx")).unwrap());
    bundle.edit("manifest.toml", |manifest| manifest.replace(&digest, &"0".repeat(64)));
    assert_refused(
        &bundle,
        &format!("the manifest says {}", std::fs::metadata(bundle.path("user_tower.onnx")).unwrap().len()),
    );
}

#[test]
fn a_missing_file() {
    let bundle = BrokenBundle::new();
    std::fs::remove_file(bundle.path("tokenizer.json")).unwrap();
    assert_refused(&bundle, "tokenizer.json is missing");
}

#[test]
fn a_manifest_with_a_path_outside_its_folder_or_an_unknown_key() {
    let bundle = BrokenBundle::new();
    bundle.edit("manifest.toml", |manifest| manifest.replace("golden.json", "../golden.json"));
    assert_refused(&bundle, "leaves the bundle's folder");
    let bundle = BrokenBundle::new();
    bundle.edit("manifest.toml", |manifest| format!("colour = 1\n{manifest}"));
    assert_refused(&bundle, "unknown field `colour`");
    let bundle = BrokenBundle::new();
    bundle.edit("manifest.toml", |manifest| manifest.replace("format = 2", "format = 1"));
    assert_refused(&bundle, "format is 1, this server reads format 2: `python -m learn upgrade BUNDLE --out NEW`");
    let bundle = BrokenBundle::new();
    bundle.edit("manifest.toml", |manifest| manifest.replace("part = \"item_tower\"", "part = \"cvr\""));
    assert_refused(&bundle, "\"item_tower.onnx\" is listed as part cvr, it is used as item_tower");
}

#[test]
fn a_golden_vector_that_differs_is_reported_with_its_difference() {
    let bundle = BrokenBundle::new();
    let text = std::fs::read_to_string(bundle.path("golden.json")).unwrap();
    let mut golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let value = golden["users"][1]["user"][0].as_f64().unwrap();
    golden["users"][1]["user"][0] = (value + 0.01).into();
    bundle.replace("golden.json", golden.to_string().as_bytes());
    assert_refused(&bundle, "golden check failed: user 1 differs from golden by 1.00e-2");
}

#[test]
fn swapped_graphs_are_found_even_with_matching_digests() {
    let bundle = BrokenBundle::new();
    let item = std::fs::read(bundle.path("item_tower.onnx")).unwrap();
    bundle.replace("user_tower.onnx", &item);
    assert_refused(&bundle, "user_tower.onnx has no input named \"adapted\"");
}

#[test]
fn the_tokenizer_of_another_model_is_found_by_its_token_ids() {
    let bundle = BrokenBundle::new();
    let text = std::fs::read_to_string(bundle.path("tokenizer.json")).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
    tokenizer["model"]["merges"] = serde_json::json!([]);
    bundle.replace("tokenizer.json", tokenizer.to_string().as_bytes());
    assert_refused(&bundle, "golden check failed: token_ids 0");
}
