//! Who belongs to the cluster: certificates, and the TLS that they make.
//!
//! Every process has a certificate of the cluster's CA, and accepts only peers that have one, both ways.
//! Without further ado a directory is enough: the first process to start there makes the CA, and each
//! process issues itself a certificate whose key never leaves its memory. A site with a PKI of its own gives
//! PEM files instead.

use ::aws_lc_rs::pbkdf2;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::num::NonZeroU32;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tandem_proto::ids::NodeId;

/// The DNS name in every certificate: peers are told apart by their node ids, not by host names.
pub(crate) const SERVER_NAME: &str = "tandem";

/// Holds the CA's key and certificate together, so that creating both is one atomic step.
const CA_FILE: &str = "ca.pem";

/// Rounds of the hash that node ids are: whoever looks for a key with the id of another has 2^64 keys to try, and each
/// costs as much as this. Whoever connects costs it once.
const ID_ROUNDS: NonZeroU32 = NonZeroU32::new(1024).unwrap();

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A certificate of the cluster's CA, the CA to check others with, and the node id that goes with them. Cheap to clone;
/// clones are the same node.
///
/// A node id is a hash of the certificate's public key and of a number that is drawn when the identity is loaded, so
/// each start of a process is a node of its own, also where processes share a certificate. The number is told in every
/// handshake, and the id is what the other side makes of it: without the key there is no way to another's id. Processes
/// that share a key are one to others: each of them could pass for the next.
#[derive(Clone)]
pub struct Identity {
    nonce: u64,
    node: NodeId,
    client: Arc<dyn ServerCertVerifier>,
    server: Arc<dyn ClientCertVerifier>,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    provider: Arc<CryptoProvider>,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file or directory cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{} holds no usable {what}: {reason}", path.display())]
    Content {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No peer would accept the certificate.
    #[error("peers would refuse the certificate in {} ({reason}): {way_out}", path.display())]
    Refused {
        /// The file that it is in, or that its CA is in.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        way_out: &'static str,
    },
    /// Certificates cannot be made.
    #[error("cannot make a certificate: {0}")]
    Make(String),
}

impl Identity {
    /// Takes the CA in `dir`, making it first if there is none, and issues a certificate for this process.
    /// However many processes do this at once, all of them get the same CA.
    ///
    /// # Errors
    /// Names the file, and what to do about it.
    pub fn load_or_create(dir: &Path) -> Result<Identity, IdentityError> {
        let path = dir.join(CA_FILE);
        let pem = match fs::read(&path) {
            Ok(pem) => pem,
            Err(e) if e.kind() == io::ErrorKind::NotFound => create_ca(dir, &path)?,
            Err(source) => {
                return Err(IdentityError::File { action: "read", path, source });
            }
        };
        warn_if_public(&path);
        let content = |what, reason: String| IdentityError::Content { what, path: path.clone(), reason };
        let ca =
            CertificateDer::from_pem_slice(&pem).map_err(|e| content("CA certificate", e.to_string()))?;
        let text = std::str::from_utf8(&pem).map_err(|e| content("CA key", e.to_string()))?;
        let ca_key = KeyPair::from_pem(text).map_err(|e| content("CA key", e.to_string()))?;

        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
        let leaf = leaf_params()?.signed_by(&key, &Issuer::new(ca_params(), ca_key)).map_err(make)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(make)?;
        Identity::checked(vec![leaf.der().clone()], key, &[ca], &path)
    }

    /// Takes the CA's certificate, and a certificate chain and private key that were issued elsewhere. The
    /// certificate needs the DNS name `tandem`, and must be good for servers and for clients.
    ///
    /// # Errors
    /// Names the file, and what to do about it.
    pub fn from_pem(ca: &Path, certificate: &Path, key: &Path) -> Result<Identity, IdentityError> {
        let roots = certificates(ca, "CA certificate")?;
        let chain = certificates(certificate, "certificate")?;
        let pem = read(key)?;
        let private = PrivateKeyDer::from_pem_slice(&pem).map_err(|e| IdentityError::Content {
            what: "private key",
            path: key.to_owned(),
            reason: e.to_string(),
        })?;
        Identity::checked(chain, private, &roots, certificate)
    }

    /// Finds out now what the first peer would otherwise find out.
    fn checked(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: &[CertificateDer<'static>],
        path: &Path,
    ) -> Result<Identity, IdentityError> {
        let refused = |error: rustls::Error| IdentityError::Refused {
            path: path.to_owned(),
            way_out: way_out(&error),
            reason: error.to_string(),
        };
        let provider = Arc::new(provider());
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.clone()).map_err(refused)?;
        }
        let store = Arc::new(store);
        let verifier = |e: rustls::client::VerifierBuilderError| IdentityError::Make(e.to_string());
        let client = WebPkiServerVerifier::builder_with_provider(Arc::clone(&store), Arc::clone(&provider))
            .build()
            .map_err(verifier)?;
        let server = WebPkiClientVerifier::builder_with_provider(store, Arc::clone(&provider))
            .build()
            .map_err(verifier)?;

        let now = UnixTime::now();
        let (leaf, rest) = chain.split_first().ok_or_else(|| IdentityError::Content {
            what: "certificate",
            path: path.to_owned(),
            reason: "it is empty".into(),
        })?;
        client.verify_server_cert(leaf, rest, &server_name(), &[], now).map_err(refused)?;
        server.verify_client_cert(leaf, rest, now).map_err(refused)?;
        let nonce = new_nonce()?;
        let node = node_id(leaf, nonce).map_err(refused)?;
        let identity = Identity { nonce, node, client, server, chain, key: Arc::new(key), provider };
        identity.server_config(&[]).map_err(refused)?;
        Ok(identity)
    }

    /// The id of the node that this is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Goes into the hash that [`Identity::node`] is.
    pub(crate) fn nonce(&self) -> u64 {
        self.nonce
    }

    /// Another node with the same certificate, for processes that are several.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn another(&self) -> Result<Identity, IdentityError> {
        let nonce = new_nonce()?;
        let node = node_id(&self.chain[0], nonce).map_err(make)?;
        Ok(Identity { nonce, node, ..self.clone() })
    }

    /// The same trust, with a certificate that nobody checks here; without one if the chain is empty.
    #[cfg(test)]
    pub(crate) fn presenting(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        protocol: &[u8],
    ) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3 is there")
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&self.client));
        let mut config = match chain.is_empty() {
            true => builder.with_no_client_auth(),
            false => builder.with_client_auth_cert(chain, key).expect("the key is the certificate's"),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        config
    }

    /// TLS for whoever connects.
    pub(crate) fn client_config(&self, protocol: &[u8]) -> Result<ClientConfig, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            // The ordinary verifier; rustls calls any that is given explicitly dangerous.
            .with_custom_certificate_verifier(Arc::clone(&self.client))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![protocol.to_vec()];
        // A resumed session would skip the certificates, and early data could be replayed.
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }

    /// TLS for whoever accepts.
    pub(crate) fn server_config(&self, protocol: &[u8]) -> Result<ServerConfig, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::clone(&self.server))
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![protocol.to_vec()];
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity")
    }
}

/// The id of whoever has this certificate and says this number.
pub(crate) fn node_id(certificate: &CertificateDer<'_>, nonce: u64) -> Result<NodeId, rustls::Error> {
    let key = ParsedCertificate::try_from(certificate)?.subject_public_key_info();
    let mut id = [0; 8];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ID_ROUNDS, &nonce.to_le_bytes(), &key, &mut id);
    Ok(NodeId(u64::from_le_bytes(id)))
}

fn new_nonce() -> Result<u64, IdentityError> {
    getrandom::u64().map_err(make)
}

fn make(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::Make(error.to_string())
}

pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("the constant is a DNS name")
}

/// AES-128 first: it is the cheapest of the three per byte, and every byte of KV is sealed with it.
fn provider() -> CryptoProvider {
    use aws_lc_rs::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites =
        vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    provider
}

fn way_out(error: &rustls::Error) -> &'static str {
    use rustls::CertificateError as C;
    match error {
        rustls::Error::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => {
            "issue a new one, or correct this machine's clock"
        }
        rustls::Error::InvalidCertificate(C::NotValidYet | C::NotValidYetContext { .. }) => {
            "correct this machine's clock, or wait until it is valid"
        }
        rustls::Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => {
            "give the certificate of the CA that issued it"
        }
        rustls::Error::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => {
            "issue it with the DNS name tandem"
        }
        rustls::Error::InvalidCertificate(C::InvalidPurpose | C::InvalidPurposeContext { .. }) => {
            "issue it with the extended key usages serverAuth and clientAuth"
        }
        rustls::Error::InconsistentKeys(_) => "give the private key that belongs to it",
        _ => "issue it anew, as an X.509 v3 certificate with an ECDSA, Ed25519 or RSA key",
    }
}

/// Both are valid as long as anyone will run this: a certificate belongs to one process, which must not
/// outlive it, and trust ends by taking the CA away. A day back, for clocks that differ.
fn validity(mut params: CertificateParams) -> CertificateParams {
    let now = SystemTime::now();
    params.not_before = (now - DAY).into();
    params.not_after = (now + 3650 * DAY).into();
    params
}

/// The name must be the same always: it is how certificates name their issuer.
fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "tandem cluster CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(params)
}

fn leaf_params() -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).map_err(make)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "tandem node");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(validity(params))
}

/// Makes a CA and puts it in place, unless another process was faster: then takes that one's.
fn create_ca(dir: &Path, path: &Path) -> Result<Vec<u8>, IdentityError> {
    let file = |action, path: &Path| {
        let path = path.to_owned();
        move |source| IdentityError::File { action, path, source }
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(file("create directory", dir))?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
    let certificate = ca_params().self_signed(&key).map_err(make)?;
    let pem = key.serialize_pem() + &certificate.pem();

    let draft = dir.join(format!(".{CA_FILE}.{:016x}", getrandom::u64().map_err(make)?));
    let mut out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .map_err(file("create", &draft))?;
    let written = out.write_all(pem.as_bytes()).and_then(|()| out.sync_all()).map_err(file("write", &draft));
    // A link, unlike a rename, fails if the name is taken: exactly one process wins, with a whole file.
    let placed = written.and_then(|()| match fs::hard_link(&draft, path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(file("create", path)(e)),
        _ => Ok(()),
    });
    fs::remove_file(&draft).map_err(file("remove", &draft))?;
    placed?;
    read(path)
}

/// Whoever reads the CA's key can join the cluster.
fn warn_if_public(path: &Path) {
    let public = fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0);
    if public {
        tracing::warn!(path = %path.display(), "others on this machine may use the cluster's CA: chmod 600 it");
    }
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    fs::read(path).map_err(|source| IdentityError::File { action: "read", path: path.to_owned(), source })
}

fn certificates(path: &Path, what: &'static str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let pem = read(path)?;
    let content = |reason: String| IdentityError::Content { what, path: path.to_owned(), reason };
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|e| content(e.to_string()))?;
    if found.is_empty() {
        return Err(content("no PEM block of a certificate".into()));
    }
    Ok(found)
}
