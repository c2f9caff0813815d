//! `r3map seed` and `r3map leech`: regions that change hosts while they are used.
//!
//! A leech that seeds on is both, one after the other, so that what a seeder does until its regions have gone is in one
//! place, [`host`].

mod application;
mod arrived;
mod host;
pub(crate) mod leech;
mod moving;
pub(crate) mod seed;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often bars move.
const TICK: Duration = Duration::from_millis(200);
/// How long giving up may take.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(3);

/// A number of rounds, for people.
fn rounds(number: u64) -> String {
    if number == 1 { "1 round".to_owned() } else { format!("{number} rounds") }
}

/// The ledger beside a file or folder, by whatever link that is named.
fn ledger_beside(path: &Path) -> PathBuf {
    let linked = path.is_symlink().then(|| std::fs::canonicalize(path).ok()).flatten();
    let path = linked.as_deref().unwrap_or(path);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".ledger");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_lies_beside_what_it_speaks_of() {
        let folder = tempfile::tempdir().expect("there is room");
        let [file, link] = ["disk.img", "link"].map(|name| folder.path().join(name));
        std::fs::write(&file, "").expect("there is room");
        std::os::unix::fs::symlink(&file, &link).expect("it can be linked");
        let file = std::fs::canonicalize(file).expect("it is there");
        assert_eq!(ledger_beside(&link), ledger_beside(&file), "however it is named");
        for (path, ledger) in
            [("disk.img", "disk.img.ledger"), ("/a/chunks/", "/a/chunks.ledger"), ("../b", "../b.ledger")]
        {
            assert_eq!(ledger_beside(Path::new(path)), Path::new(ledger));
        }
    }
}
