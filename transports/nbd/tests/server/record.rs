//! Records `tests/corpus` anew: what libnbd, qemu and the server say to each other, piece by piece as it is sent.
//!
//! ```sh
//! cargo test -p r3map-nbd --test server record -- --ignored
//! ```

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use r3map_local::Memory;
use r3map_nbd::wire::Framing;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

#[path = "../wire/decoders.rs"]
mod decoders;

use crate::cuts::conversation;
use crate::support::{FRAMINGS, Running, filled, try_run};

/// The longest piece that is kept whole: what is longer is data for the most part.
const LONGEST: usize = 400;

type Pieces = Arc<Mutex<BTreeSet<(&'static str, Vec<u8>)>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "writes the corpus anew"]
async fn record() {
    let memory = Memory::new(1 << 20).unwrap();
    memory.write_now(65_536, &filled(100_000, 1)).unwrap();
    let running = Running::one(Arc::new(memory)).await;
    let socket = running.file("recorder");
    let pieces = Pieces::default();
    tokio::spawn(relay_all(UnixListener::bind(&socket).unwrap(), running.socket(), pieces.clone()));
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", socket.display());
    let script = "h.pread(512, 0)\nh.pread(512, 65536)\nh.pwrite(b'x' * 512, 4096, nbd.CMD_FLAG_FUA)\nh.flush()\n\
                  h.trim(4096, 0)\nh.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)\nh.cache(4096, 0)\n\
                  h.block_status(1 << 20, 0, lambda *a: 0)\nh.shutdown()";
    try_run("/usr/bin/python3", &["-m", "nbd", "--base-allocation", "-u", &uri("disk"), "-c", script]);
    let simple = script.replace("h.block_status(1 << 20, 0, lambda *a: 0)\n", "");
    let simple = format!(
        "h.set_request_structured_replies(False)\nh.set_handshake_flags(0)\nh.connect_unix({socket:?})\n{simple}"
    );
    try_run("/usr/bin/python3", &["-m", "nbd", "-c", &simple]);
    try_run("nbdinfo", &["--list", &uri("")]);
    try_run("nbdinfo", &["--map", &uri("disk")]);
    try_run("nbdinfo", &[&uri("nothing")]);
    try_run("qemu-io", &["-f", "raw", "-c", "read 1 1000", "-c", "write 70000 10", "-c", "read 2M 1", &uri("disk")]);
    for framing in FRAMINGS {
        say(&socket, framing).await;
    }
    save(&pieces.lock().unwrap());
}

/// Our own conversation, which has what others do not say yet.
async fn say(socket: &std::path::Path, framing: Framing) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(&conversation(framing)).await.unwrap();
    stream.read_to_end(&mut Vec::new()).await.unwrap();
}

async fn relay_all(listener: UnixListener, server: PathBuf, pieces: Pieces) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let server = UnixStream::connect(&server).await.unwrap();
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::spawn(relay(from_client, to_server, "client", pieces.clone()));
        tokio::spawn(relay(from_server, to_client, "server", pieces.clone()));
    }
}

async fn relay(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    side: &'static str,
    pieces: Pieces,
) {
    let mut bytes = vec![0; 1 << 20];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        pieces.lock().unwrap().insert((side, bytes[..count.min(LONGEST)].to_vec()));
        if to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

fn save(pieces: &BTreeSet<(&'static str, Vec<u8>)>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    // What does not begin with a message is the end of one.
    let messages = pieces.iter().filter(|(_, bytes)| decoders::decode_all(bytes) > 0);
    for (number, (side, bytes)) in messages.enumerate() {
        std::fs::write(folder.join(format!("{side}-{number:02}")), bytes).unwrap();
    }
}
