"""libvirt: the cloud-init disk of a guest."""

import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("libvirt")

import pycdlib

from dispatcher.plugin.errors import ConfigError, ProviderError
from dispatcher.plugin.model import Network
from dispatcher_libvirt.disks import cloud_init
from tests.unit.providers.libvirt.test_domain_xml import interface, spec

ODD = "a b\t'c' \"d\" $HOME `e` \\n {x} <&> #; -rf é漢\nsecond line"


def read(data):
    """Return the files of an ISO image, by Rock Ridge path."""
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(data))
    found = {}
    for directory, _, files in iso.walk(rr_path="/"):
        for name in files:
            path = f"{directory.rstrip('/')}/{name}"
            buffer = io.BytesIO()
            iso.get_file_from_iso_fp(buffer, rr_path=path)
            found[path.lstrip("/")] = buffer.getvalue()
    label = iso.pvd.volume_identifier.decode().strip()
    iso.close()
    return label, found


def test_the_files_of_the_cloud_init_disk():
    one = replace(spec(environment={"A": ODD}), secrets={"token": "s-1", "a.b_c-D": "l1\nl2\n"}, stdin=b"in\n")
    files = cloud_init.files(one, None)
    label, found = read(cloud_init.iso_image(files))
    assert label == "cidata"
    assert found == files
    assert found["dispatcher/secrets/token"] == b"s-1"
    assert found["dispatcher/secrets/a.b_c-D"] == b"l1\nl2\n"
    assert found["dispatcher/stdin"] == b"in\n"
    about = dict(line.split("=", 1) for line in found["dispatcher/agent"].decode().splitlines())
    assert about == {
        "agent": "alice", "user": "alice", "uid": "200123", "gid": "200124", "port": "8080", "data": "/data",
        "address": "10.0.2.15/24", "gateway": "10.0.2.2",
    }  # fmt: skip
    assert found["user-data"].startswith(b"#cloud-config")
    about = json.loads(found["meta-data"])
    assert about["instance-id"] == f"{one.backend_name}-{one.hash[:12]}"


def test_without_secrets_there_are_no_files_for_them(tmp_path):
    (tmp_path / "user").write_bytes(b"#cloud-config\nx: 1\n")
    files = cloud_init.files(spec(user_data=str(tmp_path / "user"), endpoint="vsock"), None)
    assert not [name for name in files if "secrets" in name or "stdin" in name]
    assert b"address" not in files["dispatcher/agent"]
    assert files["user-data"] == b"#cloud-config\nx: 1\n"


def test_on_a_libvirt_network_the_guest_is_told_its_address():
    files = cloud_init.files(spec(network=Network.PRIVATE), interface())
    about = dict(line.split("=", 1) for line in files["dispatcher/agent"].decode().splitlines())
    told = {"address": "192.0.2.7/24", "gateway": "192.0.2.1", "dns": "192.0.2.1"}
    assert about.items() >= told.items()
    assert json.loads(files["network-config"])["ethernets"]["eth0"] == {
        "match": {"macaddress": "52:54:c0:00:02:07"},
        "set-name": "eth0",
        "addresses": ["192.0.2.7/24"],
        "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}],
        "nameservers": {"addresses": ["192.0.2.1"]},
    }
    assert json.loads(files["meta-data"])["instance-id"].endswith("-192.0.2.7"), "another address configures anew"


def test_the_start_script_hands_on_every_value_as_it_is(tmp_path):
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nfor one; do printf "%s\\0" "$one"; done\nprintf "%s\\0" "$ODD" "$HOME" "$PORT"\n')
    show.chmod(0o755)
    one = spec(
        environment={"ODD": ODD, "PORT": "{port}", "EMPTY": ""},
        command=[str(show), ODD, "", "{port}", "{data}", "{other}"],
        port=9000,
    )
    script = tmp_path / "start.sh"
    script.write_text(cloud_init.start_script(one).replace("/data", str(tmp_path)))
    done = subprocess.run(["/bin/sh", script, "/unused"], capture_output=True, check=True, env={"PATH": "/bin"})
    words = done.stdout.decode().split("\0")[:-1]
    assert words == [ODD, "", "9000", str(tmp_path), "{other}", ODD, str(tmp_path), "9000"]


def test_the_app_finds_a_user_a_shell_and_room_for_temporary_files(tmp_path):
    def start(one, passwd):
        (tmp_path / "passwd").write_text(passwd)
        script = (
            cloud_init.start_script(one)
            .replace("/data", str(tmp_path))
            .replace("/etc/passwd", f"{tmp_path}/passwd")
        )
        (tmp_path / "start.sh").write_text(script)
        command = ["/bin/sh", tmp_path / "start.sh", "/usr/bin/env"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    (tmp_path / ".tmp").mkdir()
    (tmp_path / ".tmp" / "old").write_bytes(b"")
    found = start(spec(), "root:x:0:0::/root:/bin/bash\nalice:x:200123:200124::/data:/bin/zsh\n")
    assert (found["USER"], found["LOGNAME"], found["SHELL"]) == ("alice", "alice", "/bin/zsh")
    assert found["TMPDIR"] == str(tmp_path / ".tmp")
    assert list((tmp_path / ".tmp").iterdir()) == [], "what an earlier start left is removed"
    assert found["DISPATCHER_MEMORY_LIMIT"] == str(512 << 20)
    assert "DISPATCHER_PIDS_LIMIT" not in found, "a machine does not bound them"
    found = start(spec(environment={"SHELL": "/bin/fish", "TMPDIR": "/x"}), "")
    assert (found["USER"], found["SHELL"], found["TMPDIR"]) == ("app", "/bin/fish", "/x")


def test_without_a_command_the_images_own_runs(tmp_path):
    script = tmp_path / "start.sh"
    script.write_text(cloud_init.start_script(spec()).replace("/data", str(tmp_path)))
    done = subprocess.run(
        ["/bin/sh", script, "/bin/echo", "a  b"], capture_output=True, check=True, env={"PATH": "/bin"}
    )
    assert done.stdout == b"a  b\n"


@pytest.mark.parametrize(
    "environment",
    [{"1A": "x"}, {"A-B": "x"}, {"A": "x\0y"}, {"A": "x" * 70_000}],
    ids=["digit", "dash", "nul", "big"],
)
def test_invalid_environments_are_refused(environment):
    with pytest.raises(ConfigError, match="apps.vm"):
        cloud_init.start_script(spec(environment=environment))


def test_user_data_is_read_and_validated(tmp_path):
    path = tmp_path / "user-data"
    with pytest.raises(ConfigError, match="Cannot read"):
        cloud_init.read_user_data(path)
    path.write_text("just: yaml\n")
    with pytest.raises(ConfigError, match="begin it with #cloud-config"):
        cloud_init.read_user_data(path)
    path.write_text("#cloud-config\n" + "x" * (1 << 20))
    with pytest.raises(ConfigError, match="over 1 MiB"):
        cloud_init.read_user_data(path)
    path.write_text("#cloud-config\n")
    assert cloud_init.read_user_data(path) == b"#cloud-config\n"
    assert cloud_init.read_user_data(None) == b""


def test_cloud_init_disks_are_private_and_in_memory(tmp_path):
    target = tmp_path / "x.iso"
    cloud_init.write_image(target, b"one", None)
    cloud_init.write_image(target, b"two", None)
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"two", 0o400)
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(ProviderError, match="Cannot write the cloud-init disk"):
        cloud_init.write_image(tmp_path / "none" / "x.iso", b"", None)
    assert cloud_init.in_memory(Path("/dev/shm"))
    assert not cloud_init.in_memory(Path("/proc"))
    assert not cloud_init.in_memory(tmp_path / "none")


def test_a_foreign_directory_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(cloud_init, "in_memory", lambda path: path == tmp_path)
    made = cloud_init.memory_directory("0123abcd", tmp_path)
    assert (made, made.stat().st_mode & 0o777) == (tmp_path / "seeds", 0o711)
    assert cloud_init.memory_directory("0123abcd", tmp_path) == made
    made.chmod(0o777)
    other = cloud_init.memory_directory("0123abcd", tmp_path)
    assert other != made and other.parent == tmp_path and other.stat().st_mode & 0o777 == 0o711
    made.rmdir()
    made.symlink_to("/tmp")
    assert cloud_init.memory_directory("0123abcd", tmp_path) == other
    monkeypatch.setattr(cloud_init, "in_memory", lambda path: False)
    with pytest.raises(ProviderError, match="mount a tmpfs"):
        cloud_init.memory_directory("0123abcd", tmp_path)
