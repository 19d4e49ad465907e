//! Bytes as a file of vectors made elsewhere: a file is taken as a whole or refused as a whole, in memory of its own size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use midemb::cache::{Caches, snapshot::import};
use midemb_fuzz::{
    vectors::{SERVED, check_read, empty_caches, n_entries},
    with_peak,
};
use std::sync::LazyLock;

static CACHES: LazyLock<Caches> = LazyLock::new(empty_caches);

fuzz_target!(|data: &[u8]| {
    CACHES.flush_all();
    let (imported, peak) = with_peak(|| import(data, &CACHES, &[SERVED]));
    assert!(peak <= (1 << 19) + 100 * data.len(), "{peak} bytes for a file of {}", data.len());
    match imported {
        Ok(imported) => check_read(&CACHES, imported),
        Err(reason) => {
            assert_eq!(n_entries(&CACHES), [0; 3], "a part of a refused file was taken: {reason}");
            let message = reason.to_string();
            assert!(message.len() < 1000 && !message.contains('\n'), "no line for a log: {message:?}");
        }
    }
});
