//! The list moves between processes while it is used, and nothing that was acknowledged is lost.

use std::process::Command;
use std::time::Duration;

use r3map::{ListenOptions, OpenOptions, Registry};
use r3map_testkit::process::Process;

const LIMIT: Duration = Duration::from_secs(60);

fn todo(arguments: &[&str]) -> Process {
    Process::start(Command::new(env!("CARGO_BIN_EXE_todo")).args(arguments))
}

/// Says a line, and gives what is answered.
fn ask(todo: &mut Process, line: &str, answer: &str) -> String {
    todo.send(&format!("{line}\n"));
    todo.wait_for_line(LIMIT, answer)
}

/// Where it can be taken from.
fn address(todo: &mut Process) -> String {
    let line = todo.wait_for_line(LIMIT, "to be taken from ");
    line.trim_start_matches("to be taken from ").to_owned()
}

/// Adds one thing after another until the list is not here any more, and waits until the other side has everything. The
/// number that the next one will have.
fn use_until_it_has_moved(todo: &mut Process, first: u64) -> u64 {
    let mut told = false;
    for number in first.. {
        todo.send("add task\n");
        let answer = loop {
            let line = todo.wait_for_line(LIMIT, "");
            told |= line == "moved away";
            if line.starts_with("added ") || line.starts_with("error: ") {
                break line;
            }
        };
        if answer.starts_with("error: ") {
            assert!(answer.contains("on another host"), "{answer}");
            if !told {
                todo.wait_for_line(LIMIT, "moved away");
            }
            return number;
        }
        assert_eq!(answer, format!("added {number}"));
        // The pace of a person in a hurry.
        std::thread::sleep(Duration::from_millis(1));
    }
    unreachable!("there is no end to numbers")
}

/// Ends it.
fn let_go(todo: &mut Process) {
    todo.send("quit\n");
    assert!(todo.wait(LIMIT).success());
}

#[test]
fn a_list_moves_twice_while_it_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let file = format!("file:{}", folder.path().join("list").display());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let registry = Registry::standard();
    let options = OpenOptions { size: Some(16 << 20), create: true, ..OpenOptions::default() };
    let server = runtime.block_on(async {
        let region = registry.open(&file.parse().unwrap(), &options).await.unwrap();
        registry.listen(&["grpc://127.0.0.1:0".parse().unwrap()], region, &ListenOptions::default()).await.unwrap()
    });
    let mut todo_a = todo(&["open", &server[0].uri(), "--listen", "grpc://127.0.0.1:0"]);
    let from = address(&mut todo_a);
    assert_eq!(ask(&mut todo_a, "add wash the car", "added"), "added 1");
    assert_eq!(ask(&mut todo_a, "add remove this", "added"), "added 2");
    ask(&mut todo_a, "done 1", "done 1");
    ask(&mut todo_a, "remove 2", "removed 2");

    let mut todo_b = todo(&["take", &from, "--listen", "grpc://127.0.0.1:0"]);
    let next = use_until_it_has_moved(&mut todo_a, 3);
    let_go(&mut todo_a);
    todo_b.wait_for_line(LIMIT, "moved here");
    let mut todo_c = todo(&["take", &address(&mut todo_b)]);
    let next = use_until_it_has_moved(&mut todo_b, next);
    let_go(&mut todo_b);

    todo_c.wait_for_line(LIMIT, "ready");
    assert_eq!(ask(&mut todo_c, "add the last", "added"), format!("added {next}"));
    let copy = format!("file:{}", folder.path().join("copy").display());
    ask(&mut todo_c, &format!("save {copy}"), "saved");
    todo_c.send("quit\n");
    assert!(todo_c.wait(LIMIT).success());

    let mut again = todo(&["open", &copy]);
    again.send("list\nquit\n");
    assert!(again.wait(LIMIT).success());
    let mut expected = vec!["[x] 1 wash the car".to_owned()];
    expected.extend((3..next).map(|number| format!("[ ] {number} task")));
    expected.push(format!("[ ] {next} the last"));
    let found: Vec<_> = again.stdout().into_iter().filter(|line| line.starts_with('[')).collect();
    assert_eq!(found, expected);
}
