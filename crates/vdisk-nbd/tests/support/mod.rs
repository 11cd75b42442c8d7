//! A disk of memory and a small client.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::LocalSet;
use vdisk_image::{DiskError, Flags, Geometry, Op, Request};
use vdisk_io::Buf;
use vdisk_nbd::codec::{Command, RequestHeader};
use vdisk_nbd::{Backend, ConnectionError, End, Export, Stop, serve_connection};

pub type Bytes = Arc<Mutex<Vec<u8>>>;
type Before = dyn Fn(Request) -> Pin<Box<dyn Future<Output = Result<(), DiskError>>>>;

/// A disk of memory; something may happen before each request.
pub struct Memory {
    pub geometry: Geometry,
    pub bytes: Bytes,
    pub before: Option<Box<Before>>,
    pub seen: Rc<std::cell::RefCell<Vec<(Op, Flags)>>>,
}

impl Memory {
    pub fn of(bytes: Bytes) -> Self {
        let size = bytes.lock().unwrap().len() as u64;
        let geometry = Geometry { size, read_only: false, preferred_block: 65536 };
        Self { geometry, bytes, before: None, seen: Rc::default() }
    }

    pub fn new(size: usize) -> Self {
        let pattern = (0..size).map(|at| (at / 512 * 7 + at).to_be_bytes()[7]).collect();
        Self::of(Arc::new(Mutex::new(pattern)))
    }

    pub fn read_only(mut self) -> Self {
        self.geometry.read_only = true;
        self
    }

    pub fn before<F, R>(mut self, before: F) -> Self
    where
        F: Fn(Request) -> R + 'static,
        R: Future<Output = Result<(), DiskError>> + 'static,
    {
        self.before = Some(Box::new(move |request| Box::pin(before(request))));
        self
    }
}

impl Backend for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn serve(&self, request: Request, buf: &Buf) -> Result<(), DiskError> {
        self.seen.borrow_mut().push((request.op(), request.flags()));
        if let Some(before) = &self.before {
            before(request).await?;
        }
        let mut bytes = self.bytes.lock().unwrap();
        let start = usize::try_from(request.offset()).unwrap();
        let part = &mut bytes[start..start + usize::try_from(request.len()).unwrap()];
        match request.op() {
            Op::Read => buf.copy_in(0, part),
            Op::Write => buf.copy_out(0, part),
            Op::Discard | Op::WriteZeroes => part.fill(0),
            Op::Flush => {}
        }
        Ok(())
    }
}

/// Runs a client against a server on one thread; gives what both returned.
pub async fn talk<T>(
    backend: Memory,
    stop: Stop,
    client: impl AsyncFnOnce(Client) -> T,
) -> (Result<End, ConnectionError>, T) {
    LocalSet::new()
        .run_until(async move {
            let (near, far) = tokio::io::duplex(256 << 10);
            let server = tokio::task::spawn_local(async move {
                let export = Export::new("disk").described_as("a disk for tests");
                serve_connection(far, Rc::new(backend), &export, &stop).await
            });
            let told = client(Client::new(near)).await;
            (server.await.unwrap(), told)
        })
        .await
}

pub trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

pub struct Client {
    pub stream: Box<dyn Stream>,
}

/// A reply, of either kind.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub error: u32,
    pub text: String,
    pub data: Vec<u8>,
}

impl Client {
    pub fn new(stream: impl Stream + 'static) -> Self {
        Self { stream: Box::new(stream) }
    }

    pub async fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    pub async fn many(&mut self, n: u32) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(n).unwrap()];
        self.stream.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    pub async fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes().await)
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Greeting and client flags.
    pub async fn hello(&mut self, flags: u32) {
        assert_eq!(&self.bytes().await, b"NBDMAGICIHAVEOPT\x00\x03");
        self.send(&flags.to_be_bytes()).await;
    }

    pub async fn option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        self.send(&bytes).await;
    }

    /// Kind and data of one reply to an option.
    pub async fn option_reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.bytes().await, 0x0003_e889_0455_65a9_u64.to_be_bytes());
        assert_eq!(self.u32().await, option);
        let kind = self.u32().await;
        let len = self.u32().await;
        (kind, self.many(len).await)
    }

    /// All replies up to an ACK or an error; the last one is not among them but its kind is given.
    pub async fn ask(&mut self, option: u32, data: &[u8]) -> (u32, Vec<Vec<u8>>) {
        self.option(option, data).await;
        let mut told = Vec::new();
        loop {
            match self.option_reply(option).await {
                (2 | 3, data) => told.push(data),
                (kind, _) => return (kind, told),
            }
        }
    }

    /// The whole handshake.
    pub async fn go(&mut self, structured: bool) {
        self.hello(3).await;
        if structured {
            assert_eq!(self.ask(8, &[]).await.0, 1);
        }
        assert_eq!(self.ask(7, &info_data("disk", &[])).await.0, 1);
    }

    pub async fn request(&mut self, command: Command, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.send(&RequestHeader { flags, command, cookie, offset, len }.encode()).await;
    }

    /// A simple reply; `len` bytes of data follow a success.
    pub async fn reply(&mut self, len: u32) -> Reply {
        assert_eq!(self.u32().await, 0x6744_6698);
        let error = self.u32().await;
        let cookie = u64::from_be_bytes(self.bytes().await);
        let data = self.many(if error == 0 { len } else { 0 }).await;
        Reply { cookie, error, text: String::new(), data }
    }

    /// A structured reply of one chunk, or a simple one without data.
    pub async fn structured(&mut self) -> (u16, Reply) {
        let magic = self.u32().await;
        if magic == 0x6744_6698 {
            let error = self.u32().await;
            let cookie = u64::from_be_bytes(self.bytes().await);
            return (0, Reply { cookie, error, text: String::new(), data: vec![] });
        }
        assert_eq!(magic, 0x668e_33ef);
        assert_eq!(u16::from_be_bytes(self.bytes().await), 1, "DONE");
        let kind = u16::from_be_bytes(self.bytes().await);
        let cookie = u64::from_be_bytes(self.bytes().await);
        let len = self.u32().await;
        let mut data = self.many(len).await;
        let mut reply = Reply { cookie, error: 0, text: String::new(), data: vec![] };
        if kind == 0x8001 {
            reply.error = u32::from_be_bytes(data[..4].try_into().unwrap());
            assert_eq!(usize::from(u16::from_be_bytes(data[4..6].try_into().unwrap())), data.len() - 6);
            reply.text = String::from_utf8(data.split_off(6)).unwrap();
        } else {
            reply.data = data;
        }
        (kind, reply)
    }

    /// One request and its simple reply.
    pub async fn simple(&mut self, command: Command, flags: u16, offset: u64, len: u32) -> Reply {
        self.request(command, flags, 77, offset, len).await;
        let reply = self.reply(if command == Command::Read { len } else { 0 }).await;
        assert_eq!(reply.cookie, 77);
        reply
    }

    pub async fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Reply {
        self.request(Command::Write, flags, 78, offset, u32::try_from(data.len()).unwrap()).await;
        self.send(data).await;
        self.reply(0).await
    }

    pub async fn disc(&mut self) {
        self.request(Command::Disc, 0, 0, 0, 0).await;
        assert!(self.is_closed().await);
    }

    /// Whether the server closes the stream with nothing more to say.
    pub async fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0]).await {
            Ok(n) => n == 0,
            Err(e) => matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
        }
    }
}

pub fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(u16::try_from(wanted.len()).unwrap().to_be_bytes());
    data.extend(wanted.iter().flat_map(|w| w.to_be_bytes()));
    data
}
