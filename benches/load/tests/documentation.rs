//! The pages name scenarios, flags and benchmarks that exist, and this workspace keeps to the rules of the server's.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The code spans of README.md, CHANGELOG.md and the pages in docs/.
fn code_spans() -> Vec<String> {
    let pages = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = pages.chain([root().join("README.md"), root().join("CHANGELOG.md")]);
    let mut spans = Vec::new();
    for page in pages.filter(|page| page.extension().is_some_and(|extension| extension == "md")) {
        let text = fs::read_to_string(page).unwrap();
        spans.extend(text.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    spans
}

#[test]
fn every_scenario_and_flag_that_a_page_names_exists() {
    let help = Command::new(env!("CARGO_BIN_EXE_midemb-bench")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let has = |word: &str| help.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').any(|known| known == word);
    let mut n_words = 0;
    for span in code_spans() {
        let Some(arguments) = span.strip_prefix("midemb-bench ") else { continue };
        // Capitals stand for what the reader puts in.
        let is_ours = |word: &&str| word.starts_with("--") || word.starts_with('w');
        for word in arguments.split_whitespace().filter(is_ours) {
            assert!(has(word), "`{span}`: midemb-bench knows no {word}");
            n_words += 1;
        }
    }
    assert!(n_words > 1, "no page names a scenario");
}

#[test]
fn every_micro_benchmark_that_a_page_names_exists() {
    let manifest = read("benches/micro/Cargo.toml");
    let mut n_names = 0;
    for span in code_spans() {
        let Some(name) = span.strip_prefix("cargo bench --bench ").filter(|name| *name != "NAME") else { continue };
        assert!(manifest.contains(&format!("\nname = \"{name}\"\n")), "`{span}`: there is no such benchmark");
        n_names += 1;
    }
    assert!(n_names > 2, "only {n_names} benchmarks found");
}

/// Cargo has no way for one workspace to take its lints and profiles from another, so they are written down twice.
#[test]
fn lints_and_profiles_are_those_of_the_servers_workspace() {
    let rules = |path: &str| {
        let text = read(path);
        let start = text.find("[workspace.lints.rust]").expect("no lints");
        let lines = text[start..].lines().map(|line| line.split('#').next().unwrap_or_default().trim().to_owned());
        lines.filter(|line| !line.is_empty()).collect::<Vec<_>>()
    };
    assert_eq!(rules("benches/Cargo.toml"), rules("Cargo.toml"));
}
