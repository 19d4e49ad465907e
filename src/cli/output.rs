//! Writing to a standard output that may be closed or full.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write},
    process,
};

/// Writes to standard output. Where its reader has closed it, as `| head` does, the process ends with exit code 0. Any other
/// failure, such as a full disk, ends it with exit code 1 and a line that says why.
pub(super) fn write(text: Arguments<'_>) {
    let mut stdout = io::stdout().lock();
    // Flushed at once: an error of a later flush, at the end of the process, would go unnoticed.
    let Err(error) = stdout.write_fmt(text).and_then(|()| stdout.flush()) else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        process::exit(0);
    }
    eprintln!("midemb: error: cannot write to standard output: {error}");
    process::exit(1);
}
