"""One policy for servers and one for clients; errors name the key or file at fault."""

import ssl

import pytest
from cryptography.hazmat.primitives import serialization

from dispatcher.common.tls import client_context, server_context
from dispatcher.manager.rest.certificate import make_certificate
from dispatcher.plugin.errors import BadRequest, ConfigError


@pytest.fixture
def pair(tmp_path):
    cert, key = tmp_path / "c.pem", tmp_path / "k.pem"
    make_certificate(cert, key, ["localhost"])
    return cert, key


def test_servers_offer_forward_secrecy_and_http_1_1_alone(pair):
    context = server_context(*pair, "proxy")
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    old = [cipher["name"] for cipher in context.get_ciphers() if cipher["protocol"] == "TLSv1.2"]
    assert old
    assert all(name.startswith("ECDHE-") for name in old)
    assert context.verify_mode is ssl.CERT_NONE


def test_a_servers_client_certificates_are_optional(pair):
    assert server_context(*pair, "manager", client_ca=pair[0]).verify_mode is ssl.CERT_OPTIONAL


def test_what_is_wrong_with_a_servers_files_is_named(pair, tmp_path):
    cert, key = pair
    with pytest.raises(ConfigError, match="proxy.tls_key: cannot read"):
        server_context(cert, tmp_path / "none", "proxy")
    with pytest.raises(ConfigError, match="manager.tls_cert and manager.tls_key cannot be used"):
        server_context(key, cert, "manager")
    with pytest.raises(ConfigError, match="manager.client_ca: cannot use"):
        server_context(cert, key, "manager", client_ca=key)


@pytest.mark.parametrize(
    "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL], ids=["new", "old"]
)
def test_a_key_with_a_passphrase_is_named_and_nobody_is_asked(pair, form):
    cert, key = pair
    plain = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(plain.private_bytes(serialization.Encoding.PEM, form, locked))
    with pytest.raises(ConfigError, match=f"proxy.tls_key.*passphrase.*openssl pkey -in {key}"):
        server_context(cert, key, "proxy")


def test_clients_verify_unless_told_otherwise(pair):
    context = client_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert client_context(verify=False).verify_mode is ssl.CERT_NONE
    assert client_context(ca_file=pair[0]).cert_store_stats()["x509"] == 1


@pytest.mark.parametrize("option", ["ca_file", "cert_file"])
def test_a_clients_file_that_cannot_be_used_is_named(tmp_path, option):
    with pytest.raises(BadRequest, match="Cannot use the certificate .*none"):
        client_context(**{option: tmp_path / "none"})
