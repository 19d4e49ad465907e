//! `midemb query`: one user, a page of candidates, a table of what came back.

use super::{
    client::{self, norm, numbers, refused, table},
    items,
};
use crate::{
    domain::Item,
    wire::proto::{GetMidEmbRequest, GetMidEmbResponse, Output, RowStatus, Tensor},
};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};
use tonic::Request;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The server's `server.listen`.
    #[arg(long, default_value = "127.0.0.1:50051")]
    server: String,
    /// Items, one JSON object a line: {"id": "...", "text": {"title": "...", "category": "..."}}.
    #[arg(long, value_name = "FILE", default_value = "models/default/sample_items.jsonl")]
    items: PathBuf,
    /// The first so many items are the user's history, oldest first; the rest are the candidates.
    #[arg(long, default_value_t = 8)]
    history: usize,
    /// The user's id.
    #[arg(long, default_value = "demo-user")]
    user: String,
    /// The model's name; routed by user where this is absent.
    #[arg(long, default_value = "")]
    model: String,
    /// Send ids without text: the server must have seen the items before.
    #[arg(long)]
    ids_only: bool,
    /// How long to wait for an answer.
    #[arg(long, default_value_t = 30_000)]
    deadline_ms: u64,
    /// Rows of the table at most; 0 prints all.
    #[arg(long, default_value_t = 10)]
    rows: usize,
    /// Print one JSON object with every vector.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let items = items::read(&args.items)?;
    let n_history = args.history.min(items.len() - 1);
    let (history, candidates) = items.split_at(n_history);
    let message = |item: &Item| {
        let mut message = items::message(item);
        message.text = message.text.filter(|_| !args.ids_only);
        message
    };
    let mut request = Request::new(GetMidEmbRequest {
        user_id: args.user.clone(),
        history: history.iter().map(message).collect(),
        candidates: candidates.iter().map(message).collect(),
        model: args.model.clone(),
        outputs: [Output::MidEmb, Output::Cvr, Output::UserEmb, Output::ItemEmb].map(i32::from).to_vec(),
        dtype: 0,
    });
    request.set_timeout(Duration::from_millis(args.deadline_ms));
    let mut server = client::mid_emb(&args.server).await?;
    let start = Instant::now();
    let answer = server.get_mid_emb(request).await.map_err(refused("GetMidEmb"))?.into_inner();
    let page = Page { candidates, answer, took: start.elapsed() };
    if args.json {
        println!("{}", page.to_json());
    } else {
        page.print(args.rows);
    }
    Ok(())
}

/// What was asked and what came back.
struct Page<'a> {
    candidates: &'a [Item],
    answer: GetMidEmbResponse,
    took: Duration,
}

impl Page<'_> {
    fn statuses(&self) -> Vec<&'static str> {
        self.answer.statuses().map(short).collect()
    }

    fn print(&self, max_rows: usize) {
        let answer = &self.answer;
        let statuses = self.statuses();
        let (mid_emb, cvr) = (rows(&answer.mid_emb), column(&answer.cvr));
        let mut shown = table(&["candidate", "title", "status", "|mid_emb|", "mid_emb", "cvr"]);
        let max_rows = if max_rows == 0 { usize::MAX } else { max_rows };
        for (i, item) in self.candidates.iter().enumerate().take(max_rows) {
            let title = item.text.as_ref().map_or("", |text| text.title.as_str());
            let start: Vec<String> = mid_emb[i].iter().take(3).map(|x| format!("{x:+.3}")).collect();
            shown.add_row([
                &item.id,
                title,
                statuses[i],
                &format!("{:.4}", norm(&mid_emb[i])),
                &format!("{} ...", start.join(" ")),
                &format!("{:.4}", cvr[i]),
            ]);
        }
        println!("{shown}");
        let n_more = self.candidates.len().saturating_sub(max_rows);
        if n_more > 0 {
            println!("... and {n_more} more rows (--rows 0 prints all)");
        }
        let model = answer.model.clone().unwrap_or_default();
        let n_ok = statuses.iter().filter(|status| **status == "OK").count();
        println!(
            "{n_ok} of {} rows OK, {} history items used, |user_emb| {:.4}, model {} {} ({:.12}), {:.1} ms",
            statuses.len(),
            answer.history_used,
            norm(&column(&answer.user_emb)),
            model.name,
            model.version,
            model.digest,
            self.took.as_secs_f64() * 1e3,
        );
    }

    fn to_json(&self) -> Value {
        let answer = &self.answer;
        let statuses = self.statuses();
        let (mid_emb, item_emb, cvr) = (rows(&answer.mid_emb), rows(&answer.item_emb), column(&answer.cvr));
        let model = answer.model.clone().unwrap_or_default();
        let history: Vec<&str> = answer.history_statuses().map(short).collect();
        let row = |i: usize| json!({"id": self.candidates[i].id, "status": statuses[i], "mid_emb": mid_emb[i], "item_emb": item_emb[i], "cvr": cvr[i]});
        json!({
            "model": {"name": model.name, "version": model.version, "digest": model.digest},
            "took_ms": self.took.as_secs_f64() * 1e3,
            "history_used": answer.history_used,
            "history_statuses": history,
            "user_emb": column(&answer.user_emb),
            "rows": (0..self.candidates.len()).map(row).collect::<Vec<_>>(),
        })
    }
}

fn short(status: RowStatus) -> &'static str {
    status.as_str_name().trim_start_matches("ROW_STATUS_")
}

fn column(tensor: &Option<Tensor>) -> Vec<f32> {
    tensor.as_ref().map(numbers).unwrap_or_default()
}

fn rows(tensor: &Option<Tensor>) -> Vec<Vec<f32>> {
    let width = tensor.as_ref().and_then(|t| t.shape.get(1)).copied().unwrap_or(1).max(1) as usize;
    column(tensor).chunks(width).map(<[f32]>::to_vec).collect()
}
