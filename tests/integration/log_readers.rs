//! Whatever happens to the log, the service goes on: its reader may leave, stop reading, or have no room left on its disk.

use crate::harness::{
    BrokenBundle, LogReader, Server, config, eventually, films, fixture, midemb, page, run_to_end, statuses,
};
use std::{fs::File, process::Stdio};

/// Writes several hundred bytes of log per call.
const VERBOSE: &str = "telemetry.log_filter = \"trace\"";

/// Asks for mid-embs until log lines are lost, and then once more. Ends the server, which must write its snapshot.
async fn serves_on(reader: LogReader) {
    let snapshots = tempfile::tempdir().unwrap();
    let more = format!("{VERBOSE}\nsnapshot.folder = {:?}", snapshots.path().display().to_string());
    let server = Server::start_with_log_reader(&more, reader);
    let mut client = server.client().await;
    eventually("log lines are lost", async || {
        let answer = client.get_mid_emb(page(films("seen", 5), films("new", 20))).await.unwrap().into_inner();
        assert!(statuses(&answer).iter().all(|status| *status == "OK"));
        server.scrape().sum("midemb_log_lines_lost_total", &[]) > 0.0
    })
    .await;
    let answer = client.get_mid_emb(page(films("seen", 5), films("newer", 20))).await.unwrap().into_inner();
    assert!(statuses(&answer).iter().all(|status| *status == "OK"));
    drop(client);
    let _config = server.stop();
    assert!(std::fs::read_dir(snapshots.path()).unwrap().next().is_some(), "no snapshot was written");
}

/// The first line after the reader had left used to panic, and the panic's own line ended the process, without a snapshot.
#[tokio::test]
async fn a_log_whose_reader_leaves_does_not_end_the_service() {
    serves_on(LogReader::Leaves).await;
}

/// The thread that wrote the line into the full pipe, often one of two I/O threads, used to wait for ever.
#[tokio::test]
async fn a_log_that_nobody_reads_does_not_block_the_service() {
    serves_on(LogReader::StopsReading).await;
}

#[test]
fn a_command_whose_error_line_cannot_be_written_keeps_its_exit_code() {
    let (_folder, path) = config(&fixture(), "limits.max_candidate = 3");
    for subcommand in [&["serve"][..], &["config", "check"]] {
        let mut command = midemb();
        command.args(subcommand).arg("--config").arg(&path);
        let full_disk = File::options().write(true).open("/dev/full").unwrap();
        let status = command.stderr(full_disk).stdout(Stdio::null()).status().unwrap();
        assert_eq!(status.code(), Some(2), "{subcommand:?}");
    }
}

/// A line with a message of ONNX Runtime had two fields of that name, of which readers of JSON keep either or none.
#[test]
fn a_log_line_has_one_message() {
    let bundle = BrokenBundle::new();
    bundle.replace("cvr.onnx", b"not a graph");
    let (_folder, path) = config(bundle.folder(), "telemetry.log_filter = \"debug\"");
    let output = run_to_end(midemb().arg("serve").arg("--config").arg(&path));
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("\"category\":")).collect();
    assert!(lines.len() > 100, "only {} lines of ONNX Runtime: {text}", lines.len());
    for line in lines {
        assert_eq!(line.matches("\"message\":").count(), 1, "{line}");
    }
}
