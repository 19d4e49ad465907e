//! `midemb bundle inspect|verify`: bundles without a server.

use crate::{
    bundle::{self, Manifest, digest, golden::StageReport, load::read_manifest, manifest::EncoderSpec},
    cli::terminal::table,
    config::library_from_environment,
    content::encoder::Batching,
    domain::Tolerance,
    inference::{ProviderChoice, Runtime},
};
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Print what a bundle holds, without loading it.
    Inspect {
        /// The bundle's folder.
        folder: PathBuf,
    },
    /// Check a bundle as a start of the server does: digests, graphs, golden vectors.
    Verify {
        /// The bundle's folder.
        folder: PathBuf,
        /// The path of libonnxruntime.so. Without it the library is searched for as `serve` does.
        #[arg(long, value_name = "FILE")]
        onnxruntime: Option<PathBuf>,
    },
}

pub(super) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Inspect { folder } => inspect(&folder),
        Command::Verify { folder, onnxruntime } => verify(&folder, onnxruntime.as_deref()),
    }
}

fn inspect(folder: &Path) -> anyhow::Result<()> {
    let bundle = read_manifest(folder)?;
    let manifest = &bundle.manifest;
    println!("{} {}", manifest.name, manifest.version);
    println!("digest          {}", bundle.digest);
    println!("encoder digest  {}", digest::encoder_digest(manifest));
    println!("tower digest    {}", digest::tower_digest(manifest));
    println!("item text       at most {} tokens of: {}", manifest.item_text.max_tokens, manifest.item_text.template);
    println!("encoder         {}", describe_encoder(manifest));
    println!("history         {}", describe_history(manifest));
    let mut graphs = table(&["graph", "file", "inputs", "outputs", "width"]);
    let mut add_graph = |name: &str, file: &str, inputs: &[String], outputs: &[String], dim: usize| {
        graphs.add_row([name, file, &inputs.join(", "), &outputs.join(", "), &dim.to_string()]);
    };
    let (encoder, user_tower, item_tower) = (&manifest.encoder, &manifest.user_tower, &manifest.item_tower);
    add_graph("encoder", &encoder.file, &encoder.inputs, &encoder.outputs, encoder.dim);
    add_graph("user tower", &user_tower.file, &user_tower.inputs, &user_tower.outputs, user_tower.dim);
    add_graph("item tower", &item_tower.file, &item_tower.inputs, &item_tower.outputs, item_tower.dim);
    add_graph("cvr", &manifest.cvr.file, &manifest.cvr.inputs, &manifest.cvr.outputs, manifest.cvr.dim);
    println!("\n{graphs}\n");
    let mut files = table(&["file", "bytes", "sha256", "fetched from"]);
    for file in &manifest.files {
        files.add_row([&file.path, &file.bytes.to_string(), &file.sha256, file.pypi.as_deref().unwrap_or("")]);
    }
    println!("{files}\n");
    print!("{}", toml::to_string(&manifest.provenance)?);
    Ok(())
}

fn describe_encoder(manifest: &Manifest) -> String {
    let EncoderSpec { precision, batching, tolerance, .. } = &manifest.encoder;
    let batching = match batching {
        Batching::Together => "texts share runs",
        Batching::Alone => "one text per run",
    };
    let Tolerance { absolute, cosine } = tolerance;
    let precision = precision.as_str();
    format!("{precision}, {batching}, golden within {absolute:e} and cosine {cosine}")
}

fn describe_history(manifest: &Manifest) -> String {
    let (n_items, keeps) = (manifest.user_tower.max_history, manifest.history.keeps.as_str());
    let actions: Vec<&str> = manifest.history.actions.iter().map(|action| action.as_str()).collect();
    let actions = if actions.is_empty() { "none".to_owned() } else { actions.join(", ") };
    let from_values = match (manifest.history.liked_from, manifest.history.disliked_to) {
        (None, _) => String::new(),
        (Some(like), None) => format!(", from values: {like} or more is a like"),
        (Some(like), Some(dislike)) => {
            format!(", from values: {like} or more is a like, {dislike} or less a dislike")
        }
    };
    format!(
        "the newest {n_items} items, oldest first; trained on {keeps} items of a user; actions: {actions}{from_values}"
    )
}

fn verify(folder: &Path, library: Option<&Path>) -> anyhow::Result<()> {
    let runtime = Runtime::load(
        library.map(Path::to_path_buf).or_else(library_from_environment).as_deref(),
        ProviderChoice::Auto,
    )?;
    let (bundle, reports) = bundle::verify(folder, &runtime)?;
    let mut stages = table(&["stage", "vectors", "largest difference", "smallest cosine"]);
    for StageReport { stage, n_vectors, max_absolute, min_cosine } in reports {
        stages.add_row([stage, &n_vectors.to_string(), &format!("{max_absolute:.1e}"), &format!("{min_cosine:.8}")]);
    }
    println!("{stages}");
    println!(
        "{} {} is good on {} (digest {})",
        bundle.manifest.name,
        bundle.manifest.version,
        runtime.provider(),
        bundle.digest
    );
    Ok(())
}
