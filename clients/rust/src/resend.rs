//! Rows that a replica does not know: what is asked again, and how the two answers become one.
//!
//! A candidate that is unknown costs its own row, so only such candidates are asked again, with their text. A history item
//! that is unknown changes the user's embedding and with it every row, so the whole page is asked again. What serves may
//! change between the two answers; rows of two models are never mixed.

use crate::{
    proto::{GetMidEmbRequest, GetMidEmbResponse, Item, RowStatus, Tensor},
    sent_texts::SentTexts,
};

/// What has to be asked again.
#[derive(Debug, PartialEq)]
pub(crate) enum Resend {
    /// Nothing: every row is known, or its caller has no text for it.
    Nothing,
    /// These candidates, by their places in the page.
    Candidates(Vec<usize>),
    /// The page.
    Page,
}

impl Resend {
    /// `asked` is what the caller asked, `sent` what the replica was sent for it.
    pub(crate) fn of(asked: &GetMidEmbRequest, sent: &GetMidEmbRequest, answer: &GetMidEmbResponse) -> Self {
        let history = withheld(&asked.history, &sent.history, answer.history_statuses());
        if !history.is_empty() {
            return Resend::Page;
        }
        let candidates = withheld(&asked.candidates, &sent.candidates, answer.statuses());
        if candidates.is_empty() { Resend::Nothing } else { Resend::Candidates(candidates) }
    }

    /// The second request, with every text that the caller gave. It has to be sent with all of them, as it may go to another
    /// replica, which may not know the items either. It names the model of the first answer, because a visitor without an id may
    /// get another one each time.
    pub(crate) fn request(&self, asked: &GetMidEmbRequest, first: &GetMidEmbResponse) -> Option<GetMidEmbRequest> {
        let mut again = asked.clone();
        match self {
            Resend::Nothing => return None,
            Resend::Page => {}
            Resend::Candidates(places) => {
                again.candidates = places.iter().map(|place| asked.candidates[*place].clone()).collect();
            }
        }
        if let Some(model) = &first.model {
            again.model.clone_from(&model.name);
        }
        Some(again)
    }

    /// One answer of the two. Where they cannot be put together, the first one.
    pub(crate) fn merge(&self, first: GetMidEmbResponse, second: GetMidEmbResponse) -> GetMidEmbResponse {
        match self {
            Resend::Nothing => first,
            Resend::Page => second,
            Resend::Candidates(places) => merge_rows(&first, &second, places).unwrap_or(first),
        }
    }
}

/// The places of unknown items whose text the caller gave and the replica was not sent.
fn withheld(asked: &[Item], sent: &[Item], statuses: impl Iterator<Item = RowStatus>) -> Vec<usize> {
    let mut places = Vec::new();
    for (place, ((asked, sent), status)) in asked.iter().zip(sent).zip(statuses).enumerate() {
        if status == RowStatus::UnknownItem && asked.text.is_some() && sent.text.is_none() {
            places.push(place);
        }
    }
    places
}

/// Records which texts the replica has, according to its answer.
pub(crate) fn note(sent_texts: &SentTexts, sent: &GetMidEmbRequest, answer: &GetMidEmbResponse) {
    let history = sent.history.iter().zip(answer.history_statuses());
    let candidates = sent.candidates.iter().zip(answer.statuses());
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for (item, status) in history.chain(candidates) {
        match status {
            RowStatus::Ok | RowStatus::NotInTime => known.push(item),
            RowStatus::UnknownItem => unknown.push(item),
            _ => {}
        }
    }
    sent_texts.remember(known.into_iter());
    sent_texts.forget(unknown.into_iter());
}

/// `first` with the rows of `second` at `places`. None where the two answers come from different models or from different
/// user embeddings (another part of the history was known), or where `second` does not have these rows.
fn merge_rows(first: &GetMidEmbResponse, second: &GetMidEmbResponse, places: &[usize]) -> Option<GetMidEmbResponse> {
    let is_same_user = first.history_used == second.history_used && first.history_statuses == second.history_statuses;
    if first.model != second.model || !is_same_user || second.statuses.len() != places.len() {
        return None;
    }
    let mut merged = first.clone();
    for (status, place) in second.statuses.iter().zip(places) {
        *merged.statuses.get_mut(*place)? = *status;
    }
    merged.mid_emb = merge_tensor(first.mid_emb.as_ref(), second.mid_emb.as_ref(), places)?;
    merged.cvr = merge_tensor(first.cvr.as_ref(), second.cvr.as_ref(), places)?;
    merged.item_emb = merge_tensor(first.item_emb.as_ref(), second.item_emb.as_ref(), places)?;
    Some(merged)
}

/// The outer option is none if the two tensors cannot be merged, the inner one if the tensor was not requested.
fn merge_tensor(first: Option<&Tensor>, second: Option<&Tensor>, places: &[usize]) -> Option<Option<Tensor>> {
    let (first, second) = match (first, second) {
        (None, None) => return Some(None),
        (Some(first), Some(second)) => (first, second),
        _ => return None,
    };
    if first.dtype != second.dtype || first.shape.get(1..) != second.shape.get(1..) {
        return None;
    }
    let n_rows = *first.shape.first()? as usize;
    let n_row_bytes = first.data.len().checked_div(n_rows)?;
    if second.data.len() != places.len() * n_row_bytes {
        return None;
    }
    let mut data = first.data.to_vec();
    for (i, place) in places.iter().enumerate() {
        let row = second.data.get(i * n_row_bytes..(i + 1) * n_row_bytes)?;
        data.get_mut(place * n_row_bytes..(place + 1) * n_row_bytes)?.copy_from_slice(row);
    }
    Some(Some(Tensor { dtype: first.dtype, shape: first.shape.clone(), data: data.into() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{ItemText, ModelRef};
    use RowStatus::{NotInTime, Ok as RowOk, UnknownItem};

    fn item(id: &str, title: Option<&str>) -> Item {
        let text = title.map(|title| ItemText { title: title.to_owned(), ..ItemText::default() });
        Item { id: id.to_owned(), text }
    }

    fn page(candidates: Vec<Item>) -> GetMidEmbRequest {
        GetMidEmbRequest { history: vec![item("h", Some("seen"))], candidates, ..Default::default() }
    }

    fn answer(model: &str, rows: &[(RowStatus, f32)]) -> GetMidEmbResponse {
        let tensor = |shape: Vec<u32>, values: Vec<f32>| {
            let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            Some(Tensor { dtype: 1, shape, data: data.into() })
        };
        let n_rows = rows.len() as u32;
        GetMidEmbResponse {
            model: Some(ModelRef { name: format!("served-{model}"), digest: model.to_owned(), ..ModelRef::default() }),
            statuses: rows.iter().map(|(status, _)| (*status).into()).collect(),
            history_statuses: vec![RowOk.into()],
            mid_emb: tensor(vec![n_rows, 2], rows.iter().flat_map(|(_, x)| [*x, -x]).collect()),
            cvr: tensor(vec![n_rows], rows.iter().map(|(_, x)| *x).collect()),
            ..Default::default()
        }
    }

    #[test]
    fn only_withheld_texts_of_unknown_rows_are_sent_again() {
        let asked =
            page(vec![item("a", Some("one")), item("b", Some("two")), item("c", None), item("d", Some("four"))]);
        let mut sent = asked.clone();
        sent.history[0].text = None;
        sent.candidates[0].text = None;
        sent.candidates[1].text = None;
        // a was withheld and is known, b was withheld, c has no text, d was sent with its text.
        let first = answer("m", &[(RowOk, 1.0), (UnknownItem, 0.0), (UnknownItem, 0.0), (UnknownItem, 0.0)]);
        let resend = Resend::of(&asked, &sent, &first);
        assert_eq!(resend, Resend::Candidates(vec![1]));
        let again = resend.request(&asked, &first).unwrap();
        assert_eq!((again.candidates, again.history), (vec![item("b", Some("two"))], asked.history.clone()));
        assert_eq!(again.model, "served-m", "a visitor without an id may be answered by another model");

        let unknown_history = GetMidEmbResponse { history_statuses: vec![UnknownItem.into()], ..first.clone() };
        assert_eq!(Resend::of(&asked, &sent, &unknown_history), Resend::Page);
        assert_eq!(Resend::of(&asked, &asked, &unknown_history), Resend::Nothing);
    }

    #[test]
    fn rows_of_the_second_answer_take_their_places() {
        let first = answer("m", &[(UnknownItem, 0.0), (RowOk, 1.0), (UnknownItem, 0.0)]);
        let second = answer("m", &[(RowOk, 7.0), (NotInTime, 0.0)]);
        let merged = Resend::Candidates(vec![0, 2]).merge(first, second);
        assert_eq!(merged, answer("m", &[(RowOk, 7.0), (RowOk, 1.0), (NotInTime, 0.0)]));
    }

    #[test]
    fn answers_that_do_not_fit_are_not_mixed() {
        let first = answer("m", &[(UnknownItem, 0.0), (RowOk, 1.0)]);
        let resend = Resend::Candidates(vec![0]);
        let of_another_model = answer("n", &[(RowOk, 7.0)]);
        let too_long = answer("m", &[(RowOk, 7.0), (RowOk, 7.0)]);
        let no_tensor = GetMidEmbResponse { mid_emb: None, ..answer("m", &[(RowOk, 7.0)]) };
        let fewer_history_items = GetMidEmbResponse { history_used: 9, ..answer("m", &[(RowOk, 7.0)]) };
        let history_not_in_time =
            GetMidEmbResponse { history_statuses: vec![NotInTime.into()], ..answer("m", &[(RowOk, 7.0)]) };
        for second in [of_another_model, too_long, no_tensor, fewer_history_items, history_not_in_time] {
            assert_eq!(resend.merge(first.clone(), second), first);
        }
    }

    #[test]
    fn what_an_answer_says_is_noted() {
        let sent_texts = SentTexts::new(10);
        let asked = page(vec![item("a", Some("one")), item("b", Some("two")), item("c", Some("three"))]);
        note(&sent_texts, &asked, &answer("m", &[(RowOk, 1.0), (NotInTime, 0.0), (RowStatus::InvalidItem, 0.0)]));
        let has_text = |items: &[Item]| sent_texts.strip(items).iter().map(|i| i.text.is_some()).collect::<Vec<_>>();
        assert_eq!(has_text(&asked.candidates), [false, false, true]);
        assert_eq!(has_text(&asked.history), [false]);
        note(&sent_texts, &asked, &answer("m", &[(UnknownItem, 0.0), (RowOk, 1.0), (RowOk, 1.0)]));
        assert_eq!(has_text(&asked.candidates), [true, false, false]);
    }
}
