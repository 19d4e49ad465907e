//! Bytes as an answer that the Rust client reads: a tensor is refused, or has as many numbers as its shape says.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use midemb_client::proto::{GetMidEmbResponse, Tensor};
use midemb_fuzz::with_peak;
use prost::Message;

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(answer) = GetMidEmbResponse::decode(data) else { return Corpus::Reject };
    for tensor in [&answer.mid_emb, &answer.cvr, &answer.user_emb, &answer.item_emb].into_iter().flatten() {
        check(tensor);
    }
    Corpus::Keep
});

fn check(tensor: &Tensor) {
    let ((values, matrix), peak) = with_peak(|| (tensor.values(), tensor.matrix()));
    // Halves are widened, and twice here.
    assert!(peak <= 4096 + 16 * (tensor.data.len() + 4 * tensor.shape.len()), "{peak} bytes");
    let Ok(values) = values else {
        assert!(matrix.is_err());
        return;
    };
    assert_eq!(values.len() as u128, tensor.shape.iter().map(|n| u128::from(*n)).product());
    let Ok(matrix) = matrix else { return };
    assert_eq!(matrix.rows().len() * matrix.n_columns, values.len());
    if let Some(n_rows) = tensor.shape.first().filter(|_| !values.is_empty()) {
        assert_eq!(matrix.rows().len(), *n_rows as usize);
        assert!(matrix.row(*n_rows as usize).is_none());
    }
}
