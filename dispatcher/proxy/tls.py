"""The proxy's own TLS.  Reads two files.

The key is read once before privileges are dropped, and again on a reload, then as the proxy's user: for a
reload to work the proxy's group must be able to read it.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from dispatcher.plugin.errors import ConfigError


def context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Return the server's context: TLS 1.2 and later, HTTP/1.1 by ALPN; None without a certificate.

    :raises ConfigError: a file cannot be read, or the two do not belong together.
    """
    if cert is None or key is None:
        return None
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_RENEGOTIATION
    made.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # for TLS 1.2; those of 1.3 are all good
    made.set_alpn_protocols(["http/1.1"])
    for path, name in ((cert, "proxy.tls_cert"), (key, "proxy.tls_key")):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{name}: cannot read {path}",
                why=error.strerror or str(error),
                fix="let the proxy's user or group read it",
            ) from error
    try:
        made.load_cert_chain(cert, key)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            "proxy.tls_cert and proxy.tls_key cannot be used",
            why=f"{cert} and {key}: {error}",
            fix="both are PEM; the certificate comes first, then its chain; the key has no passphrase",
        ) from error
    return made
