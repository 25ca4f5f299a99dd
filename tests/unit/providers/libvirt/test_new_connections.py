"""Rules for machines' new connections, where they cannot be set; the rest is tried with real machines."""

import subprocess

import pytest

pytest.importorskip("libvirt")

from dispatcher.plugin import Deadline, ProviderError
from dispatcher_libvirt import new_connections
from dispatcher_libvirt.new_connections import NewConnections


@pytest.mark.parametrize(
    "local, privileged, why", [(False, True, "another host"), (True, False, "not root"), (True, True, "no nft")]
)
def test_where_rules_cannot_be_set_the_reason_is_given_and_nothing_is_run(monkeypatch, local, privileged, why):
    monkeypatch.setattr(new_connections, "nft_fault", lambda rules, deadline: ("no nft", "install it"))
    monkeypatch.setattr(subprocess, "run", None)
    rates = NewConnections("0123abcd", local=local, privileged=privileged)
    reason, fix = rates.fault(Deadline(5))
    assert why in reason and fix
    rates.add(["192.0.2.2"], Deadline(5))
    rates.remove(["192.0.2.2"], Deadline(5))


def test_the_host_is_examined_again_when_asked(monkeypatch):
    answers = [("no nft", "install it"), None]
    monkeypatch.setattr(new_connections, "nft_fault", lambda rules, deadline: answers.pop(0))
    rates = NewConnections("0123abcd", local=True, privileged=True)
    assert rates.fault(Deadline(5)) == rates.fault(Deadline(5)) == ("no nft", "install it")
    assert rates.fault(Deadline(5), again=True) is None


def test_a_start_fails_where_nft_stops_to_work(monkeypatch):
    monkeypatch.setattr(new_connections, "nft_fault", lambda rules, deadline: None)
    monkeypatch.setattr(new_connections, "find_nft", lambda: "/bin/false")
    rates = NewConnections("0123abcd", local=True, privileged=True)
    with pytest.raises(ProviderError, match="cannot be bounded"):
        rates.add(["192.0.2.2"], Deadline(5))
    monkeypatch.setattr(new_connections, "find_nft", lambda: "")
    with pytest.raises(ProviderError, match="nft does not run"):
        rates.add(["192.0.2.2"], Deadline(5))
