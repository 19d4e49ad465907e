//! The desired config: the config file, or the config that was pushed over it.
//!
//! A pushed config is saved next to the config file, `midemb.pushed.toml` next to `midemb.toml`. At a restart it takes
//! precedence as long as the config file is unchanged since the push; its first line contains the config file's SHA-256. If
//! the config file is edited after the push, the config file takes precedence. So the newest config always wins, whichever
//! way it came and whether or not the server was running.

use crate::{
    config::{ConfigError, raw::read_file},
    domain::digest::sha256_hex,
};
use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// The desired config and its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// TOML.
    pub text: String,
    /// The file of the pushed config; none if the config is the config file itself.
    pub pushed_file: Option<PathBuf>,
    /// The file of a pushed config that is ignored because the config file has changed since.
    pub overridden: Option<PathBuf>,
    /// The contents of the config file.
    pub file_text: String,
}

/// Why a pushed config cannot be saved for the next restart.
#[derive(Debug, Error)]
#[error("{} cannot be updated, so a restart would not find this config: {source}", path.display())]
#[expect(missing_docs, reason = "the message names the fields")]
pub struct PersistError {
    pub path: PathBuf,
    pub source: io::Error,
}

/// The start of the first line of a pushed config.
const HEADER: &str = "# midemb: pushed over ";
const BASE: &str = " sha256=";
/// The end of the name of a pushed config that is being written.
const NEW: &str = ".new";

/// The path where a config that is pushed over `file` is saved.
pub fn pushed_path(file: &Path) -> PathBuf {
    file.with_extension("pushed.toml")
}

/// Reads the desired config; `file` is the config file.
pub fn read(file: &Path) -> Result<Desired, ConfigError> {
    let file_text = read_file(file)?;
    let path = pushed_path(file);
    let from_file = Desired { text: file_text.clone(), pushed_file: None, overridden: None, file_text };
    let pushed = match read_file(&path) {
        Ok(pushed) => pushed,
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(from_file),
        // Falling back to the config file would silently undo a push.
        Err(error) => return Err(error),
    };
    if base_of(&pushed) == Some(sha256_hex(from_file.file_text.as_bytes()).as_str()) {
        return Ok(Desired { text: body(&pushed).to_owned(), pushed_file: Some(path), ..from_file });
    }
    Ok(Desired { overridden: Some(path), ..from_file })
}

impl Desired {
    /// Logs where the config comes from, if there is a pushed config.
    pub fn log_origin(&self) {
        if let Some(file) = &self.pushed_file {
            let file = file.display();
            tracing::info!(%file, "a pushed config is in force, remove this file to go back to the config file");
        }
        if let Some(file) = &self.overridden {
            tracing::warn!(
                file = %file.display(),
                "the config file has changed since this config was pushed over it: the config file is in force"
            );
        }
    }
}

/// Saves `text` as the config that a restart uses as long as the contents of `file` are `base`. Returns what [`read`] finds
/// from now on.
pub fn persist(file: &Path, base: &str, text: &str, who: &str) -> Result<Desired, PersistError> {
    let path = pushed_path(file);
    let is_file = base == text;
    let result = if is_file { remove(&path) } else { write(&path, base, file, text, who) };
    result.map_err(|source| PersistError { path: path.clone(), source })?;
    Ok(Desired {
        text: body(text).to_owned(),
        pushed_file: (!is_file).then_some(path),
        overridden: None,
        file_text: base.to_owned(),
    })
}

/// Removes a pushed config if there is one.
fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        // Checked first, because removing a file that does not exist fails in a read-only folder, too.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => fs::remove_file(path),
    }
}

/// Replaces the pushed config atomically: a reader sees either the old file or the new one.
fn write(path: &Path, base: &str, file: &Path, text: &str, who: &str) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let prefix = new_prefix(path);
    remove_left_overs(folder, &prefix);
    let mut new = tempfile::Builder::new().prefix(&prefix).suffix(NEW).tempfile_in(folder)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let who = who.replace(char::is_control, " ");
    writeln!(new, "{HEADER}{name}{BASE}{} by {who}", sha256_hex(base.as_bytes()))?;
    new.write_all(body(text).as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(path)?;
    // Only a warning: the file is in place, and some file systems cannot sync folders.
    if let Err(error) = fs::File::open(folder).and_then(|folder| folder.sync_all()) {
        tracing::warn!(%error, folder = %folder.display(), "a pushed config may not survive a power failure");
    }
    Ok(())
}

/// The start of the name of a pushed config that is being written.
fn new_prefix(path: &Path) -> String {
    format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy())
}

/// Removes what a process that was killed while it wrote left behind. A file that cannot be removed does not fail a push.
fn remove_left_overs(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(prefix) && name.ends_with(NEW)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The SHA-256 of the config file that a pushed config was pushed over.
fn base_of(pushed: &str) -> Option<&str> {
    let header = pushed.lines().next()?.strip_prefix(HEADER)?;
    header.split_once(BASE)?.1.split(' ').next()
}

/// The config without the header line that [`write()`] adds.
fn body(text: &str) -> &str {
    match text.split_once('\n') {
        Some((header, body)) if header.starts_with(HEADER) => body,
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_config_wins() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("midemb.toml");
        fs::write(&file, "a = 1\n").unwrap();
        let found = |file: &Path| read(file).map(|desired| (desired.text, desired.pushed_file)).unwrap();
        assert_eq!(found(&file), ("a = 1\n".to_owned(), None));

        let saved = persist(&file, "a = 1\n", "a = 2\n", "ann\nfrom 127.0.0.1").unwrap();
        assert_eq!(saved.pushed_file, Some(folder.path().join("midemb.pushed.toml")));
        assert_eq!((saved.text.as_str(), saved.file_text.as_str()), ("a = 2\n", "a = 1\n"));
        assert_eq!(read(&file).unwrap(), saved, "what is read is not what was saved");

        fs::write(&file, "a = 3\n").unwrap();
        let edited = read(&file).unwrap();
        assert_eq!((edited.text.as_str(), edited.pushed_file), ("a = 3\n", None), "the file was edited after the push");
        assert_eq!(edited.overridden, saved.pushed_file);

        let pushed = fs::read_to_string(saved.pushed_file.unwrap()).unwrap();
        let saved = persist(&file, "a = 3\n", &pushed, "bob").unwrap();
        assert_eq!(read(&file).unwrap(), saved);
        assert_eq!(saved.text, "a = 2\n", "pushing a pushed file again added a second header");

        assert_eq!(persist(&file, "a = 3\n", "a = 3\n", "bob").unwrap(), read(&file).unwrap());
        assert!(!pushed_path(&file).exists(), "a pushed file was kept although it is the same as the config file");
    }

    /// A server that was killed while it saved a config left a file beside the config file for good. Found by `make faults`.
    #[test]
    fn the_next_push_removes_what_a_killed_one_left() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("midemb.toml");
        for name in [".midemb.pushed.toml.a1b2c3.new", ".other.pushed.toml.a1b2c3.new", "midemb.toml"] {
            fs::write(folder.path().join(name), "a = 1\n").unwrap();
        }
        persist(&file, "a = 1\n", "a = 2\n", "ann").unwrap();
        let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [".other.pushed.toml.a1b2c3.new", "midemb.pushed.toml", "midemb.toml"]);
    }

    #[test]
    fn the_error_names_the_file_that_cannot_be_written() {
        let error = persist(Path::new("/nowhere/midemb.toml"), "", "a = 1", "ann").unwrap_err();
        assert_eq!(error.path, Path::new("/nowhere/midemb.pushed.toml"));
    }
}
