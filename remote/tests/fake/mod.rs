//! A store that says what it is told to say.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How the store speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Speech {
    Redis,
    S3,
}

/// What it says to whoever loads; whether it is there, to whoever asks.
#[derive(Clone)]
pub(crate) struct Say {
    head: Vec<u8>,
    object: Vec<u8>,
    then: Then,
    /// Whether it has the chunk.
    there: bool,
    /// Said to whoever stores.
    stored: Vec<u8>,
    /// Whether it says the same to everybody.
    always: bool,
}

#[derive(Clone)]
enum Then {
    /// All is said.
    Done,
    /// So much of the object is said, and then the connection ends.
    Close(usize),
    /// So much of it, and nothing more.
    Hang(usize),
    /// So much of it, and the rest later.
    Late(usize, Duration),
    /// After the object zeros, for ever.
    Endless,
}

const LENGTH: u64 = 1 << 40;

impl Say {
    pub(crate) fn these(bytes: Vec<u8>) -> Say {
        Say { head: bytes, object: vec![], then: Then::Close(0), there: false, stored: vec![], always: true }
    }

    pub(crate) fn nothing_ever() -> Say {
        Say { then: Then::Hang(0), ..Say::these(vec![]) }
    }

    pub(crate) fn cut(self, kept: usize) -> Say {
        Say { then: Then::Close(kept), ..self }
    }

    pub(crate) fn hang(self, kept: usize) -> Say {
        Say { then: Then::Hang(kept), ..self }
    }

    pub(crate) fn late(self, kept: usize, pause: Duration) -> Say {
        Say { then: Then::Late(kept, pause), ..self }
    }
}

impl Speech {
    fn bytes(self, length: u64) -> Vec<u8> {
        match self {
            Speech::Redis => format!("${length}\r\n"),
            Speech::S3 => format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n"),
        }
        .into_bytes()
    }

    pub(crate) fn object(self, object: &[u8]) -> Say {
        let (head, object) = (self.bytes(object.len() as u64), object.to_vec());
        let stored = self.error("OOM command not allowed when used memory > 'maxmemory'.", 507);
        Say { head, object, then: Then::Done, there: true, stored, always: false }
    }

    pub(crate) fn nothing(self) -> Say {
        let head = match self {
            Speech::Redis => b"$-1\r\n".to_vec(),
            Speech::S3 => self.error("NoSuchKey", 404),
        };
        Say { head, there: false, ..self.object(&[]) }.alone()
    }

    fn error(self, text: &str, status: u16) -> Vec<u8> {
        let body = format!("<Error><Code>{text}</Code><Message>go away</Message></Error>");
        match self {
            Speech::Redis => format!("-{text}\r\n"),
            Speech::S3 => format!("HTTP/1.1 {status} No\r\nContent-Length: {}\r\n\r\n{body}", body.len()),
        }
        .into_bytes()
    }

    fn always(self, head: Vec<u8>) -> Say {
        Say { head, always: true, ..self.object(&[]) }.alone()
    }

    pub(crate) fn refusal(self) -> Say {
        self.always(self.error("NOAUTH Authentication required.", 403))
    }

    pub(crate) fn overload(self) -> Say {
        self.always(self.error("LOADING Redis is loading the dataset in memory", 503))
    }

    pub(crate) fn endless(self, object: &[u8]) -> Say {
        Say { head: self.bytes(LENGTH), then: Then::Endless, ..self.object(object) }
    }

    pub(crate) fn endless_refusal(self) -> Say {
        let head = match self {
            Speech::Redis => b"-ERR ".to_vec(),
            Speech::S3 => format!("HTTP/1.1 400 No\r\nContent-Length: {LENGTH}\r\n\r\n").into_bytes(),
        };
        Say { head, then: Then::Endless, ..self.object(b"never") }
    }

    /// It has the object and takes no other.
    pub(crate) fn full(self, object: &[u8]) -> Say {
        Say { there: false, ..self.object(object) }
    }

    /// The next request's first word.
    fn hear(self, from: &mut BufReader<TcpStream>) -> std::io::Result<String> {
        let gone = || std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        let line = |from: &mut BufReader<TcpStream>| {
            let mut line = String::new();
            match from.read_line(&mut line)? {
                0 => Err(gone()),
                _ => Ok(line.trim_end().to_owned()),
            }
        };
        let skip = |from: &mut BufReader<TcpStream>, bytes: u64| {
            std::io::copy(&mut from.by_ref().take(bytes), &mut std::io::sink()).map(drop)
        };
        match self {
            Speech::Redis => {
                let words: usize = line(from)?[1..].parse().expect("a command");
                let mut first = String::new();
                for word in 0..words {
                    let bytes: u64 = line(from)?[1..].parse().expect("a length");
                    if word == 0 {
                        first = line(from)?;
                    } else {
                        skip(from, bytes + 2)?;
                    }
                }
                Ok(first)
            }
            Speech::S3 => {
                let first = line(from)?.split(' ').next().expect("a method").to_owned();
                let mut bytes = 0;
                loop {
                    let header = line(from)?.to_lowercase();
                    if let Some(length) = header.strip_prefix("content-length:") {
                        bytes = length.trim().parse().expect("a length");
                    }
                    if header.is_empty() {
                        skip(from, bytes)?;
                        return Ok(first);
                    }
                }
            }
        }
    }
}

impl Say {
    /// Without an object after its head.
    fn alone(self) -> Say {
        Say { object: vec![], ..self }
    }
}

pub(crate) struct Fake {
    speech: Speech,
    address: SocketAddr,
    state: Arc<State>,
    listener: Option<JoinHandle<()>>,
}

struct State {
    say: Mutex<Say>,
    stopped: AtomicBool,
    asked: AtomicU64,
    sent: AtomicU64,
    connections: Mutex<Vec<TcpStream>>,
}

impl Fake {
    pub(crate) fn start(speech: Speech, say: Say) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(State {
            say: Mutex::new(say),
            stopped: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            connections: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        let listener = std::thread::spawn(move || {
            let mut talks = Vec::new();
            while let Ok((stream, _)) = listener.accept() {
                if shared.stopped.load(Ordering::SeqCst) {
                    break;
                }
                shared.connections.lock().unwrap().push(stream.try_clone().expect("a handle"));
                let shared = Arc::clone(&shared);
                // That the other end goes is what many tests are about.
                talks.push(std::thread::spawn(move || drop(shared.talk(speech, stream))));
            }
            for talk in talks {
                talk.join().expect("no test breaks the fake");
            }
        });
        Fake { speech, address, state, listener: Some(listener) }
    }

    pub(crate) fn url(&self) -> String {
        match self.speech {
            Speech::Redis => format!("redis://{}/0?prefix=kv", self.address),
            Speech::S3 => format!("s3://bucket/kv?endpoint=http://{}&region=here&sign=no", self.address),
        }
    }

    /// What of its URL stands in errors.
    pub(crate) fn shown(&self) -> String {
        self.address.to_string()
    }

    /// Requests that came.
    pub(crate) fn asked(&self) -> u64 {
        self.state.asked.load(Ordering::SeqCst)
    }

    pub(crate) fn say(&self, say: Say) {
        *self.state.say.lock().unwrap() = say;
    }

    pub(crate) fn close_connections(&self) {
        for connection in self.state.connections.lock().unwrap().drain(..) {
            // It may be closed already.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Ends it. How many bytes it sent.
    pub(crate) fn stop(mut self) -> u64 {
        self.end();
        self.state.sent.load(Ordering::SeqCst)
    }

    fn end(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        self.close_connections();
        if let Some(listener) = self.listener.take() {
            TcpStream::connect(self.address).expect("it listens");
            self.close_connections();
            listener.join().expect("no test breaks the fake");
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.end();
    }
}

impl State {
    fn talk(&self, speech: Speech, stream: TcpStream) -> std::io::Result<()> {
        let mut from = BufReader::new(stream.try_clone()?);
        loop {
            let word = speech.hear(&mut from)?;
            self.asked.fetch_add(1, Ordering::SeqCst);
            let say = self.say.lock().unwrap().clone();
            match word.as_str() {
                _ if say.always => {}
                "EXISTS" => {
                    self.send(&stream, format!(":{}\r\n", u8::from(say.there)).as_bytes())?;
                    continue;
                }
                "HEAD" => {
                    let status = if say.there { "200 OK" } else { "404 Not Found" };
                    let length = say.object.len();
                    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n");
                    self.send(&stream, head.as_bytes())?;
                    continue;
                }
                "SET" | "PUT" => {
                    self.send(&stream, &say.stored)?;
                    continue;
                }
                _ => {}
            }
            self.send(&stream, &say.head)?;
            match say.then {
                Then::Done => self.send(&stream, &say.object)?,
                Then::Close(kept) => {
                    self.send(&stream, &say.object[..kept])?;
                    return stream.shutdown(Shutdown::Both);
                }
                Then::Hang(kept) => {
                    self.send(&stream, &say.object[..kept])?;
                    return std::io::copy(&mut from, &mut std::io::sink()).map(drop);
                }
                Then::Late(kept, pause) => {
                    self.send(&stream, &say.object[..kept])?;
                    std::thread::sleep(pause);
                    self.send(&stream, &say.object[kept..])?;
                }
                Then::Endless => {
                    self.send(&stream, &say.object)?;
                    while !self.stopped.load(Ordering::SeqCst) {
                        self.send(&stream, &[b'0'; 64 << 10])?;
                    }
                }
            }
            if speech == Speech::Redis && !say.always && say.head.starts_with(b"$") && say.head[1] != b'-' {
                self.send(&stream, b"\r\n")?;
            }
        }
    }

    fn send(&self, mut stream: &TcpStream, bytes: &[u8]) -> std::io::Result<()> {
        stream.write_all(bytes)?;
        self.sent.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        Ok(())
    }
}
