//! A config file, a config that is pushed over it by somebody, and what an editor left in the file of the pushed config: a
//! restart finds what was pushed, and never anything that is neither of them.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::{Corpus, fuzz_target};
use midemb::lifecycle::desired::{persist, pushed_path, read};
use midemb_fuzz::scratch::Scratch;
use std::{fs, path::Path, sync::LazyLock};

static FOLDER: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(text) = std::str::from_utf8(data) else { return Corpus::Reject };
    let mut parts = text.splitn(4, '\0');
    let (Some(base), Some(pushed), Some(who), left) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Corpus::Reject;
    };
    let file = FOLDER.write("midemb.toml", base.as_bytes());
    check_left(&file, base, left);
    check_pushed(&file, base, pushed, who);
    Corpus::Keep
});

/// Whatever is in the file of the pushed config, a server starts from it or from the config file.
fn check_left(file: &Path, base: &str, left: Option<&str>) {
    let pushed = pushed_path(file);
    drop(fs::remove_file(&pushed));
    if let Some(left) = left {
        fs::write(&pushed, left).unwrap();
    }
    let desired = read(file).unwrap();
    assert_eq!(desired.file_text, base);
    match (left, desired.pushed_file) {
        (Some(left), Some(_)) => assert!(left.ends_with(&desired.text) && desired.overridden.is_none()),
        (left, pushed_file) => {
            assert_eq!((desired.text.as_str(), pushed_file), (base, None));
            assert_eq!(desired.overridden.is_some(), left.is_some());
        }
    }
}

fn check_pushed(file: &Path, base: &str, pushed: &str, who: &str) {
    let saved = persist(file, base, pushed, who).unwrap();
    let desired = read(file).unwrap();
    assert_eq!(desired, saved, "it is not what was reported as saved");
    // The header of a file that was pushed before is not kept.
    let is_found =
        desired.text == pushed || pushed.starts_with("# midemb: pushed over ") && pushed.ends_with(&desired.text);
    assert!(is_found, "pushed {pushed:?}, found {:?}", desired.text);
    fs::write(file, format!("{base}\n")).unwrap();
    assert_eq!(read(file).unwrap().text, format!("{base}\n"), "the file was edited after the push");
}
