"""`dispatcher demo` and `dispatcher serve`: what a newcomer types first, as root and as an ordinary user."""

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from pathlib import Path

import pytest

from dispatcher.manager.rest.certificate import make_certificate
from tests.support import ordinary
from tests.conftest import ROOT
from tests.support.installation import until

PROGRAM = [sys.executable, "-m", "dispatcher"]
pytestmark = pytest.mark.xdist_group("demo")  # two demos at once would race for port 8080


class Run:
    """A running program whose lines can be waited for."""

    def __init__(self, command, **options):
        self.lines = []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with self.process.stdout as stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))

    @property
    def text(self):
        return "\n".join(self.lines)

    def line(self, pattern, seconds=40):
        """Return the match of the first line that matches."""

        def found():
            if self.process.poll() is not None:
                self._reader.join(5)
            for line in list(self.lines):
                if match := re.fullmatch(pattern, line):
                    return match
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            return None

        return until(f"a line like {pattern}", found, seconds)

    def end(self, number=signal.SIGINT, seconds=60):
        """Send a signal, as Ctrl-C does, and return the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)


@pytest.fixture
def start():
    """Start programs that are ended afterwards."""
    with contextlib.ExitStack() as stack:

        def start(command, **options):
            run = Run(command, **options)

            def stop():
                if run.process.poll() is None:
                    run.process.terminate()
                    try:
                        run.process.wait(60)
                    except subprocess.TimeoutExpired:
                        os.killpg(run.process.pid, signal.SIGKILL)
                run._reader.join(5)

            stack.callback(stop)
            return run

        yield start


def ask(url, method="GET", path="/", body=None, **headers):
    host = url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        data = None if body is None else json.dumps(body)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if data:
            fields["Content-Type"] = "application/json"
        connection.request(method, path, data, fields)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read().decode()
    finally:
        connection.close()


def sign_in(url, name, password):
    status, headers, body = ask(
        url,
        "POST",
        "/auth/login",
        {"user": name, "password": password},
        Accept="application/json",
        Origin=url.rstrip("/"),
    )
    assert status == 200, body
    return "; ".join(value.split(";")[0] for value in headers.get_all("Set-Cookie"))


def use_the_demo(url, people):
    """Each has an app of their own that knows them."""
    for name, password in people.items():
        cookie = sign_in(url, name, password)
        body = until(
            f"{name}'s app answers",
            lambda cookie=cookie: (lambda reply: reply[2] if reply[0] == 200 else None)(
                ask(url, path="/about", Cookie=cookie)
            ),
        )
        assert json.loads(body)["user"] == name
        for other in people:
            assert other == name or other not in body


def processes_with(needle):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if needle.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def demo_directories():
    return {path.name for path in Path("/tmp").glob("dispatcher-*")}


def read_the_demo(run):
    url = run.line(r"Open (http://127\.0\.0\.1:\d+/)")[1]
    people = {name: run.line(rf"Sign in {name} / (\S+)")[1] for name in ("alice", "bob")}
    run.line("Ctrl-C ends it")
    assert [line for line in run.lines if not line.startswith(("Open ", "Sign in "))] == ["Ctrl-C ends it"]
    return url, people


@pytest.mark.bubblewrap
def test_demo_runs_and_leaves_nothing(start, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = demo_directories()
    run = start([*PROGRAM, "demo"])
    url, people = read_the_demo(run)
    use_the_demo(url, people)
    made = next(tmp_path.glob("dispatcher-demo-*"))
    assert processes_with(str(made))
    name = json.loads(cli(made / "dispatcher.toml", "info", "alice", "--json").stdout)["runtime"]["handle"]["name"]
    groups = f"*/{'-'.join(name.split('-')[:2])}"
    assert run.end() == 0
    assert run.lines[-2:] == [
        "dispatcher: ending; requests in progress have 30 seconds at most",
        "dispatcher: manager, proxy and agents have ended; their files are removed",
    ]
    assert not [*Path("/sys/fs/cgroup").glob(groups), *Path("/sys/fs/cgroup").glob(groups.removeprefix("*/"))]
    assert processes_with(str(made)) == []
    assert list(tmp_path.iterdir()) == []
    assert demo_directories() <= before
    with pytest.raises(OSError):
        ask(url)


NEEDED_BY_THE_DEMO = (
    "blinker",
    "click",
    "flask",
    "h11",
    "itsdangerous",
    "jinja2",
    "markupsafe",
    "werkzeug",
    "wsproto",
)


@pytest.mark.root
@pytest.mark.bubblewrap
def test_demo_from_a_directory_that_only_root_may_enter(start, tmp_path):
    """The proxy gives up root, the agents never have it, and yet the program lies below root's home."""
    private = tmp_path / "home-of-root"
    private.mkdir(mode=0o700)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dispatcher", private / "dispatcher", ignore=skip)
    shutil.copytree(ROOT / "providers", private / "providers", ignore=skip)
    venv.create(private / "venv", symlinks=True)
    here = next((private / "venv/lib").glob("python3*")) / "site-packages"
    libraries = sysconfig.get_path("purelib")
    # Agents see their program's own directories alone: what the demo app needs lies there.
    for name in (*NEEDED_BY_THE_DEMO, *(path.name for path in Path(libraries).glob("[Ww]erkzeug-*"))):
        shutil.copytree(Path(libraries, name), here / name, ignore=skip)
    (here / "clone.pth").write_text(f"{private}\n{private}/providers\n{libraries}\n")
    run = start(
        [private / "venv/bin/python", "-m", "dispatcher", "demo", "--directory", tmp_path / "demo"], cwd="/"
    )
    url, people = read_the_demo(run)
    use_the_demo(url, people)
    cookie = sign_in(url, "alice", people["alice"])
    for path in ("/auth/", "/auth/account", "/auth/login", "/auth/nothing"):
        status, _, body = ask(url, path=path, Cookie=cookie, Accept="text/html")
        assert status in {200, 303, 404}
        if status != 303:
            assert "<html" in body
    for name in ("GET", "POST"):
        assert ask(url, name, "/auth/account", Accept="text/html")[0] < 500
    assert run.end() == 0
    assert [line for line in run.lines if "ERROR" in line or "Traceback" in line] == []


@pytest.mark.root
@pytest.mark.bubblewrap
def test_demo_as_an_ordinary_user(start, short_tmp):
    uid = 41_000 + secrets.randbelow(1000)
    home = short_tmp / "home"
    (home / "run").mkdir(parents=True, mode=0o700)
    os.chown(home, uid, uid)
    os.chown(home / "run", uid, uid)
    run = start(ordinary.command(uid, home, *PROGRAM, "demo", "--directory", str(home / "demo")))
    url, people = read_the_demo(run)
    use_the_demo(url, people)
    owners = {path.stat().st_uid for path in (home / "demo").rglob("*")}
    assert owners == {uid}
    assert run.end() == 0
    assert not (home / "demo").exists()
    assert processes_with(str(home)) == []


def test_demo_takes_the_next_port_when_8080_is_taken_and_can_be_kept(start, tmp_path):
    """Also: a second run on a kept directory knows alice, with a new password."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else has it: as good
            sock.bind(("127.0.0.1", 8080))
            sock.listen()
        passwords = []
        for _ in range(2):
            run = start([*PROGRAM, "demo", "--directory", str(tmp_path / "d"), "--keep"])
            url = run.line(r"Open (http://127\.0\.0\.1:\d+/)")[1]
            assert ":8080/" not in url
            passwords.append(run.line(r"Sign in alice / (\S+)")[1])
            sign_in(url, "alice", passwords[-1])
            run.line("Ctrl-C ends it")
            assert run.end(signal.SIGTERM) == 0
            assert f"go on with `dispatcher demo --keep --directory {tmp_path}/d`" in run.lines[-1]
            assert (tmp_path / "d/dispatcher.toml").exists()
        assert passwords[0] != passwords[1]


BREAKS = {
    "its portal": (
        "proxy",
        "import waitress\nwaitress.serve = None\n",
        "The proxy cannot start: its portal ended",
    ),
    "its workers": (
        "proxy",
        "from dispatcher.proxy.edge import worker_process\nworker_process.run = None\n",
        "The proxy cannot start: its worker ended",
    ),
    "its manager": (
        "manager",
        "from dispatcher.manager.app import Manager\nManager._listen = lambda _: sys.exit(7)\n",
        "The manager ended with exit code 7",
    ),
    "its manager, later": (
        "manager",
        "import os\nfrom dispatcher.manager.app import Manager\nfrom dispatcher.manager.auth.hashing import Hasher\n"
        "real = Manager._listen\n"
        "def listen(self):\n    real(self)\n    Hasher.hash = lambda *_: (self.supervisor.close(), os._exit(7))\n"
        "Manager._listen = listen\n",
        "The manager ended with exit code 7",
    ),
}


@pytest.mark.parametrize(("which", "fault", "told"), BREAKS.values(), ids=BREAKS)
def test_demo_gives_up_when_a_part_cannot_live(start, tmp_path, which, fault, told):
    """No address and no password is shown that nobody could use; one line says why; nothing is left."""
    module = tmp_path / "fault/sitecustomize.py"
    module.parent.mkdir()
    lines = "".join(f"    {line}\n" for line in fault.splitlines())
    module.write_text(f"import sys\nif sys.orig_argv[-1] == {which!r}:\n{lines}")
    before = demo_directories()
    run = start(
        [*PROGRAM, "demo", "--directory", str(tmp_path / "demo")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(module.parent), os.environ.get("PYTHONPATH")))),
        },
    )
    assert run.process.wait(60) not in {0, -signal.SIGKILL}
    run._reader.join(5)
    assert sum(told in line for line in run.lines) == 1, run.text
    assert not [line for line in run.lines if line.startswith(("Open ", "Sign in "))]
    assert not (tmp_path / "demo").exists()
    assert demo_directories() <= before


def test_demo_touches_no_directory_that_it_did_not_make(tmp_path):
    (tmp_path / "precious").touch()
    done = subprocess.run([*PROGRAM, "demo", "--directory", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


# serve


@pytest.fixture
def config(short_tmp, free_port):
    path = short_tmp / "d.toml"
    path.write_text(
        f'[manager]\nstate_dir = "{short_tmp}/state"\nrun_dir = "{short_tmp}/run"\nlog_level = "warning"\n'
        f'[proxy]\nlisten = ["127.0.0.1:{free_port}"]\nlog_level = "warning"\n'
    )
    yield path
    # Agents outlive the manager: remove them, whatever the test did.
    with contextlib.suppress(OSError):
        if (short_tmp / "state/dispatcher.db").exists():
            cleaner = Run([*PROGRAM, "--config", str(path), "manager"])
            try:
                until("the manager is back", lambda: cli(path, "list").returncode == 0)
                for agent in json.loads(cli(path, "list", "--json").stdout)["agents"]:
                    cli(path, "remove", "--yes", agent["name"])
            finally:
                cleaner.end(signal.SIGTERM)
    shutil.rmtree(short_tmp / "state", ignore_errors=True)


def cli(config, *arguments, stdin=None):
    return subprocess.run(
        [*PROGRAM, "--config", str(config), *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )


def add(config, name):
    done = cli(config, "add", name, "--password-stdin", stdin="correct horse battery\n")
    assert done.returncode == 0, done.stderr


def children(pid):
    return {
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    }


def daemon(run, name):
    """Return the pid of one of serve's two children."""
    return next(
        pid
        for pid in children(run.process.pid)
        if Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").endswith(name.encode())
    )


def test_serve_runs_both_and_agents_outlive_it(start, config):
    run = start([*PROGRAM, "--config", str(config), "serve"])
    url = run.line(r"Open (http://127\.0\.0\.1:\d+/)")[1]
    add(config, "alice")
    cookie = sign_in(url, "alice", "correct horse battery")
    until("alice's app answers", lambda: ask(url, Cookie=cookie)[0] == 200)
    started = json.loads(cli(config, "info", "alice", "--json").stdout)["runtime"]["started_at"]
    assert run.end(signal.SIGTERM) == 0
    program = f"dispatcher --config {config}"
    assert run.lines[-1] == (
        "dispatcher: manager and proxy have ended; 1 agent keeps running: alice "
        f"(`{program} serve` serves it again, then `{program} stop NAME` stops one)"
    )
    again = start([*PROGRAM, "--config", str(config), "serve"])
    again.line(r"Open .*")
    assert ask(url, Cookie=cookie)[0] == 200
    assert json.loads(cli(config, "info", "alice", "--json").stdout)["runtime"]["started_at"] == started


def test_the_proxy_of_serve_has_no_secret_of_an_app(start, config):
    with config.open("a") as file:
        file.write('[apps.demo.secrets]\nKEY = "env:KEY_OF_THE_DEMO"\n')
    environment = {**os.environ, "KEY_OF_THE_DEMO": "for-agents-alone", "ANOTHER_VARIABLE": "for-both"}
    run = start([*PROGRAM, "--config", str(config), "serve"], env=environment)
    run.line(r"Open .*")
    seen = {name: Path(f"/proc/{daemon(run, name)}/environ").read_bytes() for name in ("manager", "proxy")}
    assert b"for-agents-alone" in seen["manager"]
    assert b"for-both" in seen["proxy"] and b"for-agents-alone" not in seen["proxy"]


def test_serve_logs_which_apps_can_never_start(start, config):
    with config.open("a") as file:
        file.write('[apps.gone.subprocess]\ncommand = ["/no/such/program", "{socket}"]\n')
    run = start([*PROGRAM, "--config", str(config), "serve"])
    run.line(r".*WARNING no agent of this app can start app=gone .*there is no program '/no/such/program'.*")
    done = cli(config, "providers", "check", "subprocess", "--app", "gone")
    assert done.returncode == 1
    assert "apps.gone.subprocess.command: there is no program '/no/such/program'" in done.stdout


def test_serve_says_so_when_a_half_dies_and_starts_it_again(start, config):
    run = start([*PROGRAM, "--config", str(config), "serve"])
    url = run.line(r"Open (.*)")[1]
    add(config, "alice")
    cookie = sign_in(url, "alice", "correct horse battery")
    until("alice's app answers", lambda: ask(url, Cookie=cookie)[0] == 200)
    old = daemon(run, "manager")
    os.kill(old, signal.SIGKILL)
    assert ask(url, Cookie=cookie)[0] == 200
    run.line(
        r"dispatcher: the manager was killed by signal 9 \(Killed\); starting it again \(agents keep running\)"
    )
    until("the manager is back", lambda: cli(config, "list").returncode == 0)
    assert daemon(run, "manager") != old
    os.kill(daemon(run, "proxy"), signal.SIGKILL)
    run.line(r"dispatcher: the proxy was killed by signal 9 .*")
    until("the proxy is back", lambda: ask(url, Cookie=cookie)[0] == 200)


def test_serve_ends_when_a_half_cannot_start(start, config, short_tmp, free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        run = start([*PROGRAM, "--config", str(config), "serve"])
        assert run.process.wait(60) != 0
    run._reader.join(5)
    assert "Cannot listen" in run.text
    assert "The proxy ended with exit code" in run.text
    assert "Traceback" not in run.text
    assert not processes_with(str(config))


def test_both_end_with_serve_however_it_ends_and_agents_go_on(start, config):
    run = start([*PROGRAM, "--config", str(config), "serve"])
    url = run.line(r"Open (.*)")[1]
    add(config, "alice")
    assert cli(config, "start", "alice").returncode == 0
    twice = cli(config, "serve")
    assert twice.returncode == 4
    assert "A manager is already running" in twice.stderr
    run.process.kill()
    run.process.wait()
    until("both have ended", lambda: not processes_with(str(config)))
    again = start([*PROGRAM, "--config", str(config), "serve"])
    assert again.line(r"Open (.*)")[1] == url
    assert json.loads(cli(config, "info", "alice", "--json").stdout)["state"] == "running"


def test_a_wrong_configuration_is_one_line(config):
    config.write_text("[proxy]\nworkerz = 1\n")
    for command in ("serve", "manager", "proxy"):
        done = cli(config, command)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "proxy.workerz: unknown key, did you mean 'workers'?" in done.stderr


def test_reload_reaches_both(start, config):
    run = start([*PROGRAM, "--config", str(config), "serve"])
    url = run.line(r"Open (.*)")[1]
    add(config, "alice")
    cookie = sign_in(url, "alice", "correct horse battery")
    config.write_text(config.read_text().replace("[proxy]", '[proxy]\naccess_log = "-"'))
    done = cli(config, "reload")
    assert done.returncode == 0, done.stderr
    assert "the proxy reloads the configuration" in done.stdout

    def logged():
        ask(url, path="/seen-after-reload", Cookie=cookie)
        return "/seen-after-reload" in run.text

    until("the access log speaks", logged)
    good = config.read_text()
    config.write_text("[manager]\nnonsense = 1\n")
    wrong = cli(config, "--manager", f"unix://{config.parent}/run/manager.sock", "reload")
    assert wrong.returncode == 2
    config.write_text(good)
    assert "nonsense" in wrong.stderr
    for name in ("one", "two"):
        make_certificate(config.parent / f"{name}.pem", config.parent / f"{name}.key", ["localhost"])
    pair = f'[proxy]\ntls_cert = "{config.parent}/one.pem"\ntls_key = "{config.parent}/two.key"'
    config.write_text(good.replace("[proxy]", pair))
    for command in (["reload"], ["config", "check"]):
        unusable = cli(config, *command)
        assert unusable.returncode == 2
        assert "proxy.tls_cert and proxy.tls_key cannot be used" in unusable.stderr
    assert "proxy.tls_cert and proxy.tls_key cannot be used" in cli(config, "doctor").stdout
    config.write_text(good)
    assert ask(url, Cookie=cookie)[0] in {200, 503}
    time.sleep(0.2)
    assert run.process.poll() is None


@pytest.mark.bubblewrap
def test_make_demo_ends_with_ctrl_c(start, tmp_path):
    """As a person in a terminal: Ctrl-C reaches make and all that it started at once."""
    prefix = Path(sys.prefix)
    directory = tmp_path / "demo"
    run = start(
        # -o: what is installed here is what is tried; how make installs it, CI shows.
        ["make", "demo", f"VENV={prefix}", "-o", str(prefix / ".demo"), f"ARGS=--directory {directory}"],
        cwd=ROOT,
    )
    url = run.line(r"Open (http://127\.0\.0\.1:\d+/)")[1]
    people = {name: run.line(rf"Sign in {name} / (\S+)")[1] for name in ("alice", "bob")}
    run.line("Ctrl-C ends it")
    use_the_demo(url, people)
    os.killpg(run.process.pid, signal.SIGINT)
    run.process.wait(60)
    until("everything has ended", lambda: not processes_with(str(directory)))
    until("the directory is gone", lambda: not directory.exists())
