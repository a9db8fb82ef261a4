//! Redis and Valkey, by a client of our own: a chunk's bytes go from its memory to the socket and back with no copy
//! between, and what is longer than the chunk is not read.

use super::resp::{self, Reply};
use super::{Fault, name};
use crate::landing::Landing;
use crate::lent::Lent;
use crate::url::StoreUrl;
use std::io;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tandem_proto::keys::ChunkKey;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Keys that are asked for at once.
const TOGETHER: usize = 256;
/// Connections that nobody used for so long are not used again: who knows what between has forgotten them.
const IDLE: Duration = Duration::from_secs(30);
/// Answers are read in pieces of this size, a chunk's bytes aside.
const BUFFER: usize = 4 << 10;

/// A server, and connections to it. As many as there are calls at once.
pub(crate) struct Redis {
    address: (String, u16),
    /// What is said on a connection first, and how many answers that has.
    greeting: (Vec<u8>, usize),
    prefix: String,
    /// The words after a value that is stored.
    terms: Vec<String>,
    idle: Mutex<Vec<(Instant, Connection)>>,
}

struct Connection {
    stream: TcpStream,
    buffer: Box<[u8; BUFFER]>,
    /// What of the buffer is not read yet.
    unread: std::ops::Range<usize>,
}

impl Redis {
    /// Panics if the URL is another store's.
    pub(crate) fn new(url: &StoreUrl) -> Redis {
        let StoreUrl::Redis { host, port, user, password, database, prefix, ttl } = url else {
            unreachable!("{url} is no URL of Redis")
        };
        let environment = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let user = user.clone().or_else(|| environment("REDIS_USERNAME"));
        let password = password.clone().map(|secret| secret.0).or_else(|| environment("REDIS_PASSWORD"));
        let mut greeting = (Vec::new(), 0);
        let mut say = |words: &[&str]| {
            resp::command(&mut greeting.0, words);
            greeting.1 += 1;
        };
        match (&user, &password) {
            (Some(user), Some(password)) => say(&["AUTH", user, password]),
            (None, Some(password)) => say(&["AUTH", password]),
            _ => {}
        }
        if *database != 0 {
            say(&["SELECT", &database.to_string()]);
        }
        let mut terms = vec!["NX".to_owned()];
        if let Some(ttl) = ttl {
            terms.extend(["EX".to_owned(), ttl.as_secs().to_string()]);
        }
        let address = (host.clone(), *port);
        Redis { address, greeting, prefix: prefix.clone(), terms, idle: Mutex::default() }
    }

    pub(crate) async fn find(&self, keys: &[ChunkKey], found: &mut usize) -> Result<(), Fault> {
        if *found == keys.len() {
            return Ok(());
        }
        let mut connection = self.connection().await?;
        for keys in keys[*found..].chunks(TOGETHER) {
            let mut out = Vec::new();
            for key in keys {
                resp::command(&mut out, &["EXISTS", &name(&self.prefix, *key)]);
            }
            connection.send(&[&out]).await?;
            let mut there = 0;
            for asked in 0..keys.len() {
                let is = connection.number().await? != 0;
                there += usize::from(is && there == asked);
            }
            *found += there;
            if there < keys.len() {
                break;
            }
        }
        self.keep(connection);
        Ok(())
    }

    pub(crate) async fn put(&self, key: ChunkKey, header: &[u8], body: &Lent) -> Result<(), Fault> {
        let mut connection = self.connection().await?;
        let name = name(&self.prefix, key);
        let mut out = Vec::new();
        resp::command(&mut out, &["EXISTS", &name]);
        connection.send(&[&out]).await?;
        if connection.number().await? == 0 {
            let mut before = Vec::with_capacity(header.len() + 256);
            resp::begin(&mut before, 3 + self.terms.len());
            for word in ["SET", &name] {
                resp::word(&mut before, word);
            }
            resp::length(&mut before, header.len() + body.bytes().len());
            before.extend(header);
            let mut after = b"\r\n".to_vec();
            for word in &self.terms {
                resp::word(&mut after, word);
            }
            connection.send(&[&before, body.bytes(), &after]).await?;
            match connection.reply().await? {
                // Nothing: somebody else was faster.
                Reply::Done | Reply::Nothing => {}
                other => return Err(unlike("SET", &other)),
            }
        }
        self.keep(connection);
        Ok(())
    }

    pub(crate) async fn get(&self, landing: &mut Landing) -> Result<(), Fault> {
        let mut connection = self.connection().await?;
        let mut out = Vec::new();
        resp::command(&mut out, &["GET", &name(&self.prefix, landing.key())]);
        connection.send(&[&out]).await?;
        match connection.reply().await? {
            Reply::Bytes(len) => {
                landing.announce(len)?;
                connection.bytes(landing).await?;
                self.keep(connection);
                Ok(())
            }
            Reply::Nothing => {
                self.keep(connection);
                Err(Fault::Absent)
            }
            other => Err(unlike("GET", &other)),
        }
    }

    pub(crate) async fn delete(&self, key: ChunkKey) -> Result<(), Fault> {
        let mut connection = self.connection().await?;
        let mut out = Vec::new();
        resp::command(&mut out, &["UNLINK", &name(&self.prefix, key)]);
        connection.send(&[&out]).await?;
        connection.number().await?;
        self.keep(connection);
        Ok(())
    }

    /// A connection on which nothing is under way. Whoever does not come to an end with it drops it.
    async fn connection(&self) -> Result<Connection, Fault> {
        let now = Instant::now();
        {
            let mut idle = self.idle.lock().expect("nobody panics with it");
            idle.retain(|(since, connection)| now - *since < IDLE && connection.is_quiet());
            if let Some((_, connection)) = idle.pop() {
                return Ok(connection);
            }
        }
        let (host, port) = &self.address;
        let stream = TcpStream::connect((host.as_str(), *port)).await;
        let stream = stream.map_err(|error| Fault::failed(error, true))?;
        stream.set_nodelay(true).map_err(broken)?;
        let mut connection = Connection { stream, buffer: Box::new([0; BUFFER]), unread: 0..0 };
        let (words, answers) = &self.greeting;
        connection.send(&[words]).await?;
        for _ in 0..*answers {
            match connection.reply().await? {
                Reply::Done => {}
                other => return Err(unlike("AUTH or SELECT", &other)),
            }
        }
        Ok(connection)
    }

    fn keep(&self, connection: Connection) {
        self.idle.lock().expect("nobody panics with it").push((Instant::now(), connection));
    }
}

impl Connection {
    /// Whether it is open and nothing has come that nobody asked for.
    fn is_quiet(&self) -> bool {
        let read = self.stream.try_read(&mut [0]);
        self.unread.is_empty() && read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    async fn send(&mut self, parts: &[&[u8]]) -> Result<(), Fault> {
        for part in parts {
            self.stream.write_all(part).await.map_err(broken)?;
        }
        Ok(())
    }

    /// The next answer's first line, which is no error.
    async fn reply(&mut self) -> Result<Reply, Fault> {
        loop {
            let unread = &self.buffer[self.unread.clone()];
            match resp::reply(unread).map_err(|reason| Fault::failed(reason, false))? {
                Some((Reply::Error(error), _)) => {
                    let passing = resp::passing(&error);
                    return Err(Fault::failed(error, passing));
                }
                Some((reply, len)) => {
                    self.unread.start += len;
                    return Ok(reply);
                }
                None => self.more().await?,
            }
        }
    }

    async fn number(&mut self) -> Result<i64, Fault> {
        match self.reply().await? {
            Reply::Number(number) => Ok(number),
            other => Err(unlike("EXISTS or UNLINK", &other)),
        }
    }

    /// Brings the bytes that were announced, and reads what ends them.
    async fn bytes(&mut self, landing: &mut Landing) -> Result<(), Fault> {
        loop {
            let space = landing.space();
            if space.is_empty() {
                break;
            }
            let len = if self.unread.is_empty() {
                ended(self.stream.read(space).await)?
            } else {
                let len = space.len().min(self.unread.len());
                space[..len].copy_from_slice(&self.buffer[self.unread.start..][..len]);
                self.unread.start += len;
                len
            };
            landing.advance(len)?;
        }
        while self.unread.len() < 2 {
            self.more().await?;
        }
        if !self.buffer[self.unread.clone()].starts_with(b"\r\n") {
            return Err(Fault::failed("its answer does not end where it said", false));
        }
        self.unread.start += 2;
        Ok(())
    }

    /// Reads more into the buffer, which has room after what is unread: no line is as long as it.
    async fn more(&mut self) -> Result<(), Fault> {
        self.buffer.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        let len = ended(self.stream.read(&mut self.buffer[self.unread.end..]).await)?;
        self.unread.end += len;
        Ok(())
    }
}

fn ended(read: io::Result<usize>) -> Result<usize, Fault> {
    match read {
        Ok(0) => Err(Fault::failed("it closed the connection in the middle of an answer", true)),
        read => read.map_err(broken),
    }
}

fn broken(error: io::Error) -> Fault {
    Fault::failed(error, true)
}

fn unlike(command: &str, reply: &Reply) -> Fault {
    Fault::failed(format!("it answers {command} with {reply:?}"), false)
}
