//! What is encoded here is read again by the library's own reader, which knows nothing of how it was made.

use super::*;
use crate::{
    domain::Outputs,
    served_features::{
        SampledAnswer,
        file::OpenFile,
        folder::UtcTime,
        stand_ins::{MID_DIM, MID_EMB, USER_DIM, column, read, sample, tensor, text, value, vector},
    },
};
use parquet::record::{Field, Row};
use proptest::prelude::*;
use std::time::Instant;

/// Writes each list of samples as a row group of one file and reads the file.
fn write_and_read(groups: &[Vec<Sample>]) -> Vec<Row> {
    let folder = tempfile::tempdir().unwrap();
    let mut file = OpenFile::create(folder.path(), &UtcTime::now(), "digest", Instant::now()).unwrap();
    let mut buffer = Vec::new();
    for group in groups {
        file.append(group, &mut buffer).unwrap();
    }
    read(&file.close().unwrap())
}

/// Writes the samples, whose requests are numbered from 0, and compares the rows with what each sample holds.
fn check(groups: &[Vec<Sample>]) {
    let rows = write_and_read(groups);
    let mut rows = rows.iter();
    for (request, sample) in groups.iter().flatten().enumerate() {
        let SampledAnswer { statuses, mid_emb, cvr, user_emb, item_emb, .. } = &sample.answer;
        for (position, status) in statuses.iter().enumerate() {
            let row = rows.next().expect("rows are missing");
            assert_eq!(text(row, "request_id"), format!("request-{request}"));
            match sample.request.user_id.as_str() {
                "" => assert_eq!(column(row, "user_id"), &Field::Null),
                user_id => assert_eq!(text(row, "user_id"), user_id),
            }
            assert_eq!(column(row, "time"), &Field::TimestampMicros(sample.request.at_us));
            let model = ["model_name", "model_version", "bundle_digest"].map(|name| text(row, name));
            assert_eq!(model, ["learn", "7", "abcdef0123456789"]);
            assert_eq!(column(row, "position"), &Field::Int(position as i32));
            assert_eq!(text(row, "item_id"), format!("item-{request}-{position}"));
            assert_eq!(text(row, "status"), status_name(*status));
            assert_eq!(column(row, "history_length"), &Field::Int(request as i32));
            let is_ok = *status == RowStatus::Ok;
            let row_of = |n_dims: usize| (0..n_dims).map(|i| value(request, position * n_dims + i)).collect::<Vec<_>>();
            let expected = |asked: &Option<Bytes>, values: Vec<f32>| asked.as_ref().filter(|_| is_ok).map(|_| values);
            assert_eq!(vector(row, "mid_emb"), expected(mid_emb, row_of(MID_DIM)));
            assert_eq!(vector(row, "item_emb"), expected(item_emb, row_of(USER_DIM)));
            let user = (0..USER_DIM).map(|i| value(request, i)).collect();
            assert_eq!(vector(row, "user_emb"), expected(user_emb, user));
            let cvr = expected(cvr, row_of(1)).map_or(Field::Null, |cvr| Field::Float(cvr[0]));
            assert_eq!(column(row, "cvr"), &cvr);
        }
    }
    assert_eq!(rows.next(), None, "there are more rows than candidates");
}

#[test]
fn rows_that_are_not_ok_have_no_vectors_and_the_others_have_their_own() {
    use RowStatus::{Failed, InvalidItem, NotInTime, Ok, Shed, UnknownItem};
    let all = Outputs { mid_emb: true, cvr: true, user_emb: true, item_emb: true };
    let samples = vec![
        sample(0, &[Ok, Ok, UnknownItem, Ok, NotInTime, InvalidItem, Ok], all),
        sample(1, &[UnknownItem, UnknownItem], all),
        sample(2, &[Shed, Failed, Ok], MID_EMB),
        sample(3, &[Ok], Outputs::default()),
    ];
    check(&[samples]);
}

/// Dictionary indexes of more than eight bits.
#[test]
fn hundreds_of_requests_fit_into_one_row_group() {
    let all = Outputs { mid_emb: true, cvr: true, user_emb: true, item_emb: true };
    check(&[(0..300).map(|i| sample(i, &[RowStatus::Ok, RowStatus::NotInTime], all)).collect()]);
}

/// The bounds of queue, files and disk are in these bytes. A user embedding is one vector in memory and one in each row of a file.
#[test]
fn a_row_group_is_hardly_larger_than_its_samples_say() {
    let n_rows = 2000;
    let user_emb = Outputs { mid_emb: false, user_emb: true, ..MID_EMB };
    let mut one = sample(1, &vec![RowStatus::Ok; n_rows], user_emb);
    one.answer.user_emb = Some(tensor(1, 300));
    let folder = tempfile::tempdir().unwrap();
    let mut file = OpenFile::create(folder.path(), &UtcTime::now(), "digest", Instant::now()).unwrap();
    file.append(std::slice::from_ref(&one), &mut Vec::new()).unwrap();
    let n_beyond = file.n_bytes.saturating_sub(one.n_bytes() as u64);
    assert!(n_beyond < 20 * n_rows as u64, "{n_beyond} bytes more than the {} that it counts", one.n_bytes());
}

fn status() -> impl Strategy<Value = RowStatus> {
    prop_oneof![4 => Just(RowStatus::Ok), 1 => proptest::sample::select(RowStatus::ALL.to_vec())]
}

fn outputs() -> impl Strategy<Value = Outputs> {
    any::<[bool; 4]>().prop_map(|[mid_emb, cvr, user_emb, item_emb]| Outputs { mid_emb, cvr, user_emb, item_emb })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_samples_are_read_as_they_were_written(
        requests in proptest::collection::vec((proptest::collection::vec(status(), 1..40), outputs()), 1..12),
        n_first in 0_usize..12,
    ) {
        let numbered = requests.iter().enumerate();
        let mut first: Vec<Sample> = numbered.map(|(i, (statuses, outputs))| sample(i, statuses, *outputs)).collect();
        let second = first.split_off(n_first.min(first.len()));
        let groups: Vec<Vec<Sample>> = [first, second].into_iter().filter(|group| !group.is_empty()).collect();
        check(&groups);
    }
}
