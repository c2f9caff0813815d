//! `r3map demo`: the main job in one command, with nothing installed and nothing left behind.
//!
//! A second process serves a file over gRPC; a proxy between adds the round trip; this process maps the region as memory
//! and as a file, directly and managed, writes through both, and compares the source with what it should be.

mod measure;
mod migrate;
mod scene;

use anyhow::{Result, bail};
use r3map::size;
use serde_json::json;

use crate::args;
use crate::output::Output;
use crate::signals::Signals;

use measure::{Figures, View};
use scene::Scene;

pub(crate) async fn run(args: args::Demo, output: Output) -> Result<()> {
    let mut signals = Signals::new()?;
    tokio::select! {
        done = show(args, output) => done,
        () = signals.next() => bail!("stopped; nothing is left behind"),
    }
}

async fn show(args: args::Demo, output: Output) -> Result<()> {
    match args.what {
        Some(args::DemoOf::Migrate(args)) => migrate::run(args, output).await,
        None => play(args, output).await,
    }
}

async fn play(args: args::Demo, output: Output) -> Result<()> {
    let scene = Scene::set_up(args.file.as_deref(), args.rtt, output).await?;
    let human = format!("serving {} over gRPC in another process, {:?} away", size::format(scene.size()), scene.rtt());
    output.event("served", &human, json!({ "size": scene.size(), "rtt_seconds": scene.rtt().as_secs_f64() }));

    let files = scene.can_mount_files(output).await;
    header(output);
    for view in [View::Slice, View::File].into_iter().filter(|view| *view == View::Slice || files) {
        for managed in [false, true] {
            let figures = measure::run(&scene, view, managed).await?;
            row(output, view, managed, &figures);
        }
    }
    let written = scene.write_everywhere(files).await?;
    scene.tear_down(&written, output).await
}

fn header(output: Output) {
    if !output.is_json() {
        let columns = format!("{:<15} {:>10} {:>13} {:>13}", "", "first byte", "a touch", "reading");
        output.event("", &columns, json!({}));
    }
}

fn row(output: Output, view: View, managed: bool, figures: &Figures) {
    let mode = if managed { "managed" } else { "direct" };
    let name = format!("{view} {mode}");
    let human = format!(
        "{name:<15} {:>8.1?} {:>11.1?} {:>11}/s  ({})",
        figures.first_byte,
        figures.touch,
        size::format(figures.rate()),
        if figures.read == figures.size {
            "all of it".to_owned()
        } else {
            format!("the first {}", size::format(figures.read))
        },
    );
    output.event(
        "measured",
        &human,
        json!({
            "view": view.to_string(),
            "mode": mode,
            "first_byte_seconds": figures.first_byte.as_secs_f64(),
            "touch_seconds": figures.touch.as_secs_f64(),
            "read_bytes": figures.read,
            "read_seconds": figures.reading.as_secs_f64(),
        }),
    );
}
