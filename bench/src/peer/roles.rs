//! What the other process does in each role.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use r3map::Workers;
use r3map_grpc::{Server, ServerSettings, Target};
use r3map_testkit::fill;
use r3map_testkit::proxy::DelayProxy;
use r3map_testkit::random::Random;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::limits::tcp;
use crate::machine::used_megabytes;
use crate::peer::Shown;
use crate::run::{millis, timed};
use crate::sections::filled;
use crate::sections::mounted::{Mode, Mounted, open_uri};

/// Where a region can be reached, over gRPC and over raw TCP.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Address {
    pub(crate) grpc: SocketAddr,
    pub(crate) raw: SocketAddr,
}

/// Where a server can be reached.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Addresses {
    pub(crate) direct: Address,
    /// Through a proxy for each round trip that was asked for, in that order.
    pub(crate) delayed: Vec<Address>,
}

/// A server and its proxies. Everything ends with it.
pub(crate) struct Serving {
    _server: Server,
    _proxies: Vec<DelayProxy>,
    _runtime: Runtime,
}

impl Serving {
    /// Serves a filled region in memory.
    pub(crate) fn start(size: u64, seed: u64, rtts: &[Duration]) -> Result<(Self, Addresses)> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let server = Server::new(filled(size, seed)?, ServerSettings::default())?;
        let target = Target::Tcp { host: Ipv4Addr::LOCALHOST.to_string(), port: 0 };
        let Target::Tcp { port, .. } = runtime.block_on(server.listen(&target))? else {
            bail!("the server listens on something that is not TCP");
        };
        let raw = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let direct = Address { grpc: (Ipv4Addr::LOCALHOST, port).into(), raw: raw.local_addr()? };
        tcp::serve(raw, Arc::new(fill::bytes(0, usize::try_from(size)?, seed)))?;
        let mut proxies = Vec::new();
        let mut delayed = Vec::new();
        for rtt in rtts {
            let mut proxy = |target: SocketAddr| {
                let proxy = DelayProxy::tcp(target, *rtt).context("the delay proxy")?;
                let address = proxy.socket_addr();
                proxies.push(proxy);
                anyhow::Ok(address)
            };
            delayed.push(Address { grpc: proxy(direct.grpc)?, raw: proxy(direct.raw)? });
        }
        let serving = Self { _server: server, _proxies: proxies, _runtime: runtime };
        Ok((serving, Addresses { direct, delayed }))
    }
}

/// An NBD server. It ends with it.
pub(crate) struct ServingNbd {
    _server: r3map_nbd::Server,
    _runtime: Runtime,
}

impl ServingNbd {
    /// Serves a filled region in memory.
    pub(crate) fn start(size: u64, seed: u64, socket: PathBuf) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let export = r3map_nbd::ServerExport::new("", filled(size, seed)?);
        let server = r3map_nbd::Server::new(vec![export], r3map_nbd::ServerSettings::default())?;
        runtime.block_on(server.listen(&r3map_nbd::Address::Unix(socket)))?;
        Ok(Self { _server: server, _runtime: runtime })
    }
}

/// What opening a region took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Opened {
    /// From nothing to the first byte.
    pub(crate) milliseconds: f64,
    /// Memory in use once pages all over it were read.
    pub(crate) megabytes: f64,
}

impl Opened {
    /// Opens `size` bytes of zeros as a managed mount that pulls on demand only: pulling all of them would measure that.
    pub(crate) fn measure(size: u64, shown: Shown) -> Result<Self> {
        const PAGES: usize = 1000;
        let mut settings = r3map::Settings::default();
        settings.pull.workers = Workers::Off;
        let mut byte = [1];
        let (mounted, time) = timed(|| {
            let mounted = Mounted::open(open_uri(&format!("null:?size={size}"))?, Mode::Managed, shown, settings)?;
            mounted.read(0, &mut byte)?;
            Ok(mounted)
        })?;
        let mut random = Random::new(1);
        for _ in 0..PAGES {
            mounted.read(random.below(size), &mut byte)?;
            ensure!(byte == [0], "zeros were expected");
        }
        let megabytes = used_megabytes().context("/proc/self/status")?;
        mounted.close()?;
        Ok(Self { milliseconds: millis(time), megabytes })
    }
}
