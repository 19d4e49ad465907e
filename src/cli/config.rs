//! `midemb config check|print`: settings without a server.

use crate::config::Settings;
use std::path::PathBuf;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check the file and the environment; all errors are reported at once.
    Check(File),
    /// Print the resulting settings, defaults included, as a config file that gives the same settings.
    Print(File),
}

#[derive(Debug, clap::Args)]
pub(super) struct File {
    /// The config file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub(super) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Check(File { config }) => {
            let settings = Settings::load(Some(&config))?;
            println!("{} is valid: {} model(s), digest {}", config.display(), settings.models.len(), settings.digest);
        }
        Command::Print(File { config }) => print!("{}", Settings::load(Some(&config))?.to_toml()),
    }
    Ok(())
}
