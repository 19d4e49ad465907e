//! Compiles `proto/` with protox: messages, server traits and the descriptor set that reflection answers from. The client
//! stubs are generated in `clients/rust`.

use prost::Message;
use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["midemb/v1/midemb.proto"], ["proto"])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("midemb_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(false)
        // Tensors go to the wire as shared bytes, never as a copied Vec.
        .bytes(".")
        // They carry items, and are decoded within bounds that prost does not know.
        .extern_path(".midemb.v1.GetMidEmbRequest", "crate::wire::raw::RawMessage")
        .extern_path(".midemb.v1.WarmItemsRequest", "crate::wire::raw::RawMessage")
        // Our codec answers bytes that are not a valid message with INVALID_ARGUMENT.
        .codec_path("crate::wire::codec::Codec")
        .compile_fds(descriptors)?;
    Ok(())
}
