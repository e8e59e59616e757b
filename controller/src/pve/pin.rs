//! TLS to a Proxmox node that is known by its certificate's fingerprint, as Proxmox itself knows others: no CA, no name, no
//! date counts, but this very certificate and the proof that the other side has its key.
//!
//! ureq's own TLS has no place for a verifier, so this stands before it in the chain of connectors; it passes over what is
//! already TLS.

use std::cell::RefCell;
use std::fmt;
use std::io::{Read as _, Write as _};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use sha2::{Digest as _, Sha256};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, Transport, TransportAdapter};

use crate::config::Fingerprint;

thread_local! {
    static REFUSED: RefCell<Option<Fingerprint>> = const { RefCell::new(None) };
}

/// The fingerprint of the certificate that was refused last on this thread, once.
pub(super) fn refused() -> Option<Fingerprint> {
    REFUSED.take()
}

/// Only these certificates; nothing: none is pinned, and this does nothing.
#[derive(Debug, Clone)]
pub(super) struct PinConnector(Option<Arc<ClientConfig>>);

impl PinConnector {
    /// # Errors
    /// rustls will not have the provider's versions: a bug of ours.
    pub(super) fn new(pins: &[Fingerprint], provider: &Arc<CryptoProvider>) -> Result<Self, String> {
        if pins.is_empty() {
            return Ok(Self(None));
        }
        let verifier = Arc::new(Pinned { pins: pins.to_vec(), provider: Arc::clone(provider) });
        let builder = ClientConfig::builder_with_provider(Arc::clone(provider)).with_safe_default_protocol_versions();
        let config = builder.map_err(|cause| cause.to_string())?.dangerous().with_custom_certificate_verifier(verifier);
        Ok(Self(Some(Arc::new(config.with_no_client_auth()))))
    }
}

#[derive(Debug)]
struct Pinned {
    pins: Vec<Fingerprint>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let seen = Fingerprint(Sha256::digest(leaf.as_ref()).into());
        if self.pins.contains(&seen) {
            return Ok(ServerCertVerified::assertion());
        }
        REFUSED.set(Some(seen));
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    // The certificate is public: whoever has no key for it must not pass.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl<In: Transport> Connector<In> for PinConnector {
    type Out = Either<In, PinTransport>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        let Some(transport) = chained else { return Ok(None) };
        let Some(config) = self.0.as_ref().filter(|_| details.needs_tls() && !transport.is_tls()) else {
            return Ok(Some(Either::A(transport)));
        };
        let host = details.uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host).map_err(|_| ureq::Error::Tls("the url's host is no name that TLS takes"))?;
        let mut conn = ClientConnection::new(Arc::clone(config), name).map_err(std::io::Error::other)?;
        let mut sock = TransportAdapter::new(transport.boxed(), Arc::clone(&details.current_time));
        sock.set_timeout(details.timeout);
        conn.complete_io(&mut sock)?;
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(Either::B(PinTransport { buffers, stream: StreamOwned { conn, sock } })))
    }
}

/// As ureq's own.
pub(super) struct PinTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl fmt::Debug for PinTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinTransport").finish_non_exhaustive()
    }
}

impl Transport for PinTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.stream.sock.set_timeout(timeout);
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        self.stream.write_all(output)?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.stream.sock.set_timeout(timeout);
        let amount = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.sock.get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}
