//! What a configuration key is: its name, default, bound and help, and the type that its text becomes.
//!
//! A `Key<T>` can only be read as a `T`: a misspelt key, or one read as another type, does not compile. The part
//! that does not depend on `T` is the [`Description`]: documentation, `midemb config print` and error messages are
//! made from it.

use crate::{served_features::Rate, telemetry::logs};
use std::{fmt, net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

/// What an operator is told about a key.
#[derive(Debug)]
pub struct Description {
    /// The dotted name: `table.key`.
    pub name: &'static str,
    /// The default as an operator would write it, without quotes. The keys of `[[models]]` have none here.
    pub default: &'static str,
    #[expect(missing_docs, reason = "the type says what it is")]
    pub bound: Bound,
    /// What the key does and when an operator would change it, in Markdown.
    pub help: &'static str,
    /// Whether a new value takes effect without a restart.
    pub is_live: bool,
    /// Whether the digest of a config covers the key even where it has its default. Digests are stored, so a key that came later
    /// must not change those of configs that do not have it.
    pub(super) is_in_every_digest: bool,
}

/// The values that a key accepts. Its `Display` completes the sentence "the value must be ...".
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "`Display` says what each variant accepts")]
pub enum Bound {
    Address,
    Integer(RangeInclusive<u64>),
    Percent(RangeInclusive<u8>),
    SampleRate,
    OneOf(&'static [&'static str]),
    Path,
    Filter,
    Text,
    /// The most bytes.
    Line(usize),
    Flag,
    Sha256,
}

/// Turns the text of a value into a `T`; none where the text is outside the bound.
pub(super) type Parse<T> = fn(&str, &Bound) -> Option<T>;

/// A key whose value is a `T`.
#[derive(Debug)]
pub(super) struct Key<T> {
    pub(super) description: Description,
    parse: Parse<T>,
}

impl<T> Key<T> {
    const fn new(name: &'static str, default: &'static str, bound: Bound, parse: Parse<T>, help: &'static str) -> Self {
        Key { description: Description { name, default, bound, help, is_live: false, is_in_every_digest: true }, parse }
    }

    /// The same key, with values that take effect without a restart.
    pub(super) const fn live(mut self) -> Self {
        self.description.is_live = true;
        self
    }

    /// The same key, which configs with a stored digest may not have known. Every new key is one.
    pub(super) const fn later(mut self) -> Self {
        self.description.is_in_every_digest = false;
        self
    }

    pub(super) fn parse(&self, text: &str) -> Option<T> {
        (self.parse)(text, &self.description.bound)
    }

    #[expect(clippy::expect_used, reason = "the defaults are compiled in, and a test reads every one of them")]
    pub(super) fn default_value(&self) -> T {
        self.parse(self.description.default).expect("the default is within the key's bound")
    }
}

impl Description {
    /// The name without its table: `listen` for `server.listen`.
    pub(super) fn last_part(&self) -> &'static str {
        self.name.rsplit('.').next().unwrap_or(self.name)
    }

    /// The table of the name: `server` for `server.listen`.
    pub(super) fn table(&self) -> &'static str {
        self.name.split('.').next().unwrap_or(self.name)
    }

    /// The line of a TOML file that gives the key this value.
    pub(super) fn toml_line(&self, value: &str) -> String {
        let name = self.last_part();
        match self.bound {
            Bound::Integer(_) | Bound::Percent(_) | Bound::SampleRate | Bound::Flag => format!("{name} = {value}\n"),
            _ => format!("{name} = {}\n", toml::Value::from(value)),
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::Address => f.write_str("an IP address and a port, for example 127.0.0.1:50051"),
            Bound::Integer(range) => write!(f, "a whole number from {} to {}", range.start(), range.end()),
            Bound::Percent(range) => {
                write!(f, "a whole percentage from {} to {}", range.start(), range.end())
            }
            Bound::SampleRate => f.write_str("a percentage from 0 to 100, for example 0.5"),
            Bound::OneOf(words) => write!(f, "one of {}", words.join(", ")),
            Bound::Path => f.write_str("a path"),
            Bound::Filter => write!(
                f,
                "a tracing filter of at most {} bytes, for example info or midemb=debug,info",
                logs::MAX_FILTER_BYTES
            ),
            Bound::Text => f.write_str("a string"),
            Bound::Line(max_bytes) => write!(f, "a string of 1 to {max_bytes} bytes without control characters"),
            Bound::Flag => f.write_str("true or false"),
            Bound::Sha256 => f.write_str("a SHA-256 of 64 hex digits"),
        }
    }
}

// One constructor for each kind of key. The arguments stand in the order of the documentation's table.

pub(super) const fn address(name: &'static str, default: &'static str, help: &'static str) -> Key<SocketAddr> {
    Key::new(name, default, Bound::Address, |text, _| text.parse().ok(), help)
}

/// A path, as written: it may be relative. None where the value is empty, as it is by default.
pub(super) const fn path(name: &'static str, help: &'static str) -> Key<Option<PathBuf>> {
    Key::new(name, "", Bound::Path, |text, _| Some((!text.is_empty()).then(|| PathBuf::from(text))), help)
}

pub(super) const fn text(name: &'static str, default: &'static str, help: &'static str) -> Key<String> {
    Key::new(name, default, Bound::Text, |text, _| Some(text.to_owned()), help)
}

pub(super) const fn filter(name: &'static str, default: &'static str, help: &'static str) -> Key<String> {
    Key::new(name, default, Bound::Filter, |text, _| logs::parse_filter(text).ok().map(|_| text.to_owned()), help)
}

/// One of `words`, which `parse` turns into a value.
pub(super) const fn choice<T>(
    name: &'static str,
    default: &'static str,
    words: &'static [&'static str],
    parse: Parse<T>,
    help: &'static str,
) -> Key<T> {
    Key::new(name, default, Bound::OneOf(words), parse, help)
}

pub(super) const fn count(
    name: &'static str,
    default: &'static str,
    range: RangeInclusive<u64>,
    help: &'static str,
) -> Key<usize> {
    Key::new(name, default, Bound::Integer(range), |text, bound| integer(text, bound)?.try_into().ok(), help)
}

/// A size in mebibytes, read as bytes.
pub(super) const fn megabytes(
    name: &'static str,
    default: &'static str,
    range: RangeInclusive<u64>,
    help: &'static str,
) -> Key<u64> {
    Key::new(name, default, Bound::Integer(range), |text, bound| Some(integer(text, bound)? << 20), help)
}

pub(super) const fn seconds(
    name: &'static str,
    default: &'static str,
    range: RangeInclusive<u64>,
    help: &'static str,
) -> Key<Duration> {
    Key::new(name, default, Bound::Integer(range), |text, bound| integer(text, bound).map(Duration::from_secs), help)
}

pub(super) const fn milliseconds(
    name: &'static str,
    default: &'static str,
    range: RangeInclusive<u64>,
    help: &'static str,
) -> Key<Duration> {
    Key::new(name, default, Bound::Integer(range), |text, bound| integer(text, bound).map(Duration::from_millis), help)
}

/// A text of one line that is not empty, of at most `max_bytes`.
pub(super) const fn line(name: &'static str, max_bytes: usize, help: &'static str) -> Key<String> {
    let parse: Parse<String> = |text, bound| {
        let Bound::Line(max_bytes) = bound else { return None };
        let is_line = (1..=*max_bytes).contains(&text.len()) && !text.contains(char::is_control);
        is_line.then(|| text.to_owned())
    };
    Key::new(name, "", Bound::Line(max_bytes), parse, help)
}

pub(super) const fn flag(name: &'static str, default: &'static str, help: &'static str) -> Key<bool> {
    Key::new(name, default, Bound::Flag, |text, _| text.parse().ok(), help)
}

/// A SHA-256 in hex, read in lower case.
pub(super) const fn sha256(name: &'static str, help: &'static str) -> Key<String> {
    let parse: Parse<String> = |text, _| {
        let is_digest = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_digest.then(|| text.to_ascii_lowercase())
    };
    Key::new(name, "", Bound::Sha256, parse, help)
}

pub(super) const fn percent(name: &'static str, range: RangeInclusive<u8>, help: &'static str) -> Key<u8> {
    let parse: Parse<u8> = |text, bound| {
        let Bound::Percent(range) = bound else { return None };
        text.parse().ok().filter(|percent| range.contains(percent))
    };
    Key::new(name, "", Bound::Percent(range), parse, help)
}

pub(super) const fn sample_rate(name: &'static str, default: &'static str, help: &'static str) -> Key<Rate> {
    let parse: Parse<Rate> = |text, _| text.parse().ok().and_then(Rate::from_percent);
    Key::new(name, default, Bound::SampleRate, parse, help)
}

fn integer(text: &str, bound: &Bound) -> Option<u64> {
    let Bound::Integer(range) = bound else { return None };
    text.parse().ok().filter(|n| range.contains(n))
}
