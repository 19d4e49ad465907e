//! From answers to messages.

use super::proto;
use crate::{
    domain::{Action, DType, Matrix, MidEmbResponse, ModelRef, RowStatus, WarmSummary},
    served_features::SampledAnswer,
};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use tonic::codegen::Bytes;

#[cfg(target_endian = "big")]
compile_error!("tensors are little-endian on the wire and are sent in their memory layout");

/// The answer to `GetMidEmb` with tensors in `dtype`.
pub fn response(response: MidEmbResponse, dtype: DType) -> proto::GetMidEmbResponse {
    let n = response.statuses.len();
    let matrix = |m: Matrix| tensor(&[m.n_rows(), m.n_cols], m.data, dtype);
    proto::GetMidEmbResponse {
        model: Some(model(&response.model)),
        mid_emb: response.mid_emb.map(matrix),
        statuses: statuses(&response.statuses),
        cvr: response.cvr.map(|cvr| tensor(&[n], cvr, dtype)),
        user_emb: response.user_emb.map(|user| tensor(&[user.len()], user, dtype)),
        item_emb: response.item_emb.map(matrix),
        history_used: response.n_history_used as u32,
        history_statuses: statuses(&response.history_statuses),
    }
}

/// The same for a request that was sampled, and the part of the answer that is written. Both share the vectors of an answer in
/// single precision; of any other, the sample has its own.
pub fn sampled_response(response: MidEmbResponse, dtype: DType) -> (proto::GetMidEmbResponse, SampledAnswer) {
    let copied = |values: Option<&[f32]>| values.map(|values| Bytes::copy_from_slice(bytemuck::cast_slice(values)));
    let mut sampled = SampledAnswer {
        model: response.model.clone(),
        statuses: response.statuses.clone(),
        n_history_used: response.n_history_used,
        mid_emb: None,
        cvr: None,
        user_emb: None,
        item_emb: None,
    };
    if dtype != DType::F32 {
        sampled.mid_emb = copied(response.mid_emb.as_ref().map(|matrix| matrix.data.as_slice()));
        sampled.cvr = copied(response.cvr.as_deref());
        sampled.user_emb = copied(response.user_emb.as_deref());
        sampled.item_emb = copied(response.item_emb.as_ref().map(|matrix| matrix.data.as_slice()));
        return (self::response(response, dtype), sampled);
    }
    let encoded = self::response(response, dtype);
    let shared = |tensor: &Option<proto::Tensor>| tensor.as_ref().map(|tensor| tensor.data.clone());
    sampled.mid_emb = shared(&encoded.mid_emb);
    sampled.cvr = shared(&encoded.cvr);
    sampled.user_emb = shared(&encoded.user_emb);
    sampled.item_emb = shared(&encoded.item_emb);
    (encoded, sampled)
}

/// The reference to the model that answered.
pub fn model(model: &ModelRef) -> proto::ModelRef {
    let ModelRef { name, version, digest } = model.clone();
    proto::ModelRef { name, version, digest }
}

/// The wire's enum value of an action.
pub fn action(action: Action) -> proto::Action {
    match action {
        Action::Unspecified => proto::Action::Unspecified,
        Action::View => proto::Action::View,
        Action::Click => proto::Action::Click,
        Action::Like => proto::Action::Like,
        Action::Dislike => proto::Action::Dislike,
        Action::Share => proto::Action::Share,
        Action::Cart => proto::Action::Cart,
        Action::Purchase => proto::Action::Purchase,
        Action::Skip => proto::Action::Skip,
    }
}

/// The answer to `WarmItems`.
pub fn warm_summary(summary: WarmSummary) -> proto::WarmItemsResponse {
    proto::WarmItemsResponse {
        items: summary.n_items,
        encoded: summary.n_encoded,
        already_cached: summary.n_cached,
        invalid: summary.n_invalid,
        failed: summary.n_failed,
    }
}

fn statuses(statuses: &[RowStatus]) -> Vec<i32> {
    statuses.iter().map(|status| row_status(*status) as i32).collect()
}

fn row_status(status: RowStatus) -> proto::RowStatus {
    match status {
        RowStatus::Ok => proto::RowStatus::Ok,
        RowStatus::UnknownItem => proto::RowStatus::UnknownItem,
        RowStatus::NotInTime => proto::RowStatus::NotInTime,
        RowStatus::InvalidItem => proto::RowStatus::InvalidItem,
        RowStatus::Failed | RowStatus::Shed => proto::RowStatus::Failed,
        RowStatus::NotUsed => proto::RowStatus::NotUsed,
    }
}

/// A tensor of `shape` in `dtype`; single precision is sent without a copy. A value beyond what `dtype` can hold becomes the
/// greatest or least that it can, never infinite.
fn tensor(shape: &[usize], mut data: Vec<f32>, dtype: DType) -> proto::Tensor {
    let (dtype, data) = match dtype {
        DType::F32 => (proto::DType::DtypeF32, Bytes::from_owner(Floats(data))),
        DType::F16 => {
            saturate(&mut data, f16::MAX.to_f32());
            let mut halves = vec![f16::ZERO; data.len()];
            halves.convert_from_f32_slice(&data);
            (proto::DType::DtypeF16, Bytes::from_owner(Floats(halves)))
        }
        DType::Bf16 => {
            saturate(&mut data, bf16::MAX.to_f32());
            let mut halves = vec![bf16::ZERO; data.len()];
            halves.convert_from_f32_slice(&data);
            (proto::DType::DtypeBf16, Bytes::from_owner(Floats(halves)))
        }
    };
    let shape = shape.iter().map(|d| *d as u32).collect();
    proto::Tensor { dtype: dtype as i32, shape, data }
}

fn saturate(data: &mut [f32], max: f32) {
    for value in data {
        *value = value.clamp(-max, max);
    }
}

/// Numbers whose memory is sent as bytes.
struct Floats<T>(Vec<T>);

impl<T: bytemuck::NoUninit> AsRef<[u8]> for Floats<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decoding takes an action's number as its index in `Action::ALL`.
    #[test]
    fn actions_have_the_numbers_of_the_wire() {
        for (number, of_domain) in (0..).zip(Action::ALL) {
            assert_eq!(action(of_domain) as i32, number);
        }
        assert!(proto::Action::try_from(Action::ALL.len() as i32).is_err(), "the wire has more actions");
    }

    /// Files name statuses as the contract does.
    #[test]
    fn statuses_have_one_name_on_the_wire_and_in_files() {
        for status in RowStatus::ALL {
            let name = row_status(status).as_str_name();
            assert_eq!(name.strip_prefix("ROW_STATUS_"), Some(crate::served_features::status_name(status)));
        }
    }

    fn answer() -> MidEmbResponse {
        let model = ModelRef { name: "a".to_owned(), version: "1".to_owned(), digest: "d".repeat(64) };
        MidEmbResponse {
            model: model.into(),
            statuses: vec![RowStatus::Ok; 2],
            history_statuses: Vec::new(),
            n_history_used: 0,
            mid_emb: Some(Matrix { n_cols: 2, data: vec![1.0, 1e6, -0.1, 0.0] }),
            cvr: Some(vec![0.3, 0.4]),
            user_emb: None,
            item_emb: None,
        }
    }

    #[test]
    fn a_sample_shares_the_vectors_of_an_answer_in_single_precision() {
        let (sent, sampled) = sampled_response(answer(), DType::F32);
        let (sent, kept) = (sent.mid_emb.unwrap().data, sampled.mid_emb.unwrap());
        assert_eq!((sent.as_ptr(), sent.len()), (kept.as_ptr(), kept.len()), "the vectors were copied");
        assert!(sampled.user_emb.is_none() && sampled.cvr.is_some());
    }

    #[test]
    fn a_sample_keeps_what_an_answer_in_half_precision_rounds_away() {
        for dtype in [DType::F16, DType::Bf16] {
            let (sent, sampled) = sampled_response(answer(), dtype);
            assert_eq!(sent.mid_emb.unwrap().data.len(), 8);
            let kept: Vec<f32> = bytemuck::pod_collect_to_vec(&sampled.mid_emb.unwrap());
            assert_eq!(kept, answer().mid_emb.unwrap().data);
        }
    }

    #[test]
    fn tensors_are_row_major_and_little_endian_in_every_type() {
        let data = vec![1.0, -2.5, 0.0, 65504.0];
        let f32s = tensor(&[2, 2], data.clone(), DType::F32);
        assert_eq!(f32s.shape, [2, 2]);
        assert_eq!(f32s.data[..8], [0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0]);
        let f16s = tensor(&[4], data.clone(), DType::F16);
        assert_eq!(f16s.data[..], [0x00, 0x3c, 0x00, 0xc1, 0, 0, 0xff, 0x7b]);
        let bf16s = tensor(&[4], data, DType::Bf16);
        assert_eq!(bf16s.data[..6], [0x80, 0x3f, 0x20, 0xc0, 0, 0]);
        let beyond = vec![65520.0, -1e6, f32::MAX, f32::MIN];
        let f16s_beyond = tensor(&[4], beyond.clone(), DType::F16);
        assert_eq!(
            f16s_beyond.data[..],
            [0xff, 0x7b, 0xff, 0xfb, 0xff, 0x7b, 0xff, 0xfb],
            "not the largest finite numbers"
        );
        assert_eq!(tensor(&[4], beyond, DType::Bf16).data[4..], [0x7f, 0x7f, 0x7f, 0xff]);
        assert_eq!((f16s.dtype, bf16s.dtype), (2, 3));
    }
}
