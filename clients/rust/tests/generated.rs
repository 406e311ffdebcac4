//! Keeps src/tokenbroker.v1.rs in step with the schema, so that nobody needs protoc to build this crate.
//! UPDATE=1 cargo test --test generated writes it.

use std::{env, fs, path::Path, process::Command};

use prost_types::FileDescriptorSet;

#[test]
fn the_code_is_generated_from_the_schema() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let buf = Command::new(root.join("bin/buf"))
        .current_dir(&root)
        .args([
            "build",
            "--as-file-descriptor-set",
            "--path",
            "proto/tokenbroker/v1/token_broker.proto",
            "-o",
            "-#format=binpb",
        ])
        .output()
        .expect("bin/buf, which make builds");
    assert!(buf.status.success(), "{}", String::from_utf8_lossy(&buf.stderr));
    let mut files: FileDescriptorSet = prost::Message::decode(&*buf.stdout).unwrap();
    files.file.retain(|f| f.package() != "buf.validate"); // its options are nobody's here
    let out = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let generator = tonic_prost_build::configure().build_server(false).skip_debug(["tokenbroker.v1.Token"]).out_dir(out);
    generator.compile_fds(files).unwrap();
    let generated = fs::read_to_string(out.join("tokenbroker.v1.rs")).unwrap();
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tokenbroker.v1.rs");
    if env::var_os("UPDATE").is_some() {
        fs::write(&kept, &generated).unwrap();
    }
    assert!(fs::read_to_string(kept).unwrap() == generated, "the schema has changed: UPDATE=1 cargo test --test generated");
}
