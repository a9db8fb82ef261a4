//! S3, what speaks like it, and directories: through OpenDAL.

use super::{Fault, name};
use crate::landing::Landing;
use crate::lent::Lent;
use crate::tier::OpenError;
use crate::url::StoreUrl;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use http::{Method, Request, Response};
use opendal::services::{Fs, S3};
use opendal::{
    Buffer, EntryMode, Error, ErrorKind, HttpBody, HttpTransport, HttpTransporter, Operator, Writer,
};
use opendal_http_transport_reqwest::ReqwestTransport;
use std::error::Error as _;
use std::time::{Duration, SystemTime};
use tandem_proto::keys::ChunkKey;
use tokio::runtime::Handle;

/// Keys that one call asks for at once.
const TOGETHER: usize = 4;
/// Where a directory holds what is not written whole yet, and for how long: nobody writes one chunk for that long.
const PARTIAL: &str = ".partial";
const STALE: Duration = Duration::from_secs(3600);
/// The longest answer of a server that is no chunk.
const LONGEST_ANSWER: usize = 64 << 10;
/// How long a connection to a server may take.
const CONNECT: Duration = Duration::from_secs(2);
/// How long what was given up may take to be taken back.
const TAKE_BACK: Duration = Duration::from_secs(10);

/// Objects by name.
pub(crate) struct Objects {
    operator: Operator,
    prefix: String,
    /// Whether writers may leave parts behind.
    partial: bool,
}

impl Objects {
    /// Panics if the URL is that of no such store.
    pub(crate) fn open(url: &StoreUrl) -> Result<Objects, OpenError> {
        let failed = |error: Error| OpenError::Refused { url: url.to_string(), reason: told(&error) };
        match url {
            StoreUrl::S3 { bucket, prefix, endpoint, region, sign } => {
                let environment = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
                let region = region.clone().or_else(|| environment("AWS_REGION"));
                let region = region.or_else(|| environment("AWS_DEFAULT_REGION"));
                let mut builder =
                    S3::default().bucket(bucket).region(region.as_deref().unwrap_or("us-east-1"));
                if let Some(endpoint) = endpoint {
                    builder = builder.endpoint(endpoint);
                }
                if !sign {
                    builder = builder.skip_signature();
                }
                let client = reqwest::Client::builder().connect_timeout(CONNECT).build();
                let client = client.map_err(|error| OpenError::Refused {
                    url: url.to_string(),
                    reason: format!("no client for HTTP: {error}"),
                })?;
                let operator = Operator::new(builder).map_err(failed)?;
                let transport = HttpTransporter::new(Short(ReqwestTransport::new(client)));
                let context = operator.context().with_http_transport(transport);
                let operator = operator.with_context(context);
                Ok(Objects { operator, prefix: prefix.clone(), partial: false })
            }
            StoreUrl::Directory { path } => {
                let utf8 = |path: &std::path::Path| path.to_str().map(str::to_owned);
                let not_utf8 =
                    || OpenError::Refused { url: url.to_string(), reason: "it is not UTF-8".into() };
                let root = utf8(path).ok_or_else(not_utf8)?;
                let partial = utf8(&path.join(PARTIAL)).ok_or_else(not_utf8)?;
                let builder = Fs::default().root(&root).atomic_write_dir(&partial);
                let operator = Operator::new(builder).map_err(failed)?;
                Ok(Objects { operator, prefix: String::new(), partial: true })
            }
            StoreUrl::Redis { .. } => unreachable!("{url} is no URL of objects"),
        }
    }

    pub(crate) async fn tidy(&self) {
        if !self.partial {
            return;
        }
        let Ok(mut parts) = self.operator.lister_with(&format!("{PARTIAL}/")).recursive(true).await else {
            return;
        };
        while let Some(Ok(entry)) = parts.next().await {
            if entry.metadata().mode() != EntryMode::FILE {
                continue;
            }
            let Ok(found) = self.operator.stat(entry.path()).await else { continue };
            let written = found.last_modified().map(SystemTime::from);
            if written.and_then(|written| written.elapsed().ok()).is_some_and(|age| age > STALE) {
                // Left is what cannot be removed, and what somebody else has removed.
                let _ = self.operator.delete(entry.path()).await;
            }
        }
    }

    pub(crate) async fn find(&self, keys: &[ChunkKey], found: &mut usize) -> Result<(), Fault> {
        let mut names = keys[*found..].iter().map(|key| name(&self.prefix, *key));
        let ask = |name: String| {
            let operator = self.operator.clone();
            async move { operator.exists(&name).await }
        };
        let mut asked: FuturesOrdered<_> = names.by_ref().take(TOGETHER).map(ask).collect();
        while let Some(answer) = asked.next().await {
            if !answer.map_err(fault)? {
                break;
            }
            *found += 1;
            asked.extend(names.next().map(ask));
        }
        Ok(())
    }

    pub(crate) async fn put(&self, key: ChunkKey, header: &[u8], body: &Lent) -> Result<(), Fault> {
        let name = name(&self.prefix, key);
        if self.operator.exists(&name).await.map_err(fault)? {
            return Ok(());
        }
        // A copy: what is given to a connection may be read after this call was dropped.
        let object: Bytes = [header, body.bytes()].concat().into();
        // That there is no such object is no answer here: there is no such bucket or folder.
        let failed = |error: Error| Fault::failed(told(&error), error.is_temporary());
        let mut upload = Upload(Some(self.operator.writer(&name).await.map_err(failed)?));
        let writer = upload.0.as_mut().expect("it has just begun");
        writer.write(Buffer::from(object)).await.map_err(failed)?;
        writer.close().await.map_err(failed)?;
        upload.0 = None;
        Ok(())
    }

    pub(crate) async fn get(&self, landing: &mut Landing) -> Result<(), Fault> {
        let name = name(&self.prefix, landing.key());
        let reader = self.operator.reader(&name).await.map_err(fault)?;
        let mut pieces = reader.into_stream(0..).await.map_err(fault)?;
        while let Some(piece) = pieces.next().await {
            for bytes in piece.map_err(fault)? {
                landing.take(&bytes)?;
            }
        }
        Ok(())
    }

    pub(crate) async fn delete(&self, key: ChunkKey) -> Result<(), Fault> {
        match self.operator.delete(&name(&self.prefix, key)).await {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(fault(error)),
            _ => Ok(()),
        }
    }
}

/// An object that is being written. What has been written is taken back if this is dropped before the end.
struct Upload(Option<Writer>);

impl Drop for Upload {
    fn drop(&mut self) {
        if let (Some(mut writer), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn(async move {
                // If it does not come about, a later start tidies up.
                let _ = tokio::time::timeout(TAKE_BACK, writer.abort()).await;
            });
        }
    }
}

/// Sends requests, and reads no answers but chunks that are longer than a server has reason to give: OpenDAL takes
/// those whole.
struct Short(ReqwestTransport);

impl HttpTransport for Short {
    async fn fetch(&self, request: Request<Buffer>) -> opendal::Result<Response<HttpBody>> {
        let reads = request.method() == Method::GET;
        let answer = self.0.fetch(request).await?;
        if reads && answer.status().is_success() {
            return Ok(answer);
        }
        let mut left = LONGEST_ANSWER;
        Ok(answer.map(|body| {
            body.map_inner(|pieces| {
                Box::new(pieces.map(move |piece| {
                    let piece = piece?;
                    left = left.checked_sub(piece.len()).ok_or_else(|| {
                        Error::new(ErrorKind::Unexpected, "the server's answer is too long")
                    })?;
                    Ok(piece)
                }))
            })
        }))
    }
}

fn fault(error: Error) -> Fault {
    match error.kind() {
        ErrorKind::NotFound => Fault::Absent,
        _ => Fault::failed(told(&error), error.is_temporary()),
    }
}

/// What OpenDAL says, without the requests and answers that it repeats.
fn told(error: &Error) -> String {
    let mut text = format!("{}: {}", error.kind(), error.message());
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
