//! Answers are sampled into Parquet files that hold exactly what was served.

use crate::{
    harness::{Scrape, Server, config, eventually, film, films, fixture, floats, ids, page, root, rows, statuses},
    lifecycle::push,
    stores::{Moto, serve},
};
use midemb_client::proto::{DType, GetMidEmbRequest, GetMidEmbResponse, Output};
use parquet::{
    file::{reader::FileReader, serialized_reader::SerializedFileReader},
    record::{Field, Row},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};
use tonic::Request;

const SAMPLE_ALL: &str = "served_features.folder = \"features\"\nserved_features.percent = 100";

/// The rows of one file or, in the order of their names, of all files of a folder.
fn read(path: &Path) -> Vec<Row> {
    if path.is_dir() {
        return files(path).iter().flat_map(|file| read(file)).collect();
    }
    let reader = SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap();
    reader.get_row_iter(None).unwrap().map(Result::unwrap).collect()
}

/// The files that a reader of `date=*/*.parquet` finds.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder).map_or(Vec::new(), |entries| entries.map(|entry| entry.unwrap().path()).collect())
    };
    let mut files: Vec<PathBuf> = entries(folder).iter().flat_map(|date| entries(date)).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "parquet"));
    files.sort();
    files
}

fn field<'a>(row: &'a Row, name: &str) -> &'a Field {
    row.get_column_iter().find(|(column, _)| *column == name).unwrap_or_else(|| panic!("no column {name}")).1
}

fn text<'a>(row: &'a Row, name: &str) -> &'a str {
    match field(row, name) {
        Field::Str(text) => text,
        other => panic!("{name} is {other:?}"),
    }
}

fn vector(row: &Row, name: &str) -> Option<Vec<f32>> {
    match field(row, name) {
        Field::Null => None,
        Field::ListInternal(list) => Some(
            list.elements()
                .iter()
                .map(|element| match element {
                    Field::Float(value) => *value,
                    other => panic!("{name} has {other:?}"),
                })
                .collect(),
        ),
        other => panic!("{name} is {other:?}"),
    }
}

/// Asks with this id of the request, if any; returns the answer and the id that the server told.
async fn ask(server: &Server, request: GetMidEmbRequest, id: Option<&str>) -> (GetMidEmbResponse, Option<String>) {
    let mut request = Request::new(request);
    if let Some(id) = id {
        request.metadata_mut().insert("x-request-id", id.parse().unwrap());
    }
    let answer = server.client().await.get_mid_emb(request).await.unwrap();
    let told = answer.metadata().get("x-request-id").map(|id| id.to_str().unwrap().to_owned());
    (answer.into_inner(), told)
}

/// A page whose third candidate nobody knows.
fn page_with_an_unknown_item() -> GetMidEmbRequest {
    let mut candidates = films("c", 4);
    candidates[2] = ids(&[film("nobody-knows-it", "")]).remove(0);
    page(films("h", 3), candidates)
}

/// The rows are the candidates of `answer`, in order, with its vectors.
fn check_rows(found: &[&Row], answer: &GetMidEmbResponse) {
    let model = answer.model.as_ref().unwrap();
    let (mid_emb, item_emb) = (rows(&answer.mid_emb), rows(&answer.item_emb));
    let (cvr, user_emb) = (floats(&answer.cvr), floats(&answer.user_emb));
    assert_eq!(found.len(), answer.statuses.len());
    for (position, (row, status)) in found.iter().zip(statuses(answer)).enumerate() {
        assert_eq!(field(row, "position"), &Field::Int(position as i32));
        assert_eq!(text(row, "status"), status);
        assert_eq!((text(row, "model_name"), text(row, "model_version")), (&*model.name, &*model.version));
        assert_eq!(text(row, "bundle_digest"), model.digest);
        assert_eq!(field(row, "history_length"), &Field::Int(answer.history_used as i32));
        let of_ok = |vector: &[f32]| (status == "OK").then(|| vector.to_vec());
        assert_eq!(vector(row, "mid_emb"), of_ok(&mid_emb[position]));
        assert_eq!(vector(row, "item_emb"), of_ok(&item_emb[position]));
        assert_eq!(vector(row, "user_emb"), of_ok(&user_emb));
        let expected = if status == "OK" { Field::Float(cvr[position]) } else { Field::Null };
        assert_eq!(field(row, "cvr"), &expected);
    }
}

fn of_request<'a>(rows: &'a [Row], id: &str) -> Vec<&'a Row> {
    rows.iter().filter(|row| text(row, "request_id") == id).collect()
}

fn n_requests(scrape: &Scrape, result: &str) -> f64 {
    scrape.sum("midemb_served_features_requests_total", &[&format!("result={result:?}")])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_candidate_is_in_the_files_with_the_vectors_that_were_served() {
    let server = Server::start_with(&fixture(), SAMPLE_ALL);
    let (sent, told) = ask(&server, page_with_an_unknown_item(), Some("search-4711")).await;
    assert_eq!(told.as_deref(), Some("search-4711"));
    assert_eq!(statuses(&sent), ["OK", "OK", "UNKNOWN_ITEM", "OK"]);
    let visitor = GetMidEmbRequest { user_id: String::new(), ..page(Vec::new(), films("d", 2)) };
    let (of_visitor, made) = ask(&server, visitor, None).await;
    let made = made.expect("the caller was not told the id that was made");
    // What is sampled is not rounded as the answer is.
    let half = GetMidEmbRequest { dtype: DType::DtypeF16.into(), ..page_with_an_unknown_item() };
    ask(&server, half, Some("half")).await;
    // An id that no header of ours would hold is as good as none.
    let (_, instead) = ask(&server, page_with_an_unknown_item(), Some("with spaces")).await;
    assert!(instead.is_some_and(|id| id != made && id.len() == 32));
    let only_mid_emb = GetMidEmbRequest { outputs: vec![Output::MidEmb.into()], ..page_with_an_unknown_item() };
    ask(&server, only_mid_emb, Some("only-mid-emb")).await;

    let (folder, _file) = server.stop();
    let rows = read(&folder.path().join("features"));
    assert_eq!(rows.len(), 4 + 2 + 4 + 4 + 4);
    let found = of_request(&rows, "search-4711");
    check_rows(&found, &sent);
    check_rows(&of_request(&rows, &made), &of_visitor);
    check_rows(&of_request(&rows, "half"), &sent);
    let items: Vec<&str> = found.iter().map(|row| text(row, "item_id")).collect();
    assert_eq!(items, ["c-0", "c-1", "nobody-knows-it", "c-3"]);
    assert!(found.iter().all(|row| text(row, "user_id") == "user"));
    assert!(of_request(&rows, &made).iter().all(|row| field(row, "user_id") == &Field::Null));
    for row in of_request(&rows, "only-mid-emb") {
        assert_eq!(vector(row, "mid_emb").is_some(), text(row, "status") == "OK");
        assert_eq!((vector(row, "user_emb"), vector(row, "item_emb"), field(row, "cvr")), (None, None, &Field::Null));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn files_appear_while_the_server_serves_and_only_their_owner_may_read_them() {
    let server = Server::start_with(&fixture(), &format!("{SAMPLE_ALL}\nserved_features.rotate_seconds = 1"));
    let folder = server.file.parent().unwrap().join("features");
    let (answer, id) = ask(&server, page(films("h", 3), films("c", 5)), None).await;
    eventually("a file is finished", async || !files(&folder).is_empty()).await;
    let [file] = files(&folder).try_into().unwrap();
    let rows = read(&file);
    check_rows(&of_request(&rows, &id.unwrap()), &answer);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&file), mode(file.parent().unwrap()), mode(&folder)), (0o600, 0o700, 0o700));
    // A file is visible before it is counted.
    eventually("the request is counted", async || n_requests(&server.scrape(), "written") == 1.0).await;
    let scrape = server.scrape();
    assert_eq!(n_requests(&scrape, "queue_full"), 0.0);
    assert_eq!(scrape.sum("midemb_served_features_rows_total", &["result=\"written\""]), 5.0);
    eventually("the file is counted", async || {
        server.scrape().sum("midemb_served_features_files_total", &["result=\"written\""]) == 1.0
    })
    .await;
    let n_bytes = std::fs::metadata(&file).unwrap().len() as f64;
    eventually("the folder is measured", async || {
        server.scrape().sum("midemb_served_features_disk_bytes", &[]) == n_bytes
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_percentage_changes_with_a_push() {
    let server = Server::start_with(&fixture(), &SAMPLE_ALL.replace("100", "0"));
    let (_, told) = ask(&server, page(films("h", 3), films("c", 5)), None).await;
    assert_eq!(told, None, "a request that is not sampled needs no id");
    let text = std::fs::read_to_string(&server.file).unwrap();
    push(&server, text.replace("percent = 0", "percent = 100")).await.unwrap();
    let (_, told) = ask(&server, page(films("h", 3), films("c", 5)), None).await;
    assert!(told.is_some());
    let other_size = text.replace("percent = 0", "percent = 100\nserved_features.rotate_mb = 2");
    let refused = push(&server, other_size).await.unwrap_err();
    assert!(refused.message().contains("served_features.rotate_mb"), "{refused:?}");
    let (folder, _file) = server.stop();
    let sampled: BTreeSet<String> =
        read(&folder.path().join("features")).iter().map(|row| text_of(row, "request_id")).collect();
    assert_eq!(sampled, BTreeSet::from([told.unwrap()]));
}

fn text_of(row: &Row, name: &str) -> String {
    text(row, name).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn whoever_is_sampled_by_user_is_sampled_always() {
    let by_user = SAMPLE_ALL.replace("100", "50") + "\nserved_features.sample_by = \"user\"";
    let server = Server::start_with(&fixture(), &by_user);
    let mut sampled = BTreeSet::new();
    for round in 0..3 {
        for user in 0..40 {
            let request = GetMidEmbRequest { user_id: format!("user-{user}"), ..page(Vec::new(), films("c", 1)) };
            if ask(&server, request, None).await.1.is_some() {
                assert!(round == 0 || sampled.contains(&user), "a user came into the sample");
                sampled.insert(user);
            } else {
                assert!(!sampled.contains(&user), "a user left the sample");
            }
        }
    }
    assert!((8..=32).contains(&sampled.len()), "{} of 40 users at 50 %", sampled.len());
}

/// The names of the objects under `prefix`.
fn objects(moto: &Moto, prefix: &str) -> Vec<String> {
    let listing = moto.get(&format!("bundles?list-type=2&prefix={prefix}"));
    let listing = String::from_utf8(listing).unwrap();
    let keys = listing.split("<Key>").skip(1);
    keys.map(|rest| rest.split("</Key>").next().unwrap().replace("%3D", "=").replace("&#x3D;", "=")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn finished_files_are_uploaded_and_removed_and_so_is_what_an_earlier_process_left() {
    let moto = Moto::start();
    let upload =
        format!("{SAMPLE_ALL}\nserver.drain_seconds = 1\nserved_features.upload_to = \"s3://bundles/features/pod-1\"");
    // The first process cannot reach its store and leaves its file.
    let server = serve(config(&fixture(), &upload), "127.0.0.1:9".parse().unwrap());
    let (first, _) = ask(&server, page(films("h", 3), films("c", 5)), Some("first")).await;
    let (folder, file) = server.stop();
    let features = folder.path().join("features");
    let [left] = files(&features).try_into().unwrap();
    let left_bytes = std::fs::read(&left).unwrap();

    let server = serve((folder, file), moto.address);
    eventually("the file that was left is uploaded", async || objects(&moto, "features/").len() == 1).await;
    let (second, _) = ask(&server, page(films("h", 3), films("d", 5)), Some("second")).await;
    let (folder, _file) = server.stop();
    assert_eq!(files(&features), Vec::<PathBuf>::new(), "an uploaded file was kept");

    let relative = left.strip_prefix(&features).unwrap().to_str().unwrap();
    assert_eq!(moto.get(&format!("bundles/features/pod-1/{relative}")), left_bytes);
    let mut rows = Vec::new();
    for object in objects(&moto, "features/") {
        let copy = folder.path().join("copy.parquet");
        std::fs::write(&copy, moto.get(&format!("bundles/{object}"))).unwrap();
        rows.extend(read(&copy));
    }
    check_rows(&of_request(&rows, "first"), &first);
    check_rows(&of_request(&rows, "second"), &second);
}

/// The SQL of docs/served-features.md, on files that a server wrote, with clicks on two items of each request.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_documented_sql_makes_a_training_table() {
    let server = Server::start_with(&fixture(), SAMPLE_ALL);
    let mut answers = Vec::new();
    let mut events = "request_id,item_id,event\n".to_owned();
    for i in 0..5 {
        let id = format!("00{i}");
        let (answer, _) = ask(&server, page_with_an_unknown_item(), Some(&id)).await;
        answers.push(answer);
        // The last candidate was not shown, and the unknown one was, by whatever rank the caller gave it.
        events +=
            &format!("{id},c-0,impression\n{id},c-1,impression\n{id},c-1,click\n{id},nobody-knows-it,impression\n");
    }
    // A call that was repeated, and what somebody else's server answered.
    ask(&server, page_with_an_unknown_item(), Some("000")).await;
    events += "not-sampled,c-0,impression\nnot-sampled,c-0,click\n";
    let (folder, _file) = server.stop();
    std::fs::write(folder.path().join("events.csv"), events).unwrap();

    let run = Command::new(root().join(".venv/bin/python"))
        .arg(root().join("tests/clients/training_table.py"))
        .arg(root().join("docs/served-features.md"))
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let table: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(table["digests"], json!([answers[0].model.as_ref().unwrap().digest]));
    let rows_of_table = table["rows"].as_array().unwrap();
    assert_eq!(rows_of_table.len(), 10, "{rows_of_table:?}");
    for row in rows_of_table {
        let answer = &answers[row["request_id"].as_str().unwrap().parse::<usize>().unwrap()];
        let position = if row["item_id"] == "c-0" { 0 } else { 1 };
        assert_eq!((&row["user_id"], &row["clicked"]), (&json!("user"), &json!(position == 1)));
        let found: Vec<f32> = serde_json::from_value(row["mid_emb"].clone()).unwrap();
        assert_eq!(found, rows(&answer.mid_emb)[position]);
        let cvr: f32 = serde_json::from_value(row["cvr"].clone()).unwrap();
        assert_eq!(cvr, floats(&answer.cvr)[position]);
    }
}
