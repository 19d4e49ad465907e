//! A client in another language: `tests/clients/verify_answer.py` uses grpcio with stubs generated from `proto/`. It recomputes
//! whole answers from the bundle's files with onnxruntime and numpy, and calls the health and the reflection service.

use crate::harness::{Server, fixture, root, shipped};
use std::{path::Path, process::Command};

fn verify(bundle: &Path) {
    let python = root().join(".venv/bin/python");
    assert!(python.exists(), "{} is missing: run `make test-setup`", python.display());
    let server = Server::start_with(bundle, "");
    let run = Command::new(python)
        .arg(root().join("tests/clients/verify_answer.py"))
        .args(["--server", &server.grpc, "--proto"])
        .arg(root().join("proto"))
        .arg("--bundle")
        .arg(bundle)
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{out}{err}");
    assert!(
        out.contains("health ok") && out.contains("reflection ok") && out.contains("answers recomputed: 4"),
        "{out}"
    );
}

#[test]
fn a_python_client_recomputes_answers_of_the_fixture_bundle() {
    verify(&fixture());
}

#[test]
fn a_python_client_recomputes_answers_of_the_shipped_bundle() {
    verify(&shipped());
}
