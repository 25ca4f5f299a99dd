"""TLS of the manager's TCP listener: its certificate, self-signed if the configuration names none."""

from __future__ import annotations

import hashlib
import socket
import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path

from dispatcher.common import tls
from dispatcher.common.log import logger
from dispatcher.config.load import ManagerConfig
from dispatcher.manager.files.manager_dirs import write_atomically

CERTIFICATE = "manager.crt"
KEY = "manager.key"
VALID_DAYS = 3650

_log = logger("manager.tls")


def server_context(config: ManagerConfig, secrets_dir: Path) -> tuple[ssl.SSLContext, str]:
    """Return the context for listening, and the certificate's SHA-256 fingerprint in hexadecimal.

    Without `tls_cert` a self-signed certificate is made once and kept in `secrets_dir`.

    :raises ConfigError: key, certificate or `client_ca` cannot be used.
    """
    certificate = config.tls_cert or secrets_dir / CERTIFICATE
    key = config.tls_key or secrets_dir / KEY
    if config.tls_cert is None and not (certificate.exists() and key.exists()):
        make_certificate(certificate, key, [socket.gethostname(), "localhost"])
    context = tls.server_context(certificate, key, "manager", client_ca=config.client_ca)
    return context, fingerprint(certificate)


def fingerprint(certificate: Path) -> str:
    """Return the SHA-256 of the first certificate of a PEM file, in hexadecimal."""
    text = certificate.read_text(encoding="ascii")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    first = text[text.index(begin) : text.index(end) + len(end)]
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first)).hexdigest()


def make_certificate(certificate: Path, key: Path, hosts: list[str]) -> None:
    """Make a self-signed certificate and its key; only the own user can read the key."""
    # Imported here: it is slow, and needed once.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dispatcher manager")])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(host) for host in dict.fromkeys(hosts)]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(key, secret, 0o600)
    write_atomically(certificate, made.public_bytes(serialization.Encoding.PEM), 0o644)
    _log.info("made a self-signed certificate", path=str(certificate), hosts=hosts)
