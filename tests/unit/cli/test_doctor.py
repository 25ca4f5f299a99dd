"""`doctor`: each thing that can be wrong with a machine or an installation has its sentence and its remedy."""

import datetime
import errno
import grp
import os
import pwd
import resource
import shutil
import socket
import time
from types import SimpleNamespace

import pytest

from dispatcher.config.load import load, parse
from dispatcher.cli.checks import installation
from dispatcher.cli.checks import machine
from dispatcher.cli.checks import neighbours
from dispatcher.cli import main
from dispatcher.plugin.errors import ManagerUnreachable, Unavailable
from dispatcher.plugin.model import Level
from dispatcher.config.layout import Paths


def only(findings):
    found = list(findings)
    assert len(found) == 1, found
    return found[0]


def levels(findings):
    return [finding.level.value for finding in findings]


def test_an_old_python_is_told(monkeypatch):
    assert only(machine.python()).level is Level.OK
    monkeypatch.setattr("sys.version_info", (3, 9, 1))
    assert only(machine.python()).level is Level.ERROR


def test_a_clock_before_this_release_is_wrong(monkeypatch):
    assert only(machine.clock()).level is Level.OK
    monkeypatch.setattr(time, "time", lambda: 0.0)
    found = only(machine.clock())
    assert found.level is Level.ERROR
    assert "timedatectl" in found.fix


@pytest.mark.parametrize(("hard", "level"), [(1024, "warning"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_open_files(monkeypatch, hard, level):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    assert only(machine.open_files()).level.value == level


def test_bubblewrap_absent_broken_and_well(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _, **__: None)
    found = only(machine.bubblewrap())
    assert (found.level, found.fix) == (Level.WARNING, "apt-get install bubblewrap")
    program = tmp_path / "bwrap"
    monkeypatch.setattr(shutil, "which", lambda _, **__: str(program))
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    found = only(machine.bubblewrap())
    assert found.level is Level.ERROR
    assert "No permissions to create new namespace" in found.what
    program.write_text("#!/bin/sh\nexit 0\n")
    assert only(machine.bubblewrap()).level is Level.OK


@pytest.mark.parametrize(("euid", "level"), [(0, "info"), (1000, "warning")])
def test_closed_user_namespaces_matter_to_an_ordinary_user(monkeypatch, euid, level):
    monkeypatch.setattr(machine, "_userns_fix", lambda: "sysctl user.max_user_namespaces is 0")
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    assert only(machine.user_namespaces()).level.value == level


def test_network_helpers(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert only(machine.private_network()).level is Level.INFO
    monkeypatch.setattr(shutil, "which", lambda name, **_: name if name == "pasta" else None)
    assert "pasta" in only(machine.private_network()).what


@pytest.mark.parametrize(("wanted", "level"), [(True, "error"), (False, "info")])
def test_an_engine_that_does_not_answer_is_loud_only_where_it_is_used(monkeypatch, short_tmp, wanted, level):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{short_tmp}/none.sock")
    found = list(machine.docker(wanted=wanted))[-1]
    assert found.level.value == level
    assert "no Docker engine answers" in found.what


def test_an_engine_that_answers(monkeypatch, short_tmp):
    import threading

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_tmp / "d.sock"))
        sock.listen()

        def serve():
            peer, _ = sock.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.0 200 OK\r\n\r\nOK")

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{short_tmp}/d.sock")
        assert list(machine.docker(wanted=True))[-1].level is Level.OK
        thread.join()


def test_a_manager_that_does_not_answer_is_unwell_or_well():
    def client(answer):
        def healthz():
            if isinstance(answer, Exception):
                raise answer
            return answer

        return SimpleNamespace(healthz=healthz)

    serving, found = installation.manager(client(ManagerUnreachable("x", why="no socket")), "unix:///x")
    assert (serving, levels(found)) == (False, ["info"])
    serving, found = installation.manager(client(Unavailable("database locked")), "unix:///x")
    assert (serving, levels(found)) == (True, ["error"])
    assert levels(installation.manager(client({"status": "degraded"}), "u")[1]) == ["warning"]
    assert levels(installation.manager(client({"status": "ok"}), "u")[1]) == ["ok"]


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o644, "ok"), (0o664, "error"), (0o606, "error")])
def test_a_configuration_that_others_may_write_is_an_error(tmp_path, mode, level):
    path = tmp_path / "d.toml"
    path.touch()
    path.chmod(mode)
    assert only(installation.config_file(path)).level.value == level


def test_no_configuration_means_the_demo(tmp_path):
    found = only(installation.config_file(tmp_path / "none"))
    assert "the demo app" in found.what


def paths(tmp_path):
    return Paths(run_dir=tmp_path / "run", state_dir=tmp_path / "state")


def test_directories_that_are_not_there_yet_will_be_made(tmp_path):
    assert levels(installation.directories(paths(tmp_path)))[:2] == ["ok", "ok"]


@pytest.mark.parametrize(("mode", "level"), [(0o700, "ok"), (0o711, "ok"), (0o777, "error"), (0o770, "error")])
def test_directories_that_others_may_write_are_errors(tmp_path, mode, level):
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)
    assert levels(installation.directories(paths(tmp_path)))[0] == level


def test_a_file_in_the_place_of_a_directory(tmp_path):
    (tmp_path / "state").touch()
    assert "is no directory" in next(iter(installation.directories(paths(tmp_path)))).what


@pytest.mark.parametrize(("free", "level"), [(10**7, "error"), (10**9, "warning"), (10**11, "ok")])
def test_disk(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert only(installation.disk(tmp_path / "not/yet")).level.value == level


def test_ports_free_taken_and_ours(free_port):
    found = parse({"proxy": {"listen": [f"127.0.0.1:{free_port}", "unix:/x", "systemd"]}})
    assert levels(installation.ports(found, serving=False)) == ["ok"]
    with socket.create_server(("127.0.0.1", free_port)):
        assert levels(installation.ports(found, serving=False)) == ["error"]
        assert levels(installation.ports(found, serving=True)) == ["ok"]


@pytest.mark.parametrize(
    ("number", "word"), [(errno.EACCES, "may not listen"), (errno.EADDRNOTAVAIL, "cannot listen")]
)
def test_ports_that_cannot_be_had(number, word):
    problem = OSError(number, os.strerror(number))
    assert word in only(installation._bind_problem("x:1", problem, False)).what


@pytest.mark.parametrize(
    ("proxy", "levels_"),
    [
        ({"listen": ["0.0.0.0:80"]}, ["warning"]),
        ({"listen": ["192.0.2.1:80"]}, ["warning"]),
        ({"listen": ["127.0.0.1:80", "[::1]:80", "localhost:80", "unix:/x"]}, []),
        ({"listen": ["0.0.0.0:80"], "tls_cert": "/c", "tls_key": "/k"}, []),
        ({"listen": ["0.0.0.0:80"], "trusted_proxies": ["192.0.2.0/24"]}, []),
    ],
)
def test_passwords_in_the_clear_are_warned_of(proxy, levels_):
    assert levels(installation.encryption(parse({"proxy": proxy}))) == levels_


def make_certificate(path, days):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=400))
        .not_valid_after(now + datetime.timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(("days", "level"), [(-1, "error"), (10, "warning"), (90, "ok")])
def test_certificates_end(tmp_path, days, level):
    make_certificate(tmp_path / "c.pem", days)
    found = parse({"proxy": {"tls_cert": str(tmp_path / "c.pem"), "tls_key": "/k"}})
    assert levels(installation.certificates(found)) == [level]


def test_certificates_that_are_none(tmp_path):
    (tmp_path / "c.pem").write_text("nonsense")
    assert "is no PEM certificate" in only(installation.certificate("proxy.tls_cert", tmp_path / "c.pem")).what
    assert "No such file" in only(installation.certificate("proxy.tls_cert", tmp_path / "none")).what


def test_accounts(monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "Path", lambda _: tmp_path / "subuid")
    (tmp_path / "subuid").write_text("carol:5500:65536\nbroken line\n")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwall", lambda: [SimpleNamespace(pw_name="dave", pw_uid=5100)])

    def missing(name):
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", missing)
    monkeypatch.setattr(grp, "getgrnam", missing)
    said = [finding.what for finding in installation.accounts(parse({"manager": {"uid_range": [5000, 5999]}}))]
    assert said == [
        "there is no user dispatcher-proxy: the proxy gets the first id of manager.uid_range",
        "there is no group dispatcher-admin: only root may administer",
        "manager.uid_range holds user ids of dave",
        "manager.uid_range overlaps the subordinate ids of carol in /etc/subuid",
    ]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "not root" in only(installation.accounts(parse({}))).what


def test_bubblewrap_of_a_user_s_own_directory_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    before = list(machine.bubblewrap())
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    assert list(machine.bubblewrap()) == before


def test_controllers_of_version_1_limit_as_well(tmp_path):
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified/cgroup.controllers").write_text("\n")
    assert "has no controller cpu, memory, pids" in only(machine.cgroups(tmp_path)).what
    for name in ("memory", "cpu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    assert "has no controller pids:" in only(machine.cgroups(tmp_path)).what
    (tmp_path / "pids").mkdir()
    (tmp_path / "pids/cgroup.procs").touch()
    assert only(machine.cgroups(tmp_path)).level is Level.OK


def test_control_groups_of_version_2(tmp_path):
    assert only(machine.cgroups(tmp_path)).fix == "mount -t cgroup2"
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert only(machine.cgroups(tmp_path)).what == "cgroup v2 with memory, cpu and pids"


def test_every_remedy_is_there():
    """Whatever is not good says what to do."""
    for finding in [
        *machine.docker(wanted=True),
        *machine.libvirt(wanted=True),
        *machine.cgroups(),
        *machine.private_network(),
        *installation.accounts(parse({})),
    ]:
        assert finding.level is Level.OK or finding.fix


def test_a_wrong_configuration_does_not_stop_the_doctor(tmp_path, capsys):
    (tmp_path / "d.toml").write_text("[manager]\nthreads = 0\n")
    code = main(["--config", str(tmp_path / "d.toml"), "doctor"])
    out = capsys.readouterr().out
    assert code == 1
    assert "ERROR" in out
    assert "manager.threads: found 0" in out
    assert "Python 3" in out


@pytest.fixture
def processes(tmp_path):
    """A made-up /proc in which managers run; returns what adds one, with a configuration of its own."""

    def add(pid, name, uid_range, words=("/usr/bin/python3", "/usr/bin/dispatcher", "--config", "{}", "manager")):
        directory = tmp_path / "proc" / str(pid)
        directory.mkdir(parents=True)
        (tmp_path / f"{name}.toml").write_text(
            f'[manager]\nrun_dir = "/run/{name}"\nuid_range = [{uid_range[0]}, {uid_range[1]}]\n'
        )
        line = "\0".join(word.format(f"{name}.toml") for word in words) + "\0"
        (directory / "cmdline").write_text(line)
        (directory / "environ").write_text(f"HOME=/root\0DISPATCHER_CONFIG={tmp_path}/{name}.toml\0")
        (directory / "cwd").symlink_to(tmp_path)
        return load(tmp_path / f"{name}.toml")

    return add


def test_another_installation_with_the_same_user_ids_is_told(processes, tmp_path):
    own = processes(10, "own", (200000, 265535))
    processes(11, "far", (300000, 365535))
    assert not list(neighbours.user_ids(own, tmp_path / "proc"))
    processes(12, "near", (260000, 270000))
    processes(13, "near2", (200000, 265535), ("python", "-m", "dispatcher", "manager"))  # by its environment
    processes(14, "ended", (200000, 265535))
    (tmp_path / "ended.toml").write_text("[")
    processes(15, "no-manager", (200000, 265535), ("vi", "dispatcher", "--config", "{}"))
    near, again = neighbours.user_ids(own, tmp_path / "proc")
    assert near.level is Level.WARNING
    assert f"({tmp_path}/near.toml)" in near.what
    assert near.what.endswith("260000 to 265535")
    assert "near2.toml" in again.what
    assert "uid_range" in near.fix
