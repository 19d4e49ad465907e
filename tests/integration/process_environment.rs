//! What the environment must have before a server starts: nothing about the process or its models leaves the machine, or is
//! written outside the configured folders, and memory has one arena for each core.

use crate::harness::{Server, config, fixture, midemb, run_to_end};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The library's telemetry is off where one of these is set, so the tests run without them.
const CI_VARIABLES: [&str; 5] = ["CI", "TF_BUILD", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"];

/// The binary with an empty home folder, and without the variables that turn telemetry off.
fn midemb_at_home(home: &Path) -> Command {
    let mut command = midemb();
    for name in CI_VARIABLES {
        command.env_remove(name);
    }
    command.env_remove("XDG_CACHE_HOME").env_remove("XDG_DATA_HOME").env("HOME", home).current_dir(home);
    command
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// ONNX Runtime wrote a device id and a database of events there, and looked up a host of its maker, before it could be told not
/// to.
#[test]
fn checking_a_bundle_writes_nothing_into_the_home_folder() {
    let home = tempfile::tempdir().unwrap();
    let output = run_to_end(midemb_at_home(home.path()).args(["bundle", "verify"]).arg(fixture()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(files_below(home.path()), Vec::<PathBuf>::new());
}

/// The internet sockets that a command opens, by its system calls; none where they cannot be traced.
fn internet_sockets(arguments: &[&str]) -> Option<usize> {
    let home = tempfile::tempdir().unwrap();
    let (trace, of_midemb) = (home.path().join("trace"), midemb_at_home(home.path()));
    let mut strace = Command::new("strace");
    strace
        .args(["--follow-forks", "--trace=socket", "--output"])
        .arg(&trace)
        .arg(of_midemb.get_program())
        .args(arguments);
    for (name, value) in of_midemb.get_envs() {
        match value {
            Some(value) => strace.env(name, value),
            None => strace.env_remove(name),
        };
    }
    let ended = strace.output().ok()?;
    let calls = std::fs::read_to_string(&trace).unwrap_or_default();
    assert!(calls.contains("exited with"), "{}", String::from_utf8_lossy(&ended.stderr));
    Some(calls.lines().filter(|line| line.contains("AF_INET")).count())
}

/// It also looked up a host of its maker.
#[test]
fn checking_a_bundle_asks_nobody() {
    let fixture = fixture().display().to_string();
    let Some(n_sockets) = internet_sockets(&["bundle", "verify", &fixture]) else {
        assert!(std::env::var_os("MIDEMB_REQUIRE_STRACE").is_none(), "strace is missing");
        eprintln!("SKIPPED: no strace (Debian: apt-get install strace)");
        return;
    };
    assert_eq!(n_sockets, 0);
    let of_a_client = internet_sockets(&["admin", "--admin", "127.0.0.1:1", "status"]);
    assert!(of_a_client > Some(0), "the trace does not show the sockets of a client");
}

#[test]
fn a_server_writes_nothing_into_the_home_folder() {
    let home = tempfile::tempdir().unwrap();
    let (folder, path) = config(&fixture(), "");
    let mut serve = midemb_at_home(home.path());
    serve.arg("serve").arg("--config").arg(&path);
    let server = Server::spawn(serve, folder, path);
    let _config = server.stop();
    assert_eq!(files_below(home.path()), Vec::<PathBuf>::new());
}

/// With the C library's own choices, 160 pushes of towers took the memory of a server from 314 MB to 437 MB, and a page of 4,000
/// candidates cost hundreds of page faults.
#[test]
fn a_server_sets_up_the_memory_of_the_c_library_unless_its_operator_did() {
    let n_cores = std::thread::available_parallelism().unwrap().get();
    let own = [
        ("MALLOC_ARENA_MAX", n_cores.max(2), "7"),
        ("MALLOC_MMAP_THRESHOLD_", 4 << 20, "1048576"),
        ("MALLOC_TRIM_THRESHOLD_", 16 << 20, "1048576"),
    ];
    let values = |name: &str, said: Option<&str>| {
        let (folder, path) = config(&fixture(), "");
        let mut serve = midemb();
        serve.env_remove(name).envs(said.map(|value| (name, value)));
        serve.arg("serve").arg("--config").arg(&path);
        let server = Server::spawn(serve, folder, path);
        let environment = std::fs::read(format!("/proc/{}/environ", server.id())).unwrap();
        let variables =
            environment.split(|byte| *byte == 0).map(|variable| String::from_utf8(variable.into()).unwrap());
        variables
            .filter_map(|variable| Some(variable.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
            .collect::<Vec<_>>()
    };
    for (name, own, of_operator) in own {
        assert_eq!(values(name, None), [own.to_string()], "{name}");
        assert_eq!(values(name, Some(of_operator)), [of_operator], "{name}");
    }
}
