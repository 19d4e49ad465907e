//! The admin listener accepts only callers with a token or a certificate, and logs who changed what.

use crate::harness::{PATIENCE, Server, config, eventually, fixture, midemb, retrained};
use midemb::domain::digest::sha256_hex;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    sync::Arc,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    },
};

fn admin(address: &str, arguments: &[&str]) -> Output {
    midemb().args(["admin", "--admin", address]).args(arguments).output().unwrap()
}

#[track_caller]
fn accepted(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The one line that gives the reason.
#[track_caller]
fn refused(output: &Output) -> String {
    let [out, line] = [&output.stdout, &output.stderr].map(|text| String::from_utf8(text.clone()).unwrap());
    assert_eq!((output.status.code(), out.as_str()), (Some(1), ""), "{line}");
    assert!(line.starts_with("midemb: error: ") && line.lines().count() == 1, "{line}");
    line
}

/// A folder of files for one test.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Files(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).unwrap();
        self.path(name)
    }
}

#[test]
fn a_token_is_accepted_under_its_name_until_it_is_removed_from_the_file() {
    let files = Files::new();
    let tokens = files.write("tokens", "ann from sre ann-s-t0ken\nbob bob-s-t0ken\n");
    let [ann, bob, eve] = ["ann-s-t0ken", "bob bob-s-t0ken", "eve"]
        .map(|token| files.write(&format!("{}.token", &token[..3]), &format!("{token}\n")));
    let server = Server::start_with(&fixture(), &format!("admin.token_file = {tokens:?}"));
    let call = |command: &[&str]| admin(&server.admin, command);

    for command in [&["status"][..], &["--token-file", &eve, "status"], &["--token-file", &eve, "flush"]] {
        let line = refused(&call(command));
        assert!(line.contains("bearer token") && !line.contains("t0ken"), "{line}");
        assert_eq!(server.wait_for_log("admin call refused")["address"], "127.0.0.1");
    }
    assert!(accepted(&call(&["--token-file", &ann, "status"])).contains("ready"));
    assert_eq!(accepted(&call(&["--token-file", &ann, "flush", "item"])), "0 entries removed\n");
    assert_eq!(server.wait_for_log("cache flushed")["who"], "ann from sre from 127.0.0.1");
    accepted(&call(&["flush", "--token-file", &bob]));
    assert_eq!(server.wait_for_log("cache flushed")["who"], "bob from 127.0.0.1");

    files.write("tokens", "bob bob-s-t0ken\neve eve\n");
    assert!(refused(&call(&["--token-file", &ann, "status"])).contains("bearer token"));
    accepted(&call(&["--token-file", &bob, "status"]));
    accepted(&call(&["--token-file", &eve, "status"]));
    fs::remove_file(&tokens).unwrap();
    assert!(refused(&call(&["--token-file", &bob, "status"])).contains("admin.token_file cannot be read"));
}

type Authority = CertifiedIssuer<'static, KeyPair>;

/// A certificate authority. All have the same name, so that only their keys distinguish them.
fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "midemb tests");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Writes a signed certificate and its key to `name.pem` and `name.key`; returns the certificate's DER.
fn sign(files: &Files, name: &str, by: &Authority, purpose: ExtendedKeyUsagePurpose) -> Vec<u8> {
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages = vec![purpose];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, by).unwrap();
    files.write(&format!("{name}.pem"), &certificate.pem());
    files.write(&format!("{name}.key"), &key.serialize_pem());
    certificate.der().to_vec()
}

/// The files of a server and its clients, the DER of the accepted client's certificate, and the server's config.
fn certificates() -> (Files, Vec<u8>, String) {
    let (files, ours, theirs) = (Files::new(), authority(), authority());
    files.write("ca.pem", &ours.pem());
    files.write("theirs.pem", &theirs.pem());
    sign(&files, "server", &ours, ExtendedKeyUsagePurpose::ServerAuth);
    let client = sign(&files, "client", &ours, ExtendedKeyUsagePurpose::ClientAuth);
    sign(&files, "foreign", &theirs, ExtendedKeyUsagePurpose::ClientAuth);
    let config = format!(
        "admin.tls_cert = {:?}\nadmin.tls_key = {:?}\nadmin.tls_client_ca = {:?}",
        files.path("server.pem"),
        files.path("server.key"),
        files.path("ca.pem")
    );
    (files, client, config)
}

#[test]
fn only_certificates_of_the_configured_authority_are_accepted() {
    let (files, der, guard) = certificates();
    let server = Server::start_with(&fixture(), &guard);
    let path = |name: &str| files.path(name);
    let (ca, theirs, cert, key) = (path("ca.pem"), path("theirs.pem"), path("client.pem"), path("client.key"));
    let (foreign_cert, foreign_key) = (path("foreign.pem"), path("foreign.key"));
    let url = format!("https://{}", server.admin);
    let as_client = |command: &[&str]| {
        let identity = ["--ca", &ca, "--cert", &cert, "--key", &key];
        admin(&url, &[&identity[..], command].concat())
    };
    assert!(accepted(&as_client(&["status"])).contains("ready"));

    refused(&admin(&url, &["--ca", &ca, "status"]));
    refused(&admin(&url, &["--ca", &ca, "--cert", &foreign_cert, "--key", &foreign_key, "status"]));
    refused(&admin(&server.admin, &["status"]));
    // The client refuses a server whose certificate was signed by another authority.
    let line = refused(&admin(&url, &["--ca", &theirs, "--cert", &cert, "--key", &key, "status"]));
    assert!(line.contains("invalid peer certificate"), "{line}");

    let config = crate::lifecycle::with_bundle(&server, &retrained());
    let pushed = accepted(&as_client(&["push", "--json", &files.write("next.toml", &config)]));
    assert_eq!(serde_json::from_str::<Value>(&pushed).unwrap()["result"], "applied");
    let who = format!("certificate {} from 127.0.0.1", &sha256_hex(&der)[..16]);
    assert_eq!(server.wait_for_log("push ended")["who"], who.as_str());
}

/// Replaced certificates were served after a restart only, and nothing said so.
#[test]
fn replaced_certificates_are_served_without_a_restart_and_bad_ones_are_not() {
    let (files, _, guard) = certificates();
    let server = Server::start_with(&fixture(), &guard);
    let [old_ca, cert, key] = ["ca.pem", "client.pem", "client.key"].map(|name| files.path(name));
    let call = |ca: &str, cert: &str, key: &str| {
        admin(&format!("https://{}", server.admin), &["--ca", ca, "--cert", cert, "--key", key, "status"])
    };
    accepted(&call(&old_ca, &cert, &key));

    // Half of a replacement: the last good certificate stays.
    let old_chain = fs::read_to_string(files.path("server.pem")).unwrap();
    files.write("server.pem", "no certificate");
    assert!(server.wait_for_log("new certificates cannot be used, the last good ones are served")["cause"].is_string());
    accepted(&call(&old_ca, &cert, &key));
    files.write("server.pem", &old_chain);

    // A new authority for the server and its operators, by rename, as tools for certificates do it.
    let new = Files::new();
    let authority = authority();
    let new_ca = new.write("ca.pem", &authority.pem());
    sign(&new, "server", &authority, ExtendedKeyUsagePurpose::ServerAuth);
    sign(&new, "client", &authority, ExtendedKeyUsagePurpose::ClientAuth);
    for name in ["server.key", "server.pem", "ca.pem"] {
        fs::copy(new.path(name), files.path("next")).unwrap();
        fs::rename(files.path("next"), files.path(name)).unwrap();
    }
    // The files are read while they are replaced, so the first set that goes together may be an older one.
    let [cert, key] = ["client.pem", "client.key"].map(|name| new.path(name));
    loop {
        server.wait_for_log("certificates reloaded");
        if call(&new_ca, &cert, &key).status.success() {
            break;
        }
    }
    let [old_cert, old_key] = ["client.pem", "client.key"].map(|name| files.path(name));
    refused(&call(&new_ca, &old_cert, &old_key));
}

/// Connections with TLS got no pings, so that of a peer that had vanished stayed open.
#[tokio::test]
async fn a_peer_behind_tls_that_answers_no_ping_loses_its_connection() {
    const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
    const PING: u8 = 6;
    let (files, _, guard) = certificates();
    let server = Server::start_with(&fixture(), &guard);
    let certificate = |name: &str| CertificateDer::from_pem_file(files.path(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate("ca.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(files.path("client.key")).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate("client.pem")], key)
        .unwrap();
    let stream = TcpStream::connect(&server.admin).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut peer = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    peer.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", SETTINGS].concat()).await.unwrap();
    let pinged = async {
        loop {
            let mut head = [0; 9];
            peer.read_exact(&mut head).await.unwrap();
            let n_bytes = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            peer.read_exact(&mut vec![0; n_bytes as usize]).await.unwrap();
            if head[3] == PING {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, pinged).await.expect("the server sends no ping");
    eventually("the connection is closed", async || server.scrape().sum("midemb_connections", &["admin"]) == 0.0).await;
}

#[test]
fn if_both_are_configured_a_certificate_alone_is_not_enough() {
    let (files, _, guard) = certificates();
    let tokens = files.write("tokens", "ann ann-s-t0ken\n");
    let server = Server::start_with(&fixture(), &format!("{guard}\nadmin.token_file = {tokens:?}"));
    let [ca, cert, key] = ["ca.pem", "client.pem", "client.key"].map(|name| files.path(name));
    let identity = ["--ca", &ca, "--cert", &cert, "--key", &key];
    let call = |command: &[&str]| admin(&server.admin, &[&identity[..], command].concat());
    assert!(refused(&call(&["flush"])).contains("bearer token"));
    refused(&admin(&server.admin, &["--ca", &ca, "--token-file", &tokens, "flush"]));
    accepted(&call(&["--token-file", &tokens, "flush"]));
    assert_eq!(server.wait_for_log("cache flushed")["who"], "ann from 127.0.0.1");
}

/// A config whose admin listener can be reached from other machines. Its bundle does not exist, so no server starts with it.
fn exposed(more: &str) -> (TempDir, PathBuf) {
    let (folder, path) = config(Path::new("/nowhere/bundle"), more);
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace("admin.listen = \"127.0.0.1:0\"", "admin.listen = \"0.0.0.0:0\"");
    assert!(text.contains("0.0.0.0:0"), "{text}");
    fs::write(&path, text).unwrap();
    (folder, path)
}

#[test]
fn an_admin_listener_open_to_other_machines_needs_a_guard() {
    let (files, _, guard) = certificates();
    let run = |command: &[&str], path: &Path| midemb().args(command).arg("--config").arg(path).output().unwrap();
    // The server's own certificate does not restrict who may call.
    let tls_only = guard.lines().filter(|line| !line.contains("client_ca")).collect::<Vec<_>>().join("\n");
    let token_file = format!("admin.token_file = {:?}", files.write("tokens", "ann ann-s-t0ken\n"));
    for (more, command) in [("", &["serve"][..]), (&tls_only, &["serve"]), ("", &["config", "check"])] {
        let (_folder, path) = exposed(more);
        let refused = run(command, &path);
        let text = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{text}");
        assert!(text.contains("admin.listen") && text.contains("0.0.0.0:0"), "{text}");
        assert!(text.contains("admin.token_file") && text.contains("admin.tls_client_ca"), "{text}");
    }
    // Whoever reads a token on the network can operate the server.
    let (_folder, path) = exposed(&token_file);
    let plaintext = run(&["serve"], &path);
    let text = String::from_utf8(plaintext.stderr).unwrap();
    assert_eq!(plaintext.status.code(), Some(2), "{text}");
    assert!(text.contains("in the clear") && text.contains("admin.allow_plaintext_tokens"), "{text}");
    let allowed = format!("{token_file}\nadmin.allow_plaintext_tokens = true");
    for more in [allowed, format!("{token_file}\n{tls_only}"), guard] {
        let (_folder, path) = exposed(&more);
        accepted(&run(&["config", "check"], &path));
    }
}
