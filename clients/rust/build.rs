//! Compiles the wire contract: messages and client stubs, and server stubs where the feature `test-server` asks for them.

use std::{env, error::Error};

const PROTO_FOLDER: &str = "../../proto";
/// The messages that `GetStatus` and `PushConfig` answer with. Commands print them as JSON.
const PRINTED_MESSAGES: [&str; 8] = [
    "GetStatusResponse",
    "PushConfigResponse",
    "ModelInfo",
    "ModelRef",
    "CacheStatus",
    "ConfigInfo",
    "PushReport",
    "PushStep",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTO_FOLDER}");
    let has_feature = |name: &str| env::var_os(format!("CARGO_FEATURE_{name}")).is_some();
    let mut config = tonic_prost_build::configure()
        // A tensor's data is a slice of the buffer that it was received in, never a copy.
        .bytes(".")
        .build_server(has_feature("TEST_SERVER"));
    if has_feature("SERDE") {
        for message in PRINTED_MESSAGES {
            config = config.type_attribute(format!("midemb.v1.{message}"), "#[derive(serde::Serialize)]");
        }
    }
    config.compile_fds(protox::compile(["midemb/v1/midemb.proto"], [PROTO_FOLDER])?)?;
    Ok(())
}
