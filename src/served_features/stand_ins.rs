//! Samples for the tests of this module, and a reader of the files.

use super::{SampledAnswer, SampledRequest, sample::Sample};
use crate::domain::{Item, MidEmbRequest, ModelRef, Outputs, RowStatus};
use bytes::Bytes;
use parquet::{
    file::{reader::FileReader, serialized_reader::SerializedFileReader},
    record::{Field, Row},
};
use std::{path::Path, sync::Arc, time::Instant};

/// The width of the mid-embs and of the other vectors.
pub(super) const MID_DIM: usize = 3;
pub(super) const USER_DIM: usize = 5;

pub(super) fn model(digest: &str) -> Arc<ModelRef> {
    Arc::new(ModelRef { name: "learn".to_owned(), version: "7".to_owned(), digest: digest.to_owned() })
}

/// The number at `position` of a tensor of the request with this number.
pub(super) fn value(request: usize, position: usize) -> f32 {
    (request * 1000 + position) as f32 + 0.1
}

pub(super) fn tensor(request: usize, n: usize) -> Bytes {
    (0..n).flat_map(|i| value(request, i).to_le_bytes()).collect()
}

/// The request with this number, whose candidates have these statuses, with the outputs that it asked for.
pub(super) fn sample(request: usize, statuses: &[RowStatus], outputs: Outputs) -> Sample {
    let n = statuses.len();
    let ids: Vec<String> = (0..n).map(|i| format!("item-{request}-{i}")).collect();
    let user_id = if request.is_multiple_of(3) { String::new() } else { format!("user-{}", request / 2) };
    let asked = MidEmbRequest {
        user_id: &user_id,
        history: Vec::new(),
        history_actions: Vec::new(),
        candidates: ids.iter().map(|id| Item { id, text: None }).collect(),
        model: None,
        outputs,
        deadline: Instant::now(),
    };
    let answer = SampledAnswer {
        model: model("abcdef0123456789"),
        statuses: statuses.to_vec(),
        n_history_used: request,
        mid_emb: outputs.mid_emb.then(|| tensor(request, n * MID_DIM)),
        cvr: outputs.cvr.then(|| tensor(request, n)),
        user_emb: outputs.user_emb.then(|| tensor(request, USER_DIM)),
        item_emb: outputs.item_emb.then(|| tensor(request, n * USER_DIM)),
    };
    Sample { request: SampledRequest::new(&asked, format!("request-{request}")), answer }
}

pub(super) const MID_EMB: Outputs = Outputs { mid_emb: true, cvr: false, user_emb: false, item_emb: false };

/// A sample of `n` candidates that are all OK, at a certain time.
pub(super) fn page(request: usize, n: usize) -> Sample {
    let mut sample = sample(request, &vec![RowStatus::Ok; n], MID_EMB);
    sample.request.at_us = 1_795_867_200_000_000;
    sample
}

/// All rows of a file, read by the library and not by anything of ours.
pub(super) fn read(path: &Path) -> Vec<Row> {
    let reader = SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap();
    reader.get_row_iter(None).unwrap().map(Result::unwrap).collect()
}

pub(super) fn column<'a>(row: &'a Row, name: &str) -> &'a Field {
    row.get_column_iter().find(|(found, _)| *found == name).map(|(_, field)| field).unwrap()
}

/// The text of a column, for one that is not null.
pub(super) fn text(row: &Row, name: &str) -> String {
    let Field::Str(text) = column(row, name) else { panic!("{name} is {:?}", column(row, name)) };
    text.clone()
}

/// A vector, or none where it is null.
pub(super) fn vector(row: &Row, name: &str) -> Option<Vec<f32>> {
    match column(row, name) {
        Field::Null => None,
        Field::ListInternal(list) => {
            let element = |field: &Field| if let Field::Float(value) = field { *value } else { panic!("{field:?}") };
            Some(list.elements().iter().map(element).collect())
        }
        other => panic!("{name} is {other:?}"),
    }
}
