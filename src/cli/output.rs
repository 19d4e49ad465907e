//! Standard output that may be closed or full.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write},
    process,
};

/// Writes to standard output. Whoever has closed it, as `| head` does, wants no more: the process ends and nothing is wrong.
/// Anything else that fails there, such as a full disk, ends it with exit code 1 and a line that says why.
pub(super) fn write(text: Arguments<'_>) {
    let mut stdout = io::stdout().lock();
    // Flushed at once: what is still buffered when the process ends would be lost without a word.
    let Err(error) = stdout.write_fmt(text).and_then(|()| stdout.flush()) else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        process::exit(0);
    }
    eprintln!("midemb: error: cannot write to standard output: {error}");
    process::exit(1);
}
