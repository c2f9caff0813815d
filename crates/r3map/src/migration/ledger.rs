//! A ledger in a file.
//!
//! ```text
//!    0  magic "r3mledgr"
//!    8  format version, u32           (all numbers are little-endian)
//!   12  checksum, u32: CRC-32C of all that follows
//!   16  standing, u32: 1 owner, 2 handed over, 3 gone, 4 arrived, 5 asking, 6 pulling
//!   20  epoch, u64; of 5 and 6 the records that have arrived
//!   28  name of the migration, 16 bytes; of 1 the one from which the region was taken back, or zeros
//!   44  regions, u32; then for each of them its runs, u64, and each run's first block and the one after its last, u64
//! ```
//! It is replaced as a whole: written beside, synced, renamed, and the folder synced.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_migrate::protocol::{MAX_REGIONS, MigrationId};
use r3map_migrate::{Ledger, Standing};
use r3map_pipeline::BlockSet;

const MAGIC: &[u8; 8] = b"r3mledgr";
const VERSION: u32 = 1;

/// A ledger in a file, which is made when there is something to write.
#[derive(Debug, Clone)]
pub struct FileLedger {
    path: PathBuf,
}

impl FileLedger {
    /// The ledger at `path`.
    #[must_use]
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned() }
    }

    fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        let write = || {
            let mut file = File::create(&beside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&beside, &self.path)
        };
        if let Err(error) = write() {
            let _ = fs::remove_file(&beside); // its own error says nothing more
            return Err(error);
        }
        self.sync_folder()
    }

    fn sync_folder(&self) -> io::Result<()> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// What is there, if anything is. It may be there only until the next loss of power, left by a process that was killed
    /// before it had synced it, or by an entry that failed; what is told here rests on it, so that it is synced first.
    fn read(&self) -> io::Result<Option<Vec<u8>>> {
        let mut file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        file.sync_all()?;
        self.sync_folder()?;
        Ok(Some(bytes))
    }

    fn damaged(&self) -> Error {
        let message = format!("{} is damaged, or no ledger of this version: who owns the region?", self.path.display());
        Error::new(ErrorKind::Corrupt, Operation::Open, message)
    }
}

impl Ledger for FileLedger {
    fn load(&self) -> Result<Option<Standing>> {
        let found = self.read().map_err(|error| {
            Error::from_io(Operation::Open, format!("{} cannot be read", self.path.display()), error)
        })?;
        found.map(|bytes| decode(&bytes).ok_or_else(|| self.damaged())).transpose()
    }

    fn save(&self, standing: &Standing) -> Result<()> {
        self.replace(&encode(standing)).map_err(|error| {
            Error::from_io(Operation::Write, format!("{} cannot be written", self.path.display()), error)
        })
    }
}

fn encode(standing: &Standing) -> Vec<u8> {
    let none = MigrationId([0; 16]);
    let (kind, number, id, dirty): (u32, u64, _, &[BlockSet]) = match standing {
        Standing::Owner { epoch, revoked } => (1, *epoch, revoked.unwrap_or(none), &[]),
        Standing::HandedOver { id, epoch, dirty } => (2, *epoch, *id, dirty),
        Standing::Gone { id, epoch } => (3, *epoch, *id, &[]),
        Standing::Arrived { id, epoch } => (4, *epoch, *id, &[]),
        Standing::Asking { id, rounds } => (5, *rounds, *id, &[]),
        Standing::Pulling { id, rounds } => (6, *rounds, *id, &[]),
    };
    let mut body = Vec::new();
    body.extend(kind.to_le_bytes());
    body.extend(number.to_le_bytes());
    body.extend(id.0);
    body.extend(u32::try_from(dirty.len()).unwrap_or(u32::MAX).to_le_bytes());
    for blocks in dirty {
        body.extend((blocks.runs().count() as u64).to_le_bytes());
        blocks.runs().for_each(|run| [run.start, run.end].iter().for_each(|at| body.extend(at.to_le_bytes())));
    }
    [&MAGIC[..], &VERSION.to_le_bytes(), &crc_fast::crc32_iscsi(&body).to_le_bytes(), &body].concat()
}

fn decode(bytes: &[u8]) -> Option<Standing> {
    let mut head = Fields(bytes);
    if head.take::<8>()? != *MAGIC || head.u32()? != VERSION || head.u32()? != crc_fast::crc32_iscsi(head.0) {
        return None;
    }
    let mut body = head;
    let (kind, epoch, id) = (body.u32()?, body.u64()?, MigrationId(body.take()?));
    let regions = body.u32()?;
    if regions as usize > MAX_REGIONS {
        return None;
    }
    let mut dirty = Vec::new();
    for _ in 0..regions {
        let mut blocks = BlockSet::default();
        for _ in 0..body.u64()? {
            blocks.insert(body.u64()?..body.u64()?);
        }
        dirty.push(blocks);
    }
    Some(match kind {
        1 => Standing::Owner { epoch, revoked: (id.0 != [0; 16]).then_some(id) },
        2 => Standing::HandedOver { id, epoch, dirty },
        3 => Standing::Gone { id, epoch },
        4 => Standing::Arrived { id, epoch },
        5 => Standing::Asking { id, rounds: epoch },
        6 => Standing::Pulling { id, rounds: epoch },
        _ => return None,
    })
}

/// What is left to read.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standings() -> Vec<Standing> {
        let mut blocks = BlockSet::default();
        [0..3, 9..10, 5000..90_000].into_iter().for_each(|run| blocks.insert(run));
        let (id, epoch) = (MigrationId([7; 16]), 1 << 40);
        vec![
            Standing::Owner { epoch, revoked: None },
            Standing::Owner { epoch, revoked: Some(id) },
            Standing::HandedOver { id, epoch, dirty: vec![blocks, BlockSet::default()] },
            Standing::Gone { id, epoch },
            Standing::Arrived { id, epoch },
            Standing::Asking { id, rounds: 3 },
            Standing::Pulling { id, rounds: 1 << 33 },
        ]
    }

    #[test]
    fn what_was_written_last_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = FileLedger::new(folder.path().join("ledger"));
        assert_eq!(ledger.load().unwrap(), None);
        for standing in standings() {
            ledger.save(&standing).unwrap();
            assert_eq!(ledger.load().unwrap(), Some(standing));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        let nowhere = FileLedger::new(folder.path().join("no/such/folder"));
        assert!(nowhere.save(&standings()[0]).is_err() && nowhere.load().unwrap().is_none());
    }

    #[test]
    fn what_could_not_be_written_leaves_what_was_there_and_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = FileLedger::new(folder.path().join("ledger"));
        let [first, second, ..] = &standings()[..] else { panic!("there are more") };
        ledger.save(first).unwrap();
        // A full disk.
        std::os::unix::fs::symlink("/dev/full", folder.path().join("ledger.new")).unwrap();
        assert_eq!(ledger.save(second).unwrap_err().kind(), ErrorKind::Exhausted);
        assert_eq!(ledger.load().unwrap().as_ref(), Some(first));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn any_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = FileLedger::new(folder.path().join("ledger"));
        for standing in standings() {
            let good = encode(&standing);
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                fs::write(&ledger.path, &bad).unwrap();
                assert_eq!(ledger.load().unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
                fs::write(&ledger.path, &good[..at]).unwrap();
                assert!(ledger.load().is_err(), "cut at {at}");
            }
        }
    }
}
