"""`doctor`: each thing that can be wrong with a machine or an installation has its sentence and its remedy."""

import contextlib
import datetime
import errno
import grp
import os
import pwd
import resource
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dispatcher.common.tls import server_context
from dispatcher.config import default_paths
from dispatcher.config.load import parse
from dispatcher.config.plugins import Plugins
from dispatcher.cli.doctor import installation
from dispatcher.cli.doctor import machine
from dispatcher.cli.doctor import providers
from dispatcher.cli.doctor.providers import plugins_in_use
from dispatcher.cli import main
from dispatcher.plugin.errors import ManagerUnreachable, Unavailable
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import Finding, Level
from dispatcher.config.layout import Paths
from dispatcher.manager.rest.certificate import make_certificate as self_signed
from tests.support.certificates import Authority
from tests.unit.config.test_plugins import FakeAuthenticator, FakeProvider, entry, plugin


def only(findings):
    found = list(findings)
    assert len(found) == 1, found
    return found[0]


def levels(findings):
    return [finding.level.value for finding in findings]


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
    _, found = installation.manager(client({"status": "ok", "configuration_changed": True}), "u")
    assert levels(found) == ["ok", "warning"]
    assert "dispatcher reload" in found[1].fix


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o644, "ok"), (0o664, "error"), (0o606, "error")])
def test_a_configuration_that_others_may_write_is_an_error(tmp_path, mode, level):
    path = tmp_path / "d.toml"
    path.touch()
    path.chmod(mode)
    assert only(installation.config_file(path)).level.value == level


def test_a_configuration_that_others_may_replace_is_an_error(tmp_path):
    path = tmp_path / "d.toml"
    path.touch(0o600)
    tmp_path.chmod(0o1777)
    assert levels(installation.config_file(path)) == ["ok"]
    tmp_path.chmod(0o777)
    assert f"{tmp_path} is writable for all users" in only(installation.config_file(path)).what


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


def test_a_file_or_a_link_in_the_place_of_a_directory(tmp_path):
    (tmp_path / "state").touch()
    assert "is not a directory" in next(iter(installation.directories(paths(tmp_path)))).what
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").unlink()
    (tmp_path / "state").symlink_to(tmp_path / "disk")
    found = next(iter(installation.directories(paths(tmp_path))))
    assert "is a symbolic link, which the manager does not follow" in found.what
    assert f"name {tmp_path}/disk in manager.state_dir" in found.fix


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
    ("number", "word"),
    [
        (errno.EACCES, "may not listen"),
        (errno.EADDRNOTAVAIL, "does not have the address"),
        (errno.EINVAL, "cannot listen"),
    ],
)
def test_ports_that_cannot_be_had(number, word):
    problem = OSError(number, os.strerror(number))
    assert word in only(installation._bind_problem("x:1", problem, False)).what


def test_the_remedy_for_a_low_port_is_one_for_the_reader(monkeypatch):
    refused = OSError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    remedy = only(installation._bind_problem("127.0.0.1:443", refused, False)).fix
    assert "net.ipv4.ip_unprivileged_port_start=443" in remedy
    assert "front proxy" in remedy
    assert "systemctl" not in remedy
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    assert "systemctl edit dispatcher-proxy" in only(installation._bind_problem("[::]:80", refused, False)).fix


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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an ordinary user's proxy reads what the user reads")
def test_a_key_that_the_proxys_user_cannot_read_is_a_fault_of_the_next_renewal(tmp_path):
    """As certbot leaves it: links to files below directories of root's own."""
    archive = tmp_path / "archive"
    archive.mkdir(mode=0o700)
    self_signed(archive / "cert1.pem", archive / "key1.pem", ["localhost"])
    for name in ("cert", "key"):
        (tmp_path / f"{name}.pem").symlink_to(f"archive/{name}1.pem")
    proxy = {"tls_cert": f"{tmp_path}/cert.pem", "tls_key": f"{tmp_path}/key.pem", "user": "nobody"}
    found = lambda: [fault.partition(":")[0] for fault in installation.renewal_faults(parse({"proxy": proxy}))]
    for path in tmp_path.parents:
        path.chmod(path.stat().st_mode | 0o111)
    tmp_path.chmod(0o755)
    assert found() == ["proxy.tls_cert", "proxy.tls_key"]
    archive.chmod(0o755)
    (archive / "cert1.pem").chmod(0o644)
    assert found() == ["proxy.tls_key"]
    os.chown(archive / "key1.pem", 0, pwd.getpwnam("nobody").pw_gid)
    (archive / "key1.pem").chmod(0o640)
    assert found() == []


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
    assert "is not a PEM certificate" in only(installation.certificate("proxy.tls_cert", tmp_path / "c.pem")).what
    assert "No such file" in only(installation.certificate("proxy.tls_cert", tmp_path / "none")).what


def test_a_certificate_that_is_not_the_one_on_the_disk_is_told(tmp_path):
    served, renewed = (Authority(tmp_path).issue(name, ["127.0.0.1"]) for name in ("served", "renewed"))
    context = server_context(*served, "proxy")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            for _ in range(2):
                with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        address = "{}:{}".format(*listener.getsockname())
        told = [
            list(
                installation.served_certificate(
                    parse({"proxy": {"listen": [address], "tls_cert": str(certificate), "tls_key": str(key)}})
                )
            )
            for certificate, key in (served, renewed)
        ]
        thread.join()
    assert told[0] == []
    assert only(told[1]).level.value == "error" and "another certificate" in only(told[1]).what


def test_accounts(monkeypatch, tmp_path):
    found = [("carol in /etc/subuid", range(5500, 71036)), ("erin in /etc/subgid", range(100000, 165536))]
    monkeypatch.setattr(installation, "subordinate_ids", lambda: found)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwall", lambda: [SimpleNamespace(pw_name="dave", pw_uid=5100)])

    def missing(name):
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", missing)
    monkeypatch.setattr(grp, "getgrnam", missing)
    said = [finding.what for finding in installation.accounts(parse({"manager": {"uid_range": [5000, 5999]}}))]
    assert said == [
        "the user dispatcher-proxy does not exist: the proxy gets the first id of manager.uid_range",
        "the group dispatcher-admin does not exist: only root may administer",
        "manager.uid_range contains the user ids of dave",
        "manager.uid_range overlaps the subordinate ids of carol in /etc/subuid; agents get none of these",
    ]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "not root" in only(installation.accounts(parse({}))).what


def test_a_wrong_configuration_does_not_stop_the_doctor(tmp_path, capsys):
    (tmp_path / "d.toml").write_text("[manager]\nthreads = 0\n")
    code = main(["--config", str(tmp_path / "d.toml"), "doctor"])
    out = capsys.readouterr().out
    assert code == 1
    assert "ERROR" in out
    assert "manager.threads: found 0" in out
    assert "the clock shows" in out


# Providers.


class ThirdParty(FakeProvider):
    """A provider of another distribution, whose backend works."""

    def check(self, *, deadline):
        assert deadline.remaining() > 0
        assert self.context.state_dir.is_dir()
        assert self.context.run_dir.is_dir()

    def explain(self, app):
        assert app is None
        return [Finding(level=Level.WARNING, what="Agents share a kernel", fix="accept it")]


def installed(monkeypatch, *classes):
    """Return the plugins of a machine on which distributions provide these classes, each under its name."""
    for cls in classes:
        monkeypatch.setitem(sys.modules, f"{cls.name}_plugin", plugin([cls]))
    return Plugins([entry(cls.name, f"{cls.name}_plugin") for cls in classes])


def found_by(plugins, config=None, client=None):
    return [
        (item.level.value, item.what, item.fix)
        for item in plugins_in_use(parse(config or {"apps": {}}), plugins, client)
    ]


USED = {"providers": {"fake": {}}, "apps": {}}


def test_a_third_party_s_provider_is_checked_and_explained_where_it_is_used(monkeypatch):
    plugins = installed(monkeypatch, ThirdParty)
    assert found_by(plugins, USED) == [
        ("ok", "fake: can be used", ""),
        ("warning", "fake: Agents share a kernel", "accept it"),
    ]
    assert found_by(plugins) == [("ok", "fake: can be used", "")]


@pytest.mark.parametrize("limit", [10.0, 0.4])
def test_providers_that_hang_do_not_add_up(monkeypatch, limit):
    monkeypatch.setattr(providers, "SECONDS", 0.5)
    monkeypatch.setattr(providers, "SLACK", 0.3)
    monkeypatch.setattr(providers, "LIMIT", limit)
    released = threading.Event()

    def hanging(name):
        return type("Hanging", (ThirdParty,), {"name": name, "check": lambda self, *, deadline: released.wait(60)})

    names = [f"hanging{number}" for number in range(8)]
    plugins = installed(monkeypatch, ThirdParty, *map(hanging, names))
    began = time.monotonic()
    try:
        found = {what.partition(":")[0]: (level, what) for level, what, _ in found_by(plugins)}
    finally:
        released.set()
    assert time.monotonic() - began < 4
    assert found["fake"] == ("ok", "fake: can be used")
    words = "does not return from its check" if limit > 1 else "It has not answered in 0.4 seconds"
    assert all(words in found[name][1] for name in names), found


@pytest.mark.parametrize(("config", "level"), [(USED, "error"), (None, "info")])
def test_a_backend_that_does_not_answer_is_an_error_only_where_it_is_used(monkeypatch, config, level):
    def check(self, *, deadline):
        raise Unavailable("The engine does not answer", why="no socket", fix="start it")

    plugins = installed(monkeypatch, type("Broken", (ThirdParty,), {"check": check}))
    [(found, what, fix)] = found_by(plugins, config)
    assert found == level
    assert what.startswith("fake: The engine does not answer: no socket")
    assert fix == "start it"


@pytest.mark.parametrize(("config", "level"), [(USED, "error"), (None, "info")])
@pytest.mark.parametrize("fault", [ZeroDivisionError("oops"), SystemExit("oops")])
def test_a_plugin_that_fails_does_not_stop_the_doctor(monkeypatch, fault, config, level):
    def check(self, *, deadline):
        raise fault

    plugins = installed(monkeypatch, type("Faulty", (ThirdParty,), {"check": check}))
    [(found, what, fix)] = found_by(plugins, config)
    assert (found, "authors of acme-plugin 1.2" in fix) == (level, True)
    assert what.startswith(f"fake: The provider fake failed in its check: {type(fault).__name__}: 'oops'")


@pytest.mark.parametrize(("config", "level"), [(USED, "error"), (None, "info")])
def test_a_plugin_that_cannot_be_imported_says_what_to_install(config, level):
    [(found, what, fix)] = found_by(Plugins([entry("fake", "no_such_module_anywhere")]), config)
    assert (found, "cannot be imported" in what, "pip install" in fix) == (level, True, True)


def test_a_library_that_a_plugin_lacks_is_named_with_its_package(monkeypatch, tmp_path):
    text = "libvirt.so.0: cannot open shared object file: No such file or directory"
    (tmp_path / "needs_libvirt.py").write_text(f"raise ImportError({text!r})")
    monkeypatch.syspath_prepend(tmp_path)
    [(_, what, fix)] = found_by(Plugins([entry("fake", "needs_libvirt")]))
    assert "the library libvirt.so.0 is not installed" in what
    assert fix.endswith("apt install libvirt0)")


def test_a_plugin_without_a_provider_is_not_mentioned(monkeypatch):
    monkeypatch.setitem(sys.modules, "login_plugin", plugin(authenticators=[FakeAuthenticator]))
    assert found_by(Plugins([entry("fake", "login_plugin")])) == []


def test_a_running_manager_checks_the_providers_that_it_uses(monkeypatch):
    plugins = installed(monkeypatch, ThirdParty, type("Other", (ThirdParty,), {"name": "other"}))
    client = SimpleNamespace(
        providers=lambda: {"providers": [{"name": "fake"}]},
        plugins=lambda: {"plugins": [{"name": "fake", "configured": True, "error": None}]},
        check_provider=lambda name: {
            "findings": [{"level": "ok", "what": f"{name} as the manager sees it", "fix": ""}]
        },
    )
    assert found_by(plugins, USED, client) == [
        ("ok", "fake: fake as the manager sees it", ""),
        ("ok", "other: can be used", ""),
    ]


@pytest.mark.parametrize("table", [{"plugins": ["fake"]}, {"auth": {"authenticator": "fake", "fake": {}}}])
@pytest.mark.parametrize("works", [True, False])
def test_every_plugin_of_the_configuration_is_asked(monkeypatch, table, works):
    """An observer, an authenticator: by the manager, and without one by this process."""
    made = plugin(authenticators=[FakeAuthenticator], dispatcher_agent_event=hookimpl(lambda event: None))
    monkeypatch.setitem(sys.modules, "a_plugin", made if works else plugin(providers=[int]))
    found = found_by(Plugins([entry("fake", "a_plugin")]), {"apps": {}} | table)
    assert [level for level, *_ in found] == ["ok" if works else "error"]
    assert works or "of acme-plugin 1.2" in found[0][1]
    state = {"name": "fake", "configured": True, "error": None if works else "it does not return"}
    client = SimpleNamespace(
        providers=lambda: {"providers": []},
        plugins=lambda: {"plugins": [state]},
        check_authenticator=lambda plugin: {
            "findings": [{"level": "ok", "what": "the directory answers", "fix": ""}]
        },
    )
    found = found_by(Plugins([entry("fake", "a_plugin")]), {"apps": {}} | table, client)
    assert [level for level, *_ in found] == ["ok" if works else "error"]
    assert ("the directory answers" in found[0][1]) == (works and "auth" in table)
    assert works or "it does not return" in found[0][1]


def test_the_fix_that_a_plugin_tells_is_the_fix_of_the_finding(monkeypatch):
    made = plugin(authenticators=[FakeAuthenticator])
    monkeypatch.setitem(sys.modules, "a_plugin", made)
    state = {
        "name": "fake",
        "configured": True,
        "error": "The directory is down: refused (start it)",
        "fix": "start it",
    }
    client = SimpleNamespace(providers=lambda: {"providers": []}, plugins=lambda: {"plugins": [state]})
    table = {"apps": {}, "auth": {"authenticator": "fake", "fake": {}}}
    [found] = found_by(Plugins([entry("fake", "a_plugin")]), table, client)
    assert found[:3] == ("error", "fake: The directory is down: refused", "start it")


def test_a_run_directory_that_goes_at_logout_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: pwd.getpwnam("nobody").pw_uid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    found = only(installation._until_logout(Path("/run/user/1000/dispatcher"), tmp_path))
    assert found.level is Level.WARNING
    assert "loginctl enable-linger nobody" in found.fix
    (tmp_path / "nobody").touch()
    assert levels(installation._until_logout(Path("/run/user/1000/dispatcher"), tmp_path)) == []
    assert levels(installation._until_logout(Path("/srv/run"), tmp_path)) == []
    with monkeypatch.context() as without_name:
        without_name.setattr(os, "geteuid", lambda: 1_234_567)
        assert levels(installation._until_logout(Path("/run/user/1234567/dispatcher"), tmp_path)) == []
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert levels(installation._until_logout(Path("/tmp/own"), tmp_path)) == [], "it was chosen"
    found = only(installation._until_logout(default_paths.run_dir(), tmp_path))
    assert found.level is Level.INFO
    assert "manager.run_dir" in found.fix


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://apps.example.org", True),
        ("http://localhost:8080", False),
        ("http://127.0.0.1", False),
        ("https://apps.example.org", False),
    ],
)
def test_a_public_url_without_encryption_is_told(url, warned):
    found = list(installation.encryption(parse({"proxy": {"listen": ["127.0.0.1:80"], "public_url": url}})))
    assert [url in finding.what for finding in found] == [True] * warned


def test_trusting_every_address_is_told():
    for networks, told in (["0.0.0.0/0"], True), (["10.0.0.0/8", "::/0"], True), (["10.0.0.1"], False):
        config = parse({"proxy": {"listen": ["127.0.0.1:80"], "trusted_proxies": networks}})
        assert any("trusted_proxies" in finding.what for finding in installation.encryption(config)) is told


@pytest.mark.parametrize(
    ("text", "mode", "level"),
    [
        ('[manager]\ndatabase = "postgresql+psycopg://d:secret@db/d"\n', 0o644, "error"),
        ('[manager]\ndatabase = "postgresql+psycopg://d:secret@db/d"\n', 0o640, "ok"),
        ('[manager]\ndatabase = "postgresql+psycopg://d@/d?host=/run/postgresql"\n', 0o644, "ok"),
        ('[manager]\ndatabase = "postgresql+psycopg://d@db/d?passfile=/etc/dispatcher/pgpass"\n', 0o644, "ok"),
        ('[manager]\ndatabase = "postgresql+psycopg://d@db/d?password=secret"\n', 0o644, "error"),
        ('manager = { database = "postgresql+psycopg://d:secret@db/d" }\n', 0o644, "error"),
        ('# database = "postgresql+psycopg://d:secret@db/d"\n', 0o644, "ok"),
    ],
)
def test_a_password_in_a_file_that_all_may_read_is_told(tmp_path, text, mode, level):
    path = tmp_path / "d.toml"
    path.write_text(text)
    path.chmod(mode)
    assert levels(installation.config_file(path)) == [level]


@pytest.mark.parametrize(("most", "levels"), [("2466165", ["warning"]), ("9223372036854775807", [])])
def test_a_table_of_files_that_one_agent_can_fill_is_told(tmp_path, most, levels):
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs/file-max").write_text(f"{most}\n")
    assert [finding.level.value for finding in machine.file_table(tmp_path)] == levels


@pytest.mark.root
def test_a_password_that_the_proxy_may_read_is_told(tmp_path):
    """The proxy's user must be able to read the configuration, and is the first that an attacker becomes."""
    path = tmp_path / "d.toml"
    path.write_text('[manager]\ndatabase = "postgresql+psycopg://d:secret@db/d"\n')
    path.chmod(0o640)
    os.chown(path, 0, 65534)
    found = only(installation.config_file(path))
    assert found.level is Level.ERROR
    assert "readable for a group" in found.what
    assert "?passfile=FILE" in found.fix


@pytest.mark.parametrize("key", ["proxy", "manager"])
def test_a_key_that_all_may_read_is_told(tmp_path, key):
    make_certificate(tmp_path / "c.pem", 90)
    tls_key = tmp_path / "k.pem"
    tls_key.touch(0o640)
    found = parse({key: {"tls_cert": str(tmp_path / "c.pem"), "tls_key": str(tls_key)}})
    assert levels(installation.certificates(found)) == ["ok"]
    tls_key.chmod(0o644)
    assert levels(installation.certificates(found)) == ["ok", "error"]
