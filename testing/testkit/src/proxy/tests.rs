use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use super::*;
use crate::fill;

const LONG: Duration = Duration::from_secs(30);

/// Sends everything back, to everybody.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            stream.set_nodelay(true).unwrap();
            thread::spawn(move || {
                let _ = io::copy(&mut &stream, &mut &stream);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

fn connect(proxy: &DelayProxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.socket_addr()).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

fn round_trip(mut stream: &TcpStream) -> io::Result<Duration> {
    let start = Instant::now();
    stream.write_all(b"ping")?;
    stream.read_exact(&mut [0; 4])?;
    Ok(start.elapsed())
}

#[test]
fn a_round_trip_takes_as_long_as_asked() {
    let proxy = DelayProxy::tcp(echo(), Duration::from_millis(20)).unwrap();
    let stream = connect(&proxy);
    let mut trips: Vec<_> = (0..15).map(|_| round_trip(&stream).unwrap()).collect();
    trips.sort();
    assert!(trips[0] >= Duration::from_millis(20), "never early: {trips:?}");
    // Generous above: other tests share the machine. What it really is, the example `proxy_limits` prints.
    assert!(trips[0] < Duration::from_millis(30), "not late either: {trips:?}");
    proxy.set_rtt(Duration::ZERO);
    let fastest = (0..15).map(|_| round_trip(&stream).unwrap()).min();
    assert!(fastest < Some(Duration::from_millis(10)), "{fastest:?}");
}

#[test]
fn a_slow_line_takes_its_time_and_holds_the_sender_back() {
    let proxy = DelayProxy::tcp(echo(), Duration::from_millis(20)).unwrap();
    proxy.set_rate(NonZeroU64::new(1 << 20));
    let mut stream = connect(&proxy);
    let start = Instant::now();
    let bytes = fill::bytes(0, 1 << 19, 2);
    let writer = {
        let (mut stream, bytes) = (stream.try_clone().unwrap(), bytes.clone());
        thread::spawn(move || stream.write_all(&bytes).unwrap())
    };
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).unwrap();
    writer.join().unwrap();
    assert_eq!(back, bytes);
    // Both ways at once: half a second, and the round trip.
    let took = start.elapsed();
    assert!((Duration::from_millis(520)..Duration::from_secs(5)).contains(&took), "{took:?}");
    proxy.set_rate(None);
    let start = Instant::now();
    let mut other = stream.try_clone().unwrap();
    let writer = thread::spawn(move || other.write_all(&vec![1; 16 << 20]).unwrap());
    stream.read_exact(&mut vec![0; 16 << 20]).unwrap();
    writer.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "as fast as before");
}

#[test]
fn many_round_trips_fit_into_one() {
    let proxy = DelayProxy::tcp(echo(), Duration::from_millis(100)).unwrap();
    let mut stream = connect(&proxy);
    let start = Instant::now();
    for _ in 0..50 {
        stream.write_all(b"ping").unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    stream.read_exact(&mut [0; 200]).unwrap();
    assert!(start.elapsed() < Duration::from_millis(50 * 100), "they do not queue behind one another's delay");
}

#[test]
fn every_byte_arrives_in_order_and_so_does_the_end() {
    let proxy = DelayProxy::tcp(echo(), Duration::from_millis(4)).unwrap();
    let stream = connect(&proxy);
    let len = 48 << 20;
    let writer = {
        let mut stream = stream.try_clone().unwrap();
        thread::spawn(move || {
            let bytes = fill::bytes(0, len, 3);
            let (small, large) = bytes.split_at(1 << 20);
            small.chunks(777).for_each(|part| stream.write_all(part).unwrap());
            stream.write_all(large).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    let mut back = Vec::new();
    (&stream).read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    assert_eq!(back.len(), len);
    fill::check(&back, 0, 3).unwrap();
    drop(stream);
    let end = Instant::now() + LONG;
    while proxy.connections() > 0 {
        assert!(Instant::now() < end, "a closed connection lives on");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_cut_resets_and_a_heal_mends() {
    let proxy = DelayProxy::tcp(echo(), Duration::ZERO).unwrap();
    let stream = connect(&proxy);
    round_trip(&stream).unwrap();
    proxy.cut();
    assert_eq!(proxy.connections(), 0);
    assert_eq!(round_trip(&stream).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let refused = TcpStream::connect(proxy.socket_addr()).and_then(|stream| round_trip(&stream));
    assert!(refused.is_err());
    proxy.heal();
    round_trip(&connect(&proxy)).unwrap();
}

#[test]
fn a_reset_is_for_once_and_frees_blocked_writers() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = DelayProxy::tcp(silent.local_addr().unwrap(), Duration::ZERO).unwrap();
    let mut stream = connect(&proxy);
    let (_deaf, _) = silent.accept().unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    // Until the deaf server's buffers and the proxy's are full, or enough.
    let chunk = vec![1; 1 << 20];
    for _ in 0..64 {
        if stream.write_all(&chunk).is_err() {
            break;
        }
    }
    let start = Instant::now();
    proxy.reset();
    assert!(start.elapsed() < Duration::from_secs(4), "nobody stays blocked");
    assert_eq!(proxy.connections(), 0);
    proxy.retarget(echo());
    round_trip(&connect(&proxy)).unwrap();
}

#[test]
fn a_stall_loses_nothing() {
    let proxy = DelayProxy::tcp(echo(), Duration::ZERO).unwrap();
    let mut stream = connect(&proxy);
    round_trip(&stream).unwrap();
    proxy.stall();
    stream.write_all(b"late").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut buf = [0; 4];
    assert!(stream.read_exact(&mut buf).is_err(), "nothing comes through");
    proxy.heal();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.read_exact(&mut buf).unwrap();
    assert_eq!(&buf, b"late");
}

#[test]
fn an_absent_target_resets() {
    let absent = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = DelayProxy::tcp(absent, Duration::ZERO).unwrap();
    assert!(round_trip(&connect(&proxy)).is_err());
    proxy.retarget(echo());
    round_trip(&connect(&proxy)).unwrap();
}

#[test]
fn a_target_that_dies_is_noticed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = DelayProxy::tcp(listener.local_addr().unwrap(), Duration::from_millis(2)).unwrap();
    let mut stream = connect(&proxy);
    let (server, _) = listener.accept().unwrap();
    stream.write_all(b"unread").unwrap();
    thread::sleep(Duration::from_millis(20));
    // Closing with unread bytes is a reset; without, an end. The client must see one of them.
    drop(server);
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
}

#[test]
fn unix_sockets_on_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let (near, far) = (dir.path().join("near"), dir.path().join("far"));
    let listener = UnixListener::bind(&far).unwrap();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        io::copy(&mut &stream, &mut &stream).unwrap();
    });
    let proxy = DelayProxy::unix(&near, far.as_path(), Duration::from_millis(10)).unwrap();
    let mut stream = UnixStream::connect(&near).unwrap();
    let start = Instant::now();
    stream.write_all(b"ping").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(10));
    drop(stream);
    server.join().unwrap();
    drop(proxy);
    assert!(!near.exists(), "nothing is left behind");
}

#[test]
fn dropping_resets_and_stops_listening() {
    let proxy = DelayProxy::tcp(echo(), Duration::ZERO).unwrap();
    let (stream, address) = (connect(&proxy), proxy.socket_addr());
    round_trip(&stream).unwrap();
    drop(proxy);
    assert!(round_trip(&stream).is_err());
    assert!(TcpStream::connect(address).is_err());
}
