"""libvirt: translation of errors."""

import pytest

libvirt = pytest.importorskip("libvirt")

from dispatcher.plugin.errors import Conflict, NotFound, ProviderError, Unavailable
from dispatcher_libvirt import errors


def error_of(code, domain=libvirt.VIR_FROM_QEMU, text="words of libvirt"):
    error = libvirt.libvirtError("x")
    error.err = (code, domain, text, 2, None, None, None, 0, 0)
    return error


@pytest.mark.parametrize(
    ("error", "wanted", "words"),
    [
        (error_of(libvirt.VIR_ERR_AUTH_FAILED), ProviderError, "group libvirt"),
        (error_of(libvirt.VIR_ERR_NO_CONNECT), Unavailable, "start libvirtd"),
        (error_of(libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC), Unavailable, "start libvirtd"),
        (error_of(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC), Unavailable, "start libvirtd"),
        (error_of(libvirt.VIR_ERR_NO_DOMAIN), NotFound, "start the agent again"),
        (error_of(libvirt.VIR_ERR_OPERATION_TIMEOUT), Unavailable, "try again"),
        (error_of(libvirt.VIR_ERR_NO_NETWORK), ProviderError, "net-list"),
        (
            error_of(libvirt.VIR_ERR_INTERNAL_ERROR, text="write: No space left on device"),
            ProviderError,
            "disk is full",
        ),
        (error_of(libvirt.VIR_ERR_INTERNAL_ERROR, text="Permission denied"), ProviderError, "may not use a file"),
        (error_of(libvirt.VIR_ERR_OPERATION_INVALID), Conflict, "check the agent"),
        (error_of(libvirt.VIR_ERR_XML_INVALID_SCHEMA), ProviderError, "does not accept"),
        (
            error_of(libvirt.VIR_ERR_INTERNAL_ERROR, text="Cannot allocate memory"),
            ProviderError,
            "too little memory",
        ),
        (error_of(libvirt.VIR_ERR_INTERNAL_ERROR), ProviderError, "libvirt failed"),
    ],
)
def test_every_error_is_translated_with_a_remedy(error, wanted, words):
    made = errors.translate(error, "qemu:///system", "starting x")
    assert type(made) is wanted
    assert words in str(made)
    assert made.fix
    assert "words" in made.why or made.why


def test_long_messages_are_cut():
    assert len(errors.message(error_of(libvirt.VIR_ERR_INTERNAL_ERROR, text="x\n" * 5000))) <= 400
