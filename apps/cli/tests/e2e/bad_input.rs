//! Bad input: each wrong name, size, path, permission and version gets one clear line and a non-zero exit.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use crate::support::{MIB, Outcome, SOON, Scene, is_mounted, make_file};

const LONG: Duration = Duration::from_secs(180);

/// Nobody listens there: the port is reserved and its owner never accepts.
const NOBODY: &str = "grpc://127.0.0.1:9";

/// Exactly one line, which says `hint`, and nothing on standard output.
fn one_line(arguments: &[&str], outcome: &Outcome, hint: &str) {
    assert!(outcome.code.is_some_and(|code| code != 0), "{arguments:?} must fail: {outcome:?}");
    assert!(outcome.out.is_empty(), "{arguments:?} says on standard output: {outcome:?}");
    let [line] = outcome.err.as_slice() else { panic!("{arguments:?} does not say one line: {:#?}", outcome.err) };
    assert!(line.starts_with("error: "), "{arguments:?}: {line}");
    assert!(line.contains(hint), "{arguments:?} does not say {hint:?}: {line}");
    assert!(line.len() < 400, "{arguments:?} says too much: {line}");
}

/// Runs a table of command lines.
fn refuses(scene: &Scene, table: &[(&str, &str)]) {
    for (line, hint) in table {
        let line = line.replace("DIR", &scene.name("."));
        let arguments: Vec<_> = line.split_whitespace().collect();
        one_line(&arguments, &scene.ended(&arguments), hint);
    }
}

#[test]
fn wrong_names() {
    Scene::play(LONG, |scene| {
        make_file(&scene.path("file"), MIB, 1);
        refuses(
            scene,
            &[
                ("info DIR/file", "did you mean file:"),
                ("info nowhere", "starts with a scheme"),
                ("info tape:/dev/nst0", "known are"),
                ("info file:", "a path must follow"),
                ("info file:DIR/absent", "absent"),
                ("info file:DIR", "directory"),
                ("info file:DIR/file?sice=1MiB", "sice"),
                ("info file:DIR/file?size", "no value"),
                ("info memory:x?size=1MiB", "nothing may follow"),
                ("info memory:?size=1MiB&size=1MiB", "given twice"),
                ("info directory:DIR/file?size=1MiB", "file"),
                ("info grpc://", "HOST:PORT"),
                ("info grpc://127.0.0.1", "HOST:PORT"),
                ("info grpc://127.0.0.1:x", "HOST:PORT"),
                ("info grpc://127.0.0.1:70000", "HOST:PORT"),
                ("info grpc://[::1:5", "HOST:PORT"),
                ("info grpc://127.0.0.1:9?chunking=perhaps --size 1MiB", "chunking is"),
                ("info grpc+unix://DIR/absent", "absent"),
                ("info grpc+unix://DIR/file", "file"),
                ("serve memory:?size=1MiB --listen file:DIR/x", "listen"),
                ("serve memory:?size=1MiB --listen grpc://127.0.0.1", "HOST:PORT"),
                ("serve memory:?size=1MiB --listen grpc+unix://DIR/absent/socket", "absent"),
                ("serve memory:?size=1MiB --listen grpc+unix://DIR/file", "file"),
                ("serve memory:?size=1MiB --listen grpc://192.0.2.1:1", "192.0.2.1"),
                ("serve memory:?size=1MiB --listen grpc://no-such-host.invalid:1", "(invalid input)"),
                ("serve memory:?size=1MiB --listen nbd://no-such-host.invalid/x", "(invalid input)"),
                ("info directory:DIR", "--create"),
            ],
        );
        assert!(scene.path("file").exists(), "what was in the way is left alone");
    });
}

#[test]
fn wrong_block_devices() {
    Scene::play(LONG, |scene| {
        refuses(
            scene,
            &[
                ("nbd detach /dev/sda", "/dev/nbdN is wanted"),
                ("nbd detach /dev/nbd0p1", "/dev/nbdN is wanted"),
                ("nbd detach", "try --help"),
                ("nbd attach nbd://127.0.0.1:1 /dev/null", "/dev/nbdN is wanted"),
                ("nbd attach nbd://127.0.0.1:1 --connections 0", "try --help"),
                ("nbd attach nbd://127.0.0.1:1 --wait soon", "is not a time"),
                ("nbd attach memory:?size=1MiB", "nbd"),
            ],
        );
        if !Path::new("/sys/module/nbd").exists() {
            refuses(
                scene,
                &[("nbd attach nbd://127.0.0.1:1", "modprobe nbd"), ("nbd detach /dev/nbd0", "modprobe nbd")],
            );
        }
    });
}

/// And not what the library calls it, which is nothing that its user has asked for.
#[test]
fn a_command_about_a_device_says_what_it_could_not_do() {
    Scene::play(LONG, |scene| {
        for (line, tried) in [
            ("nbd attach nbd://127.0.0.1:1 /dev/null", "attach nbd://127.0.0.1:1"),
            ("nbd detach /dev/sda", "detach /dev/sda"),
            ("remove /dev/loop0", "remove /dev/loop0"),
        ] {
            let arguments: Vec<_> = line.split(' ').collect();
            let outcome = scene.ended(&arguments);
            one_line(&arguments, &outcome, tried);
            let start = format!("error: cannot {tried}: ");
            assert!(outcome.err[0].starts_with(&start), "{line}: {outcome:?}");
            let why = &outcome.err[0][start.len()..];
            assert!(!why.starts_with("mount: ") && !why.starts_with("close: "), "{line}: {outcome:?}");
        }
    });
}

#[test]
fn wrong_sizes() {
    Scene::play(LONG, |scene| {
        make_file(&scene.path("file"), MIB, 1);
        make_file(&scene.path("half"), MIB / 2, 1);
        std::fs::write(scene.path("empty"), "").expect("there is room");
        refuses(
            scene,
            &[
                ("info memory:", "--size"),
                ("info memory:?size=0", "at least one byte"),
                ("info memory:?size=big", "not a size"),
                ("info memory:?size=-1", "not a size"),
                ("info memory:?size=99999999999999999999", "size"),
                ("info null:?size=2EiB", "largest region"),
                ("info memory:?size=1MiB --size 2MiB", "given twice"),
                ("info memory: --size 1XiB", "not a size"),
                ("info null:", "--size"),
                ("info directory:DIR/chunks", "chunks"),
                ("info file:DIR/empty", "empty"),
                ("info file:DIR/file --size 2MiB", "1048576 bytes, not 2097152"),
                ("serve file:DIR/new --create --listen grpc://127.0.0.1:0", "--size"),
                ("serve directory:DIR/new --create --listen grpc://127.0.0.1:0", "size"),
                ("serve memory: --size 1MiB --chunk-size 5000 --listen grpc://127.0.0.1:0", "power of two"),
                ("serve memory: --size 1MiB --chunk-size 2KiB --listen grpc://127.0.0.1:0", "power of two"),
                ("serve memory: --size 1MiB --chunk-size 128MiB --listen grpc://127.0.0.1:0", "power of two"),
                ("serve directory:DIR/new?size=1MiB&chunk=3000 --create --listen grpc://127.0.0.1:0", "power of two"),
                ("copy file:DIR/file file:DIR/half", "524288 bytes, not 1048576"),
            ],
        );
        assert!(!scene.path("new").exists(), "nothing was made");
    });
}

#[test]
fn wrong_options() {
    Scene::play(LONG, |scene| {
        make_file(&scene.path("file"), MIB, 1);
        std::fs::write(scene.path("order"), "0\n9GiB\n").expect("there is room");
        let server = scene.serve(&format!("file:{}", scene.name("file")), &[]);
        let mount = |options: &str| format!("mount {} DIR/region {options}", server.uri);
        let table = [
            (mount("--mode other"), "managed"),
            (mount("--pull-workers many"), "auto"),
            (mount("--pull-workers=-1"), "--pull-workers"),
            (mount("--push-interval 0s"), "--push-interval"),
            (mount("--push-interval soon"), "20ms"),
            (mount("--retry 0s"), "or `forever`"),
            (mount("--dirty-budget 0"), "--dirty-budget"),
            (mount("--retry never"), "not a time"),
            (mount("--fsync local"), "--cache"),
            (mount("--mode direct --cache DIR/cache"), "--mode direct"),
            (mount("--mode direct --pull-first"), "--mode direct"),
            (mount("--mode direct --pull-workers 4"), "--mode direct"),
            (mount("--mode direct --push-interval 5s"), "--mode direct"),
            (mount("--mode direct --dirty-budget 1MiB"), "--mode direct"),
            (mount("--block-size 4096"), "--as block"),
            (mount("--pull-first --pull-workers 0"), "--pull-first"),
            (mount("--pull-order DIR/absent"), "absent"),
            (mount("--pull-order DIR/order"), "line 2"),
            (mount("--cache"), "--cache"),
            (mount("--nonsense"), "--nonsense"),
            (format!("mount {}", server.uri), "PATH"),
            ("serve memory:?size=1MiB".to_owned(), "--listen"),
            ("frobnicate".to_owned(), "frobnicate"),
            (format!("copy --in-flight 0 {0} {0}", server.uri), "--in-flight"),
            ("completions tcsh".to_owned(), "bash"),
            ("man DIR/absent".to_owned(), "absent"),
            ("demo --rtt fast".to_owned(), "20ms"),
            ("demo --file DIR/absent".to_owned(), "absent"),
        ];
        let table: Vec<_> = table.iter().map(|(line, hint)| (line.as_str(), *hint)).collect();
        refuses(scene, &table);
        assert!(!scene.path("region").exists(), "nothing was mounted");
        assert!(!scene.path("cache").exists(), "nothing was made");
    });
}

#[test]
fn wrong_paths_to_mount_on() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("file"), MIB, 1);
        let server = scene.serve(&format!("file:{}", scene.name("file")), &[]);
        std::fs::write(scene.path("full"), "precious").expect("there is room");
        std::fs::create_dir_all(scene.path("folder/with")).expect("there is room");
        let mount = |path: &str| format!("mount {} {path}", server.uri);
        let table = [
            (mount("DIR/full"), "full"),
            (mount("DIR/absent/region"), "absent"),
            (mount("DIR/full/region"), "full"),
            (mount("DIR/folder"), "folder"),
            (mount("DIR/folder"), "add --entry NAME"),
            (mount("DIR/folder/with/"), "add --entry NAME"),
            (mount("/dev/null"), "/dev/null"),
            (mount("DIR/folder --entry disk"), "something in it"),
            (mount("DIR/full --entry disk"), "not a directory"),
            (mount("DIR/absent/region --entry disk"), "absent"),
            (mount("DIR/region --entry a/b --cache DIR/cache"), "\"a/b\" is not a file name"),
            (mount("DIR/region --entry ..  --cache DIR/cache"), "\"..\" is not a file name"),
            (mount("DIR/region --entry= --cache DIR/cache"), "\"\" is not a file name"),
            (mount("DIR/region --cache DIR/absent/cache"), "absent"),
            (mount("DIR/region --cache DIR/folder"), "folder"),
            (mount("DIR/full --cache DIR/cache"), "full"),
            (mount("DIR/cache --cache ./cache"), "cannot be the cache file"),
        ];
        let table: Vec<_> = table.iter().map(|(line, hint)| (line.as_str(), *hint)).collect();
        refuses(scene, &table);
        assert_eq!(std::fs::read(scene.path("full")).expect("it is there"), b"precious");
        assert!(!scene.path("region").exists() && !scene.path("cache").exists(), "nothing was left behind");
    });
}

/// What was shown already when something else failed is not left behind.
#[test]
fn wrong_things_to_seed() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("file"), MIB, 1);
        make_file(&scene.path("other"), MIB, 2);
        let server = scene.serve("memory:?size=1MiB", &[]);
        let seed = |more: &str| format!("seed file:DIR/file DIR/region --listen grpc://127.0.0.1:0 {more}");
        let table = [
            (format!("seed file:DIR/file DIR/region --listen {}", server.uri), "in use"),
            (seed("--also file:DIR/other DIR/region"), "mounted on it already"),
            (seed("--also file:DIR/other DIR/absent/region"), "absent"),
            (seed("--also file:DIR/absent DIR/other-region"), "absent"),
            (seed("--listen nbd://127.0.0.1/x"), "migrated"),
            (seed("--ledger DIR/absent/ledger"), "give another --ledger"),
        ];
        let table: Vec<_> = table.iter().map(|(line, hint)| (line.as_str(), *hint)).collect();
        refuses(scene, &table);
        assert!(!is_mounted(&scene.path("region")) && !scene.path("region").exists(), "nothing was left behind");
    });
}

#[test]
fn nobody_answers() {
    Scene::play(LONG, |scene| {
        make_file(&scene.path("file"), MIB, 1);
        let silent = TcpListener::bind("127.0.0.1:0").expect("it can listen");
        let silent = format!("grpc://{}", silent.local_addr().expect("it listens"));
        let other = scene.serve_at("memory:?size=1MiB", "nbd://127.0.0.1:0/x", &[]);
        let mount = |uri: &str| format!("mount {uri} DIR/region --retry 1s");
        let table = [
            (mount(NOBODY), "127.0.0.1:9"),
            (format!("info {NOBODY}"), "127.0.0.1:9"),
            (format!("copy {NOBODY} file:DIR/copy"), "127.0.0.1:9"),
            (format!("copy file:DIR/file {NOBODY}"), "127.0.0.1:9"),
            ("info grpc://no-such-host.invalid:1".to_owned(), "no-such-host.invalid"),
            (mount(&silent), "127.0.0.1"),
            (format!("info {}", other.uri.replace("nbd:", "grpc:").replace("/x", "")), "is that a gRPC server?"),
        ];
        let table: Vec<_> = table.iter().map(|(line, hint)| (line.as_str(), *hint)).collect();
        refuses(scene, &table);
        assert!(!scene.path("copy").exists(), "nothing was made");
    });
}

#[test]
fn who_waits_for_a_silent_remote_can_be_stopped() {
    Scene::play(LONG, |scene| {
        let silent = TcpListener::bind("127.0.0.1:0").expect("it can listen");
        let uri = format!("grpc://{}", silent.local_addr().expect("it listens"));
        for rest in [
            &["copy", &uri, "memory:"][..],
            &["mount", &uri, &scene.name("region")],
            &["serve", &uri, "--listen", "grpc://127.0.0.1:0"],
        ] {
            let waits = scene.r3map(rest);
            let _connection = silent.accept().expect("it connects");
            waits.interrupt();
            let outcome = waits.end(SOON);
            assert!(outcome.code == Some(1) && outcome.text().contains("stopped before"), "{rest:?}: {outcome:?}");
        }
    });
}

#[test]
fn an_address_that_is_taken() {
    Scene::play(LONG, |scene| {
        let server = scene.serve("memory:?size=1MiB", &[]);
        let arguments = ["serve", "memory:?size=1MiB", "--listen", &server.uri];
        one_line(&arguments, &scene.ended(&arguments), "in use");
        let socket = format!("grpc+unix://{}", scene.name("socket"));
        let _other = scene.serve_at("memory:?size=1MiB", &socket, &[]);
        let arguments = ["serve", "memory:?size=1MiB", "--listen", &socket];
        one_line(&arguments, &scene.ended(&arguments), "another server listens");
        let works = scene.ended(&["info", &socket]);
        assert_eq!(works.code, Some(0), "the server that was there still serves: {works:?}");
    });
}

/// Where the socket of a server that was killed still lies, a new one listens.
#[test]
fn a_socket_that_a_dead_server_left_behind() {
    Scene::play(LONG, |scene| {
        let socket = format!("grpc+unix://{}", scene.name("socket"));
        let mut server = scene.serve_at("memory:?size=1MiB", &socket, &[]);
        server.program.kill();
        assert!(scene.path("socket").exists());
        let server = scene.serve_at("memory:?size=1MiB", &socket, &[]);
        assert_eq!(scene.ended(&["info", &socket]).code, Some(0));
        server.stop();
    });
}

#[test]
fn what_the_user_may_not() {
    Scene::with_root(LONG, |scene| {
        make_file(&scene.path("secret"), MIB, 1);
        make_file(&scene.path("readable"), MIB, 1);
        std::fs::set_permissions(scene.path("secret"), PermissionsExt::from_mode(0o600)).expect("it is ours");
        std::fs::set_permissions(scene.path("readable"), PermissionsExt::from_mode(0o644)).expect("it is ours");
        let server = scene.serve(&format!("file:{}", scene.name("readable")), &[]);
        let socket = format!("grpc+unix://{}", scene.name("socket"));
        let _private = scene.serve_at("memory:?size=1MiB", &socket, &[]);
        let table = [
            ("info file:DIR/secret".to_owned(), "secret"),
            ("serve file:DIR/readable --listen grpc://127.0.0.1:0".to_owned(), "readable"),
            ("serve file:DIR/new --create --size 1MiB --listen grpc://127.0.0.1:0".to_owned(), "new"),
            ("serve directory:DIR/new --create --size 1MiB --listen grpc://127.0.0.1:0".to_owned(), "new"),
            ("serve memory:?size=1MiB --listen grpc+unix://DIR/other".to_owned(), "other"),
            (format!("info {socket}"), "socket"),
            (format!("mount {} DIR/region", server.uri), "region"),
            (format!("mount {} DIR/region --cache DIR/cache", server.uri), "region"),
            (format!("copy {} file:DIR/copy", server.uri), "copy"),
            ("man DIR".to_owned(), "DIR"),
        ];
        for (line, hint) in table {
            let line = line.replace("DIR", &scene.name("."));
            let arguments: Vec<_> = line.split_whitespace().collect();
            let outcome = scene.r3map_as_nobody(&arguments).end(SOON);
            one_line(&arguments, &outcome, &hint.replace("DIR", &scene.name(".")));
        }
        let readable = format!("file:{}", scene.name("readable"));
        let info = scene.r3map_as_nobody(&["--json", "info", &readable]).end(SOON).event("info");
        assert_eq!((&info["read_only"], &info["abilities"]), (&true.into(), &serde_json::json!(["extents"])));
    });
}

/// What a later version has written is not guessed at, and left as it is.
#[test]
fn wrong_versions() {
    Scene::play(LONG, |scene| {
        let region = format!("directory:{}?size=1MiB&chunk=64KiB", scene.name("chunks"));
        let made = scene.ended(&["copy", "memory:?size=1MiB", &region]);
        assert_eq!(made.code, Some(0), "{made:?}");
        let manifest = scene.path("chunks").join(".r3map-directory");
        let text = std::fs::read_to_string(&manifest).expect("it was made");
        let later = text.replace("r3map directory 1", "r3map directory 2");
        assert_ne!(later, text);
        std::fs::write(&manifest, &later).expect("there is room");
        for command in ["info", "serve"] {
            let listen = ["--listen", "grpc://127.0.0.1:0"];
            let rest = if command == "serve" { listen.as_slice() } else { &[] };
            let arguments = [&[command, region.as_str()], rest].concat();
            one_line(&arguments, &scene.ended(&arguments), "this version knows format 1 only");
        }
        assert_eq!(std::fs::read_to_string(&manifest).expect("it is there"), later);
    });
}

/// With `--json` the one line is an event on standard output.
#[test]
fn errors_as_events() {
    Scene::play(LONG, |scene| {
        for arguments in [
            ["--json", "info", "tape:/dev/nst0"].as_slice(),
            &["--json", "info", "memory:"],
            &["--json", "mount"],
            &["info", "nowhere", "--json"],
        ] {
            let outcome = scene.ended(arguments);
            assert!(outcome.code.is_some_and(|code| code != 0), "{arguments:?}: {outcome:?}");
            assert!(outcome.err.is_empty(), "{arguments:?}: {outcome:?}");
            let events = outcome.events();
            assert_eq!(events.len(), 1, "{arguments:?}: {outcome:?}");
            assert_eq!(events[0]["event"], "error");
            assert!(events[0]["message"].as_str().is_some_and(|message| message.len() > 10), "{events:?}");
        }
    });
}

/// Help is not an error, and says what there is.
#[test]
fn help_and_version() {
    Scene::play(LONG, |scene| {
        for arguments in [["--help"].as_slice(), &["mount", "--help"], &["help", "serve"], &["--version"]] {
            let outcome = scene.ended(arguments);
            assert_eq!(outcome.code, Some(0), "{arguments:?}: {outcome:?}");
            assert!(!outcome.out.is_empty() && outcome.err.is_empty(), "{arguments:?}: {outcome:?}");
        }
        assert!(scene.ended(&["--help"]).text().contains("r3map serve"));
    });
}
