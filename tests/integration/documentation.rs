//! The pages say what is there: tables of config keys and metrics, files, headings, `make` targets, commands and their flags.
//!
//! `UPDATE_DOCS=1 cargo test --test integration documentation` writes the tables anew from the code.

use crate::harness::{Server, films, fixture, midemb, page, root};
use midemb::{
    config::keys::{KEYS, MODEL_KEYS},
    telemetry::names::METRICS,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The README fits on a few screens; everything else has a page of its own.
const MAX_README_LINES: usize = 200;

const COMMANDS: &[&str] = &["serve", "query", "bundle", "config", "admin", "cache", "cache-curve"];

#[test]
fn the_table_of_config_keys_matches_the_code() {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for key in KEYS {
        let default = if key.default.is_empty() { "(empty)".to_owned() } else { format!("`{}`", key.default) };
        rows.push(vec![format!("`{}`", key.name), default, key.help.to_owned()]);
    }
    for key in MODEL_KEYS {
        rows.push(vec![format!("`{}`", key.name), "-".to_owned(), key.help.to_owned()]);
    }
    check_table("docs/configuration.md", &["key", "default", "what it does, when to change it"], &rows);
}

#[test]
fn the_pages_name_every_key_that_may_change_while_the_server_runs() {
    let sentence = |text: &str| {
        let start = text.find("`[[models]]`, `routing.salt`").expect("the sentence that lists the live keys is gone");
        text[start..].split(" may change").next().unwrap_or_default().to_owned()
    };
    for name in ["docs/configuration.md", "docs/operating.md"] {
        let listed = sentence(&read(&root().join(name)));
        let keys: BTreeSet<&str> = listed.split('`').skip(1).step_by(2).collect();
        let live = KEYS.iter().filter(|key| key.is_live).map(|key| key.name);
        assert_eq!(keys, live.chain(["[[models]]"]).collect(), "{name}");
    }
}

#[test]
fn the_table_of_metrics_matches_the_code() {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for metric in METRICS {
        let labels = metric.labels.replace(',', ", ");
        let cells = [format!("`{}`", metric.name), metric.kind.as_str().to_owned(), labels, metric.help.to_owned()];
        rows.push(cells.to_vec());
    }
    check_table("docs/metrics.md", &["metric", "kind", "labels", "what it tells"], &rows);
}

#[tokio::test]
async fn a_server_that_served_exposes_every_metric_with_its_labels() {
    let server = Server::start_with(&fixture(), "served_features.folder = \"features\"");
    server.client().await.get_mid_emb(page(films("h", 2), films("c", 3))).await.unwrap();
    let text = server.scrape().0;
    // These appear when the thing they count first happens.
    let rare = [
        "midemb_shed_total",
        "midemb_cache_evictions_total",
        "midemb_trace_requests_total",
        "midemb_log_lines_lost_total",
    ];
    let is_rare =
        |name: &str| rare.contains(&name) || ["midemb_shadow", "midemb_snapshot"].iter().any(|p| name.starts_with(p));
    for metric in METRICS.iter().filter(|metric| !is_rare(metric.name)) {
        let line = text.lines().find(|line| line.starts_with(metric.name) && !line.starts_with('#'));
        let line = line.unwrap_or_else(|| panic!("{} is not exposed", metric.name));
        for label in metric.labels.split(',').filter(|label| !label.is_empty()) {
            assert!(line.contains(&format!("{label}=\"")), "{line} has no label {label}");
        }
        assert!(text.contains(&format!("# HELP {} ", metric.name)), "{} is not described", metric.name);
    }
    for metric in ["process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"] {
        assert!(text.contains(metric), "{metric} is not exposed");
    }
    let ours = text.lines().filter_map(|line| line.strip_prefix("# TYPE midemb_")?.split(' ').next());
    let mut n_exposed = 0;
    for name in ours {
        assert!(
            METRICS.iter().any(|metric| metric.name == format!("midemb_{name}")),
            "midemb_{name} is not in the table"
        );
        n_exposed += 1;
    }
    assert_eq!(n_exposed, METRICS.iter().filter(|metric| !is_rare(metric.name)).count());
}

#[test]
fn queries_use_metrics_and_labels_that_exist() {
    let page = read(&root().join("docs/metrics.md"));
    let queries = page.split("\n## All metrics\n").next().unwrap_or_default();
    let mut n_queries = 0;
    for start in queries.match_indices("midemb_").map(|(start, _)| start) {
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let name: String = queries[start..].chars().take_while(|c| is_of_name(*c)).collect();
        if name == "midemb_" {
            continue; // The pattern that all names follow.
        }
        let is_this = |metric: &str| metric == name || format!("{metric}_bucket") == name;
        let metric = METRICS.iter().find(|metric| is_this(metric.name));
        let metric = metric.unwrap_or_else(|| panic!("a query asks for {name}, which is no metric"));
        let selector = queries[start + name.len()..].strip_prefix('{').and_then(|rest| rest.split('}').next());
        for label in selector.into_iter().flat_map(|selector| selector.split(',')) {
            let label = label.split('=').next().unwrap_or_default();
            assert!(metric.labels.split(',').any(|known| known == label), "{name} has no label {label}");
        }
        n_queries += 1;
    }
    assert!(n_queries >= 5, "only {n_queries} queries found");
}

#[test]
fn the_readme_is_short_and_leads_to_every_page() {
    let readme = read(&root().join("README.md"));
    let n_lines = readme.lines().count();
    assert!(n_lines <= MAX_README_LINES, "README.md has {n_lines} lines, at most {MAX_README_LINES} are allowed");
    for page in pages() {
        let name = page.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        let is_page = !name.contains('/') || name.starts_with("docs/");
        assert!(
            !is_page || name == "README.md" || readme.contains(&format!("]({name})")),
            "README.md does not link to {name}"
        );
    }
}

#[test]
fn the_map_of_the_modules_lists_the_modules_of_the_crate() {
    let page = read(&root().join("docs/architecture.md"));
    let map = section(&page, "## The map of the modules");
    let listed: BTreeSet<&str> = map.lines().filter_map(|line| line.strip_prefix("| [")?.split(']').next()).collect();
    let outside = ["proto", "clients/rust", "benches/load", "fuzz", "models", "deploy", "tests"];
    let listed: BTreeSet<&str> = listed.into_iter().filter(|name| !outside.contains(name)).collect();
    let lib = read(&root().join("src/lib.rs"));
    let modules = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    assert_eq!(listed, modules.collect());
}

#[test]
fn every_link_leads_to_a_file_and_a_heading_that_exist() {
    let mut n_links = 0;
    let mut broken = Vec::new();
    for page in pages() {
        for link in links(&read(&page)) {
            n_links += 1;
            if !exists(&page, &link) {
                broken.push(format!("{}: {link}", page.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(n_links > 100, "only {n_links} links found");
    assert!(broken.is_empty(), "links that lead nowhere:\n{}", broken.join("\n"));
}

#[test]
fn every_make_target_that_a_page_names_exists() {
    let makefile = read(&root().join("Makefile"));
    let mut n_targets = 0;
    for page in pages() {
        let text = read(&page);
        for command in commands(&text).into_iter().filter_map(|command| command.strip_prefix("make ")) {
            for target in command.split(' ').take_while(|word| is_word(word)) {
                assert!(makefile.contains(&format!("\n{target}:")), "{} names make {target}", page.display());
                n_targets += 1;
            }
        }
    }
    assert!(n_targets > 20, "only {n_targets} targets found");
}

#[test]
fn every_command_that_a_page_names_exists_with_its_flags() {
    let mut named = BTreeSet::new();
    let mut helps: BTreeMap<Vec<&str>, String> = BTreeMap::new();
    let texts: Vec<String> = pages().iter().map(|page| read(page)).collect();
    for command in texts.iter().flat_map(|text| commands(text)) {
        let command = command.trim_start_matches("./").trim_start_matches("target/release/");
        let Some(words) = command.strip_prefix("midemb ") else { continue };
        let words: Vec<&str> = words.split(' ').collect();
        let subcommands: Vec<&str> = words.iter().copied().take(2).take_while(|word| is_word(word)).collect();
        let Some(first) = subcommands.first() else { continue };
        named.insert((*first).to_owned());
        let help = helps.entry(subcommands.clone()).or_insert_with(|| help(&subcommands));
        let flags = words.iter().map(|word| word.trim_end_matches([',', ';', '.']));
        for flag in flags.filter(|word| word.len() > 2 && word.starts_with("--")) {
            assert!(help.contains(flag), "`{command}`: midemb {} has no {flag}", subcommands.join(" "));
        }
    }
    for command in COMMANDS {
        assert!(named.contains(*command), "no page names midemb {command}");
    }
}

/// What `midemb ... --help` prints; fails where there is no such command.
fn help(subcommands: &[&str]) -> String {
    let output = midemb().args(subcommands).arg("--help").output().unwrap();
    assert!(output.status.success(), "midemb {} does not exist", subcommands.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every Markdown page of the repository that is written by hand.
fn pages() -> Vec<PathBuf> {
    let mut pages = Vec::new();
    collect(root(), false, &mut pages);
    for folder in ["docs", "clients", "deploy", "models", "benches"] {
        collect(&root().join(folder), true, &mut pages);
    }
    pages.retain(|page| !page.ends_with("models/REPORT.md"));
    assert!(pages.len() > 10, "only {} pages found", pages.len());
    pages.sort();
    pages
}

/// Pages in `folder`, and in its folders where `recurse` says so. Hidden folders, builds and training runs hold none of ours.
fn collect(folder: &Path, recurse: bool, pages: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.map(|entry| entry.unwrap().path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if recurse && !name.starts_with('.') && !["target", "runs", "results", "smollm2"].contains(&name.as_str()) {
                collect(&path, true, pages);
            }
        } else if name.ends_with(".md") {
            pages.push(path);
        }
    }
}

/// The text under `heading`, up to the next heading of the same level.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let start = text.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("there is no {heading:?}"));
    let rest = &text[start + 1 + heading.len()..];
    let level = heading.split(' ').next().unwrap_or_default();
    rest.find(&format!("\n{level} ")).map_or(rest, |end| &rest[..end])
}

/// Compares the table whose first line is `header` with `rows`, or writes it anew where `UPDATE_DOCS` is set.
fn check_table(page: &str, header: &[&str], rows: &[Vec<String>]) {
    let path = root().join(page);
    let text = read(&path);
    let title = format!("| {} |\n", header.join(" | "));
    let mut expected = format!("{title}|{}\n", "---|".repeat(header.len()));
    for row in rows {
        let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
        expected += &format!("| {} |\n", cells.join(" | "));
    }
    let start = text.find(&title).unwrap_or_else(|| panic!("{page} has no table that begins with {title}"));
    let lines = text[start..].split_inclusive('\n').take_while(|line| line.starts_with('|'));
    let n_bytes: usize = lines.map(str::len).sum();
    let found = &text[start..start + n_bytes];
    if found == expected {
        return;
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, text.replace(found, &expected)).unwrap();
        return;
    }
    let differs = found.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    panic!("{page} differs from the code, UPDATE_DOCS=1 writes its table anew; first difference: {differs:#?}");
}

/// The targets of all relative links outside code.
fn links(text: &str) -> Vec<String> {
    let mut links = Vec::new();
    for line in prose(text) {
        for rest in line.split("](").skip(1) {
            let link = rest.split(')').next().unwrap_or_default();
            if !link.contains("://") {
                links.push(link.to_owned());
            }
        }
    }
    links
}

/// The lines that are not in a fenced block.
fn prose(text: &str) -> Vec<&str> {
    let mut is_code = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            lines.push(line);
        }
    }
    lines
}

/// Code spans, and the lines of fenced blocks that follow a prompt.
fn commands(text: &str) -> Vec<&str> {
    let mut commands: Vec<&str> = text.lines().filter_map(|line| line.trim_start().strip_prefix("$ ")).collect();
    for line in prose(text) {
        commands.extend(line.split('`').skip(1).step_by(2));
    }
    commands
}

/// Whether this can be a subcommand or a target: lower case, digits and hyphens, not first a hyphen.
fn is_word(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase())
        && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// Whether `link`, as it stands in `page`, leads to a file, and to a heading where it names one.
fn exists(page: &Path, link: &str) -> bool {
    let (file, heading) = link.split_once('#').unwrap_or((link, ""));
    let target = if file.is_empty() { page.to_path_buf() } else { page.parent().unwrap().join(file) };
    if !target.exists() {
        return false;
    }
    heading.is_empty() || prose(&read(&target)).into_iter().any(|line| line.starts_with('#') && anchor(line) == heading)
}

/// What GitHub calls a heading in a link.
fn anchor(heading: &str) -> String {
    let title = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = title.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}
