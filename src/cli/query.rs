//! `midemb query`: one user and a page of candidates, and the answer as a table or as JSON.

use super::{
    items::{self, Item},
    terminal::table,
};
use anyhow::{Context, ensure};
use midemb_client::{
    Client, Matrix,
    proto::{Action, GetMidEmbRequest, GetMidEmbResponse, ModelRef, Output, RowStatus, Tensor},
};
use serde::Serialize;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The server's `server.listen`.
    #[arg(long, default_value = "127.0.0.1:50051")]
    server: String,
    /// Items, one JSON object per line: {"id": "...", "text": {"title": "...", "category": "..."}}.
    #[arg(long, value_name = "FILE", default_value = "models/default/sample_items.jsonl")]
    items: PathBuf,
    /// How many items from the start of the file are the user's history, oldest first; the rest are the candidates.
    #[arg(long, default_value_t = 8)]
    history: usize,
    /// What the user did with the history items, oldest first, such as `click,like,purchase`: one action for all of them, or one
    /// each. Known are unspecified, view, click, like, dislike, share, cart, purchase and skip.
    #[arg(long, value_name = "ACTIONS", value_delimiter = ',', value_parser = parse_action)]
    history_actions: Vec<Action>,
    /// The user's id; empty for a visitor without one.
    #[arg(long, default_value = "demo-user")]
    user: String,
    /// The model's name. Without it the server routes by user.
    #[arg(long, default_value = "")]
    model: String,
    /// Send ids without text. The server must have seen the items before.
    #[arg(long)]
    ids_only: bool,
    /// The deadline of the call in milliseconds.
    #[arg(long, default_value_t = 30_000)]
    deadline_ms: u64,
    /// The largest number of table rows; 0 prints all.
    #[arg(long, default_value_t = 10)]
    rows: usize,
    /// Print one JSON object with all vectors.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let items = items::read(&args.items)?;
    let n_history = args.history.min(items.len() - 1);
    let (history, candidates) = items.split_at(n_history);
    let message = |item: &Item| {
        let mut message = items::message(item);
        if args.ids_only {
            message.text = None;
        }
        message
    };
    let history_actions = one_per_item(&args.history_actions, n_history)?;
    let request = GetMidEmbRequest {
        user_id: args.user.clone(),
        history: history.iter().map(message).collect(),
        candidates: candidates.iter().map(message).collect(),
        model: args.model.clone(),
        outputs: [Output::MidEmb, Output::Cvr, Output::UserEmb, Output::ItemEmb].map(i32::from).to_vec(),
        dtype: 0,
        history_actions: history_actions.into_iter().map(i32::from).collect(),
    };
    let client = Client::connect([args.server.as_str()]).await?;
    let start = Instant::now();
    let answer = client.get_mid_emb(&request, Duration::from_millis(args.deadline_ms)).await?;
    let page = Page::new(candidates, &answer, start.elapsed())?;
    if args.json {
        println!("{}", serde_json::to_string(&page.to_json())?);
    } else {
        page.print(args.rows);
    }
    Ok(())
}

fn parse_action(name: &str) -> Result<Action, String> {
    let action = Action::from_str_name(&format!("ACTION_{}", name.to_uppercase()));
    action.ok_or_else(|| {
        "it is not an action, use unspecified, view, click, like, dislike, share, cart, purchase or skip".to_owned()
    })
}

/// The actions of a history of `n_items`: none, one for all, or one each.
fn one_per_item(actions: &[Action], n_items: usize) -> anyhow::Result<Vec<Action>> {
    match *actions {
        [action] => Ok(vec![action; n_items]),
        _ => {
            let n_actions = actions.len();
            ensure!(
                n_actions == 0 || n_actions == n_items,
                "--history-actions names {n_actions} actions for {n_items} history items: give one for all, or one each"
            );
            Ok(actions.to_vec())
        }
    }
}

/// A page of candidates and its answer, with every tensor read.
struct Page<'a> {
    candidates: &'a [Item],
    answer: &'a GetMidEmbResponse,
    statuses: Vec<&'static str>,
    mid_emb: Matrix<'a>,
    item_emb: Matrix<'a>,
    user_emb: Matrix<'a>,
    cvr: Matrix<'a>,
    took: Duration,
}

impl<'a> Page<'a> {
    /// Checks that the answer has every output and one row per candidate.
    fn new(candidates: &'a [Item], answer: &'a GetMidEmbResponse, took: Duration) -> anyhow::Result<Self> {
        let page = Page {
            candidates,
            answer,
            statuses: answer.statuses().map(short_name).collect(),
            mid_emb: matrix("mid_emb", &answer.mid_emb)?,
            item_emb: matrix("item_emb", &answer.item_emb)?,
            user_emb: matrix("user_emb", &answer.user_emb)?,
            cvr: matrix("cvr", &answer.cvr)?,
            took,
        };
        let n_rows =
            [page.mid_emb.rows().len(), page.item_emb.rows().len(), page.cvr.values.len(), page.statuses.len()];
        ensure!(n_rows == [candidates.len(); 4], "the answer does not have one row per candidate");
        Ok(page)
    }

    fn print(&self, max_rows: usize) {
        let mut shown = table(&["candidate", "title", "status", "|mid_emb|", "mid_emb", "cvr"]);
        let max_rows = if max_rows == 0 { usize::MAX } else { max_rows };
        for (i, (item, mid_emb)) in self.candidates.iter().zip(self.mid_emb.rows()).enumerate().take(max_rows) {
            let title = item.text.as_ref().map_or("", |text| text.title.as_str());
            let first_numbers: Vec<String> = mid_emb.iter().take(3).map(|x| format!("{x:+.3}")).collect();
            shown.add_row([
                &item.id,
                title,
                self.statuses[i],
                &format!("{:.4}", norm(mid_emb)),
                &format!("{} ...", first_numbers.join(" ")),
                &format!("{:.4}", self.cvr.values[i]),
            ]);
        }
        println!("{shown}");
        let n_more = self.candidates.len().saturating_sub(max_rows);
        if n_more > 0 {
            println!("... and {n_more} more rows (--rows 0 prints all)");
        }
        let model = self.model();
        let n_ok = self.statuses.iter().filter(|status| **status == "OK").count();
        println!(
            "{n_ok} of {} rows OK, {} history items used, |user_emb| {:.4}, model {} {} ({:.12}), {:.1} ms",
            self.statuses.len(),
            self.answer.history_used,
            norm(&self.user_emb.values),
            model.name,
            model.version,
            model.digest,
            self.took.as_secs_f64() * 1e3,
        );
    }

    fn to_json(&self) -> PageJson<'_> {
        let row = |(i, item): (usize, &'a Item)| RowJson {
            id: &item.id,
            status: self.statuses[i],
            mid_emb: self.mid_emb.row(i).unwrap_or_default(),
            item_emb: self.item_emb.row(i).unwrap_or_default(),
            cvr: self.cvr.values[i],
        };
        PageJson {
            model: self.model(),
            took_ms: self.took.as_secs_f64() * 1e3,
            history_used: self.answer.history_used,
            history_statuses: self.answer.history_statuses().map(short_name).collect(),
            user_emb: &self.user_emb.values,
            rows: self.candidates.iter().enumerate().map(row).collect(),
        }
    }

    fn model(&self) -> ModelRef {
        self.answer.model.clone().unwrap_or_default()
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct PageJson<'a> {
    model: ModelRef,
    took_ms: f64,
    history_used: u32,
    history_statuses: Vec<&'static str>,
    user_emb: &'a [f32],
    rows: Vec<RowJson<'a>>,
}

#[derive(Serialize)]
struct RowJson<'a> {
    id: &'a str,
    status: &'static str,
    mid_emb: &'a [f32],
    item_emb: &'a [f32],
    cvr: f32,
}

fn matrix<'a>(name: &str, tensor: &'a Option<Tensor>) -> anyhow::Result<Matrix<'a>> {
    let tensor = tensor.as_ref().with_context(|| format!("the answer has no {name}"))?;
    tensor.matrix().with_context(|| name.to_owned())
}

/// Without the prefix that the wire's names have.
fn short_name(status: RowStatus) -> &'static str {
    status.as_str_name().trim_start_matches("ROW_STATUS_")
}

fn norm(vector: &[f32]) -> f32 {
    vector.iter().map(|x| x * x).sum::<f32>().sqrt()
}
