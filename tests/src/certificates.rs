//! Certificates that are made up for a test, in the files in which a monitor looks for them. Compiled
//! into the monitor's unit tests as well.

use std::path::Path;

use graviola::signing::eddsa::Ed25519SigningKey;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, PKCS_ED25519, PublicKeyData, SerialNumber, SignatureAlgorithm, SigningKey,
    date_time_ymd,
};

/// A CA.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, Key>,
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A source.
    Client,
    /// A destination.
    Server,
}

/// When a certificate is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// Whenever a test runs.
    Now,
    /// No more.
    Over,
}

impl Authority {
    /// A new one, with a key of its own.
    pub fn new() -> Self {
        let mut params = params("a CA for tests", Vec::new(), Validity::Now);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = Key::new();
        let certificate = params.self_signed(&key).expect("a CA's certificate").pem();
        Authority {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// Lets whoever has `dir` trust this.
    pub fn trust(&self, dir: &Path) {
        write(dir, "ca-cert.pem", &self.certificate);
    }

    /// Puts a certificate for `names`, which may be addresses, and its key into `dir`.
    pub fn issue(&self, dir: &Path, purpose: Purpose, names: &[&str], validity: Validity) {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = params("a monitor", names, validity);
        let (file, usage) = match purpose {
            Purpose::Client => ("client", ExtendedKeyUsagePurpose::ClientAuth),
            Purpose::Server => ("server", ExtendedKeyUsagePurpose::ServerAuth),
        };
        params.extended_key_usages = vec![usage];
        let key = Key::new();
        let signed = params.signed_by(&key, &self.issuer);
        let certificate = signed.expect("a certificate");
        write(dir, &format!("{file}-cert.pem"), &certificate.pem());
        write(dir, &format!("{file}-key.pem"), &key.pem());
    }
}

impl Default for Authority {
    fn default() -> Self {
        Authority::new()
    }
}

fn params(name: &str, names: Vec<String>, validity: Validity) -> CertificateParams {
    let mut params = CertificateParams::new(names).expect("names of hosts");
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.serial_number = Some(SerialNumber::from(1));
    params.key_identifier_method = KeyIdMethod::PreSpecified(name.as_bytes().to_vec());
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = match validity {
        Validity::Now => date_time_ymd(2120, 1, 1),
        Validity::Over => date_time_ymd(2021, 1, 1),
    };
    params
}

fn write(dir: &Path, name: &str, contents: &str) {
    std::fs::write(dir.join(name), contents).expect("a folder that can be written to");
}

/// A key of a certificate.
struct Key {
    private: Ed25519SigningKey,
    public: [u8; 32],
}

impl Key {
    fn new() -> Self {
        let private = Ed25519SigningKey::generate().expect("random numbers");
        let public = private.public_key().as_bytes();
        Key { private, public }
    }

    fn pem(&self) -> String {
        let mut der = [0; 128];
        let der = self.private.to_pkcs8_der(&mut der).expect("a short key");
        pem::encode(&pem::Pem::new("PRIVATE KEY", der))
    }
}

impl PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

impl SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(self.private.sign(message).to_vec())
    }
}
