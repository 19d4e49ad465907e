//! What every command that talks to a server shares.

use crate::wire::proto::{
    Tensor, admin_service_client::AdminServiceClient, mid_emb_service_client::MidEmbServiceClient,
};
use anyhow::Context;
use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use half::{bf16, f16};
use std::{future::Future, time::Duration};
use tonic::{Status, transport::Channel};

/// Pages of ten thousand candidates with every output fit.
const MAX_ANSWER_BYTES: usize = 256 << 20;
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// An answer of 500 mid-embs is 128 KB. HTTP/2's usual frames of 16 KB would be written one by one.
const MAX_FRAME_BYTES: u32 = 1 << 20;

/// Runs a client command on one thread.
pub(super) fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}

async fn channel(server: &str) -> anyhow::Result<Channel> {
    let url = if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
    let endpoint = Channel::from_shared(url).with_context(|| format!("server address {server:?}"))?;
    let endpoint = endpoint.connect_timeout(CONNECT_WITHIN).tcp_nodelay(true).max_frame_size(MAX_FRAME_BYTES);
    endpoint.connect().await.with_context(|| format!("cannot connect to {server}"))
}

pub(super) async fn mid_emb(server: &str) -> anyhow::Result<MidEmbServiceClient<Channel>> {
    Ok(MidEmbServiceClient::new(channel(server).await?).max_decoding_message_size(MAX_ANSWER_BYTES))
}

pub(super) async fn admin(server: &str) -> anyhow::Result<AdminServiceClient<Channel>> {
    Ok(AdminServiceClient::new(channel(server).await?))
}

/// A status as people read it.
pub(super) fn refused(method: &str) -> impl Fn(Status) -> anyhow::Error {
    let method = method.to_owned();
    move |status| anyhow::anyhow!("{method}: {:?}: {}", status.code(), status.message())
}

/// The numbers of a tensor, whatever its type.
pub(super) fn numbers(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype {
        2 => tensor.data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        3 => tensor.data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => tensor.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// The length of a vector.
pub(super) fn norm(vector: &[f32]) -> f32 {
    vector.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// An empty table with these headings.
pub(super) fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(headings.iter().copied());
    table
}
