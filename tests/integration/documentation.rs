//! The README's tables are the truth: config keys, metrics, commands, files it links to.

use crate::harness::{Server, films, midemb, page, root};
use midemb::{
    config::keys::{KEYS, MODEL_KEYS},
    telemetry::names::METRICS,
};

fn readme() -> String {
    std::fs::read_to_string(root().join("README.md")).unwrap()
}

/// The rows of the table under this heading, each cell trimmed, back-quotes gone from the first.
fn table(heading: &str) -> Vec<Vec<String>> {
    let readme = readme();
    let section = readme.split(&format!("\n{heading}\n")).nth(1).unwrap_or_else(|| panic!("README has no {heading:?}"));
    let lines = section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().replace("\\", "")).collect();
    lines.skip(2).map(cells).collect()
}

#[test]
fn the_table_of_config_keys_is_the_code_s() {
    let mut expected: Vec<Vec<String>> = KEYS
        .iter()
        .map(|key| {
            let default = if key.default.is_empty() { "(empty)".to_owned() } else { format!("`{}`", key.default) };
            vec![format!("`{}`", key.name), default, key.help.to_owned()]
        })
        .collect();
    expected
        .extend(MODEL_KEYS.iter().map(|(name, help)| vec![format!("`{name}`"), "-".to_owned(), (*help).to_owned()]));
    assert_eq!(table("### Configuration"), expected);
}

#[test]
fn the_table_of_metrics_is_the_code_s() {
    let expected: Vec<Vec<String>> = METRICS
        .iter()
        .map(|m| {
            vec![format!("`{}`", m.name), m.kind.as_str().to_owned(), m.labels.replace(',', ", "), m.help.to_owned()]
        })
        .collect();
    assert_eq!(table("### Metrics"), expected);
}

#[tokio::test]
async fn a_server_that_served_exposes_every_metric_with_its_labels() {
    let server = Server::start();
    server.client().await.get_mid_emb(page(films("h", 2), films("c", 3))).await.unwrap();
    let text = server.scrape().0;
    // These appear when the thing they count first happens.
    let rare = ["midemb_shed_total", "midemb_cache_evictions_total", "midemb_trace_requests_total"];
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
fn every_file_and_command_that_the_readme_names_is_there() {
    let readme = readme();
    let mut n_links = 0;
    for link in readme.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        if !link.contains("://") && !link.starts_with('#') {
            assert!(
                root().join(link.split('#').next().unwrap()).exists(),
                "README links to {link}, which is not there"
            );
            n_links += 1;
        }
    }
    assert!(n_links > 10, "only {n_links} links");
    let makefile = std::fs::read_to_string(root().join("Makefile")).unwrap();
    for target in readme.split("`make ").skip(1).filter_map(|rest| rest.split(['`', ' ']).next()) {
        assert!(makefile.contains(&format!("\n{target}:")), "README names make {target}, which is not there");
    }
    for command in ["serve", "query", "bundle", "config", "admin", "cache"] {
        assert!(readme.contains(&format!("midemb {command}")), "README does not name midemb {command}");
        assert!(midemb().args([command, "--help"]).output().unwrap().status.success());
    }
}
