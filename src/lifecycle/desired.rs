//! What is to be in force: the config file, or what was pushed over it.
//!
//! A pushed config lies beside the file, `midemb.pushed.toml` beside `midemb.toml`, and wins over it at a restart for as long
//! as the file stays as it was when the push came: its first line holds the file's SHA-256. Who edits the file afterwards
//! means the file, and has it. So the newest wish wins, whichever way it came and whether or not the server was up.

use crate::{
    config::{ConfigError, raw::read_file},
    domain::digest::sha256_hex,
};
use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

/// A config and where it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// TOML.
    pub text: String,
    /// The file that it was pushed into; none where it is the config file's own.
    pub pushed_file: Option<PathBuf>,
    /// A pushed config that is not in force, because the config file has changed since.
    pub overruled: Option<PathBuf>,
    /// What the config file says.
    pub file_text: String,
}

/// How the first line of a pushed config begins.
const HEADER: &str = "# midemb: pushed over ";
const BASE: &str = " sha256=";

/// Where a config that is pushed over `file` is kept.
pub fn pushed_path(file: &Path) -> PathBuf {
    file.with_extension("pushed.toml")
}

/// What is to be in force where `file` is the config file.
pub fn read(file: &Path) -> Result<Desired, ConfigError> {
    let file_text = read_file(file)?;
    let path = pushed_path(file);
    let own = Desired { text: file_text.clone(), pushed_file: None, overruled: None, file_text };
    let pushed = match fs::read_to_string(&path) {
        Ok(pushed) => pushed,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(own),
        // Nobody would know why another config than the one that was pushed is in force.
        Err(source) => return Err(ConfigError::Read { path, source }),
    };
    if base_of(&pushed) == Some(sha256_hex(own.file_text.as_bytes()).as_str()) {
        return Ok(Desired { text: body(&pushed).to_owned(), pushed_file: Some(path), ..own });
    }
    Ok(Desired { overruled: Some(path), ..own })
}

impl Desired {
    /// Says in the log which of two configs this is.
    pub fn announce(&self) {
        if let Some(file) = &self.pushed_file {
            let file = file.display();
            tracing::info!(%file, "a pushed config is in force, remove this file to go back to the config file");
        }
        if let Some(file) = &self.overruled {
            tracing::warn!(
                file = %file.display(),
                "the config file has changed since this config was pushed over it: the config file is in force"
            );
        }
    }
}

/// Makes `text` what a restart finds, for as long as `file` says `base`, as it did when somebody wished for it. Returns the
/// file that it was put into; none where the config file says the same.
pub fn keep(file: &Path, base: &str, text: &str, who: &str) -> Result<Option<PathBuf>, (PathBuf, io::Error)> {
    let path = pushed_path(file);
    let kept = if base == text { forget(&path).map(|()| None) } else { write(&path, base, file, text, who).map(Some) };
    kept.map_err(|source| (path, source))
}

fn forget(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        // A folder that is mounted read-only refuses to remove even what is not there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => fs::remove_file(path),
    }
}

/// A reader finds the old file or the new one, whole.
fn write(path: &Path, base: &str, file: &Path, text: &str, who: &str) -> io::Result<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let who = who.replace(char::is_control, " ");
    writeln!(new, "{HEADER}{name}{BASE}{} by {who}", sha256_hex(base.as_bytes()))?;
    new.write_all(body(text).as_bytes())?;
    new.as_file().sync_all()?;
    new.persist(path)?;
    // It is in its place; not every file system syncs folders.
    if let Err(error) = fs::File::open(folder).and_then(|folder| folder.sync_all()) {
        tracing::warn!(%error, folder = %folder.display(), "a pushed config may not survive a power failure");
    }
    Ok(path.to_path_buf())
}

fn base_of(pushed: &str) -> Option<&str> {
    let header = pushed.lines().next()?.strip_prefix(HEADER)?;
    header.split_once(BASE)?.1.split(' ').next()
}

/// The config without our line above it.
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
    fn the_newest_wish_wins() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("midemb.toml");
        fs::write(&file, "a = 1\n").unwrap();
        let found = |file: &Path| read(file).map(|desired| (desired.text, desired.pushed_file)).unwrap();
        assert_eq!(found(&file), ("a = 1\n".to_owned(), None));

        let kept = keep(&file, "a = 1\n", "a = 2\n", "ann\nfrom 127.0.0.1").unwrap();
        assert_eq!(kept, Some(folder.path().join("midemb.pushed.toml")));
        assert_eq!(found(&file), ("a = 2\n".to_owned(), kept.clone()));
        assert_eq!(read(&file).unwrap().file_text, "a = 1\n");

        fs::write(&file, "a = 3\n").unwrap();
        let edited = read(&file).unwrap();
        assert_eq!((edited.text.as_str(), edited.pushed_file), ("a = 3\n", None), "the file was edited after the push");
        assert_eq!(edited.overruled, kept);

        let pushed = fs::read_to_string(kept.unwrap()).unwrap();
        keep(&file, "a = 3\n", &pushed, "bob").unwrap();
        assert_eq!(read(&file).unwrap().text, "a = 2\n", "a pushed file that is pushed has one header");

        assert_eq!(keep(&file, "a = 3\n", "a = 3\n", "bob").unwrap(), None);
        assert!(!pushed_path(&file).exists(), "what the file says needs no file beside it");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let (path, _source) = keep(Path::new("/nowhere/midemb.toml"), "", "a = 1", "ann").unwrap_err();
        assert_eq!(path, Path::new("/nowhere/midemb.pushed.toml"));
    }
}
