//! What the delay proxy costs: throughput beside a direct connection, and how exact its delay is.
//!
//! `cargo run --release -p r3map-testkit --example proxy_limits`; with `delay` behind it only the latter. On a busy machine
//! that shows how long threads wait for a processor: `chrt -f 10` in front of it leaves that out.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use r3map_testkit::proxy::DelayProxy;

const BYTES: usize = 4 << 30;

fn main() -> io::Result<()> {
    let mut out = io::stdout().lock();
    let echo = serve(|stream| io::copy(&mut &*stream, &mut &*stream).map(|_| ()))?;
    if std::env::args().nth(1).as_deref() != Some("delay") {
        throughputs(&mut out)?;
    }
    for rtt in [0, 1, 10, 40] {
        let proxy = DelayProxy::tcp(echo, Duration::from_millis(rtt))?;
        let late = lateness(proxy.socket_addr(), Duration::from_millis(rtt))?;
        let at = |part: usize| late[part * (late.len() - 1) / 100].as_micros();
        writeln!(out, "rtt {rtt:2} ms: late by p50 {} µs, p90 {} µs, p99 {} µs", at(50), at(90), at(99))?;
    }
    Ok(())
}

fn throughputs(out: &mut impl Write) -> io::Result<()> {
    let sink = serve(drain)?;
    for _ in 0..2 {
        writeln!(out, "direct             {:5.2} GB/s", throughput(sink)?)?;
        for rtt in [0, 1, 10, 40] {
            let proxy = DelayProxy::tcp(sink, Duration::from_millis(rtt))?;
            writeln!(out, "through, rtt {rtt:2} ms  {:5.2} GB/s", throughput(proxy.socket_addr())?)?;
        }
    }
    Ok(())
}

fn serve(work: fn(&TcpStream) -> io::Result<()>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = stream.set_nodelay(true);
            let _ = work(&stream);
        }
    });
    Ok(address)
}

/// Reads everything, and answers with one byte at the end.
fn drain(mut stream: &TcpStream) -> io::Result<()> {
    let mut buf = vec![0; 1 << 20];
    let mut left = BYTES;
    while left > 0 {
        left -= stream.read(&mut buf)?;
    }
    stream.write_all(&[1])
}

fn throughput(address: SocketAddr) -> io::Result<f64> {
    let mut stream = TcpStream::connect(address)?;
    let buf = vec![7; 1 << 20];
    let start = Instant::now();
    for _ in 0..BYTES / buf.len() {
        stream.write_all(&buf)?;
    }
    stream.read_exact(&mut [0])?;
    Ok(BYTES as f64 / start.elapsed().as_secs_f64() / 1e9)
}

fn lateness(address: SocketAddr, rtt: Duration) -> io::Result<Vec<Duration>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut late = Vec::new();
    for _ in 0..100 {
        let start = Instant::now();
        stream.write_all(b"ping")?;
        stream.read_exact(&mut [0; 4])?;
        late.push(start.elapsed().saturating_sub(rtt));
    }
    late.sort();
    Ok(late)
}
