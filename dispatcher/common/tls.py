"""TLS contexts: one policy for everything that listens, one for everything that connects.

TLS 1.2 is the oldest version; with it only ciphers with forward secrecy and authenticated encryption are offered.
The daemons reload certificates: `manager/app.py` and `proxy/daemon.py`.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from dispatcher.plugin.errors import BadRequest, ConfigError


def server_context(cert: Path, key: Path, table: str, *, client_ca: Path | None = None) -> ssl.SSLContext:
    """Return the context of a server that speaks HTTP/1.1.

    :param table: of the configuration: errors name its keys `tls_cert`, `tls_key` and `client_ca`.
    :param client_ca: signs the certificates that clients may present, and need not.
    :raises ConfigError: a file cannot be read, or the certificate and key do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2; all those of TLS 1.3 are good
    context.set_alpn_protocols(["http/1.1"])
    for path, name in ((cert, "tls_cert"), (key, "tls_key")):
        try:
            path.read_bytes()
        except OSError as error:
            fix = f"let the {table}'s user or group read it"
            if path.is_relative_to("/root") or path.is_relative_to("/home"):
                fix += "; the installed service cannot read home directories"
            raise ConfigError(
                f"{table}.{name}: cannot read {path}", why=error.strerror or str(error), fix=fix
            ) from error

    def passphrase() -> str:  # without it OpenSSL asks at the terminal
        raise ConfigError(
            f"{table}.tls_key cannot be used",
            why=f"{key} has a passphrase, which no daemon can type",
            fix=f"write a key without one: openssl pkey -in {key} -out NEW-KEY",
        )

    try:
        context.load_cert_chain(cert, key, passphrase)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{table}.tls_cert and {table}.tls_key cannot be used",
            why=f"{cert} and {key}: {reason(error)}",
            fix="both are PEM; the certificate comes first, then its chain",
        ) from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{table}.client_ca: cannot use {client_ca}", why=reason(error)) from error
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def client_context(
    *,
    verify: bool = True,
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
) -> ssl.SSLContext:
    """Return the context of a client.

    :param verify: False accepts any certificate; :param ca_file: trusted in place of the system's authorities.
    :param cert_file: the client's own certificate.
    :raises BadRequest: a certificate cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    name: str | Path | None = ca_file
    try:
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif ca_file:
            context.load_verify_locations(os.fspath(ca_file))
        else:
            context.load_default_certs()
        if name := cert_file:
            context.load_cert_chain(os.fspath(cert_file))
    except (OSError, ValueError) as error:
        raise BadRequest(f"Cannot use the certificate {name}", why=reason(error), fix="give a PEM file") from error
    return context


def reason(error: Exception) -> str:
    """Return why a file of keys or certificates cannot be used, in the words of OpenSSL or the system."""
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
