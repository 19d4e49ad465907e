//! What is digested is what is used: a bundle that serves depends on no file any more, and only listed files are read.

use crate::{
    harness::{BrokenBundle, Server, films, midemb, page, rows, run_to_end, shipped},
    onnx::{Entry, FLOAT, Graph, Tensor, append},
};
use midemb_client::proto::FlushCacheRequest;
use std::{fs::File, os::unix::fs::symlink, process::Command};

/// ONNX Runtime maps weights that are in files of their own into memory. A copy of another bundle over the folder of one that
/// served changed its vectors under the old digest, and a file that was shortened ended the process with SIGBUS.
#[tokio::test]
async fn a_bundle_that_serves_does_not_depend_on_its_files() {
    let bundle = BrokenBundle::of(&shipped());
    let server = Server::start_with(bundle.folder(), "");
    let mut client = server.client().await;
    let items = films("cold", 20);
    let before = client.get_mid_emb(page(vec![], items.clone())).await.unwrap().into_inner();
    server.admin().await.flush_cache(FlushCacheRequest::default()).await.unwrap();
    for entry in std::fs::read_dir(bundle.folder()).unwrap() {
        // As `cp` does: the file stays, and is empty until its new bytes come.
        File::create(entry.unwrap().path()).unwrap();
    }
    let after = client.get_mid_emb(page(vec![], items)).await.unwrap().into_inner();
    assert_eq!(server.scrape().n_encoded(), 40.0, "the items were not encoded again");
    for (before, after) in rows(&before.item_emb).iter().flatten().zip(rows(&after.item_emb).iter().flatten()) {
        assert!((before - after).abs() < 1e-5, "{before} became {after}");
    }
}

#[track_caller]
fn assert_refused(bundle: &BrokenBundle, expected: &str) {
    let output = run_to_end(midemb().args(["bundle", "verify"]).arg(bundle.folder()));
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{line}");
    assert!(line.contains(expected) && line.trim_end().lines().count() == 1, "{line:?} does not say {expected:?}");
}

/// A graph with a location such as `/etc/hostname` used to be loaded, with data that no digest covered.
#[test]
fn a_graph_reads_weights_only_from_files_that_are_listed_under_its_part() {
    let outside = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(outside.path(), [0; 4]).unwrap();
    let above = format!("../{}", outside.path().file_name().unwrap().display());
    for location in [outside.path().to_str().unwrap(), &above, "unlisted.bin", "golden.json", "*/_ORT_MEM_ADDR_/*"] {
        let bundle = BrokenBundle::new();
        std::fs::write(bundle.path("unlisted.bin"), [0; 4]).unwrap();
        let entry = Entry { key: "location".to_owned(), value: location.to_owned() };
        let weight = Tensor {
            dims: vec![1],
            data_type: FLOAT,
            name: "weight".to_owned(),
            external_data: vec![entry],
            data_location: 1,
            ..Tensor::default()
        };
        append(&bundle, "encoder.onnx", Graph { initializer: vec![weight], ..Graph::default() });
        let expected = format!("reads weights from {location:?}, which the manifest does not list under part encoder");
        assert_refused(&bundle, &expected);
    }
}

/// Opening it would wait for a writer for ever.
#[test]
fn a_pipe_in_place_of_a_file_is_refused() {
    let bundle = BrokenBundle::new();
    std::fs::remove_file(bundle.path("tokenizer.json")).unwrap();
    assert!(Command::new("mkfifo").arg(bundle.path("tokenizer.json")).status().unwrap().success());
    assert_refused(&bundle, "tokenizer.json cannot be read: it is not a regular file");
}

/// Volumes of Kubernetes and the cache of Hugging Face have links in place of files. What they lead to must have the digest.
#[test]
fn symbolic_links_are_followed() {
    let (bundle, elsewhere) = (BrokenBundle::new(), tempfile::tempdir().unwrap());
    let target = elsewhere.path().join("encoder");
    std::fs::copy(bundle.path("encoder.onnx"), &target).unwrap();
    std::fs::remove_file(bundle.path("encoder.onnx")).unwrap();
    symlink(&target, bundle.path("encoder.onnx")).unwrap();
    let verify = || run_to_end(midemb().args(["bundle", "verify"]).arg(bundle.folder()));
    assert!(verify().status.success());
    std::fs::write(&target, [0; 9]).unwrap();
    assert_refused(&bundle, "encoder.onnx has a wrong digest");
}
