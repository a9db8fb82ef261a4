//! What identities are taken, and what is said about those that are not.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd,
};
use std::path::PathBuf;
use tandem_transport::Identity;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("tandem-identity-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    fn put(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn ca() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "a site's own CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn leaf() -> CertificateParams {
    let mut params = CertificateParams::new(vec!["tandem".to_owned()]).unwrap();
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// Gives the files to `from_pem`; expects to be taken (None), or refused with these words.
#[track_caller]
fn check(scratch: &Scratch, ca_pem: &str, leaf_pem: &str, key_pem: &str, words: Option<&[&str]>) {
    let ca = scratch.put("ca.crt", ca_pem);
    let leaf = scratch.put("node.crt", leaf_pem);
    let key = scratch.put("node.key", key_pem);
    match (Identity::from_pem(&ca, &leaf, &key), words) {
        (Ok(_), None) => {}
        (Err(error), Some(words)) => {
            let text = error.to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
        (outcome, _) => panic!("{outcome:?}"),
    }
}

#[test]
fn certificates_of_a_site_are_checked_before_peers_do() {
    let scratch = Scratch::new("site");
    let (ours, theirs) = (ca(), ca());
    let key = KeyPair::generate().unwrap();
    let (ca_pem, key_pem) = (ours.pem(), key.serialize_pem());
    let issue = |params: CertificateParams| params.signed_by(&key, &ours).unwrap().pem();
    let good = issue(leaf());

    check(&scratch, &ca_pem, &good, &key_pem, None);
    check(&scratch, &theirs.pem(), &good, &key_pem, Some(&["node.crt", "the CA that issued it"]));

    let mut expired = leaf();
    expired.not_after = date_time_ymd(2020, 1, 1);
    check(&scratch, &ca_pem, &issue(expired), &key_pem, Some(&["node.crt", "issue a new one"]));

    let mut early = leaf();
    early.not_before = date_time_ymd(4000, 1, 1);
    check(&scratch, &ca_pem, &issue(early), &key_pem, Some(&["clock"]));

    let mut other_name = leaf();
    other_name.subject_alt_names.clear();
    check(&scratch, &ca_pem, &issue(other_name), &key_pem, Some(&["DNS name tandem"]));

    let mut server_only = leaf();
    server_only.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    check(&scratch, &ca_pem, &issue(server_only), &key_pem, Some(&["clientAuth"]));

    let other_key = KeyPair::generate().unwrap().serialize_pem();
    check(&scratch, &ca_pem, &good, &other_key, Some(&["private key that belongs"]));

    check(&scratch, &ca_pem, "", &key_pem, Some(&["node.crt", "no PEM block"]));
    check(&scratch, &ca_pem, &good, "nonsense", Some(&["node.key", "private key"]));
}

/// An id is of the certificate's key and of the start: neither alone brings it back.
#[test]
fn each_start_is_a_node_of_its_own() {
    let scratch = Scratch::new("nodes");
    let (ca, key) = (ca(), KeyPair::generate().unwrap());
    let leaf = leaf().signed_by(&key, &ca).unwrap().pem();
    let [ca, leaf, key] = [("ca", ca.pem()), ("leaf", leaf), ("key", key.serialize_pem())]
        .map(|(name, pem)| scratch.put(name, &pem));
    let started = [(); 3].map(|()| Identity::from_pem(&ca, &leaf, &key).unwrap());
    assert_eq!(started[0].node(), started[0].clone().node());
    let mut ids: Vec<_> = started.iter().map(Identity::node).collect();
    ids.extend(started.iter().map(|identity| identity.another().unwrap().node()));
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 6, "{ids:?}");
}

#[test]
fn unusable_files_are_named() {
    let scratch = Scratch::new("files");
    let missing = scratch.0.join("missing.pem");
    let error = Identity::from_pem(&missing, &missing, &missing).unwrap_err().to_string();
    assert!(error.contains("cannot read") && error.contains("missing.pem"), "{error}");

    scratch.put("ca.pem", "nonsense");
    let error = Identity::load_or_create(&scratch.0).unwrap_err().to_string();
    assert!(error.contains("ca.pem") && error.contains("CA"), "{error}");

    let file = scratch.put("file", "");
    let error = Identity::load_or_create(&file).unwrap_err().to_string();
    assert!(error.contains("file"), "{error}");
}
