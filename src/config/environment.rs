//! Environment variables that other programs define and that the server honours, and those that it sets for its libraries.

use std::{env, ffi::OsString, io, os::unix::process::CommandExt, path::PathBuf, process::Command, thread};

/// The path of ONNX Runtime's library in `ORT_DYLIB_PATH`; none where the variable is unset or empty.
pub fn library_from_environment() -> Option<PathBuf> {
    env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// The variables that configure clients of object stores (credentials, endpoints, regions), under the names that the
/// stores' own tools give them.
pub fn store_options() -> Vec<(String, String)> {
    const PREFIXES: [&str; 4] = ["AWS_", "AZURE_", "GOOGLE_", "HTTP_AUTHORIZATION"];
    let is_store_option = |name: &OsString| PREFIXES.iter().any(|prefix| name.to_string_lossy().starts_with(prefix));
    let variables = env::vars_os().filter(|(name, _)| is_store_option(name));
    variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))).collect()
}

/// ONNX Runtime reads this variable when its library is loaded, writes a device id into the home folder and looks up a host of
/// its maker unless it is set, and offers no call that comes early enough to prevent that.
const NO_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

/// The C library reads this variable at the start of a process: into how many arenas it divides the memory that ONNX Runtime and
/// the server allocate. Its own choice is eight for each core, and each keeps gaps where models were that have been replaced.
const ARENAS: &str = "MALLOC_ARENA_MAX";

/// The C library reads these variables at the start of a process, too: from which size on it asks the system for memory for each
/// allocation, and how much free memory an arena keeps. Its own choice returns the vectors of a large page to the system after each
/// request, and fetching them again is a page fault for every 4 KB.
const THRESHOLDS: [(&str, usize); 2] = [("MALLOC_MMAP_THRESHOLD_", 4 << 20), ("MALLOC_TRIM_THRESHOLD_", 16 << 20)];

/// Returns once the environment has what must be there before the process starts: ONNX Runtime's telemetry is off, and the C
/// library's memory is set up as above, except for variables that are set already. Loads the program anew to set them. It is for the
/// start of a command, as nothing that was done before survives. Process id, arguments and open files stay the same.
pub fn prepare_process() -> io::Result<()> {
    let mut missing = Vec::new();
    if env::var_os(NO_TELEMETRY).is_none_or(|value| value != "1") {
        missing.push((NO_TELEMETRY, "1".to_owned()));
    }
    // One arena would make all threads wait for each other.
    let n_arenas = thread::available_parallelism().map_or(2, |n| n.get().max(2));
    for (name, value) in [(ARENAS, n_arenas)].into_iter().chain(THRESHOLDS) {
        if env::var_os(name).is_none() {
            missing.push((name, value.to_string()));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    // The name of the executable file becomes the name of the process. It has none if an update has replaced it.
    let program = env::current_exe().ok().filter(|path| path.exists()).unwrap_or_else(|| "/proc/self/exe".into());
    let mut arguments = env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // It returns only if it fails.
    Err(command.args(arguments).envs(missing).exec())
}
