//! Environment variables that other programs define and that the server honours, too.

use std::{env, ffi::OsString, io, os::unix::process::CommandExt, path::PathBuf, process::Command};

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

/// Returns once ONNX Runtime's telemetry is off in the environment; loads the program anew to set the variable. It is for the
/// start of a command, as nothing that was done before survives. Process id, arguments and open files stay the same.
pub fn forbid_telemetry() -> io::Result<()> {
    if env::var_os(NO_TELEMETRY).is_some_and(|value| value == "1") {
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
    Err(command.args(arguments).env(NO_TELEMETRY, "1").exec())
}
