//! Finds `libonnxruntime.so`, loads it once per process and chooses the execution provider that runs the graphs.

use ort::{
    environment::Environment,
    ep::{CUDA, ExecutionProviderDispatch},
    logging::LogLevel,
    session::Session,
};
use serde::Deserialize;
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};
use thiserror::Error;

/// The provider that the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProviderChoice {
    /// CUDA if the library and the machine have it, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA. Loading fails if it cannot be used.
    Cuda,
}

/// The execution provider that runs the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl Provider {
    /// The name that metrics and responses use.
    pub fn as_str(self) -> &'static str {
        match self {
            Provider::Cpu => "cpu",
            Provider::Cuda => "cuda",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why ONNX Runtime cannot be used.
#[derive(Debug, Error)]
pub enum LibraryError {
    /// No library was found.
    #[error(
        "ONNX Runtime's library was not found ({tried}): run `make setup`, or set inference.onnxruntime to libonnxruntime.so"
    )]
    NotFound {
        /// The paths that were tried.
        tried: String,
    },
    /// The library was found but cannot be loaded.
    #[error(
        "ONNX Runtime cannot be loaded: {source}: run `make setup`, or set inference.onnxruntime to libonnxruntime.so"
    )]
    Unusable {
        /// The cause, with the file's path.
        source: ort::LoadDynamicError,
    },
    /// The library is loaded but cannot create an environment.
    #[error("ONNX Runtime cannot be started: {0}")]
    Environment(ort::Error),
    /// CUDA was asked for by name but cannot be used.
    #[error("inference.provider = \"cuda\", but ONNX Runtime's CUDA provider cannot be used: {0}")]
    NoCuda(ort::Error),
}

const FILE: &str = "libonnxruntime.so";
const CUDA_FILE: &str = "libonnxruntime_providers_cuda.so";
/// Where `make setup` puts the library, below the project's folder.
const SETUP_FOLDER: &str = ".runtime/lib";

/// A loaded ONNX Runtime. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Runtime {
    environment: Environment,
    provider: Provider,
    library: Arc<Path>,
}

impl Runtime {
    /// Loads the library at `configured`, or else the first one found beside the executable or below the current folder.
    pub fn load(configured: Option<&Path>, choice: ProviderChoice) -> Result<Self, LibraryError> {
        let path = find(configured)?;
        let environment = ort::init_from(&path)
            .map_err(|source| LibraryError::Unusable { source })?
            .with_name("midemb")
            .with_telemetry(false)
            .with_logger(Arc::new(log))
            .build()
            .map_err(LibraryError::Environment)?;
        // At the verbose level ONNX Runtime formats several lines per run, even if nobody reads them.
        let is_debug = tracing::enabled!(tracing::Level::DEBUG);
        environment.set_log_level(if is_debug { LogLevel::Verbose } else { LogLevel::Warning });
        let provider = choose(&environment, choice, &path)?;
        Ok(Runtime { environment, provider, library: path.into() })
    }

    /// The provider that runs the graphs.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// The library's path.
    pub fn library(&self) -> &Path {
        &self.library
    }

    pub(super) fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The providers that a session registers before the CPU's, which is always there.
    pub(super) fn execution_providers(&self) -> Vec<ExecutionProviderDispatch> {
        match self.provider {
            Provider::Cpu => Vec::new(),
            Provider::Cuda => vec![cuda()],
        }
    }
}

/// TF32 is off: it would round products to 10 bits of mantissa, which exceeds the golden tolerances.
fn cuda() -> ExecutionProviderDispatch {
    CUDA::default().with_tf32(false).build().error_on_failure()
}

fn choose(environment: &Environment, choice: ProviderChoice, library: &Path) -> Result<Provider, LibraryError> {
    let try_cuda = || -> ort::Result<()> {
        Session::builder(environment)?.with_execution_providers([cuda()])?;
        Ok(())
    };
    match choice {
        ProviderChoice::Cpu => Ok(Provider::Cpu),
        ProviderChoice::Cuda => try_cuda().map(|()| Provider::Cuda).map_err(LibraryError::NoCuda),
        ProviderChoice::Auto if !library.with_file_name(CUDA_FILE).exists() => Ok(Provider::Cpu),
        ProviderChoice::Auto => match try_cuda() {
            Ok(()) => Ok(Provider::Cuda),
            Err(error) => {
                tracing::warn!(%error, "the CUDA provider was found but cannot be used, running on the CPU");
                Ok(Provider::Cpu)
            }
        },
    }
}

fn find(configured: Option<&Path>) -> Result<PathBuf, LibraryError> {
    let places = configured.map_or_else(usual_places, |path| vec![path.to_path_buf()]);
    let tried = || places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
    let found = places.iter().find(|path| path.is_file());
    found.cloned().ok_or_else(|| LibraryError::NotFound { tried: tried() })
}

/// The paths to try, in order. An installed executable has its library beside it or in `../lib`; `make setup` puts it above a
/// built executable or below the current folder.
fn usual_places() -> Vec<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    let mut places = Vec::new();
    for (n_levels_up, folder) in executable.ancestors().enumerate() {
        match n_levels_up {
            1 => places.push(folder.join(FILE)),
            2 => places.push(folder.join("lib").join(FILE)),
            3 | 4 => places.push(folder.join(SETUP_FOLDER).join(FILE)),
            _ => {}
        }
    }
    places.push(Path::new(SETUP_FOLDER).join(FILE));
    places
}

fn log(level: LogLevel, category: &str, _id: &str, _location: &str, message: &str) {
    match level {
        LogLevel::Fatal | LogLevel::Error => tracing::error!(category, text = message, "onnxruntime"),
        LogLevel::Warning => tracing::warn!(category, text = message, "onnxruntime"),
        LogLevel::Info | LogLevel::Verbose => tracing::debug!(category, text = message, "onnxruntime"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_for_a_missing_library_is_one_line_and_says_how_to_fetch_it() {
        let error = Runtime::load(Some(Path::new("/nowhere/libonnxruntime.so")), ProviderChoice::Cpu).unwrap_err();
        let line = error.to_string();
        assert!(line.contains("/nowhere/libonnxruntime.so") && line.contains("make setup"), "{line}");
        assert!(!line.contains('\n'));
    }
}
