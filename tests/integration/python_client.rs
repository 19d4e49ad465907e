//! A stock client in another language: `tests/clients/verify_answer.py` (grpcio, stubs generated from `proto/`) recomputes
//! whole answers with onnxruntime and numpy from the bundle's files, and asks health and reflection.

use crate::harness::{Server, fixture, root, shipped};
use std::{path::Path, process::Command};

fn verify(bundle: &Path) {
    let python = root().join(".venv/bin/python");
    assert!(python.exists(), "{} is missing: run `make test-setup`", python.display());
    let server = Server::start_with(bundle, "limits.default_deadline_ms = 60000");
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
