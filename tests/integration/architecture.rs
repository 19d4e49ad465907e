//! The sources keep to their map: each library in its room, arrows down the list only, no file too long to read.

use crate::harness::root;
use std::path::{Path, PathBuf};

fn sources() -> Vec<(PathBuf, String)> {
    fn collect(folder: &Path, files: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, files);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push((
                    path.strip_prefix(root().join("src")).unwrap().to_path_buf(),
                    std::fs::read_to_string(&path).unwrap(),
                ));
            }
        }
    }
    let mut files = Vec::new();
    collect(&root().join("src"), &mut files);
    assert!(files.len() > 40, "only {} sources found", files.len());
    files
}

/// Code without its comments and without what is behind `#[cfg(test)]`.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn is_test(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "tests.rs")
}

/// The rooms from top to bottom: a room uses only those below it.
const ROOMS: &[&str] = &[
    "main",
    "cli",
    "server",
    "wire",
    "lifecycle",
    "config",
    "pipeline",
    "admission",
    "bundle",
    "item_trace",
    "cache_snapshot",
    "known_items",
    "fusion",
    "towers",
    "content",
    "vector_cache",
    "bounded_cache",
    "inference",
    "item_text",
    "telemetry",
    "error",
    "domain",
];

fn room(path: &Path) -> String {
    path.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

#[test]
fn arrows_run_down_the_list_only() {
    for (path, text) in sources() {
        let room = room(&path);
        if room == "lib" || room == "main" {
            continue;
        }
        let place = ROOMS.iter().position(|r| *r == room).unwrap_or_else(|| panic!("{} is in no room", path.display()));
        let code = code(&text);
        // Every `use crate::...;` on one line, and every path in the code itself.
        let flat: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
        let imports = flat.split("use crate::").skip(1).filter_map(|rest| rest.split(';').next());
        let used: Vec<String> = imports.map(|import| format!(" {} ", import.replace(['{', '}', ','], " "))).collect();
        for upper in ROOMS[1..place].iter().filter(|upper| **upper != room) {
            let imported = used.iter().any(|import| import.contains(&format!(" {upper}::")));
            assert!(!imported && !flat.contains(&format!("crate::{upper}::")), "{} uses {upper}", path.display());
        }
    }
}

#[test]
fn each_library_lives_in_one_room() {
    let rules: &[(&str, &[&str])] = &[
        ("ort::", &["inference"]),
        ("tonic::", &["wire", "server", "cli"]),
        // An ONNX file is a protobuf message, too.
        ("prost::", &["wire", "inference"]),
        ("metrics::{", &["telemetry"]),
        ("counter!(", &["telemetry"]),
        ("gauge!(", &["telemetry"]),
        ("histogram!(", &["telemetry"]),
        ("axum::", &["server"]),
        ("minijinja::", &["item_text"]),
        ("tokenizers::", &["content"]),
        ("dashmap::", &["content"]),
        ("hashbrown::", &["bounded_cache"]),
        ("object_store::", &["bundle"]),
        ("safetensors::", &["cache_snapshot"]),
        ("notify::", &["lifecycle"]),
        ("moka::", &["towers"]),
        ("env::var", &["config"]),
        ("anyhow::", &["cli"]),
    ];
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        let (room, code) = (room(&path), code(&text));
        for (library, rooms) in rules {
            let uses = code
                .match_indices(library)
                .any(|(i, _)| !code[..i].ends_with(|c: char| c.is_alphanumeric() || c == '_'));
            assert!(
                !uses || rooms.contains(&room.as_str()),
                "{} uses {library}, which lives in {rooms:?}",
                path.display()
            );
        }
    }
}

#[test]
fn every_module_opens_with_what_it_is() {
    for (path, text) in sources() {
        assert!(text.starts_with("//! "), "{} has no opening comment", path.display());
    }
}

#[test]
fn files_stay_short_enough_to_read() {
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        let n_lines = text.split("#[cfg(test)]").next().unwrap().lines().count();
        assert!(n_lines <= 400, "{} has {n_lines} lines", path.display());
    }
}
