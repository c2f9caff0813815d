//! Exports of a foreign NBD server, nbdkit, as regions: listed, looked at, copied, mounted.

use std::os::unix::fs::FileExt;
use std::process::Command;

use r3map_testkit::process::Process;

use crate::support::{MIB, SOON, Scene, make_file, wait_until};

const SIZE: u64 = 24 * MIB + 4097;

/// nbdkit on a Unix socket of the scene, and the region's name.
fn nbdkit(scene: &Scene, arguments: &[&str]) -> (Process, String) {
    let socket = scene.path("nbd.sock");
    let process = scene.start(Command::new("nbdkit").args(["--foreground", "--unix"]).arg(&socket).args(arguments));
    wait_until(SOON, "nbdkit listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    (process, format!("nbd+unix:///?socket={}", scene.name("nbd.sock")))
}

#[test]
fn exports_are_listed() {
    Scene::play(SOON, |scene| {
        let names = ["exportname=disk", "exportname=a b", "exportname-list=explicit"];
        let mut arguments = vec!["--filter=exportname", "memory", "1M"];
        arguments.extend(names);
        let (_server, uri) = nbdkit(scene, &arguments);
        let outcome = scene.ended(&["--json", "nbd", "list", &uri]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let exports: Vec<_> = outcome.events().into_iter().filter(|event| event["event"] == "export").collect();
        assert_eq!(exports.len(), 2, "{outcome:?}");
        assert_eq!((&exports[0]["name"], &exports[1]["name"]), (&"disk".into(), &"a b".into()));
        assert_eq!(exports[0]["size"], MIB);
        let has = |list: &str, what: &str| {
            exports[0][list].as_array().is_some_and(|list| list.iter().any(|each| each == what))
        };
        assert!(has("abilities", "write") && has("abilities", "multi-conn"), "{outcome:?}");
        assert!(has("contexts", "base:allocation"), "{outcome:?}");
        let text = scene.ended(&["nbd", "list", &uri]).text();
        for words in ["\"a b\"", "(1048576 bytes)", "write-zeroes", "base:allocation"] {
            assert!(text.contains(words), "{words:?} is missing in {text}");
        }
    });
}

#[test]
fn info_has_a_map() {
    Scene::play(SOON, |scene| {
        let (_server, uri) = nbdkit(scene, &["data", "data=@1048576(0x55)*65536@4194304"]);
        let info = scene.ended(&["--json", "info", "--map", &uri]).event("info");
        assert_eq!((&info["size"], &info["read_only"]), (&(4 * MIB).into(), &false.into()), "{info}");
        let extents = info["extents"].as_array().unwrap_or_else(|| panic!("{info}"));
        let kinds: Vec<_> = extents.iter().map(|extent| extent["kind"].as_str()).collect();
        assert_eq!(kinds, [Some("hole"), Some("data"), Some("hole")], "{info}");
        assert_eq!(extents[1]["offset"], MIB, "{info}");
        let total: u64 = extents.iter().filter_map(|extent| extent["length"].as_u64()).sum();
        assert_eq!(total, 4 * MIB);
        assert_eq!(info["data"], extents[1]["length"]);
        assert_eq!(scene.ended(&["--json", "info", &uri]).event("info")["extents"], serde_json::Value::Null);
        let text = scene.ended(&["info", "--map", &uri]).text();
        assert!(text.contains("data         1048576-") && text.contains("hole         0-1048576"), "{text}");
    });
}

#[test]
fn copied_to_and_fro() {
    Scene::play(SOON, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 1);
        let (_server, uri) = nbdkit(scene, &["memory", &SIZE.to_string()]);
        let (source, back) = (format!("file:{}", scene.name("source")), format!("file:{}", scene.name("back")));
        for (from, to) in [(&source, &uri), (&uri, &back)] {
            let copied = scene.r3map(&["--json", "copy", from, to]).end_well(SOON).event("copied");
            assert_eq!(copied["size"], SIZE, "{copied}");
        }
        expected.check_file(&scene.path("back"));
        // What nbdcopy finds there is the same.
        scene.run(SOON, "nbdcopy", &[&uri, &scene.name("nbdcopied")]);
        expected.check_file(&scene.path("nbdcopied"));
    });
}

#[test]
fn mounted_either_way() {
    for mode in ["managed", "direct"] {
        Scene::with_fuse(SOON, move |scene| {
            let mut expected = make_file(&scene.path("source"), SIZE, 2);
            let (_server, uri) = nbdkit(scene, &["memory", &SIZE.to_string()]);
            scene.run(SOON, "nbdcopy", &["--destination-is-zero", &scene.name("source"), &uri]);
            let mounted = scene.mount(&uri, "region", &["--mode", mode]);
            expected.check_file(&mounted.path);
            let file = mounted.open();
            for (offset, len) in [(0, 1), (5 * MIB - 3, 100_000), (SIZE - 9, 9)] {
                let bytes = expected.write(offset..offset + len, 77);
                file.write_all_at(&bytes, offset).expect("the region is writable");
            }
            file.sync_all().expect("the server flushes");
            expected.keep();
            drop(file);
            mounted.unmount();
            scene.run(SOON, "nbdcopy", &[&uri, &scene.name("after")]);
            expected.check_file(&scene.path("after"));
        });
    }
}

#[test]
fn what_is_not_there_is_one_line() {
    Scene::play(SOON, |scene| {
        let (_server, uri) =
            nbdkit(scene, &["--filter=exportname", "memory", "1M", "exportname=disk", "exportname-strict=true"]);
        let other = uri.replace("///?", "///other?");
        let none = format!("nbd+unix:///?socket={}", scene.name("none"));
        for (arguments, reason) in [
            (["info", &other].as_slice(), "other"),
            (&["info", &none], "cannot connect to"),
            (&["info", "nbd://127.0.0.1:1/x"], "cannot connect to"),
            (&["nbd", "list", &none], "cannot connect to"),
            (&["info", &format!("{}&tls-verify-peer=0", uri.replace("nbd+", "nbds+"))], "TLS is demanded"),
            (&["info", "nbd+unix:///x"], "?socket=PATH"),
            (&["info", "nbd://host/x?colour=red"], "unknown option"),
        ] {
            let outcome = scene.ended(arguments);
            assert_eq!(outcome.code, Some(1), "{outcome:?}");
            let [line] = &outcome.err[..] else { panic!("one line: {outcome:?}") };
            assert!(line.starts_with("error: ") && line.contains(reason), "{line}");
        }
    });
}
