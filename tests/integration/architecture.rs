//! The sources keep to their map: each library in its room, imports down the list only, no cycles, no file too long to read.

use crate::harness::root;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// The modules of the crate in the order of `lib.rs`, top to bottom: a module uses only those below it.
const MODULES: [&str; 14] = [
    "cli",
    "server",
    "wire",
    "lifecycle",
    "config",
    "pipeline",
    "served_features",
    "bundle",
    "content",
    "towers",
    "cache",
    "inference",
    "telemetry",
    "domain",
];

struct Source {
    /// Relative to `src/`.
    path: PathBuf,
    text: String,
}

impl Source {
    /// The code without its comments and without what is behind `#[cfg(test)]`.
    fn code(&self) -> String {
        let text = self.text.split("#[cfg(test)]").next().unwrap();
        text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
    }

    fn is_test(&self) -> bool {
        self.path.file_name().is_some_and(|name| name == "tests.rs")
    }

    /// Its module path: `["cache", "snapshot", "read"]` for `cache/snapshot/read.rs`, `["cache"]` for `cache/mod.rs`.
    fn module(&self) -> Vec<String> {
        let path = self.path.with_extension("");
        let mut names: Vec<String> = path.iter().map(|name| name.to_str().unwrap().to_owned()).collect();
        if names.last().is_some_and(|name| name == "mod") {
            names.pop();
        }
        names
    }
}

fn sources() -> Vec<Source> {
    fn collect(folder: &Path, sources: &mut Vec<Source>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, sources);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                sources.push(Source { path: path.strip_prefix(root().join("src")).unwrap().to_path_buf(), text });
            }
        }
    }
    let mut sources = Vec::new();
    collect(&root().join("src"), &mut sources);
    assert!(sources.len() > 40, "only {} sources found", sources.len());
    sources
}

/// Every path that a file's code imports from this crate, as lists of names from the crate's root on.
fn imports(source: &Source) -> Vec<Vec<String>> {
    let module = source.module();
    let code: String = source.code().split_whitespace().collect::<Vec<_>>().join(" ");
    let mut found = Vec::new();
    for prefix in ["crate::", "super::super::", "super::"] {
        for (at, _) in code.match_indices(prefix) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let base: &[String] = match prefix {
                "crate::" => &[],
                "super::" => &module[..module.len() - 1],
                _ => &module[..module.len().saturating_sub(2)],
            };
            expand(&code[at + prefix.len()..], base, &mut found);
        }
    }
    found
}

/// Reads one import tree, such as `a::{b, c::{d, e}}`, and appends its paths.
fn expand(text: &str, base: &[String], found: &mut Vec<Vec<String>>) {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let mut path = base.to_vec();
    if !name.is_empty() && name != "self" {
        path.push(name.to_owned());
    }
    if let Some(rest) = rest.strip_prefix("::") {
        expand(rest, &path, found);
    } else if let Some(rest) = rest.strip_prefix('{').filter(|_| name.is_empty()) {
        let (mut depth, mut start) = (0, 0);
        for (i, c) in rest.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' if depth == 0 => {
                    expand(rest[start..i].trim(), base, found);
                    start = i + 1;
                }
                '}' => {
                    expand(rest[start..i].trim(), base, found);
                    break;
                }
                _ => {}
            }
        }
    } else {
        found.push(path);
    }
}

#[test]
fn the_crate_has_these_modules_and_its_map_names_them_in_order() {
    let lib = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let mapped: Vec<&str> = lib.lines().filter_map(|line| line.strip_prefix("//! - [`")?.split('`').next()).collect();
    assert_eq!(mapped, MODULES, "the list in lib.rs is not the order that is tested here");
    let mut declared: Vec<&str> =
        lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    declared.sort_unstable();
    let mut expected = MODULES;
    expected.sort_unstable();
    assert_eq!(declared, expected);
}

#[test]
fn modules_import_only_those_below_them() {
    let place = |name: &str| MODULES.iter().position(|module| *module == name);
    for source in sources() {
        let Some(own) = source.module().first().and_then(|name| place(name)) else { continue };
        for import in imports(&source) {
            let used = import.first().and_then(|name| place(name));
            assert!(
                used.is_none_or(|used| used >= own),
                "{} uses {}, which is above it in the list",
                source.path.display(),
                import.join("::")
            );
        }
    }
}

#[test]
fn no_two_files_import_each_other() {
    let sources: Vec<Source> = sources().into_iter().filter(|source| !source.is_test()).collect();
    let modules: BTreeSet<Vec<String>> = sources.iter().map(Source::module).collect();
    let mut uses: BTreeMap<Vec<String>, BTreeSet<Vec<String>>> = BTreeMap::new();
    for source in &sources {
        for import in imports(source) {
            // The file that a path leads into is the longest part of it that is a module.
            let file = (1..=import.len()).rev().map(|n| import[..n].to_vec()).find(|path| modules.contains(path));
            uses.entry(source.module()).or_default().extend(file);
        }
    }
    let mut n_arrows = 0;
    for (file, used) in &uses {
        for other in used.iter().filter(|other| *other != file) {
            n_arrows += 1;
            // A module and the files in its folder may import each other: the module is what holds them together.
            let is_family = other.starts_with(file) || file.starts_with(other);
            let is_mutual = uses.get(other).is_some_and(|back| back.contains(file));
            assert!(is_family || !is_mutual, "{} and {} import each other", file.join("::"), other.join("::"));
        }
    }
    assert!(n_arrows > 200, "only {n_arrows} imports between files were found");
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
        ("minijinja::", &["domain"]),
        ("tokenizers::", &["content"]),
        ("dashmap::", &["content"]),
        ("hashbrown::", &["cache"]),
        ("moka::", &["cache"]),
        ("safetensors::", &["cache"]),
        ("object_store::", &["bundle"]),
        ("parquet::", &["served_features"]),
        ("notify::", &["lifecycle"]),
        ("env::var", &["config"]),
        ("toml_edit::", &["config"]),
        ("anyhow::", &["cli"]),
        ("midemb_client::", &["cli"]),
    ];
    for source in sources().into_iter().filter(|source| !source.is_test()) {
        let (module, code) = (source.module(), source.code());
        for (library, rooms) in rules {
            let uses = code
                .match_indices(library)
                .any(|(i, _)| !code[..i].ends_with(|c: char| c.is_alphanumeric() || c == '_'));
            assert!(
                !uses || rooms.contains(&module[0].as_str()),
                "{} uses {library}, which lives in {rooms:?}",
                source.path.display()
            );
        }
    }
}

#[test]
fn every_module_opens_with_what_it_is() {
    for source in sources() {
        assert!(source.text.starts_with("//! "), "{} has no opening comment", source.path.display());
    }
}

#[test]
fn files_stay_short_enough_to_read() {
    for source in sources().into_iter().filter(|source| !source.is_test()) {
        let n_lines = source.text.split("#[cfg(test)]").next().unwrap().lines().count();
        assert!(n_lines <= 400, "{} has {n_lines} lines", source.path.display());
    }
}

#[test]
fn an_import_tree_is_read_as_the_compiler_reads_it() {
    let source = Source {
        path: "cache/snapshot/read.rs".into(),
        text:
            "use super::{Kind, format::{self, Part}};\nuse crate::{cache::Caches, domain::{Item, ids}};\nuse std::io;\n\
               fn f() { crate::telemetry::events::shed(1) }"
                .to_owned(),
    };
    let mut found: Vec<String> = imports(&source).into_iter().map(|path| path.join("::")).collect();
    found.sort();
    let expected = [
        "cache::Caches",
        "cache::snapshot::Kind",
        "cache::snapshot::format",
        "cache::snapshot::format::Part",
        "domain::Item",
        "domain::ids",
        "telemetry::events::shed",
    ];
    assert_eq!(found, expected);
}
