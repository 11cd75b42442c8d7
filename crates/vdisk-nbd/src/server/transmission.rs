//! Transmission: one task reads requests, one task per request serves it, one task writes replies.

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};
use vdisk_image::{DiskError, ErrorKind, Flags, Op, Request};
use vdisk_io::{Buf, Limited, chain};

use super::connection::End;
use super::flight::{Flight, Permit};
use super::pool::capacity_for;
use super::reader::Reader;
use super::terms::Terms;
use super::writer::{Payload, Queue, Reply, write_replies};
use crate::backend::Backend;
use crate::codec::{
    Command, MAX_PAYLOAD, NbdError, RequestHeader, command_flag, error_chunk_head, nbd_error, none_chunk,
    offset_data_head, simple_reply,
};
use crate::error::ConnectionError;
use crate::stop::Stop;

/// How long a client may take to read its last replies once the server stops or the client has gone.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Requests that failed, on any connection: a full or poisoned image fails them all.
static FAILURES: Limited = Limited::new();

/// What the tasks of a connection share.
struct Shared<B> {
    terms: Terms,
    backend: Rc<B>,
    structured: bool,
    flight: Rc<Flight>,
    queue: Rc<Queue>,
}

pub(super) async fn transmission<R, W, B>(
    reader: Reader<R>,
    write: W,
    terms: Terms,
    backend: Rc<B>,
    structured: bool,
    stop: &Stop,
) -> Result<End, ConnectionError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + 'static,
    B: Backend,
{
    let flight = Rc::new(Flight::new(terms.budget.clone()));
    let shared = Rc::new(Shared { terms, backend, structured, flight, queue: Rc::default() });
    let (queue, pool, stall) = (Rc::clone(&shared.queue), Rc::clone(&shared.terms.pool), shared.terms.stall);
    let mut writer = tokio::task::spawn_local(write_replies(write, queue, pool, stall));
    let mut reading = pin!(read_requests(reader, &shared, stop));
    let end = tokio::select! {
        end = &mut reading => end,
        written = &mut writer => {
            let error = ConnectionError::Stream(match written {
                Ok(Err(e)) => e,
                Ok(Ok(())) => std::io::ErrorKind::BrokenPipe.into(),
                Err(e) => std::io::Error::other(e),
            });
            // Whether the kernel said DISC before it shut the socket tells why it did.
            let last_words = shared.terms.kernel.is_some();
            match if last_words { timeout(DRAIN_DEADLINE, reading).await.ok() } else { None } {
                Some(Ok(end)) => Ok(end),
                _ => Err(error),
            }
        }
        () = too_late(stop) => Err(ConnectionError::Drain(DRAIN_DEADLINE.as_secs())),
    };
    shared.flight.none_running().await;
    shared.queue.close();
    if !writer.is_finished() && timeout(DRAIN_DEADLINE, &mut writer).await.is_err() {
        writer.abort();
        return end.and(Err(ConnectionError::Drain(DRAIN_DEADLINE.as_secs())));
    }
    end
}

async fn too_late(stop: &Stop) {
    stop.wait().await;
    sleep(DRAIN_DEADLINE).await;
}

async fn read_requests<R: AsyncRead + Unpin, B: Backend>(
    mut reader: Reader<R>,
    shared: &Rc<Shared<B>>,
    stop: &Stop,
) -> Result<End, ConnectionError> {
    let mut stopped = pin!(stop.wait());
    let mut stopping = false;
    loop {
        let header = match next_request(&mut reader, &shared.flight, stopped.as_mut(), &mut stopping).await? {
            Ok(header) => header,
            Err(end) => return Ok(end),
        };
        if header.command == Command::Disc {
            return Ok(End::Disconnected);
        }
        let payload = if header.command == Command::Write { header.len } else { 0 };
        let checked = if stopping || stop.is_stopped() {
            Err((NbdError::Shutdown, "the server is stopping".into()))
        } else {
            shared.check(&header)
        };
        match checked {
            Ok(request) => {
                let len = shared.buffer_len(&request);
                let permit = shared.flight.permit(if len == 0 { 0 } else { capacity_for(len) }).await;
                let mut buf = if len == 0 { Buf::new(0) } else { shared.terms.pool.take(len) };
                if payload > 0 {
                    let bytes = buf.get_mut().and_then(|bytes| bytes.get_mut(..len));
                    let bytes = bytes.ok_or_else(|| std::io::Error::other("a fresh buffer is shared"))?;
                    reader.exact(bytes).await?;
                }
                let running = shared.flight.run();
                let shared = Rc::clone(shared);
                tokio::task::spawn_local(async move {
                    if shared.may_begin(&request) {
                        shared.serve(header, request, buf, permit).await;
                    }
                    drop(running);
                });
            }
            Err((error, text)) => {
                reader.skip(payload.into()).await?;
                let permit = shared.flight.permit(0).await;
                shared.queue.push(shared.failed(&header, error, &text, permit));
            }
        }
    }
}

/// The next request, or why there is none.
async fn next_request<R: AsyncRead + Unpin>(
    reader: &mut Reader<R>,
    flight: &Flight,
    mut stopped: Pin<&mut impl Future<Output = ()>>,
    stopping: &mut bool,
) -> Result<Result<RequestHeader, End>, ConnectionError> {
    loop {
        if let Some(bytes) = reader.take() {
            return Ok(Ok(RequestHeader::decode(&bytes)?));
        }
        tokio::select! {
            biased;
            n = reader.fill() => if n? == 0 {
                return if reader.is_empty() {
                    Ok(Err(End::Closed))
                } else {
                    Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into())
                };
            },
            () = stopped.as_mut(), if !*stopping => *stopping = true,
            () = flight.all_answered(), if *stopping => return Ok(Err(End::Stopped)),
        }
    }
}

impl<B: Backend> Shared<B> {
    fn check(&self, header: &RequestHeader) -> Result<Request, (NbdError, String)> {
        let op = match header.command {
            Command::Read => Op::Read,
            Command::Write => Op::Write,
            Command::Flush => Op::Flush,
            Command::Trim => Op::Discard,
            Command::WriteZeroes => Op::WriteZeroes,
            Command::Disc => return Err((NbdError::Inval, "DISC is no operation".into())),
            Command::Other(kind) => return Err((NbdError::Inval, format!("unknown command {kind}"))),
        };
        let undefined = header.flags & !header.command.allowed_flags(self.structured);
        if undefined != 0 {
            return Err((NbdError::Inval, format!("flags {undefined:#06x} are not defined for {:?}", header.command)));
        }
        if op == Op::Read && header.len > MAX_PAYLOAD {
            return Err((NbdError::Inval, format!("read of {} bytes: at most {MAX_PAYLOAD}", header.len)));
        }
        let changes = matches!(op, Op::Write | Op::Discard | Op::WriteZeroes);
        let flags = Flags {
            fua: changes && header.flags & command_flag::FUA != 0,
            no_unmap: op == Op::WriteZeroes && header.flags & command_flag::NO_HOLE != 0,
        };
        Request::check(&self.backend.geometry(), op, header.offset, header.len.into(), flags)
            .map_err(|e| (nbd_error(e.kind(), op), e.to_string()))
    }

    /// Whether a request may be begun. A change of a socket that the kernel gave up may not: it is sent again on
    /// another, and newer changes of the same place may have been made there.
    fn may_begin(&self, request: &Request) -> bool {
        matches!(request.op(), Op::Read | Op::Flush) || !self.terms.is_given_up()
    }

    /// Bytes of the buffer that a request needs.
    fn buffer_len(&self, request: &Request) -> usize {
        match request.op() {
            Op::Read | Op::Write => usize::try_from(request.len()).unwrap_or(usize::MAX),
            Op::Flush | Op::Discard | Op::WriteZeroes => 0,
        }
    }

    async fn serve(&self, header: RequestHeader, request: Request, mut buf: Buf, permit: Permit) {
        let result = self.backend.serve(request, &buf).await;
        let op = request.op();
        let len = self.buffer_len(&request);
        let reply = match result {
            Ok(()) if op == Op::Read && len > 0 && buf.get_mut().is_none() => {
                if let Some(left_out) = FAILURES.line() {
                    warn!(offset = request.offset(), len, "the engine kept the buffer of a read{left_out}");
                }
                self.failed(&header, NbdError::Io, "the host failed to read the image", permit)
            }
            Ok(()) if op == Op::Read && len > 0 => {
                let head = if self.structured {
                    offset_data_head(header.cookie, header.offset, header.len).into()
                } else {
                    simple_reply(header.cookie, None).into()
                };
                Reply { head, payload: Payload::Data(buf, len), permit }
            }
            done => {
                self.terms.pool.give(buf);
                match done {
                    Ok(()) if op == Op::Read && self.structured => {
                        Reply { head: none_chunk(header.cookie).into(), payload: Payload::None, permit }
                    }
                    Ok(()) => Reply { head: simple_reply(header.cookie, None).into(), payload: Payload::None, permit },
                    Err(e) => {
                        if let Some(left_out) = FAILURES.line() {
                            let (offset, len) = (request.offset(), request.len());
                            warn!(offset, len, "{op:?} failed: {}{left_out}", chain(&e));
                        }
                        self.failed(&header, nbd_error(e.kind(), op), told(&e), permit)
                    }
                }
            }
        };
        self.queue.push(reply);
    }

    fn failed(&self, header: &RequestHeader, error: NbdError, text: &str, permit: Permit) -> Reply {
        debug!(?header, ?error, "{text}");
        if self.structured {
            let (head, text) = error_chunk_head(header.cookie, error, text);
            Reply { head: head.into(), payload: Payload::Text(text.into()), permit }
        } else {
            Reply { head: simple_reply(header.cookie, Some(error)).into(), payload: Payload::None, permit }
        }
    }
}

/// What a client is told. The error itself, with the host's paths in it, is for the log only.
fn told(error: &DiskError) -> &'static str {
    match error.kind() {
        ErrorKind::NotAnImage | ErrorKind::Corrupt => "the image is corrupt",
        ErrorKind::Unsupported => "the image does not support this",
        ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::Busy => "the host refused access to the image",
        ErrorKind::ReadOnly => "the disk is read-only",
        ErrorKind::OutOfRange => "past the end of the disk",
        ErrorKind::InvalidRequest => "the request makes no sense",
        ErrorKind::NoSpace => "no space left on the host, or in the image",
        ErrorKind::HostIo => "the host failed to read or write the image",
        ErrorKind::Poisoned => "an earlier failure made the image read-only until it is opened again",
    }
}
