//! A server of the Go programs that keeps its region in a directory of chunks and was started without `-chunking`, as the
//! specification of the wire formats describes it (A.9): it takes a request for one to the chunk that begins at the
//! offset, whatever that is, and does not look at the length. Its directory is a map here.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use r3map_grpc::Target;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use super::peer::go::backend_server::{Backend, BackendServer};
use super::peer::go::{ReadAtArgs, ReadAtReply, SyncArgs, SyncReply, WriteAtArgs, WriteAtReply};
use super::tonic_go::serve_with;

/// Files that it keeps open; few, so that tests see what happens when one is opened again.
const OPEN_FILES: usize = 8;

/// What the server holds, shared with the test.
#[derive(Clone)]
pub(crate) struct GoDirectory(Arc<Mutex<Directory>>);

struct Directory {
    chunk: usize,
    /// By the offset that is their name.
    files: BTreeMap<i64, Vec<u8>>,
    /// In the order in which they were opened.
    open: VecDeque<i64>,
    requests: Vec<(i64, usize)>,
}

impl GoDirectory {
    pub(crate) fn new(chunk: u64) -> Self {
        let chunk = usize::try_from(chunk).unwrap();
        let (files, open, requests) = Default::default();
        Self(Arc::new(Mutex::new(Directory { chunk, files, open, requests })))
    }

    /// Serves on a port that the system chooses, until the runtime ends.
    pub(crate) async fn serve(&self) -> Target {
        serve_with(Routes::new(BackendServer::new(self.clone()).max_decoding_message_size(4 << 20))).await
    }

    /// Offset and length of every request so far.
    pub(crate) fn requests(&self) -> Vec<(i64, usize)> {
        self.lock().requests.clone()
    }

    /// The files, by their names.
    pub(crate) fn files(&self) -> BTreeMap<i64, Vec<u8>> {
        self.lock().files.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Directory> {
        self.0.lock().unwrap()
    }
}

impl Directory {
    /// The file of an offset. One that is opened to be read is cut or stretched to a chunk.
    fn file(&mut self, off: i64, writing: bool) -> &mut Vec<u8> {
        let file = self.files.entry(off).or_default();
        if !self.open.contains(&off) {
            if self.open.len() == OPEN_FILES {
                self.open.pop_front();
            }
            self.open.push_back(off);
            if !writing {
                file.resize(self.chunk, 0);
            }
        }
        file
    }
}

#[tonic::async_trait]
impl Backend for GoDirectory {
    async fn read_at(&self, request: Request<ReadAtArgs>) -> Result<Response<ReadAtReply>, Status> {
        let ReadAtArgs { length, off } = request.into_inner();
        let len = usize::try_from(length).unwrap();
        let mut directory = self.lock();
        directory.requests.push((off, len));
        let bytes = directory.file(off, false).get(..len).ok_or_else(|| Status::unknown("EOF"))?;
        Ok(Response::new(ReadAtReply { n: length, p: bytes.to_vec().into() }))
    }

    async fn write_at(&self, request: Request<WriteAtArgs>) -> Result<Response<WriteAtReply>, Status> {
        let WriteAtArgs { off, p } = request.into_inner();
        let mut directory = self.lock();
        directory.requests.push((off, p.len()));
        let file = directory.file(off, true);
        file.resize(file.len().max(p.len()), 0);
        file[..p.len()].copy_from_slice(&p);
        Ok(Response::new(WriteAtReply { length: i32::try_from(p.len()).unwrap() }))
    }

    async fn sync(&self, _: Request<SyncArgs>) -> Result<Response<SyncReply>, Status> {
        Ok(Response::new(SyncReply {}))
    }
}
