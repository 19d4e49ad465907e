//! `midemb cache export|import`: a running server's vectors as safetensors files.
//!
//! An exported file appears under its name only once it is complete. The server checks what an imported file holds.

use super::terminal;
use anyhow::{Context, bail};
use indicatif::{HumanBytes, ProgressBar};
use midemb_client::{
    AdminAccess, AdminClient,
    proto::{CacheChunk, ExportCacheRequest, ImportCacheResponse},
};
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
/// How many chunks may be read from the file before the connection can take them.
const MAX_WAITING_CHUNKS: usize = 2;
const KNOWN_SIZE: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {eta}";
const UNKNOWN_SIZE: &str = "{spinner} {msg} {bytes} {bytes_per_sec}";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    access: AdminAccess,
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
        /// The served model whose vectors to export. Without it, the first one.
        #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
        model: String,
        /// The file. It is written under another name and renamed to this one when it is complete, replacing an older file.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Import files of vectors, exported or computed elsewhere. Each file is taken whole or refused; the first refusal ends the
    /// command.
    Import {
        /// Files that `midemb cache export` wrote, or files of a snapshot.
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let admin = AdminClient::connect(&args.access).await?;
    match args.command {
        Command::Export { cache, model, out } => {
            let exported = export(&admin, ExportCacheRequest { cache, model }, &out).await?;
            let entries = exported.n_entries.map_or(String::new(), |n| format!("{n} entries, "));
            println!("{}: {entries}{} ({} bytes)", out.display(), HumanBytes(exported.n_bytes), exported.n_bytes);
        }
        Command::Import { files } => {
            for file in files {
                let ImportCacheResponse { cache, entries, skipped } =
                    import(&admin, &file).await.with_context(|| file.display().to_string())?;
                println!("{}: {cache}, {entries} entries, {skipped} skipped", file.display());
            }
        }
    }
    Ok(())
}

struct Exported {
    n_bytes: u64,
    /// From the file's header, where it says so.
    n_entries: Option<u64>,
}

async fn export(admin: &AdminClient, request: ExportCacheRequest, out: &Path) -> anyhow::Result<Exported> {
    let mut chunks = admin.export_cache(request).await?;
    let mut file = UnfinishedFile::create(out).with_context(|| out.display().to_string())?;
    let bar = terminal::progress(UNKNOWN_SIZE).with_message("export");
    let (mut n_bytes, mut header) = (0, HeaderReader::default());
    while let Some(CacheChunk { data }) = chunks.next().await? {
        file.file.write_all(&data).with_context(|| file.path.display().to_string())?;
        n_bytes += data.len() as u64;
        header.read(&data);
        if let Some(n_file_bytes) = header.n_file_bytes
            && bar.length() != Some(n_file_bytes)
        {
            bar.set_length(n_file_bytes);
            bar.set_style(terminal::progress_style(KNOWN_SIZE));
        }
        bar.set_position(n_bytes);
    }
    bar.finish_and_clear();
    if let Some(n_file_bytes) = header.n_file_bytes
        && n_file_bytes != n_bytes
    {
        bail!("ExportCache: received {n_bytes} bytes of a file of {n_file_bytes}");
    }
    file.finish(out).with_context(|| out.display().to_string())?;
    Ok(Exported { n_bytes, n_entries: header.n_entries })
}

/// A file under a temporary name. It is removed unless it is finished.
struct UnfinishedFile {
    file: File,
    path: PathBuf,
}

impl UnfinishedFile {
    fn create(out: &Path) -> anyhow::Result<Self> {
        let name = out.file_name().context("not a file name")?;
        let path = out.with_file_name(format!(".{}.new-{}", name.display(), process::id()));
        Ok(UnfinishedFile { file: File::create_new(&path)?, path })
    }

    fn finish(self, out: &Path) -> std::io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, out)
    }
}

impl Drop for UnfinishedFile {
    fn drop(&mut self) {
        // It fails where the file has been renamed.
        let _ = fs::remove_file(&self.path);
    }
}

/// Reads the header of a safetensors file that comes in pieces: its length in eight bytes, then JSON. What it says is only
/// shown and compared, so a header that cannot be read is not an error here.
#[derive(Debug, Default)]
struct HeaderReader {
    bytes: Vec<u8>,
    is_done: bool,
    n_entries: Option<u64>,
    n_file_bytes: Option<u64>,
}

impl HeaderReader {
    /// No header of ours is longer.
    const MAX_HEADER_BYTES: u64 = 64 << 10;

    /// Takes the next piece of the file.
    fn read(&mut self, piece: &[u8]) {
        if self.is_done {
            return;
        }
        let n_missing = size_of::<u64>() + Self::MAX_HEADER_BYTES as usize - self.bytes.len();
        self.bytes.extend_from_slice(&piece[..n_missing.min(piece.len())]);
        let Some((length, rest)) = self.bytes.split_first_chunk() else { return };
        let n_header_bytes = u64::from_le_bytes(*length);
        if n_header_bytes > Self::MAX_HEADER_BYTES {
            self.is_done = true;
            return;
        }
        let Some(header) = rest.get(..n_header_bytes as usize) else { return };
        let header: Value = serde_json::from_slice(header).unwrap_or_default();
        self.is_done = true;
        self.n_entries = header["__metadata__"]["n"].as_str().and_then(|n| n.parse().ok());
        let tensors = header.as_object().into_iter().flatten().filter(|(name, _)| *name != "__metadata__");
        let n_data_bytes = tensors.filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64()).max();
        self.n_file_bytes = n_data_bytes.and_then(|n| n.checked_add(size_of::<u64>() as u64 + n_header_bytes));
    }
}

async fn import(admin: &AdminClient, path: &Path) -> anyhow::Result<ImportCacheResponse> {
    let file = File::open(path)?;
    let bar = terminal::progress(KNOWN_SIZE).with_message("import");
    bar.set_length(file.metadata()?.len());
    let (chunks, waiting) = mpsc::channel(MAX_WAITING_CHUNKS);
    let sending = send(file, chunks, &bar);
    let importing = async { Ok(admin.import_cache(ReceiverStream::new(waiting)).await?) };
    // A read error ends the call, too: the server must not take a file that cannot be read further for a complete one.
    let imported = tokio::try_join!(sending, importing);
    bar.finish_and_clear();
    let ((), answer) = imported?;
    Ok(answer)
}

/// Sends the file. Where the call ends early, so does this: the call's answer says why.
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
    fn a_header_is_read_whatever_pieces_it_comes_in() {
        let file = safetensors();
        for n_bytes in [1, 7, 8, 50, file.len()] {
            let mut header = HeaderReader::default();
            for piece in file.chunks(n_bytes) {
                header.read(piece);
            }
            assert_eq!((header.n_entries, header.n_file_bytes), (Some(3), Some(file.len() as u64)));
        }
    }

    #[test]
    fn a_file_of_another_kind_gives_nothing() {
        let too_long = [&u64::MAX.to_le_bytes()[..], &[b' '; 100]].concat();
        let no_json = [&4u64.to_le_bytes()[..], b"nope"].concat();
        let no_tensor = [&2u64.to_le_bytes()[..], b"{}"].concat();
        for bytes in [vec![], too_long, no_json, no_tensor] {
            let mut header = HeaderReader::default();
            header.read(&bytes);
            header.read(&[0; 100_000]);
            assert_eq!((header.n_entries, header.n_file_bytes), (None, None));
        }
    }

    #[test]
    fn an_export_is_complete_or_absent() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("item.safetensors");
        fs::write(&out, "before").unwrap();
        drop(UnfinishedFile::create(&out).unwrap());
        assert_eq!(fs::read_to_string(&out).unwrap(), "before");
        let mut file = UnfinishedFile::create(&out).unwrap();
        file.file.write_all(b"after").unwrap();
        file.finish(&out).unwrap();
        assert_eq!(fs::read_to_string(&out).unwrap(), "after");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a file was left behind");
        assert!(UnfinishedFile::create(Path::new("/")).is_err());
    }
}
