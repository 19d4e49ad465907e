//! Configuration: a TOML file and the environment in, validated and typed settings out.
//!
//! [`keys`] lists every key with its default, its bound and when an operator would change it; the README's table and
//! `midemb config print` come from it. [`raw`] reads what was written, [`settings`] and [`models`] check it: all errors at once, each with
//! its key, its value and its bound ([`fault`]). This is the only room that reads environment variables.

pub mod fault;
pub mod keys;
pub mod models;
pub mod raw;
pub mod settings;

pub use fault::ConfigError;
pub use models::{ModelSettings, Role};
pub use settings::Settings;
