//! The .proto files → Rust without protoc: protox compiles, tonic-prost-build generates.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["csi.proto", "pluginregistration.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;

    // A message that carries secrets gets no Debug at all: it cannot be printed by accident.
    let with_secrets: Vec<String> = descriptors
        .file
        .iter()
        .filter(|file| file.package() == "csi.v1")
        .flat_map(|file| file.message_type.iter())
        .filter(|message| message.field.iter().any(|field| field.name() == "secrets"))
        .map(|message| format!("csi.v1.{}", message.name()))
        .collect();

    // The descriptor test reads what was really compiled.
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors"), prost_bytes(&descriptors))?;

    tonic_prost_build::configure()
        .build_client(std::env::var_os("CARGO_FEATURE_CLIENT").is_some())
        .build_server(true)
        .build_transport(false)
        // An RPC that we do not write answers UNIMPLEMENTED.
        .generate_default_stubs(true)
        .disable_comments(["."])
        .skip_debug(with_secrets)
        .compile_fds(descriptors)?;
    Ok(())
}

fn prost_bytes(message: &impl prost::Message) -> Vec<u8> {
    message.encode_to_vec()
}
