//! Authentication of the admin listener's callers.
//!
//! If `admin.token_file` is set, a call needs one of its tokens; the file is read at every call, so tokens can be added and
//! removed without a restart. Client certificates are checked by the listener's TLS before any call. An operator's changes
//! are logged under the token's name, the certificate's fingerprint, or the caller's address.

use super::peer::Peer;
use crate::domain::bounded_text::cut;
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use tonic::{Request, Status, service::Interceptor};

/// The most bytes of a token's name, which goes into the log and the status.
const MAX_NAME_BYTES: usize = 128;

/// The name that a caller's changes are logged under.
#[derive(Debug, Clone)]
pub struct Operator(String);

impl Operator {
    /// The name that the [`Guard`] found for the caller of `request`.
    pub fn of<T>(request: &Request<T>) -> String {
        request.extensions().get::<Operator>().map_or_else(|| "unknown".to_owned(), |operator| operator.0.clone())
    }
}

/// Checks the token of each call and names its caller.
#[derive(Debug, Clone)]
pub struct Guard {
    token_file: Option<PathBuf>,
}

impl Guard {
    /// Requires a token of `token_file` if there is one.
    pub fn new(token_file: Option<PathBuf>) -> Self {
        Guard { token_file }
    }

    /// The name of the token that was sent; none if the listener has no token file.
    fn token_name(&self, request: &Request<()>) -> Result<Option<String>, Status> {
        let Some(file) = &self.token_file else { return Ok(None) };
        let tokens = fs::read_to_string(file).map_err(|error| unreadable(file, &error))?;
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let sent = header.and_then(|value| value.strip_prefix("Bearer ")).map(str::trim).unwrap_or_default();
        let lines = tokens.lines().map(str::trim).filter(|line| !line.starts_with('#'));
        let mut named_tokens = lines.filter_map(|line| line.rsplit_once(char::is_whitespace));
        // Comparing hashes takes constant time, so the answer's timing does not tell how much of a guess was right.
        let is_sent = |token: &str| blake3::hash(token.as_bytes()) == blake3::hash(sent.as_bytes());
        match named_tokens.find(|(_, token)| is_sent(token)) {
            Some((name, _)) => Ok(Some(cut(name.trim(), MAX_NAME_BYTES).into_owned())),
            None => Err(Status::unauthenticated(
                "the admin listener needs a bearer token of its admin.token_file (--token-file)",
            )),
        }
    }
}

fn unreadable(file: &Path, error: &io::Error) -> Status {
    tracing::error!(file = %file.display(), %error, "admin.token_file cannot be read, every admin call is refused");
    Status::unauthenticated("the server's admin.token_file cannot be read")
}

impl Interceptor for Guard {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let Peer { address, certificate, .. } = request.extensions().get().cloned().unwrap_or_default();
        let address = address.map_or_else(|| "unknown address".to_owned(), |address| address.to_string());
        let name = self.token_name(&request).inspect_err(|status| {
            tracing::warn!(address, reason = status.message(), "admin call refused");
        })?;
        let who = match (name, certificate) {
            (Some(name), _) => format!("{name} from {address}"),
            (None, Some(fingerprint)) => format!("certificate {fingerprint} from {address}"),
            (None, None) => address,
        };
        request.extensions_mut().insert(Operator(who));
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn call(guard: &mut Guard, authorization: Option<&str>) -> Result<String, String> {
        let mut request = Request::new(());
        if let Some(value) = authorization {
            request.metadata_mut().insert("authorization", value.parse().unwrap());
        }
        let called = guard.call(request).map_err(|status| status.message().to_owned())?;
        Ok(Operator::of(&called))
    }

    #[test]
    fn only_tokens_in_the_file_are_accepted_and_the_file_may_change() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "ann from sre s3cret\n\nbroken\n# eve g0ne\nbob  t0ken ").unwrap();
        let mut guard = Guard::new(Some(file.path().to_path_buf()));
        assert_eq!(call(&mut guard, Some("Bearer s3cret")).unwrap(), "ann from sre from unknown address");
        assert_eq!(call(&mut guard, Some("Bearer t0ken")).unwrap(), "bob from unknown address");
        for wrong in
            [None, Some("Bearer "), Some("Bearer broken"), Some("s3cret"), Some("Bearer s3cre"), Some("Bearer g0ne")]
        {
            let refused = call(&mut guard, wrong).unwrap_err();
            assert!(refused.contains("bearer token") && !refused.contains("s3cret"), "{wrong:?}: {refused}");
        }
        fs::write(file.path(), "eve n3w\n").unwrap();
        assert!(call(&mut guard, Some("Bearer s3cret")).is_err(), "a removed token was accepted");
        assert!(call(&mut guard, Some("Bearer n3w")).is_ok());
        fs::remove_file(file.path()).unwrap();
        assert!(call(&mut guard, Some("Bearer n3w")).unwrap_err().contains("cannot be read"));
        assert_eq!(call(&mut Guard::new(None), None).unwrap(), "unknown address");
    }
}
