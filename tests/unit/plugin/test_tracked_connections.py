"""Rules of nftables are tried before they are relied upon."""

import stat

import pytest

from dispatcher.plugin import Deadline, nft_fault, tracked_connections


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tracked_connections, "_SEARCH", str(tmp_path))
    assert nft_fault("", Deadline(5)) == ("unshare is not installed", "install util-linux")
    program(tmp_path / "unshare", "")
    assert nft_fault("", Deadline(5)) == ("nft is not installed", "install nftables")


@pytest.mark.parametrize(
    "code, why",
    [
        ("exit 0", None),
        (
            "echo 'Error: Could not process rule: No such file' >&2; echo more >&2; exit 1",
            "Error: Could not process",
        ),
        ("exit 3", "nft ended with 3"),
        ("exec sleep 20", "timed out"),
    ],
)
def test_a_kernel_that_refuses_rules_is_reported_in_its_words(monkeypatch, tmp_path, code, why):
    program(tmp_path / "unshare", code)
    program(tmp_path / "nft", "")
    monkeypatch.setattr(tracked_connections, "_SEARCH", str(tmp_path))
    found = nft_fault("table inet t {}", Deadline(0.5))
    if why is None:
        assert found is None
    else:
        assert why in found[0] and "\n" not in found[0]
        assert "kernel modules" in found[1]


def program(path, code):
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(stat.S_IRWXU)
