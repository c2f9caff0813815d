//! A client is a backend, whatever is between it and the server: the conformance suite and the model.

use std::sync::Arc;

use crate::common::{Pair, lasting, over_connections, over_go, over_tcp, over_unix};
use r3map_core::{Backend, ChunkSize};
use r3map_grpc::ServerSettings;
use r3map_local::Memory;
use r3map_testkit::conformance;
use r3map_testkit::model;
use r3map_testkit::store::Store;

const SIZE: u64 = 300_001;

fn memory() -> Arc<dyn Backend> {
    Arc::new(Memory::new(SIZE).unwrap())
}

fn backend(pair: Pair) -> Arc<dyn Backend> {
    Arc::new(pair)
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_it_conforms() {
    conformance::backend(async || backend(over_tcp(memory(), lasting()).await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_unix_socket_it_conforms() {
    conformance::backend(async || backend(over_unix(memory(), lasting()).await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_the_service_of_the_go_programs_it_conforms() {
    conformance::backend(async || backend(over_go(memory()).await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_several_connections_it_conforms() {
    conformance::backend(async || backend(over_connections(memory(), 3).await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_requests_that_are_cut_small_it_conforms() {
    let settings = ServerSettings { max_request: 10_000, in_flight: 10_000, ..lasting() };
    conformance::backend(async || backend(over_tcp(memory(), settings.clone()).await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_backend_that_takes_whole_chunks_it_conforms() {
    let store = || Arc::new(Store::new(SIZE).whole_chunks(ChunkSize::MIN).plain());
    conformance::backend(async || backend(over_tcp(store(), lasting()).await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_that_cannot_be_written_conforms() {
    let store = || Arc::new(Store::new(SIZE).filled(7).read_only());
    conformance::filled(async || backend(over_tcp(store(), lasting()).await), 7).await;
    let store = || Arc::new(Store::new(SIZE).filled(7));
    let settings = ServerSettings { read_only: true, ..lasting() };
    conformance::filled(async || backend(over_tcp(store(), settings.clone()).await), 7).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_operations_agree_with_the_model() {
    model::check(async || backend(over_tcp(memory(), lasting()).await), model::Settings::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_operations_agree_with_the_model_over_the_service_of_the_go_programs() {
    model::check(async || backend(over_go(memory()).await), model::Settings::default()).await;
}
