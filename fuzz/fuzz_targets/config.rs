//! Bytes as a config file: whatever is accepted is written by `midemb config print` so that it means the same again.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::{Corpus, fuzz_target};
use midemb::config::{ConfigError, ModelSettings, Role, Settings};
use midemb_fuzz::with_peak;
use std::path::Path;

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(text) = std::str::from_utf8(data) else { return Corpus::Reject };
    let file = Path::new("/etc/midemb/midemb.toml");
    let (settings, peak) = with_peak(|| Settings::from_text(text, file));
    // A key of one letter costs two tables of the TOML parser and of ours. Eighty tables within each other are built one by one.
    assert!(peak <= (1 << 21) + 1000 * text.len(), "{peak} bytes for a config of {}", text.len());
    match settings {
        Ok(settings) => check_accepted(&settings, file),
        Err(ConfigError::Syntax { reason, .. }) => assert!(!reason.contains('\n'), "not one line: {reason:?}"),
        Err(ConfigError::Invalid(faults)) => assert!(!faults.is_empty()),
        Err(error @ ConfigError::Read { .. }) => panic!("nothing was read: {error}"),
    }
    Corpus::Keep
});

fn check_accepted(settings: &Settings, file: &Path) {
    let written = settings.to_toml();
    let again = Settings::from_text(&written, file).unwrap_or_else(|error| panic!("{error}: {written}"));
    assert_eq!(again.digest, settings.digest, "{written}");
    assert_eq!(again.to_toml(), written);
    assert_eq!(settings.frozen_differences(&again), []);
    let share = |model: &ModelSettings| match model.role {
        Role::Live { share } => u32::from(share),
        Role::Shadow { .. } => 0,
    };
    assert_eq!(settings.models.iter().map(share).sum::<u32>(), 100);
    assert!(settings.models.iter().all(|model| !model.name.is_empty()));
}
