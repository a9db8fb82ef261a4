//! Which store: a URL, as it stands in options.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use url::Url;

const REDIS_PORT: u16 = 6379;

/// A store of chunks, and where in it they are. Shown without its secrets.
///
/// - `s3://bucket/prefix?endpoint=https://host:port&region=eu-west-1`: S3, or with an endpoint what speaks like it.
///   Credentials are those of AWS's own tools: from `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, a profile, or the
///   machine's role; with `sign=no` there are none.
/// - `redis://user:password@host:port/database?prefix=name&ttl=86400`: Redis or Valkey. What is left out of user and
///   password is taken from `REDIS_USERNAME` and `REDIS_PASSWORD`. With a TTL, in seconds, chunks go that long after they
///   were stored.
/// - `fs:///path`: a directory, which many hosts may share.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreUrl {
    /// S3, and what speaks like it.
    S3 {
        /// The bucket, which is there.
        bucket: String,
        /// What names of objects begin with, without a slash at either end.
        prefix: String,
        /// The server, if it is not Amazon's.
        endpoint: Option<String>,
        /// Its region; if it is not given, that of the environment.
        region: Option<String>,
        /// Whether requests are signed, which takes credentials.
        sign: bool,
    },
    /// Redis or Valkey, one server.
    Redis {
        /// Its name or address.
        host: String,
        /// Its port.
        port: u16,
        /// Who to be there.
        user: Option<String>,
        /// With which password.
        password: Option<Secret>,
        /// Which of its databases.
        database: u32,
        /// What keys begin with, without a slash at either end.
        prefix: String,
        /// How long chunks stay.
        ttl: Option<Duration>,
    },
    /// A directory.
    Directory {
        /// Where it is; made if it is not there.
        path: PathBuf,
    },
}

/// What nobody is shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub(crate) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Why text is no URL of a store. Shows nothing of the text but names: it may hold a password.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UrlError {
    /// It is no URL.
    #[error(
        "a remote store is given as a URL, such as s3://bucket/prefix, redis://host:6379/0 or fs:///path: {0}"
    )]
    NoUrl(url::ParseError),
    /// No such kind of store.
    #[error("no remote store is called {0}: take s3, redis or fs")]
    Scheme(String),
    /// A part is missing.
    #[error("a URL of {scheme} names {what}")]
    Missing {
        /// The kind of store.
        scheme: &'static str,
        /// What it lacks.
        what: &'static str,
    },
    /// A part is there that means nothing.
    #[error("a URL of {scheme} has no {part}")]
    Unknown {
        /// The kind of store.
        scheme: &'static str,
        /// What is too much.
        part: String,
    },
    /// A part has no sense.
    #[error("{part} of a URL of {scheme} is {what}")]
    Value {
        /// The kind of store.
        scheme: &'static str,
        /// Which part.
        part: &'static str,
        /// What it must be.
        what: &'static str,
    },
}

impl FromStr for StoreUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<StoreUrl, UrlError> {
        let url = Url::parse(text).map_err(UrlError::NoUrl)?;
        match url.scheme() {
            "s3" => s3(&url),
            "redis" => redis(&url),
            "fs" => directory(&url),
            other => Err(UrlError::Scheme(other.into())),
        }
    }
}

fn s3(url: &Url) -> Result<StoreUrl, UrlError> {
    let scheme = "s3";
    nobody(scheme, url)?;
    if url.port().is_some() {
        return Err(UrlError::Unknown { scheme, part: "port: give endpoint=https://host:port".into() });
    }
    let [endpoint, region, sign] = options(scheme, url, ["endpoint", "region", "sign"])?;
    let sign = match sign.as_deref() {
        None | Some("yes") => true,
        Some("no") => false,
        Some(_) => return Err(UrlError::Value { scheme, part: "sign", what: "yes or no" }),
    };
    if let Some(endpoint) = &endpoint {
        let http = Url::parse(endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let http =
            http.ok_or(UrlError::Value { scheme, part: "endpoint", what: "a URL of http or https" })?;
        nobody(scheme, &http)?;
    }
    let bucket = url.host_str().filter(|host| !host.is_empty());
    let bucket = bucket.ok_or(UrlError::Missing { scheme, what: "a bucket" })?.to_owned();
    Ok(StoreUrl::S3 {
        bucket,
        prefix: trimmed(&decoded(scheme, "prefix", url.path())?),
        endpoint,
        region,
        sign,
    })
}

fn redis(url: &Url) -> Result<StoreUrl, UrlError> {
    let scheme = "redis";
    let [prefix, ttl] = options(scheme, url, ["prefix", "ttl"])?;
    let host = url.host_str().filter(|host| !host.is_empty());
    let host = host.ok_or(UrlError::Missing { scheme, what: "a host" })?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let database = match url.path().trim_matches('/') {
        "" => 0,
        number => {
            number.parse().map_err(|_| UrlError::Value { scheme, part: "database", what: "a number" })?
        }
    };
    let ttl = match ttl.map(|ttl| ttl.parse()) {
        None => None,
        Some(Ok(seconds @ 1..=0xFFFF_FFFF)) => Some(Duration::from_secs(seconds)),
        Some(_) => {
            return Err(UrlError::Value { scheme, part: "ttl", what: "a number of seconds from 1 on" });
        }
    };
    let user = Some(url.username()).filter(|user| !user.is_empty());
    let user = user.map(|user| decoded(scheme, "user", user)).transpose()?;
    let password = url.password().map(|password| decoded(scheme, "password", password)).transpose()?;
    Ok(StoreUrl::Redis {
        host,
        port: url.port().unwrap_or(REDIS_PORT),
        user,
        password: password.map(Secret),
        database,
        prefix: trimmed(&prefix.unwrap_or_default()),
        ttl,
    })
}

fn directory(url: &Url) -> Result<StoreUrl, UrlError> {
    let scheme = "fs";
    nobody(scheme, url)?;
    let [] = options(scheme, url, [])?;
    if url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err(UrlError::Unknown { scheme, part: "host: write fs:///path with three slashes".into() });
    }
    let path = PathBuf::from(decoded(scheme, "path", url.path())?);
    if !path.is_absolute() || path.parent().is_none() {
        return Err(UrlError::Missing { scheme, what: "a directory, from the root on" });
    }
    Ok(StoreUrl::Directory { path })
}

fn nobody(scheme: &'static str, url: &Url) -> Result<(), UrlError> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(());
    }
    Err(UrlError::Unknown { scheme, part: "user or password: credentials come from the environment".into() })
}

/// The values of these options, in their order. Any other is an error.
fn options<const N: usize>(
    scheme: &'static str,
    url: &Url,
    names: [&'static str; N],
) -> Result<[Option<String>; N], UrlError> {
    let mut values = [const { None }; N];
    for (name, value) in url.query_pairs() {
        match names.iter().position(|known| *known == name) {
            Some(at) => values[at] = Some(value.into_owned()),
            None => return Err(UrlError::Unknown { scheme, part: format!("option {name}") }),
        }
    }
    Ok(values)
}

/// Without percent signs. Options come so already.
fn decoded(scheme: &'static str, part: &'static str, text: &str) -> Result<String, UrlError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        bytes.push(match byte {
            b'%' => match (digit(rest.next()), digit(rest.next())) {
                (Some(high), Some(low)) => (high * 16 + low) as u8,
                _ => return Err(UrlError::Value { scheme, part, what: "written with %, but not as %2F" }),
            },
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| UrlError::Value { scheme, part, what: "not UTF-8" })
}

fn trimmed(prefix: &str) -> String {
    prefix.trim_matches('/').to_owned()
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreUrl::S3 { bucket, prefix, endpoint, region, sign } => {
                write!(f, "s3://{bucket}/{prefix}")?;
                let endpoint = endpoint.as_ref().map(|endpoint| format!("endpoint={endpoint}"));
                let region = region.as_ref().map(|region| format!("region={region}"));
                query(f, [endpoint, region, (!sign).then(|| "sign=no".into())])
            }
            StoreUrl::Redis { host, port, database, prefix, ttl, user: _, password: _ } => {
                let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
                write!(f, "redis://{open}{host}{close}:{port}/{database}")?;
                let prefix = Some(prefix).filter(|prefix| !prefix.is_empty());
                let ttl = ttl.map(|ttl| format!("ttl={}", ttl.as_secs()));
                query(f, [prefix.map(|prefix| format!("prefix={prefix}")), ttl, None])
            }
            StoreUrl::Directory { path } => write!(f, "fs://{}", path.display()),
        }
    }
}

fn query(f: &mut fmt::Formatter<'_>, options: [Option<String>; 3]) -> fmt::Result {
    let mut sign = '?';
    for option in options.into_iter().flatten() {
        write!(f, "{sign}{option}")?;
        sign = '&';
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read, and shown again, without secrets.
    fn check(text: &str, shown: Result<&str, &str>) {
        let read = text.parse::<StoreUrl>();
        if let Ok(url) = &read {
            assert!(!format!("{url} {url:?}").contains("hunter2"), "{text}");
        }
        let read = read.map(|url| url.to_string()).map_err(|error| error.to_string());
        match (&read, shown) {
            (Ok(read), Ok(shown)) => assert_eq!(read, shown, "{text}"),
            (Err(read), Err(shown)) => {
                assert!(read.contains(shown) && !read.contains("hunter2"), "{text}: {read}");
            }
            _ => panic!("{text}: {read:?}"),
        }
    }

    #[test]
    fn urls_are_read_and_shown_without_secrets() {
        check("s3://bucket", Ok("s3://bucket/"));
        check("s3://bucket/a/b/?region=eu-west-1", Ok("s3://bucket/a/b?region=eu-west-1"));
        check(
            "s3://bucket/a?endpoint=http%3A%2F%2Flocalhost%3A9000&region=x",
            Ok("s3://bucket/a?endpoint=http://localhost:9000&region=x"),
        );
        check("s3://bucket?sign=no", Ok("s3://bucket/?sign=no"));
        check("redis://host", Ok("redis://host:6379/0"));
        check("redis://me:hunter2@host:7000/3?prefix=/kv/", Ok("redis://host:7000/3?prefix=kv"));
        check("redis://:hunter2@[::1]:7000/3?ttl=60", Ok("redis://[::1]:7000/3?ttl=60"));
        check("fs:///var/kv%20store", Ok("fs:///var/kv store"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_name() {
        check("bucket", Err("is given as a URL"));
        check("gcs://bucket", Err("called gcs"));
        check("s3:///prefix", Err("a bucket"));
        check("s3://key:hunter2@bucket/", Err("from the environment"));
        check("s3://bucket:80/", Err("no port"));
        check("s3://bucket/?endpoint=host:9000", Err("endpoint of a URL of s3 is a URL of http"));
        check("s3://bucket/?sign=maybe", Err("yes or no"));
        check("s3://bucket/?endpoint=http://me:hunter2@host:9000", Err("from the environment"));
        check("s3://bucket/?zone=1", Err("no option zone"));
        check("redis://:hunter2@host/x", Err("database"));
        check("redis://host/0?ttl=0", Err("ttl"));
        check("redis://host/0?tls=1", Err("no option tls"));
        check("fs://var/kv", Err("three slashes"));
        check("fs:///", Err("a directory"));
        check("fs:///a%zz", Err("%2F"));
        check("fs:///a?x=1", Err("no option x"));
    }
}
