//! The server: listeners and worker threads, and what each connection does.
//!
//! Invariants. A connection lives on one thread: its tasks share cells, and no borrow is held across an await. A
//! future of the backend runs in a task of its own and is polled to the end. A reply is written whole, by the one
//! writer of its connection. Memory is bounded, per connection and for all of them: see `flight.rs`.

mod budget;
mod connection;
mod flight;
mod handshake;
mod listener;
mod pool;
mod reader;
mod terms;
mod transmission;
mod worker;
mod writer;

pub use connection::{End, serve_connection, serve_transmission};
pub use listener::{Server, ServerOptions};
pub(crate) use worker::run_on_this_thread;
