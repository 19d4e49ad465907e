//! Tables, progress bars and what is printed.
#![expect(clippy::print_stderr, reason = "errors are printed there")]

use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};

/// Writes lines to standard output.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Writes an error and its causes to standard error, as one line.
pub(crate) fn print_error(error: &anyhow::Error) {
    eprintln!("midemb-bench: error: {}", format!("{error:#}").replace('\n', " "));
}

/// An empty table with these headings.
pub(crate) fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(headings.iter().copied());
    table
}

/// A bar of `n` steps on standard error, hidden where that is not a terminal.
pub(crate) fn progress(n: u64, activity: &'static str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(n).with_style(style).with_message(activity)
}

/// A number with two decimals; `-` for none.
pub(crate) fn decimals(number: Option<f64>) -> String {
    number.map_or("-".to_owned(), |number| format!("{number:.2}"))
}

/// A part of 1 as percent; `-` for none.
pub(crate) fn percent(part: Option<f64>) -> String {
    part.map_or("-".to_owned(), |part| format!("{:.1} %", part * 1e2))
}
