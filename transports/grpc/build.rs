//! Compiles the protocol files to Rust, without protoc: the messages for the library, and once more with tonic's own
//! clients and servers for the tests, which check ours against them.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let names = ["region/v1/region", "mount/v1/mount", "migration/v1/migration", "migration/v1/seeder"];
    let files = protox::compile(names.map(|name| format!("r3map/{name}.proto")), ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    for (folder, services) in [("messages", false), ("peer", true)] {
        let folder = out.join(folder);
        std::fs::create_dir_all(&folder)?;
        tonic_prost_build::configure()
            .bytes(".")
            .build_client(services)
            .build_server(services)
            .out_dir(folder)
            .emit_rerun_if_changed(false)
            .compile_fds(files.clone())?;
    }
    Ok(())
}
