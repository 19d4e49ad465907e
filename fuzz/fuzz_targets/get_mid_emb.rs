//! Bytes as the message of a `GetMidEmb` call, through the layers, the codec, the checks and the pipeline with a real model.
//!
//! A message that keeps the contract is answered with one row per item, every other one with INVALID_ARGUMENT or NOT_FOUND.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::fuzz_target;
use midemb_client::proto::{DType, GetMidEmbRequest, GetMidEmbResponse, Output, RowStatus, Tensor};
use midemb_fuzz::{
    service::{LIMITS, MODEL, MidEmbCaller},
    with_peak,
};
use prost::Message;
use std::sync::{LazyLock, Mutex};
use tonic::Code;

static CALLER: LazyLock<Mutex<MidEmbCaller>> = LazyLock::new(|| Mutex::new(MidEmbCaller::start()));

fuzz_target!(|data: &[u8]| {
    let mut caller = CALLER.lock().unwrap();
    caller.forget();
    let (answer, peak) = with_peak(|| caller.get_mid_emb(data));
    // The message, twice; what is decoded of it; and its answer.
    assert!(peak <= (1 << 20) + 8 * data.len(), "{peak} bytes for a message of {}", data.len());
    let request = GetMidEmbRequest::decode(data);
    let expected = request.as_ref().map_or(Code::InvalidArgument, expected_code);
    // The rest of a text that is too long is not looked at, so it need not be what prost accepts.
    let has_long_text = |response: &GetMidEmbResponse| {
        let mut statuses = response.statuses().chain(response.history_statuses());
        statuses.any(|status| status == RowStatus::InvalidItem)
    };
    let is_beyond_prost = request.is_err() && answer.response.as_ref().is_some_and(has_long_text);
    assert!(answer.code == expected || is_beyond_prost, "{:?} {}", answer.code, answer.message);
    match (answer.response, request) {
        (Some(_), Err(_)) => {}
        (Some(response), Ok(request)) => {
            check_response(&request, &response);
            check_again(&response, &caller.get_mid_emb(data).response.unwrap());
        }
        (response, _) => assert!(response.is_none() && !answer.message.is_empty()),
    }
});

/// The status that the wire contract asks for.
fn expected_code(request: &GetMidEmbRequest) -> Code {
    let items = || request.candidates.iter().chain(&request.history);
    let n_actions = request.history_actions.len();
    let keeps_contract = (1..=LIMITS.max_candidates).contains(&request.candidates.len())
        && (n_actions == 0 || n_actions == request.history.len())
        && request.history_actions.iter().all(|action| (0..=8).contains(action))
        && request.history.len() <= LIMITS.max_history
        && items().all(|item| !item.id.is_empty())
        && request.outputs.iter().all(|output| (1..=4).contains(output))
        && (0..=3).contains(&request.dtype);
    match keeps_contract {
        false => Code::InvalidArgument,
        true if request.model.is_empty() || request.model == MODEL => Code::Ok,
        true => Code::NotFound,
    }
}

fn check_response(request: &GetMidEmbRequest, response: &GetMidEmbResponse) {
    let n = request.candidates.len();
    assert_eq!((response.statuses.len(), response.history_statuses.len()), (n, request.history.len()));
    let allowed = [RowStatus::Ok, RowStatus::UnknownItem, RowStatus::InvalidItem];
    assert!(response.statuses().all(|status| allowed.contains(&status)), "{:?}", response.statuses);
    let n_used = response.history_statuses().filter(|status| *status == RowStatus::Ok).count();
    assert_eq!(response.history_used as usize, n_used);
    check_tensor(request, Output::MidEmb, &response.mid_emb, &[n, 12]);
    check_tensor(request, Output::Cvr, &response.cvr, &[n]);
    check_tensor(request, Output::ItemEmb, &response.item_emb, &[n, 16]);
    check_tensor(request, Output::UserEmb, &response.user_emb, &[16]);
    for tensor in [&response.mid_emb, &response.cvr, &response.item_emb].into_iter().flatten() {
        for (row, status) in tensor.matrix().unwrap().rows().zip(response.statuses()) {
            assert!(status == RowStatus::Ok || row.iter().all(|value| *value == 0.0), "{status:?}");
        }
    }
}

/// Whether the tensor is there as it was asked for, with finite numbers.
fn check_tensor(request: &GetMidEmbRequest, output: Output, tensor: &Option<Tensor>, shape: &[usize]) {
    let is_asked = match request.outputs.as_slice() {
        [] => output == Output::MidEmb,
        outputs => outputs.contains(&(output as i32)),
    };
    assert_eq!(tensor.is_some(), is_asked, "{output:?}");
    let Some(tensor) = tensor else { return };
    let dtype = if request.dtype() == DType::DtypeUnspecified { DType::DtypeF32 } else { request.dtype() };
    assert_eq!(tensor.dtype(), dtype);
    assert!(tensor.shape.iter().map(|width| *width as usize).eq(shape.iter().copied()), "{output:?}");
    assert!(tensor.values().unwrap().iter().all(|value| value.is_finite()), "{output:?}");
}

/// The same message again finds everything cached and every text known, so no row is worse.
fn check_again(first: &GetMidEmbResponse, again: &GetMidEmbResponse) {
    let rows = || first.statuses().zip(again.statuses()).chain(first.history_statuses().zip(again.history_statuses()));
    assert!(rows().all(|(first, again)| first == again || first == RowStatus::UnknownItem));
    if rows().all(|(first, again)| first == again) {
        assert_eq!(again, first, "the same items have other vectors");
    }
}
