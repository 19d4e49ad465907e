//! Configuration: a TOML file and the environment go in, validated and typed settings come out.
//!
//! [`keys`] describes every key once: its name, default, bound, help, and the type that its text becomes. [`raw`]
//! holds what was written. `reader` and `models` check it against the keys, and [`settings`] is what the rest of
//! the server sees. `pin` writes digests of bundles into a config's text, and `served_features` reads the table of that name. A config is refused with all its errors at once ([`fault`]), each with its key, value and
//! bound.
//!
//! This is the only module that reads environment variables.

mod environment;
pub mod fault;
pub mod key;
pub mod keys;
pub mod models;
mod pin;
pub mod raw;
mod reader;
mod served_features;
pub mod settings;

pub use environment::{library_from_environment, prepare_process, store_options};
pub use fault::ConfigError;
pub use models::{ModelSettings, Role};
pub use pin::pin_bundles;
pub use settings::Settings;
