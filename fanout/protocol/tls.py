"""TLS without a certificate authority: one self-signed certificate, known by its digest.

The scheduler makes its identity once and keeps it in its home. The join string carries the SHA-256
of the certificate; whoever dials accepts exactly that one. Names and dates in it mean nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path

from fanout.exceptions import AuthError, InvalidError

#: Certificate and key in one file, so that there is never one without the other.
FILE_NAME = "tls.pem"
#: The digest in the join string is what ends a certificate's life, not a date.
VALIDITY_DAYS = 36500


class CertificateError(AuthError):
    """Who answers has another certificate than the join string says: it is not the scheduler."""


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """A certificate with its key, as a file, and the SHA-256 of the certificate."""

    path: Path
    fingerprint: bytes

    @classmethod
    def load_or_create(cls, folder: Path | str) -> TlsIdentity:
        """The identity that `folder` holds; made there, readable only for its owner, if there is
        none. Two processes doing this at once get the same one.

        Raises:
            InvalidError: the file is there and is not an identity.
            OSError: the folder cannot be read or written.
        """
        path = Path(folder) / FILE_NAME
        if not path.exists():
            _write_once(path, _generate())
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> TlsIdentity:
        """The identity in a PEM file.

        Raises:
            InvalidError: it does not hold a certificate and its key.
        """
        try:
            text = path.read_text()
            begin = text.index(ssl.PEM_HEADER)
            end = text.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)
            certificate = ssl.PEM_cert_to_DER_cert(text[begin:end])
            identity = cls(path, hashlib.sha256(certificate).digest())
            identity.server_context()
        except (ValueError, ssl.SSLError) as error:
            raise InvalidError(
                f"{path} does not hold a certificate and its key ({error}); delete it to get a new "
                f"one, after which workers and clients need new join strings"
            ) from error
        return identity

    def server_context(self) -> ssl.SSLContext:
        """For the listening side."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.path)
        return context


def client_context() -> ssl.SSLContext:
    """For the dialling side. It accepts any certificate: whoever uses it must compare
    `peer_fingerprint` before a byte is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def peer_fingerprint(transport: asyncio.Transport) -> bytes:
    """SHA-256 of the certificate that the other side of a TLS connection showed."""
    certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return hashlib.sha256(certificate or b"").digest()


def _generate() -> bytes:
    # Imported here, as it takes tens of milliseconds and is needed once in a scheduler's life.
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fanout scheduler")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=VALIDITY_DAYS))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def _write_once(path: Path, content: bytes) -> None:
    """Make the file whole or not at all; one that is there already stays."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
    finally:
        os.unlink(draft)
