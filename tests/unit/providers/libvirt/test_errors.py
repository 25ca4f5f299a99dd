"""libvirt: translation of errors."""

import errno
import os

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


@pytest.mark.parametrize(
    ("number", "words", "fix"),
    [
        (errno.ENOSPC, "The disk is full", "free some space"),
        (errno.EDQUOT, "The disk is full", "free some space"),
        (errno.EFBIG, "The host refused", "takes no file of that size"),
        (errno.EPERM, "The host refused", "immutable"),
        (errno.EROFS, "The host refused", "read-only"),
        (errno.EIO, "The host refused", "its file system"),
    ],
)
def test_the_disk_is_full_only_where_the_error_says_so(tmp_path, number, words, fix):
    with pytest.raises(ProviderError, match=words) as caught, errors.disk_errors("making a disk", tmp_path):
        raise OSError(number, os.strerror(number))
    assert ("disk is full" in str(caught.value)) is (number in {errno.ENOSPC, errno.EDQUOT})
    assert fix in caught.value.fix
