//! Our own service, served by tonic's generated code: honestly, or as a test wants it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use r3map_grpc::Target;
use tonic::service::Routes;
use tonic::{Request, Response, Status, transport};

use super::peer::region::region_client::RegionClient;
use super::peer::region::region_server::{Region, RegionServer};
use super::peer::region::{
    DescribeReply, DescribeRequest, ExtentsReply, FlushReply, FlushRequest, RangeRequest, ReadReply, ReadRequest, Run,
    WriteReply, WriteRequest,
};
use super::tonic_go::serve_with;

/// A region of one byte repeated, whose replies a test can change before they are sent.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) description: DescribeReply,
    pub(crate) byte: u8,
    pub(crate) read: fn(&mut ReadReply),
    pub(crate) write: fn(&mut WriteReply),
    pub(crate) extents: fn(&mut ExtentsReply),
    /// What is wrong with the checksums over all of a reply, which agree with what the test makes of it otherwise.
    pub(crate) flipped: u32,
    /// Reads so far.
    pub(crate) reads: Arc<AtomicUsize>,
    /// The last write.
    pub(crate) written: Arc<Mutex<Option<WriteRequest>>>,
}

impl Fake {
    pub(crate) fn new(size: u64) -> Self {
        let description = DescribeReply {
            major: 1,
            minor: 7,
            instance: vec![3; 16].into(),
            region: vec![4; 5].into(),
            size,
            chunk_size: 4096,
            max_request: 1 << 20,
            max_ranges: 4,
            trim: true,
            extents: true,
            ..DescribeReply::default()
        };
        Self {
            description,
            byte: 0x5a,
            read: |_| {},
            write: |_| {},
            extents: |_| {},
            flipped: 0,
            reads: Arc::default(),
            written: Arc::default(),
        }
    }

    /// Serves it on a port that the system chooses, until the runtime ends.
    pub(crate) async fn serve(self) -> Target {
        serve_with(Routes::new(RegionServer::new(self))).await
    }

    fn written(&self) -> Result<Response<WriteReply>, Status> {
        let mut reply = WriteReply { instance: self.description.instance.clone() };
        (self.write)(&mut reply);
        Ok(Response::new(reply))
    }
}

/// The checksum of these numbers, and of `bytes` behind them.
pub(crate) fn sum(numbers: &[u64], bytes: &[u8]) -> u32 {
    let numbers: Vec<_> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    crc_fast::crc32_iscsi(&[&numbers, bytes].concat())
}

/// A request about a range, as it must be.
pub(crate) fn range(offset: u64, length: u64) -> RangeRequest {
    RangeRequest { offset, length, crc32c: sum(&[offset, length], &[]) }
}

/// A write, as it must be.
pub(crate) fn write(offset: u64, bytes: &[u8]) -> WriteRequest {
    WriteRequest { offset, crc32c: sum(&[offset], bytes), data: bytes.to_vec().into() }
}

fn check(request: &RangeRequest) -> Result<(), Status> {
    match *request == range(request.offset, request.length) {
        true => Ok(()),
        false => Err(Status::data_loss("its checksum is wrong")),
    }
}

/// A client of a region.
pub(crate) async fn connect(target: &Target) -> RegionClient<transport::Channel> {
    let endpoint = transport::Endpoint::new(format!("http://{target}")).unwrap();
    RegionClient::new(endpoint.connect().await.unwrap()).max_decoding_message_size(64 << 20)
}

#[tonic::async_trait]
impl Region for Fake {
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeReply>, Status> {
        Ok(Response::new(self.description.clone()))
    }

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<ReadReply>, Status> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let mut reply = ReadReply::default();
        let mut data = Vec::new();
        for range in &request.get_ref().ranges {
            let bytes = vec![self.byte; usize::try_from(range.length).unwrap()];
            reply.runs.push(Run { length: range.length, crc32c: Some(crc_fast::crc32_iscsi(&bytes)) });
            data.extend(bytes);
        }
        reply.data = data.into();
        (self.read)(&mut reply);
        let asked = request.get_ref().ranges.iter().flat_map(|range| [range.offset, range.length]);
        let found = reply.runs.iter().flat_map(|run| [run.length, run.crc32c.map_or(1 << 32, u64::from)]);
        reply.crc32c = sum(&asked.chain(found).collect::<Vec<_>>(), &[]) ^ self.flipped;
        Ok(Response::new(reply))
    }

    async fn write(&self, request: Request<WriteRequest>) -> Result<Response<WriteReply>, Status> {
        *self.written.lock().unwrap() = Some(request.into_inner());
        self.written()
    }

    async fn flush(&self, _: Request<FlushRequest>) -> Result<Response<FlushReply>, Status> {
        Ok(Response::new(FlushReply { instance: self.description.instance.clone() }))
    }

    async fn trim(&self, request: Request<RangeRequest>) -> Result<Response<WriteReply>, Status> {
        check(request.get_ref())?;
        self.written()
    }

    async fn write_zeroes(&self, request: Request<RangeRequest>) -> Result<Response<WriteReply>, Status> {
        check(request.get_ref())?;
        self.written()
    }

    async fn extents(&self, request: Request<RangeRequest>) -> Result<Response<ExtentsReply>, Status> {
        let &RangeRequest { offset, length, .. } = request.get_ref();
        check(request.get_ref())?;
        let extent = super::peer::region::Extent { length, hole: false };
        let mut reply = ExtentsReply { extents: vec![extent], crc32c: 0 };
        (self.extents)(&mut reply);
        let found = reply.extents.iter().flat_map(|extent| [extent.length, u64::from(extent.hole)]);
        reply.crc32c = sum(&[offset, length].into_iter().chain(found).collect::<Vec<_>>(), &[]) ^ self.flipped;
        Ok(Response::new(reply))
    }
}
