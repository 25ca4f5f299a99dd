"""packaging/provision.sh, as far as a machine without systemd allows, and then the units as systemd would run them.

Everything goes below a directory of its own.  Each unit runs in a mount namespace with the installation's /etc/passwd and
/etc/group, the file system read-only but for ReadWritePaths, as the unit's user, with the unit's capabilities.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.installation import until

PACKAGING = ROOT / "packaging"
PYTHON = "/usr/bin/python3"  # what a plain Debian has, and what every user may run
DENY_HOSTNAME = ROOT / "tests/support/deny_hostname.py"
SETUP = {"__file__": str(ROOT / "setup.py")}
exec((ROOT / "setup.py").read_text().partition("\nMYPY = ")[0], SETUP)
COMPILED = sorted(SETUP["COMPILED"])
PASSWORD = "correct horse battery"


def provision(root, *options):
    return subprocess.run(
        [
            PACKAGING / "provision.sh",
            "--root",
            root,
            "--no-packages",
            "--no-systemd",
            "--python",
            PYTHON,
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )


class Unit:
    """A unit file, and its process run as systemd would."""

    def __init__(self, root, name):
        self.root, self.name = root, name
        self.settings = {}
        text = (root / f"etc/systemd/system/{name}.service").read_text()
        for line in text.splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                self.settings.setdefault(key, []).append(value)
        self.process = None

    def one(self, key):
        return self.settings[key][-1]

    @property
    def user(self):
        name = self.settings.get("User", ["root"])[-1]
        line = next(
            line for line in (self.root / "etc/passwd").read_text().splitlines() if line.startswith(f"{name}:")
        )
        return int(line.split(":")[2]), int(line.split(":")[3])

    def command(self):
        writable = [
            path for line in self.settings["ReadWritePaths"] for path in line.split() if not path.startswith("-")
        ]
        if self.settings.get("PrivateTmp"):
            writable.append("/tmp")
        binds = "".join(f"mount --bind {path} {path}\n" for path in writable)
        uid, gid = self.user
        # ProtectHostname= is a seccomp filter, which reaches the agents' sandboxes too.
        protect = f"{PYTHON} {DENY_HOSTNAME}" if self.settings.get("ProtectHostname") == ["yes"] else ""
        capabilities = [name.removeprefix("CAP_").lower() for name in self.one("CapabilityBoundingSet").split()]
        bounding = ",".join(["-all", *(f"+{name}" for name in capabilities)])
        script = f"""set -e
mount --make-rprivate /
mount --bind {self.root}/etc/passwd /etc/passwd
mount --bind {self.root}/etc/group /etc/group
{binds}mount -o remount,bind,ro /
umask {self.one("UMask")}
cd /
exec {protect} setpriv --reuid={uid} --regid={gid} {"--clear-groups" if uid else "--keep-groups"} --inh-caps=-all \\
    --bounding-set={bounding} --no-new-privs {self.one("ExecStart")}
"""
        return ["unshare", "--mount", "sh", "-c", script]

    def start(self):
        """Start it and wait until it says READY=1 (Type=notify)."""
        assert self.one("Type") == "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.bind(f"\0dispatcher-test-{os.getpid()}-{self.name}")
            notified.settimeout(30)
            log = (self.root / f"{self.name}.log").open("ab")
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    "PATH": os.defpath,
                    "LANG": "C.UTF-8",
                    "NOTIFY_SOCKET": f"@dispatcher-test-{os.getpid()}-{self.name}",
                },
            )
            log.close()
            try:
                while b"READY=1" not in notified.recv(4096):
                    pass
            except TimeoutError:
                pytest.fail(f"{self.name} was never ready:\n{self.log}")

    @property
    def log(self):
        return (self.root / f"{self.name}.log").read_text()

    def status(self):
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@pytest.fixture(scope="module")
def installed(free_port_for_module):
    root = Path(tempfile.mkdtemp(prefix="p-", dir="/tmp"))
    root.chmod(0o755)
    done = provision(root)
    assert done.returncode == 0, done.stdout + done.stderr
    config = root / "etc/dispatcher/dispatcher.toml"
    text = config.read_text().replace("0.0.0.0:8080", f"127.0.0.1:{free_port_for_module}")
    # A private network needs more of the unit than none: a capability for its name server, and no /tmp.
    config.write_text(text.replace('title = "Demo"', 'title = "Demo"\nnetwork = "private"'))
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def free_port_for_module():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def units(installed):
    manager, proxy = Unit(installed, "dispatcher-manager"), Unit(installed, "dispatcher-proxy")
    try:
        manager.start()
        proxy.start()
        yield manager, proxy
        if manager.process.poll() is None:
            for agent in json.loads(cli(installed, "list", "--json").stdout)["agents"]:
                cli(installed, "remove", "--yes", agent["name"])
    finally:
        proxy.stop()
        manager.stop()


def cli(root, *arguments, stdin=None):
    return subprocess.run(
        [root / "usr/local/bin/dispatcher", "--config", root / "etc/dispatcher/dispatcher.toml", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


class Browser:
    """Speaks HTTPS to the installation and believes its certificate alone."""

    def __init__(self, root, port):
        self.url = f"https://localhost:{port}"
        context = ssl.create_default_context(cafile=root / "etc/dispatcher/tls/cert.pem")
        self.opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context), urllib.request.HTTPCookieProcessor()
        )

    def ask(self, path, body=None):
        request = urllib.request.Request(
            self.url + path, headers={"Accept": "application/json", "Origin": self.url}
        )
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with self.opener.open(request, timeout=30) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            error.close()  # it is the answer, and holds the connection
            raise


pytestmark = [pytest.mark.root, pytest.mark.xdist_group("provision")]


def test_what_is_installed_where_and_for_whom(installed):
    def look(path):
        status = (installed / path).stat()
        return oct(status.st_mode & 0o7777), status.st_uid, status.st_gid

    uid, gid = Unit(installed, "dispatcher-proxy").user
    assert uid != 0
    assert look("etc/dispatcher/tls") == ("0o750", 0, gid)
    assert look("etc/dispatcher/tls/key.pem") == ("0o640", 0, gid)
    assert look("etc/dispatcher/dispatcher.toml") == ("0o644", 0, 0)
    assert look("var/lib/dispatcher") == ("0o711", 0, 0)
    assert look("run/dispatcher/proxy") == ("0o700", uid, gid)
    assert "dispatcher-admin:" in (installed / "etc/group").read_text()
    with pytest.raises(KeyError):
        pwd.getpwnam("no-such-user-of-the-host")
    for unit in ("dispatcher-manager", "dispatcher-proxy"):
        text = (installed / f"etc/systemd/system/{unit}.service").read_text()
        assert f"ExecStart={installed}/opt/dispatcher/bin/dispatcher" in text
    assert cli(installed, "config", "check").returncode == 0


def test_the_units_are_what_systemd_understands(installed):
    units = [
        installed / f"etc/systemd/system/dispatcher-{name}.service" for name in ("agents", "manager", "proxy")
    ]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "dispatcher-" in line]
    assert complaints == []


@pytest.mark.bubblewrap
def test_people_sign_in_over_https_and_agents_outlive_a_restart(installed, units, free_port_for_module):
    manager, proxy = units
    done = cli(installed, "add", "alice", "--password-stdin", stdin=f"{PASSWORD}\n")
    assert done.returncode == 0, done.stderr + manager.log
    browser = Browser(installed, free_port_for_module)
    browser.ask("/auth/login", {"user": "alice", "password": PASSWORD})

    def about():
        with contextlib.suppress(urllib.error.HTTPError, ValueError):
            return browser.ask("/about")

    assert until("alice's app answers", about)["user"] == "alice", proxy.log
    before = json.loads(cli(installed, "info", "alice", "--json").stdout)["runtime"]
    assert 1_900_000_000 <= before["uid"] <= 1_900_065_535
    manager.stop()
    assert browser.ask("/about")["user"] == "alice"
    manager.start()
    after = json.loads(cli(installed, "info", "alice", "--json").stdout)["runtime"]
    assert after["started_at"] == before["started_at"]


def test_the_daemons_have_the_rights_of_their_units_and_no_more(installed, units):
    manager, proxy = units
    seen = manager.status()
    assert seen["Uid"].split()[0] == "0"
    assert seen["NoNewPrivs"] == "1"
    assert 0 < int(seen["CapBnd"], 16).bit_count() <= 14
    uid, gid = proxy.user
    seen = proxy.status()
    assert set(seen["Uid"].split()) == {str(uid)}
    assert set(seen["Gid"].split()) == {str(gid)}
    assert {int(seen[key], 16) for key in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh")} == {0}
    assert seen["NoNewPrivs"] == "1"


def test_reload_keeps_connections_and_takes_the_new_configuration(installed, units, free_port_for_module):
    manager, proxy = units
    check, signal_it = proxy.settings["ExecReload"]
    assert check.endswith("proxy --check") and signal_it == "/bin/kill -HUP $MAINPID"
    proxy.process.send_signal(signal.SIGHUP)
    browser = Browser(installed, free_port_for_module)
    until("the proxy serves", lambda: browser.ask("/auth/login", {"user": "alice", "password": PASSWORD}))
    assert proxy.process.poll() is None
    assert "reload" in manager.one("ExecReload")
    assert cli(installed, "reload").returncode == 0


def test_the_doctor_finds_nothing_to_mend(installed, units):
    findings = json.loads(cli(installed, "doctor", "--json").stdout)["findings"]
    assert [finding for finding in findings if finding["level"] == "error"] == []
    assert any("tls/cert.pem is valid until" in finding["what"] for finding in findings)


def compiled_modules(installed):
    """Which of `COMPILED` the installed program loads in compiled form."""
    code = (
        "import importlib, sys\n"
        "for path in sys.argv[1:]:\n"
        "    if importlib.import_module(path[:-3].replace('/', '.')).__file__.endswith('.so'):\n"
        "        print(path)\n"
    )
    command = [installed / "opt/dispatcher/bin/python", "-c", code, *COMPILED]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.split()


def test_again_is_an_upgrade_that_renews_the_program_and_keeps_the_rest(installed, units):
    kept = [installed / "etc/dispatcher/tls/cert.pem", installed / "etc/dispatcher/dispatcher.toml"]
    before = [path.read_bytes() for path in kept]
    users = (installed / "etc/passwd").read_text()
    old = [
        next(site_packages(installed).glob("dispatcher/proxy/edge/http/*.so")),
        site_packages(installed) / "dispatcher/demo/app.py",
    ]
    for path in old:  # as if these were of an older release
        path.write_bytes(b"")
    wheel = next((installed / "opt/dispatcher/share").glob("*.whl"))  # compiling takes a minute, and was done once
    done = provision(installed, "--wheel", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.stat().st_size for path in old)
    assert compiled_modules(installed) == COMPILED
    assert [path.read_bytes() for path in kept] == before
    assert (installed / "etc/passwd").read_text() == users


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--nonsense"], "unknown option --nonsense"),
        (["--root", "relative", "--no-systemd"], "--root needs an absolute path"),
        (["--root", "/tmp/x"], "--root needs --no-systemd"),
        (
            ["--no-systemd", "--no-packages", "--root", "/tmp/x-nowhere", "--python", "/no/python"],
            "/no/python not found",
        ),
    ],
)
def test_wrong_usage_is_told(options, complaint):
    done = subprocess.run([PACKAGING / "provision.sh", *options], capture_output=True, text=True)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_the_vagrant_machine_runs_the_same_script():
    text = (ROOT / "Vagrantfile").read_text()
    assert "/vagrant/packaging/provision.sh" in text
    assert "guest: 8080" in text


def site_packages(installed):
    return next((installed / "opt/dispatcher/lib").glob("python3.*")) / "site-packages"


def test_every_file_of_the_packages_is_installed(installed):
    site = site_packages(installed)
    assert compiled_modules(installed) == COMPILED
    when = (installed / "opt/dispatcher/pyvenv.cfg").stat().st_mtime  # somebody may be at work in the clone
    missing = []
    for top in (ROOT / "dispatcher", *(ROOT / "providers").glob("dispatcher_*")):
        for path in top.rglob("*"):
            if (
                path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".so"}
            ):  # built for this Python
                target = site / path.relative_to(top.parent)
                if not target.exists() and path.stat().st_mtime < when:
                    missing.append(str(path.relative_to(ROOT)))
    assert missing == []
    assert (installed / "opt/dispatcher/share/doc/LICENSE").exists()
