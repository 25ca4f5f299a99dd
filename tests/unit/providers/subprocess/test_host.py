"""What the provider `subprocess` finds out about the host."""

import os

import pytest
from dispatcher_subprocess import explain, host, sandbox

from dispatcher.plugin import Deadline, Unavailable
from dispatcher_subprocess.options import AppOptions, Options


@pytest.mark.parametrize(
    ("setting", "value", "euid", "fix"),
    [
        ("kernel/apparmor_restrict_unprivileged_userns", "1", 1000, "profile of AppArmor"),
        ("kernel/apparmor_restrict_unprivileged_userns", "0", 1000, "allow bubblewrap to make namespaces"),
        ("kernel/unprivileged_userns_clone", "0", 1000, "setting kernel.unprivileged_userns_clone, which is 0"),
        ("user/max_user_namespaces", "0", 1000, "setting user.max_user_namespaces, which is 0"),
        ("user/max_user_namespaces", "0", 0, "allow bubblewrap to make namespaces"),
    ],
)
def test_a_setting_that_forbids_namespaces_is_named_to_an_ordinary_user(
    monkeypatch, tmp_path, setting, value, euid, fix
):
    path = tmp_path / setting
    path.parent.mkdir()
    path.write_text(f"{value}\n")
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    assert fix in host.namespaces_fix(tmp_path)


@pytest.mark.parametrize(
    ("bubblewrap", "program", "reason", "fix"),
    [
        ("never", "/usr/bin/true", 'is "never"', "remove providers.subprocess.bubblewrap"),
        ("auto", "", "not installed", "install bubblewrap"),
        ("auto", "/usr/bin/false", "false: ended with 1", "allow bubblewrap to make namespaces"),
    ],
)
def test_the_missing_sandbox_is_explained_with_its_remedy(monkeypatch, bubblewrap, program, reason, fix):
    monkeypatch.setattr(host, "find_program", lambda name: program if name == "bwrap" else "")
    monkeypatch.setattr(host, "namespaces_fix", lambda: "allow bubblewrap to make namespaces")
    found = host.examine(Options(bubblewrap=bubblewrap, cgroups="never"), "i", Deadline(10))
    assert not found.sandboxed
    assert reason in found.reason
    assert found.fix == fix


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sleep 9", "takes too long"),
        (
            "echo 'bwrap: Creating new namespace failed: Resource temporarily unavailable' >&2; exit 1",
            "unavailable",
        ),
        ("echo 'bwrap: Cannot allocate memory' >&2; exit 1", "allocate memory"),
        ("kill -9 $$", "ended with -9"),
    ],
)
def test_no_agent_starts_without_a_sandbox_for_a_shortage(monkeypatch, tmp_path, code, reason):
    """Any user of the host can use up processes or time while the manager starts."""
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(f"#!/bin/sh\n{code}\n")
    bwrap.chmod(0o755)
    monkeypatch.setattr(host, "find_program", lambda name: str(bwrap) if name == "bwrap" else "")
    options = Options(cgroups="never")
    found = host.examine(options, "i", Deadline(0.5))
    assert not found.sandboxed
    with pytest.raises(Unavailable, match="could not be tried") as refused:
        host.verify(found, options)
    assert reason in refused.value.why
    assert "No agent can start" in explain.findings(found, None)[0].what
    bwrap.write_text("#!/bin/sh\n")
    assert host.examine(options, "i", Deadline(10)).sandboxed


@pytest.mark.parametrize("known", [True, False])
def test_pasta_is_asked_for_the_loopback_interface_where_it_knows_the_option(monkeypatch, tmp_path, known):
    """Since October 2024 it connects to an address that an app on 127.0.0.1 does not listen on."""
    pasta = tmp_path / "pasta"
    pasta.write_text(f'#!/bin/sh\n[ "$1" = {host.LOOPBACK if known else "--other"} ]\n')
    pasta.chmod(0o755)
    monkeypatch.setattr(host, "find_program", lambda name: str(pasta) if name == "pasta" else "")
    assert host.examine(Options(cgroups="never"), "i", Deadline(10)).pasta_loopback is known


@pytest.mark.parametrize("known", [True, False])
def test_an_old_bubblewrap_makes_sandboxes_whose_temporary_files_have_no_size(monkeypatch, tmp_path, known):
    """Version 0.6.1 of Ubuntu 22.04 knows no --size."""
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(f'#!/bin/sh\nfor one; do [ "$one" != --size ] || {str(known).lower()} || exit 1; done\n')
    bwrap.chmod(0o755)
    monkeypatch.setattr(host, "find_program", lambda name: str(bwrap) if name == "bwrap" else "")
    found = host.examine(Options(cgroups="never"), "i", Deadline(10))
    assert found.sandboxed
    assert found.sizes is known
    told = [one.what for one in explain.findings(found, None) if "older than 0.7" in one.what]
    assert bool(told) is not known
    options = AppOptions(command=["app"])
    seen = sandbox.view(options, [], [tmp_path], own_uid=True, own_resolver=False, sizes=found.sizes)
    assert ("--size" in seen.words) is known
