//! Finds `libonnxruntime.so`, loads it once a process and decides which execution provider runs the graphs.

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

/// What the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProviderChoice {
    /// CUDA where the library and the machine have it, else CPU.
    Auto,
    /// CPU.
    Cpu,
    /// CUDA, or an error.
    Cuda,
}

/// What runs the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// The default provider.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl Provider {
    /// The name that metrics and answers use.
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

/// ONNX Runtime cannot be had.
#[derive(Debug, Error)]
pub enum LibraryError {
    /// There is no library where we looked.
    #[error(
        "ONNX Runtime's library was not found ({looked}): run `make setup`, or set inference.onnxruntime to libonnxruntime.so"
    )]
    NotFound {
        /// The places, for the message.
        looked: String,
    },
    /// There is a file, but it cannot be used.
    #[error(
        "ONNX Runtime cannot be loaded: {source}: run `make setup`, or set inference.onnxruntime to libonnxruntime.so"
    )]
    Unusable {
        /// Which file, and why not.
        source: ort::LoadDynamicError,
    },
    /// The library is loaded, but no session can be had of it.
    #[error("ONNX Runtime cannot be started: {0}")]
    Environment(ort::Error),
    /// CUDA was asked for by name and is not to be had.
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
    /// Loads the library at `configured`, or the first one found beside the executable or below the current folder.
    pub fn load(configured: Option<&Path>, choice: ProviderChoice) -> Result<Self, LibraryError> {
        let path = find(configured)?;
        let environment = ort::init_from(&path)
            .map_err(|source| LibraryError::Unusable { source })?
            .with_name("midemb")
            .with_telemetry(false)
            .with_logger(Arc::new(log))
            .build()
            .map_err(LibraryError::Environment)?;
        // ONNX Runtime writes several lines about every run, and formats them whether or not anybody reads them.
        environment.set_log_level(if tracing::enabled!(tracing::Level::DEBUG) {
            LogLevel::Verbose
        } else {
            LogLevel::Warning
        });
        let provider = choose(&environment, choice, &path)?;
        Ok(Runtime { environment, provider, library: path.into() })
    }

    /// What runs the graphs.
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

    /// The providers that a session registers, before the CPU's.
    pub(super) fn execution_providers(&self) -> Vec<ExecutionProviderDispatch> {
        match self.provider {
            Provider::Cpu => Vec::new(),
            Provider::Cuda => vec![cuda()],
        }
    }
}

/// TF32 would round products to 10 bits of mantissa: outside the golden tolerances.
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
        ProviderChoice::Auto => Ok(try_cuda().map_or_else(
            |error| {
                tracing::warn!(%error, "the CUDA provider is beside the library but cannot be used, running on the CPU");
                Provider::Cpu
            },
            |()| Provider::Cuda,
        )),
    }
}

fn find(configured: Option<&Path>) -> Result<PathBuf, LibraryError> {
    let places = configured.map_or_else(usual_places, |path| vec![path.to_path_buf()]);
    let looked = || places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
    let found = places.iter().find(|path| path.is_file());
    found.cloned().ok_or_else(|| LibraryError::NotFound { looked: looked() })
}

/// Beside an installed executable, then where `make setup` puts it: above a built one, then below the current folder.
fn usual_places() -> Vec<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    let folders = executable.ancestors().skip(1);
    let beside = folders.clone().take(1).map(|folder| folder.join(FILE));
    let installed = folders.clone().skip(1).take(1).map(|folder| folder.join("lib").join(FILE));
    let built = folders.skip(2).take(2).map(|folder| folder.join(SETUP_FOLDER).join(FILE));
    beside.chain(installed).chain(built).chain([Path::new(SETUP_FOLDER).join(FILE)]).collect()
}

fn log(level: LogLevel, category: &str, _id: &str, _location: &str, message: &str) {
    match level {
        LogLevel::Fatal | LogLevel::Error => tracing::error!(category, message, "onnxruntime"),
        LogLevel::Warning => tracing::warn!(category, message, "onnxruntime"),
        LogLevel::Info | LogLevel::Verbose => tracing::debug!(category, message, "onnxruntime"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_one_line_that_says_what_fetches_it() {
        let error = Runtime::load(Some(Path::new("/nowhere/libonnxruntime.so")), ProviderChoice::Cpu).unwrap_err();
        let line = error.to_string();
        assert!(line.contains("/nowhere/libonnxruntime.so") && line.contains("make setup"), "{line}");
        assert!(!line.contains('\n'));
    }
}
