//! Defaults are valid, the environment wins over the file, all errors are reported at once, and digests stay what they are.

use super::*;
use crate::{
    bundle::store::Source,
    config::{Role, key::Bound, keys::MODEL_KEYS},
};
use std::io::Write;

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn check(text: &str, variables: &[(&str, &str)]) -> Result<Settings, ConfigError> {
    let file = file(text);
    Settings::check(&Raw::read_with(Some(file.path()), variables)?, Some(file.path()))
}

fn faults(text: &str, variables: &[(&str, &str)]) -> Vec<String> {
    match check(text, variables) {
        Err(ConfigError::Invalid(faults)) => faults.iter().map(Fault::to_string).collect(),
        other => panic!("expected faults, got {other:?}"),
    }
}

const MODEL: &str = "[[models]]\nname = \"a\"\nbundle = \"bundles/a\"\n";

#[test]
fn every_default_is_within_its_bound() {
    let settings = check(MODEL, &[]).unwrap();
    assert_eq!(settings.server_listen, "127.0.0.1:50051".parse().unwrap());
    assert_eq!(settings.models[0].role, Role::Live { share: 100 });
    assert!(settings.n_threads >= 1);
    let Source::Folder(bundle) = &settings.models[0].bundle else { panic!("{:?}", settings.models[0].bundle) };
    assert!(bundle.starts_with(std::env::temp_dir()), "{bundle:?}");
    assert!(settings.bundles_folder.starts_with(std::env::temp_dir()) && settings.snapshot_folder.is_none());
}

#[test]
fn every_key_is_read_by_the_settings() {
    let settings = check(MODEL, &[]).unwrap();
    for key in KEYS {
        assert!(settings.texts.contains_key(key.name), "{} has no field in Settings", key.name);
    }
}

#[test]
fn names_of_keys_are_unique() {
    let mut names: Vec<&str> = KEYS.iter().chain(MODEL_KEYS).map(|key| key.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), KEYS.len() + MODEL_KEYS.len());
}

#[test]
fn every_word_of_a_choice_is_accepted() {
    let mut n_words = 0;
    for key in KEYS {
        let Bound::OneOf(words) = key.bound else { continue };
        for word in words {
            // Some keys need another one of their table.
            let needed = if key.table() == "served_features" { "served_features.folder = \"f\"\n" } else { "" };
            let settings = check(&format!("{needed}{} = {word:?}\n{MODEL}", key.name), &[]).unwrap();
            assert_eq!(settings.texts[key.name], *word);
            n_words += 1;
        }
    }
    assert_eq!(n_words, 8);
}

#[test]
fn the_environment_wins_over_the_file() {
    let text = format!("[server]\nlisten = \"127.0.0.1:1\"\n{MODEL}");
    let variables = [("MIDEMB__SERVER__LISTEN", "0.0.0.0:2"), ("MIDEMB__LIMITS__MAX_CANDIDATES", "7"), ("PATH", "x")];
    let settings = check(&text, &variables).unwrap();
    assert_eq!(settings.server_listen, "0.0.0.0:2".parse().unwrap());
    assert_eq!(settings.limits.max_candidates, 7);
}

/// The reason for which the config is refused before its values are looked at.
fn syntax_error(text: &str, variables: &[(&str, &str)]) -> String {
    match check(text, variables) {
        Err(ConfigError::Syntax { reason, .. }) => reason,
        other => panic!("no syntax error: {other:?}"),
    }
}

#[test]
fn a_config_has_a_bound_that_its_file_has_too() {
    let of = |n_bytes: usize| format!("{MODEL}#{}", "x".repeat(n_bytes - MODEL.len() - 1));
    let most = crate::config::raw::MAX_TEXT_BYTES;
    let file = Path::new("midemb.toml");
    Settings::from_text(&of(most), file).unwrap();
    let error = Settings::from_text(&of(most + 1), file).unwrap_err().to_string();
    assert!(error.ends_with("a config of 262145 bytes or more, at most 262144 are allowed"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("midemb.toml");
    std::fs::write(&file, "é".repeat(5 << 20)).unwrap();
    let error = Settings::load(Some(&file)).unwrap_err().to_string();
    assert!(error.contains("bytes or more, at most 262144 are allowed"), "{error}");
    std::fs::write(&file, [0xff]).unwrap();
    let error = Settings::load(Some(&file)).unwrap_err().to_string();
    assert!(error.contains("is not UTF-8"), "{error}");
}

/// Keys that `config` reads as paths used to end the process: one asked for a list of petabytes, the other for tables nested
/// too deep for the stack. A third one set a model that the code that pins digests did not find.
#[test]
fn a_key_that_is_a_path_is_refused() {
    let index = syntax_error(&format!("routing.salt = 's'\n'a[1000000000000000]' = 1\n{MODEL}"), &[]);
    assert_eq!(index, "line 2: the key \"a[1000000000000000]\" is not a name, use only letters, digits, _ and -");
    let dots = "a.".repeat(60_000) + "a";
    let deep = syntax_error(&format!("{dots:?} = 1\n{MODEL}"), &[]);
    assert!(deep.starts_with("line 1: the key \"a.a.") && deep.len() < 300, "{deep}");
    let model = syntax_error(&format!("{MODEL}[\"models[0]\"]\nname = 'b'\n"), &[]);
    assert!(model.contains("the key \"models[0]\" is not a name"), "{model}");
    for key in ["", "server.listen", "\u{e9}", r"a\nb"] {
        let error = syntax_error(&format!("\"{key}\" = 1\n{MODEL}"), &[]);
        assert!(error.starts_with("line 1: the key ") && !error.contains('\n'), "{key:?}: {error}");
    }
    let inner = faults(&format!("[cache]\n'a[1000000000000000]' = 1\n'a.b' = 2\n{MODEL}"), &[]);
    assert_eq!(inner, ["cache.a.b: unknown key", "cache.a[1000000000000000]: unknown key"]);
}

#[test]
fn a_variable_that_is_a_path_is_refused() {
    for name in ["MIDEMB__A[1000000000000000]", "MIDEMB__MODELS[0]__NAME", "MIDEMB__", "MIDEMB__A____B"] {
        let error = syntax_error(MODEL, &[(name, "1")]);
        assert!(error.contains("of a variable MIDEMB__... is not a name"), "{name}: {error}");
    }
    let deep = format!("MIDEMB__A{}", "__A".repeat(60_000));
    assert!(syntax_error(MODEL, &[(&deep, "1")]).starts_with("the key \"a.a.a."));
}

#[test]
fn keys_may_be_written_with_dots() {
    let text = format!("server.listen = '127.0.0.1:1'\n'limits'.max_candidates = 7\n{MODEL}");
    let settings = check(&text, &[]).unwrap();
    assert_eq!((settings.server_listen.port(), settings.limits.max_candidates), (1, 7));
}

#[test]
fn all_errors_are_reported_at_once_with_key_value_and_bound() {
    let text = "[server]\nlisten = \"nowhere\"\nlissten = 1\n[limits]\nmax_history = 0\nmax_candidates = \"many\"\n\
                [inference]\nprovider = \"tpu\"\n[telemetry]\nlog_filter = \"a=b=c\"\n[colour]\nred = 1\n\
                [[models]]\nname = \"\"\nbundle = \"x\"\nshare = 101\nweight = 3\n";
    let found = faults(text, &[("MIDEMB__CACHE__ITEM_MB", "-1")]);
    let expected = [
        "colour.red: unknown key",
        "server.lissten: unknown key, did you mean server.listen?",
        "server.listen: \"nowhere\" is not an IP address and a port, for example 127.0.0.1:50051",
        "telemetry.log_filter: \"a=b=c\" is not a tracing filter of at most 4096 bytes, for example info or midemb=debug,info",
        "inference.provider: \"tpu\" is not one of auto, cpu, cuda",
        "cache.item_mb: \"-1\" is not a whole number from 1 to 1048576",
        "limits.max_candidates: \"many\" is not a whole number from 1 to 100000",
        "limits.max_history: \"0\" is not a whole number from 1 to 100000",
        "models[0].weight: unknown key",
        "models[0].name: must be a string of 1 to 128 bytes without control characters",
        "models[0].share: \"101\" is not a whole percentage from 0 to 100",
    ];
    assert_eq!(found, expected);
}

#[test]
fn the_error_of_an_unknown_key_suggests_a_similar_one() {
    assert_eq!(
        faults(&format!("[server]\nmax_history = 3\n{MODEL}"), &[]),
        ["server.max_history: unknown key, did you mean limits.max_history?"]
    );
}

#[test]
fn models_need_different_names_and_shares_that_add_up_to_100() {
    let two = |a: u8, b: u8, name: &str| {
        format!("[[models]]\nname=\"a\"\nbundle=\"x\"\nshare={a}\n[[models]]\nname={name:?}\nbundle=\"y\"\nshare={b}\n")
    };
    assert_eq!(check(&two(1, 99, "b"), &[]).unwrap().models.len(), 2);
    assert_eq!(faults(&two(50, 49, "b"), &[]), ["models.share: the shares add up to 99, not to 100"]);
    assert_eq!(faults(&two(50, 50, "a"), &[]), ["models[1].name: \"a\" is taken by another model"]);
    assert_eq!(
        faults(&format!("{MODEL}[[models]]\nname = \"b\"\n"), &[]),
        [
            "models[0].share: is missing, it must be a whole percentage from 0 to 100",
            "models[1].bundle: is missing, it must be a string of 1 to 4096 bytes without control characters",
            "models[1].share: is missing, it must be a whole percentage from 0 to 100",
        ]
    );
    assert_eq!(faults("", &[]), ["models: no model is configured, add at least one [[models]] with name and bundle"]);
}

/// A name goes into every answer, log line and metric of its model.
#[test]
fn a_name_has_a_bound_and_no_control_characters() {
    let named = |name: &str| format!("[[models]]\nname = {}\nbundle = \"x\"\n", toml::Value::from(name));
    assert!(check(&named(&"n".repeat(128)), &[]).is_ok() && check(&named("neuer Größe"), &[]).is_ok());
    for name in ["a\0b", "a\nb", "a\u{7f}", &"n".repeat(20 << 10)] {
        let expected = "models[0].name: must be a string of 1 to 128 bytes without control characters";
        assert_eq!(faults(&named(name), &[]), [expected]);
    }
    let models = MODEL.repeat(65);
    assert_eq!(faults(&models, &[]), ["models: 65 models are configured, at most 64 can be"]);
}

#[test]
fn two_listeners_cannot_share_a_port() {
    let listen = |server: &str, admin: &str| {
        format!(
            "server.listen = {server:?}\nadmin.listen = {admin:?}\nadmin.tls_client_ca = \"ca\"\n\
                 admin.tls_cert = \"c\"\nadmin.tls_key = \"k\"\n{MODEL}"
        )
    };
    for (server, admin) in
        [("127.0.0.1:7", "127.0.0.1:7"), ("0.0.0.0:7", "127.0.0.1:7"), ("127.0.0.1:7", "[::]:7"), ("[::1]:7", "[::]:7")]
    {
        let expected = format!("admin.listen: {admin} is taken by server.listen, use another port");
        assert_eq!(faults(&listen(server, admin), &[]), [expected]);
    }
    for (server, admin) in
        [("127.0.0.1:7", "127.0.0.1:8"), ("127.0.0.1:0", "127.0.0.1:0"), ("127.0.0.1:7", "127.0.0.2:7")]
    {
        assert!(check(&listen(server, admin), &[]).is_ok(), "{server} and {admin}");
    }
    let metrics = format!("telemetry.metrics_listen = \"127.0.0.1:50052\"\n{MODEL}");
    let expected = "telemetry.metrics_listen: 127.0.0.1:50052 is taken by admin.listen, use another port";
    assert_eq!(faults(&metrics, &[]), [expected]);
}

#[test]
fn a_shadow_needs_a_model_that_answers_and_has_no_share() {
    let with = |shadow: &str| format!("{MODEL}[[models]]\nname = \"b\"\nbundle = \"y\"\n{shadow}\n");
    let settings = check(&with("shadow_of = \"a\"\nshadow_percent = 10"), &[]).unwrap();
    assert_eq!(settings.models[0].role, Role::Live { share: 100 }, "the only model that answers");
    assert_eq!(settings.models[1].role, Role::Shadow { of: "a".to_owned(), percent: 10 });
    let again = check(&settings.to_toml(), &[]).unwrap();
    assert_eq!(again.models[1].role, settings.models[1].role);
    assert_eq!(
        faults(&with("shadow_of = \"c\""), &[]),
        ["models[1].shadow_of: \"c\" is not the name of a model that answers"]
    );
    assert_eq!(
        faults(&with("shadow_of = \"b\"\nshare = 1\nshadow_percent = 0\ndigest = \"abc\""), &[]),
        [
            "models[1].digest: \"abc\" is not a SHA-256 of 64 hex digits",
            "models[1].share: a shadow answers no request, so it has no share",
            "models[1].shadow_percent: \"0\" is not a whole percentage from 1 to 100",
            "models[1].shadow_of: \"b\" is not the name of a model that answers",
        ]
    );
}

#[test]
fn an_admin_listener_beyond_loopback_needs_encrypted_tokens_or_client_certificates() {
    let listen = "admin.listen = \"0.0.0.0:1\"\n";
    let found = faults(&format!("{listen}{MODEL}"), &[]);
    assert!(
        found[0].starts_with("admin.listen: 0.0.0.0:1 can be reached from other machines: set admin.token_file"),
        "{found:?}"
    );
    let tokens = format!("{listen}admin.token_file = \"t\"\n");
    assert_eq!(
        faults(&format!("{tokens}{MODEL}"), &[]),
        ["admin.token_file: tokens for 0.0.0.0:1 would cross the network in the clear: set admin.tls_cert and \
             admin.tls_key, or admin.allow_plaintext_tokens if something else encrypts the traffic"]
    );
    for encrypted in ["admin.allow_plaintext_tokens = true", "admin.tls_cert = \"c\"\nadmin.tls_key = \"k\""] {
        assert!(check(&format!("{tokens}{encrypted}\n{MODEL}"), &[]).is_ok(), "{encrypted}");
    }
    assert!(check(&format!("admin.token_file = \"t\"\n{MODEL}"), &[]).is_ok(), "nothing leaves the machine");
    assert_eq!(
        faults(&format!("{listen}admin.tls_client_ca = \"ca\"\nadmin.tls_key = \"k\"\n{MODEL}"), &[]),
        ["admin.tls_key: needs admin.tls_cert, too", "admin.tls_client_ca: needs admin.tls_cert, too"]
    );
}

#[test]
fn changes_that_need_a_restart_are_named() {
    let before = check(MODEL, &[]).unwrap();
    let live = check(&format!("routing.salt = \"x\"\nreload.warm_seconds = 1\n{MODEL}share = 100\n"), &[]).unwrap();
    assert_eq!(before.frozen_differences(&live), []);
    let frozen = check(&format!("server.listen = \"127.0.0.1:9\"\ncache.item_mb = 1\n{MODEL}"), &[]).unwrap();
    let found: Vec<String> = before.frozen_differences(&frozen).iter().map(Fault::to_string).collect();
    assert_eq!(
        found,
        [
            "server.listen: cannot change from \"127.0.0.1:50051\" to \"127.0.0.1:9\" without a restart",
            "cache.item_mb: cannot change from \"512\" to \"1\" without a restart",
        ]
    );
}

#[test]
fn served_features_are_off_unless_they_have_a_folder() {
    assert_eq!(check(MODEL, &[]).unwrap().served_features, None);
    let text = format!("[served_features]\nfolder = \"features\"\npercent = 0.5\n{MODEL}");
    let options = check(&text, &[]).unwrap().served_features.unwrap();
    assert!(options.folder.is_absolute() && options.folder.ends_with("features"), "{:?}", options.folder);
    assert_eq!((options.rotate_bytes, options.queue_bytes), (64 << 20, 32 << 20));
    let forgotten = faults(&format!("served_features.percent = 5\n{MODEL}"), &[]);
    assert_eq!(forgotten, ["served_features.percent: needs served_features.folder, too"]);
    let printed = check(MODEL, &[]).unwrap().to_toml();
    assert_eq!(check(&printed, &[]).unwrap().served_features, None, "a printed default counts as written");
}

#[test]
fn faults_of_served_features_name_the_key_and_no_secret() {
    let found = |more: &str| faults(&format!("served_features.folder = \"f\"\nserved_features.{more}\n{MODEL}"), &[]);
    for percent in ["101", "-1", "100.5", "\"all\""] {
        let expected = "is not a percentage from 0 to 100, for example 0.5";
        let value = percent.trim_matches('"');
        assert_eq!(found(&format!("percent = {percent}")), [format!("served_features.percent: {value:?} {expected}")]);
    }
    assert_eq!(
        found("rotate_mb = 2000"),
        ["served_features.rotate_mb: is more than served_features.max_disk_mb, so no file would ever be that large"]
    );
    let [url] = found("upload_to = \"ftp://me:s3cret@host/x\"").try_into().unwrap();
    assert!(url.starts_with("served_features.upload_to: ") && !url.contains("s3cret"), "{url}");
}

#[test]
fn the_sample_rate_changes_without_a_restart() {
    let with = |percent: &str| {
        check(&format!("served_features.folder = \"/f\"\nserved_features.percent = {percent}\n{MODEL}"), &[]).unwrap()
    };
    assert_eq!(with("1").frozen_differences(&with("2.5")), []);
    assert_eq!(with("1").frozen_differences(&check(MODEL, &[]).unwrap()).len(), 1);
}

/// Digests of configs are stored and compared across versions: they must not change.
#[test]
fn the_digest_of_a_config_never_changes() {
    let text = r#"
server.listen = "0.0.0.0:9"
admin.token_file = "tokens"
inference.threads = 3
cache.item_mb = 1
routing.salt = "spring \"25\""
[[models]]
name = "a"
bundle = "/bundles/a"
digest = "ABCDEF0123456789abcdef0123456789abcdef0123456789abcdef0123456789"
[[models]]
name = "b"
bundle = "s3://bucket/b"
shadow_of = "a"
"#;
    let printed = r#"[server]
listen = "0.0.0.0:9"
drain_seconds = 30

[admin]
listen = "127.0.0.1:50052"
token_file = "tokens"
tls_cert = ""
tls_key = ""
tls_client_ca = ""

[telemetry]
metrics_listen = "127.0.0.1:9464"
log_format = "auto"
log_filter = "info"

[inference]
provider = "auto"
threads = 3
batch_requests = 0
onnxruntime = ""

[cache]
content_mb = 1024
item_mb = 12
user_mb = 16
known_items_mb = 256

[snapshot]
folder = ""
interval_seconds = 300

[bundles]
folder = ""

[reload]
warm_seconds = 30

[routing]
salt = 'spring "25"'

[limits]
max_candidates = 10000
max_history = 1000
max_text_bytes = 8192
max_message_mb = 16
max_in_flight = 256
default_deadline_ms = 1000

[[models]]
name = "a"
bundle = "/bundles/a"
digest = "abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789"
share = 100

[[models]]
name = "b"
bundle = "s3://bucket/b"
shadow_of = "a"
shadow_percent = 100
"#;
    let settings = check(text, &[("MIDEMB__CACHE__ITEM_MB", "12")]).unwrap();
    assert_eq!(settings.digested_form(), printed);
    assert_eq!(settings.digest, "66b50ba311ad0b449e02a1b8cbd02766f83581f8a74dd1b84413c9a2a6ecc9ea");
}

#[test]
fn a_key_that_came_later_is_in_the_digest_unless_it_has_its_default() {
    let digest = |text: &str| check(&format!("{text}\n{MODEL}"), &[]).unwrap().digest;
    assert_eq!(digest("limits.read_ms = 5000"), digest(""));
    assert_ne!(digest("limits.read_ms = 5001"), digest(""));
}

#[test]
fn a_printed_config_gives_the_same_settings_again() {
    let text = format!("[cache]\nitem_mb = 3\n[telemetry]\nlog_filter = \"a=debug\"\n{MODEL}");
    let settings = check(&text, &[]).unwrap();
    assert_eq!(settings.item_cache_bytes, 3 << 20);
    assert_eq!(check(&settings.to_toml(), &[]).unwrap(), settings);
}

#[test]
fn a_syntax_error_names_its_line() {
    let error = check("[server\n", &[]).unwrap_err().to_string();
    assert!(error.contains("line 1"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}
