//! What the demo measures on one mount: how long the first byte takes, how long a touch far away, how fast reading is.

use std::fmt;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::Result;
use r3map::{FileMount, Mount, SliceMount};

use super::scene::Scene;

/// How the region is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Slice,
    File,
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Slice => "slice",
            Self::File => "file",
        })
    }
}

/// What was measured.
pub(super) struct Figures {
    /// From asking for the mount to having its first byte.
    pub(super) first_byte: Duration,
    /// One byte in the middle of what has not been read yet.
    pub(super) touch: Duration,
    /// Bytes that were read in a row, and how long it took.
    pub(super) read: u64,
    pub(super) reading: Duration,
    pub(super) size: u64,
}

impl Figures {
    /// Bytes a second.
    pub(super) fn rate(&self) -> u64 {
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rate = (self.read as f64 / self.reading.as_secs_f64().max(1e-9)) as u64;
        rate
    }
}

/// How long reading goes on where all of it would take too long.
const PATIENCE: Duration = Duration::from_secs(2);
const STEP: usize = 1 << 20;

/// Measures one way to mount the region.
pub(super) async fn run(scene: &Scene, view: View, managed: bool) -> Result<Figures> {
    let size = scene.size();
    let start = Instant::now();
    let remote = scene.connect().await?;
    let mount = if managed { Mount::managed(remote) } else { Mount::direct(remote) };
    match view {
        View::Slice => {
            let slice = mount.slice().await?;
            let (mut slice, figures) = on_thread(move || {
                let figures = read(start, size, |offset, buf| copy(&slice, offset, buf));
                (slice, figures)
            })
            .await?;
            slice.close().await?;
            Ok(figures?)
        }
        View::File => {
            let file = mount.file().await?;
            let (file, figures) = on_thread(move || {
                let figures = read(start, size, |offset, buf| copy_file(&file, offset, buf));
                (file, figures)
            })
            .await?;
            file.close().await?;
            Ok(figures?)
        }
    }
}

fn copy(slice: &SliceMount, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
    let start = usize::try_from(offset).map_err(std::io::Error::other)?;
    buf.copy_from_slice(&slice.as_slice()[start..start + buf.len()]);
    // Nobody looks at the copy, and an optimiser that sees that leaves the touch out.
    std::hint::black_box(buf);
    Ok(())
}

fn copy_file(file: &FileMount, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
    file.file().read_exact_at(buf, offset)
}

/// Touching mapped memory may wait for the network, so it happens on a thread of its own.
async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    Ok(tokio::task::spawn_blocking(work).await?)
}

fn read(start: Instant, size: u64, get: impl Fn(u64, &mut [u8]) -> std::io::Result<()>) -> std::io::Result<Figures> {
    get(0, &mut [0])?;
    let first_byte = start.elapsed();
    let touched = Instant::now();
    get(size * 3 / 4, &mut [0])?;
    let touch = touched.elapsed();

    let (begin, mut read, mut buf) = (Instant::now(), 0, vec![0; STEP]);
    while read < size && (read == 0 || begin.elapsed() < PATIENCE) {
        let len = usize::try_from(size - read).unwrap_or(STEP).min(STEP);
        get(read, &mut buf[..len])?;
        read += len as u64;
    }
    Ok(Figures { first_byte, touch, read, reading: begin.elapsed(), size })
}
