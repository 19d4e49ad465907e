//! `midemb cache export|import`: a running server's vectors as safetensors files.
//!
//! A file that is exported is whole or is not there. What a file holds is the server's to check.

use super::client::{self, AdminClient, AdminServer, refused};
use crate::wire::proto::{CacheChunk, ExportCacheRequest, ImportCacheResponse};
use anyhow::{Context, bail};
use indicatif::{HumanBytes, ProgressBar};
use serde_json::Value;
use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const CHUNK_BYTES: u64 = 1 << 20;
/// Chunks that were read before the connection could take them.
const MAX_WAITING_CHUNKS: usize = 2;
const BYTES: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {eta}";
const BYTES_OF_UNKNOWN: &str = "{spinner} {msg} {bytes} {bytes_per_sec}";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    server: AdminServer,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write the vectors of one cache into a safetensors file, hottest first.
    Export {
        /// Which cache: the encoder's embeddings or the item tower's.
        #[arg(long, value_parser = ["content", "item"])]
        cache: String,
        /// The served model whose vectors they are; the first one where this is absent.
        #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
        model: String,
        /// The file, which is written under another name and takes this one, replacing what was there, once it is whole.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Put vectors files in, exported or computed elsewhere. Each is taken whole or refused; the first refusal ends it.
    Import {
        /// Files as `midemb cache export` writes them, or parts of a snapshot.
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let mut admin = args.server.connect().await?;
    match args.command {
        Command::Export { cache, model, out } => {
            let exported = export(&mut admin, ExportCacheRequest { cache, model }, &out).await?;
            let entries = exported.n_entries.map_or(String::new(), |n| format!("{n} entries, "));
            println!("{}: {entries}{} ({} bytes)", out.display(), HumanBytes(exported.n_bytes), exported.n_bytes);
        }
        Command::Import { files } => {
            for file in files {
                let ImportCacheResponse { cache, entries, skipped } =
                    import(&mut admin, &file).await.with_context(|| file.display().to_string())?;
                println!("{}: {cache}, {entries} entries, {skipped} skipped", file.display());
            }
        }
    }
    Ok(())
}

struct Exported {
    n_bytes: u64,
    /// As the file's header says it.
    n_entries: Option<u64>,
}

async fn export(admin: &mut AdminClient, request: ExportCacheRequest, out: &Path) -> anyhow::Result<Exported> {
    let mut chunks = admin.export_cache(request).await.map_err(refused("ExportCache"))?.into_inner();
    let mut file = Unfinished::create(out).with_context(|| out.display().to_string())?;
    let bar = client::progress(BYTES_OF_UNKNOWN).with_message("export");
    let (mut n_bytes, mut start) = (0, Start::default());
    while let Some(CacheChunk { data }) = chunks.message().await.map_err(refused("ExportCache"))? {
        file.file.write_all(&data).with_context(|| file.path.display().to_string())?;
        n_bytes += data.len() as u64;
        if start.take(&data) {
            bar.set_length(start.n_file_bytes.unwrap_or_default());
            bar.set_style(client::style(BYTES));
        }
        bar.set_position(n_bytes);
    }
    bar.finish_and_clear();
    if start.n_file_bytes.is_some_and(|n| n != n_bytes) {
        bail!("ExportCache: {n_bytes} bytes came, of {}", start.n_file_bytes.unwrap_or_default());
    }
    file.finish(out).with_context(|| out.display().to_string())?;
    Ok(Exported { n_bytes, n_entries: start.n_entries })
}

/// A file beside the one it will be. Dropped before that, it is removed.
struct Unfinished {
    file: File,
    path: PathBuf,
}

impl Unfinished {
    fn create(out: &Path) -> anyhow::Result<Self> {
        let name = out.file_name().context("is no name for a file")?;
        let path = out.with_file_name(format!(".{}.new-{}", name.display(), process::id()));
        Ok(Unfinished { file: File::create_new(&path)?, path })
    }

    fn finish(self, out: &Path) -> std::io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, out)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Nothing is there any more where it was renamed.
        let _ = fs::remove_file(&self.path);
    }
}

/// The start of a safetensors file, read for what the header says: eight bytes of its length, then JSON. It is only shown and
/// compared, so one that cannot be read is no error here.
#[derive(Debug, Default)]
struct Start {
    seen: Vec<u8>,
    is_done: bool,
    n_entries: Option<u64>,
    n_file_bytes: Option<u64>,
}

impl Start {
    /// As long as a header of ours may be.
    const MAX_HEADER_BYTES: u64 = 64 << 10;

    /// Takes the next bytes. True once: when they complete a header that says how long the file is.
    fn take(&mut self, bytes: &[u8]) -> bool {
        if self.is_done {
            return false;
        }
        let n_wanted = size_of::<u64>() + Self::MAX_HEADER_BYTES as usize - self.seen.len();
        self.seen.extend_from_slice(&bytes[..n_wanted.min(bytes.len())]);
        let Some((length, rest)) = self.seen.split_first_chunk() else { return false };
        let n_header_bytes = u64::from_le_bytes(*length);
        if n_header_bytes > Self::MAX_HEADER_BYTES {
            self.is_done = true;
            return false;
        }
        let Some(header) = rest.get(..n_header_bytes as usize) else { return false };
        self.is_done = true;
        let header: Value = serde_json::from_slice(header).unwrap_or_default();
        self.n_entries = header["__metadata__"]["n"].as_str().and_then(|n| n.parse().ok());
        let tensors = header.as_object().into_iter().flatten().filter(|(name, _)| *name != "__metadata__");
        let n_data_bytes = tensors.filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64()).max();
        self.n_file_bytes = n_data_bytes.and_then(|n| n.checked_add(size_of::<u64>() as u64 + n_header_bytes));
        self.n_file_bytes.is_some()
    }
}

async fn import(admin: &mut AdminClient, path: &Path) -> anyhow::Result<ImportCacheResponse> {
    let file = File::open(path)?;
    let bar = client::progress(BYTES).with_message("import");
    bar.set_length(file.metadata()?.len());
    let (chunks, waiting) = mpsc::channel(MAX_WAITING_CHUNKS);
    let sending = send(file, chunks, &bar);
    let importing = async {
        let answer = admin.import_cache(ReceiverStream::new(waiting)).await;
        Ok(answer.map_err(refused("ImportCache"))?.into_inner())
    };
    // Whichever fails ends the other: a file that cannot be read on is never one that ended.
    let imported = tokio::try_join!(sending, importing);
    bar.finish_and_clear();
    Ok(imported?.1)
}

/// Until the file ends, or nobody wants more of it: then the call's answer says why.
async fn send(mut file: File, chunks: mpsc::Sender<CacheChunk>, bar: &ProgressBar) -> anyhow::Result<()> {
    loop {
        let mut data = Vec::new();
        let n_bytes = (&mut file).take(CHUNK_BYTES).read_to_end(&mut data)?;
        if n_bytes == 0 || chunks.send(CacheChunk { data: data.into() }).await.is_err() {
            return Ok(());
        }
        bar.inc(n_bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn safetensors() -> Vec<u8> {
        let header = br#"{"__metadata__":{"n":"3"},"a":{"data_offsets":[0,12]},"b":{"data_offsets":[12,20]}}"#;
        [&(header.len() as u64).to_le_bytes(), &header[..], &[7; 20]].concat()
    }

    #[test]
    fn a_start_is_read_however_it_is_cut() {
        let file = safetensors();
        for n_bytes in [1, 7, 8, 50, file.len()] {
            let mut start = Start::default();
            let n_complete = file.chunks(n_bytes).filter(|chunk| start.take(chunk)).count();
            assert_eq!((n_complete, start.n_entries, start.n_file_bytes), (1, Some(3), Some(file.len() as u64)));
        }
    }

    #[test]
    fn a_start_that_is_something_else_says_nothing() {
        let too_long = [&u64::MAX.to_le_bytes()[..], &[b' '; 100]].concat();
        let no_json = [&4u64.to_le_bytes()[..], b"nope"].concat();
        let no_tensor = [&2u64.to_le_bytes()[..], b"{}"].concat();
        for bytes in [vec![], too_long, no_json, no_tensor] {
            let mut start = Start::default();
            assert!(!start.take(&bytes) && !start.take(&[0; 100_000]));
            assert_eq!((start.n_entries, start.n_file_bytes), (None, None));
        }
    }

    #[test]
    fn an_export_is_whole_or_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("item.safetensors");
        fs::write(&out, "before").unwrap();
        drop(Unfinished::create(&out).unwrap());
        assert_eq!(fs::read_to_string(&out).unwrap(), "before");
        let mut file = Unfinished::create(&out).unwrap();
        file.file.write_all(b"after").unwrap();
        file.finish(&out).unwrap();
        assert_eq!(fs::read_to_string(&out).unwrap(), "after");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a file was left behind");
        assert!(Unfinished::create(Path::new("/")).is_err());
    }
}
