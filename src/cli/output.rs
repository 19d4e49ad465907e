//! Writing to a standard output and a standard error that may be closed or full, and the end of the process.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write},
    sync::mpsc,
    thread,
    time::Duration,
};

/// Writes to standard output. Where its reader has closed it, as `| head` does, the process ends with exit code 0. Any other
/// failure, such as a full disk, ends it with exit code 1 and a line that says why.
pub(super) fn write(text: Arguments<'_>) {
    let mut stdout = io::stdout().lock();
    // Flushed at once: an error of a later flush, at the end of the process, would go unnoticed.
    let Err(error) = stdout.write_fmt(text).and_then(|()| stdout.flush()) else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        end_process(0);
    }
    eprintln!("midemb: error: cannot write to standard output: {error}");
    end_process(1);
}

/// How long an error line waits for room in a full pipe before the process ends without it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Writes to standard error. If that is closed or full, the text is lost, and the process goes on after [`PATIENCE`] at most.
pub(super) fn write_error(text: Arguments<'_>) {
    let text = text.to_string();
    let (done, is_done) = mpsc::channel();
    let write = move || {
        let _ = io::stderr().write_all(text.as_bytes());
        let _ = done.send(());
    };
    if thread::Builder::new().spawn(write).is_ok() {
        let _ = is_done.recv_timeout(PATIENCE);
    }
}

/// Ends the process at once. What the caller wants to be written must be written by now.
///
/// The usual way out would run the destructors of ONNX Runtime's library while other threads still load or run graphs in it,
/// which is a crash.
pub(super) fn end_process(code: u8) -> ! {
    signal_hook::low_level::exit(code.into())
}
