//! Environment variables that other programs define and that the server honours, too.

use std::{ffi::OsString, path::PathBuf};

/// The path of ONNX Runtime's library in `ORT_DYLIB_PATH`; none where the variable is unset or empty.
pub fn library_from_environment() -> Option<PathBuf> {
    std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// The variables that configure clients of object stores (credentials, endpoints, regions), under the names that the
/// stores' own tools give them.
pub fn store_options() -> Vec<(String, String)> {
    const PREFIXES: [&str; 4] = ["AWS_", "AZURE_", "GOOGLE_", "HTTP_AUTHORIZATION"];
    let is_store_option = |name: &OsString| PREFIXES.iter().any(|prefix| name.to_string_lossy().starts_with(prefix));
    let variables = std::env::vars_os().filter(|(name, _)| is_store_option(name));
    variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))).collect()
}
