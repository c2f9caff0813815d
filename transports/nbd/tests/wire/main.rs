//! The codec: against bytes written by hand from proto.md, there and back, and with bytes that make no sense.

mod corpus;
mod decoders;
mod round_trip;
mod vectors;
