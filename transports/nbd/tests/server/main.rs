//! The server: against other people's clients, and against bytes that no client sends.

mod cuts;
mod edges;
mod foreign;
mod handshake;
mod lending;
mod limits;
mod newer;
mod record;
mod slow;
mod support;
mod tls;
