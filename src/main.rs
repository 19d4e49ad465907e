//! `midemb`: parse and run.

use clap::Parser;
use midemb::cli::{self, Cli};

fn main() {
    cli::main(Cli::parse())
}
