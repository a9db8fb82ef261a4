//! The flags that say who this process is to its peers.

use std::path::PathBuf;
use tandem_transport::{Identity, IdentityError};

/// Mutual TLS between the processes of a cluster; flatten it into the binary's own struct.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Identity")]
pub struct TlsOptions {
    /// Directory of the cluster's own certificate authority, made on first start.
    ///
    /// Each process issues itself a certificate from it, and processes that share it trust each other: right
    /// for one machine. Across machines, give each its own certificate with the three flags below.
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// The authority that signed every certificate of the cluster (PEM). Needs --tls-cert and --tls-key.
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// This process's certificate and its chain (PEM), for the DNS name `tandem`, as server and client.
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The flags do not say.
    #[error("{0}; give --tls-dir DIR (made on first start), or all of --tls-ca, --tls-cert and --tls-key")]
    Flags(&'static str),
    /// The files cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl TlsOptions {
    /// This process's identity, from the files that the flags name.
    ///
    /// # Errors
    /// When the flags are incomplete or contradict each other, or the files cannot be used.
    pub fn identity(&self) -> Result<Identity, TlsError> {
        match (&self.tls_dir, &self.tls_ca, &self.tls_cert, &self.tls_key) {
            (Some(dir), None, None, None) => Ok(Identity::load_or_create(dir)?),
            (None, Some(ca), Some(certificate), Some(key)) => Ok(Identity::from_pem(ca, certificate, key)?),
            (Some(_), ..) => Err(TlsError::Flags("--tls-dir excludes the other --tls flags")),
            (None, None, None, None) => Err(TlsError::Flags("this process needs a certificate")),
            (None, ..) => Err(TlsError::Flags("--tls-ca, --tls-cert and --tls-key belong together")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_must_be_complete_and_agree() {
        let check = |options: TlsOptions, expected: &str| {
            let text = options.identity().err().map(|e| e.to_string()).unwrap_or_default();
            assert!(text.contains(expected), "{text:?}");
        };
        let some = || Some(PathBuf::from("/no/such/place"));
        check(TlsOptions::default(), "needs a certificate");
        check(TlsOptions { tls_ca: some(), ..Default::default() }, "belong together");
        check(TlsOptions { tls_dir: some(), tls_key: some(), ..Default::default() }, "excludes");
    }

    #[test]
    fn a_directory_is_filled_on_first_start() {
        let dir = std::env::temp_dir().join(format!("tandem-tls-{}", std::process::id()));
        let options = TlsOptions { tls_dir: Some(dir.clone()), ..Default::default() };
        options.identity().unwrap();
        options.identity().unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }
}
