//! The server: against other people's clients, and against bytes that no client sends.

mod foreign;
mod support;
