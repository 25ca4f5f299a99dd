"""The commands of the documentation, run as they stand, page by page, as root of a machine of their own.

That machine is a set of namespaces: /etc is a copy, /opt, /run, /srv, /tmp and /var/lib are empty, and the network is a
loopback interface.  Manager and proxy run in it with the page's own configuration, added to BASE.  Functions of the
shell stand for `systemctl` and `journalctl`; somebody types PASSWORD where one is asked for.
"""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from tests.conftest import ROOT
from tests.support.certificates import Authority
from tests.support.documentation import PAGES, blocks, configuration, merged, tomllib
from tests.support.installation import APP, PASSWORD

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap]

#: Stands for programs that are not installed here; listens on the socket of its last or its `sock=` argument.
PROGRAM = f"""#!/usr/bin/python3
import sys
paths = [word.rpartition("=")[2] for word in sys.argv if "sock=" in word]
sys.argv[1:] = paths or sys.argv[-1:]
{APP}"""
PROGRAMS = ("/opt/lab/bin/lab", "/opt/apps/bin/jupyter-lab", "/tmp/quick/datasette/bin/datasette")
BASE = """
default_app = "lab"
[apps.lab.subprocess]
command = ["/opt/lab/bin/lab", "{socket}"]
read_only = ["/opt/lab"]
"""

SHELL = r"""
set -euo pipefail
mount --make-rprivate /
ip link set lo up
repository=$PWD inputs=$1
# The clone and its Python environment stay visible, wherever they are.
mount -t tmpfs tmpfs /mnt
mkdir /mnt/repository /mnt/prefix
mount --bind "$repository" /mnt/repository
mount --bind "$PYTHON_PREFIX" /mnt/prefix
mount -t tmpfs -o mode=755 tmpfs /opt
cp -a "$inputs" /opt/inputs
for directory in /home /srv /var/lib /run; do mount -t tmpfs -o mode=755 tmpfs "$directory"; done
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p "$repository" "$PYTHON_PREFIX"
mount --bind /mnt/repository "$repository"
mount --bind /mnt/prefix "$PYTHON_PREFIX"
cp -a /etc /opt/etc
mount --bind /opt/etc /etc
mkdir -p /etc/dispatcher /srv/backup /opt/clone
cp /opt/inputs/dispatcher.toml /etc/dispatcher/
printf '127.0.0.1 localhost apps.example.org host\n::1 localhost\n' > /etc/hosts
mkdir -p /etc/ssl/certs
cat /opt/inputs/authority.pem >> /etc/ssl/certs/ca-certificates.crt
for program in PROGRAMS; do install -D -m 755 /opt/inputs/program "$program"; done
cd /opt/clone
ln -s "$repository"/* .
ln -s "$PYTHON_PREFIX" .venv
export PATH=$PYTHON_PREFIX/bin:$PATH
cp /opt/inputs/authority.pem manager.crt
cp /opt/inputs/page.toml dispatcher.toml

retry() { local - tries=0; set +x; until "$@" > /dev/null 2>&1; do [ $((tries += 1)) -lt 200 ]; sleep 0.1; done; }
manager_up() { curl -sf --unix-socket "${1:-/run/dispatcher}/manager.sock" http://manager/healthz; }
SITE=http://localhost:8080
proxy_up() { curl -sk "$SITE/auth/login" || curl -sk https://localhost/auth/login; }
systemctl() {
    local - verb=$1 unit; set +x; shift
    for unit; do
        unit=${unit#dispatcher-}
        case $verb in stop | restart) kill "$(cat "/tmp/$unit.pid")"; while kill -0 "$(cat "/tmp/$unit.pid")" 2> /dev/null; do sleep 0.1; done;; esac
        case $verb in start | restart) dispatcher "$unit" >> "/tmp/$unit.log" 2>&1 & echo $! > "/tmp/$unit.pid"; retry "${unit}_up";; esac
    done
}
journalctl() { cat /tmp/manager.log; }
sign_in() {
    curl -sSf -c /tmp/jar -H 'Content-Type: application/json' -d "{\"user\": \"$1\", \"password\": \"$PASSWORD\"}" "$SITE/auth/login"
    retry curl -sf -b /tmp/jar "$SITE/"
}
metrics_of_workers() { curl -s --unix-socket /run/dispatcher/manager.sock http://manager/metrics | grep dispatcher_edge_; }
service() { systemctl start dispatcher-manager; systemctl start dispatcher-proxy; }
finish() {
    local code=$? name
    set +x
    [ "$code" = 0 ] || tail -n 20 /tmp/*.log
    for name in $(dispatcher list --json 2> /dev/null | grep -oP '"name": *"\K[^"]+'); do dispatcher remove --yes "$name" || true; done
    exit "$code"
}
trap finish EXIT
user() { printf '%s\n' "$PASSWORD" | dispatcher add --password-stdin "$1"; }
"""

#: What a page takes for granted, and places of it that stand for something else.
BEFORE = {
    "docs/explanation/portal.md": "service; user alice",
    "docs/howto/administer-from-elsewhere.md": "touch /etc/dispatcher/tokens; chmod 600 /etc/dispatcher/tokens; service",
    "docs/howto/copy-the-database.md": "service; user alice",
    "docs/howto/from-jupyterhub.md": "service; install -D /etc/passwd /home/alice/papers/notes",
    "docs/howto/give-secrets-to-an-app.md": "export LAB_API_TOKEN=secret; service",
    "docs/howto/jupyterlab.md": "service; cat examples/jupyterlab.toml >> /etc/dispatcher/dispatcher.toml",
    "docs/howto/limit-resources.md": "service; user alice; dispatcher start alice",
    "docs/howto/monitor.md": "SITE=https://localhost:8080; service; user alice; sign_in alice; retry metrics_of_workers",
    "docs/howto/share-folders.md": "service",
    "docs/howto/upgrade.md": "service; user alice",
    "docs/howto/use-tokens.md": "service; user alice",
    "docs/reference/rest.md": "openssl rand -hex 32 > token; chmod 600 token; service; user alice",
}
INSTEAD = {
    "README.md": [("make ", "make -n ")],
    "CONTRIBUTING.md": [("make ", "make -n ")],
    "docs/howto/administer-from-elsewhere.md": [
        ("--token-file token", "--token-file /etc/dispatcher/tokens"),
        ("SHA256", '"$(journalctl | grep -oE "([0-9a-f]{2}:?){32}" | tail -n 1)"'),
    ],
    "docs/howto/give-secrets-to-an-app.md": [("secrets/lab-db  ", "secrets/lab-db <<< secret  ")],
    "docs/tutorial/quick-start.md": [
        ('make demo ARGS="--directory /tmp/try"', "dispatcher demo --directory /tmp/try & retry proxy_up"),
        ("config check\n", "config check\nkill %1; wait %1\n"),
        ("dispatcher running ", "sign_in alice; dispatcher running "),
        ("dispatcher logs -f alice ", "timeout 2 dispatcher logs -f alice || [ $? = 124 ] "),
    ],
}  # fmt: skip
SERVED = """
[manager]
listen = ["127.0.0.1:4443"]
tls_cert = "/opt/inputs/host.crt"
tls_key = "/opt/inputs/host.key"
[proxy]
listen = ["127.0.0.1:443"]
tls_cert = "/opt/inputs/host.crt"
tls_key = "/opt/inputs/host.key"
"""
SETTINGS = {
    "docs/howto/monitor.md": """
[proxy]
tls_cert = "/opt/inputs/host.crt"
tls_key = "/opt/inputs/host.key"
""",
    "docs/howto/use-tokens.md": SERVED,
    "docs/reference/rest.md": SERVED.replace("[proxy]", 'token_file = "/opt/clone/token"\n[proxy]'),
}


def commands(page, name):
    text = "\n".join(block.text for block in blocks(page, "sh") if not block.mark)
    for old, new in INSTEAD.get(name, []):
        assert old in text, f"{name} has no {old!r}"
        text = text.replace(old, new)
    lines = []
    for line in text.replace('"password": "..."', f'"password": "{PASSWORD}"').splitlines():
        line = line.rstrip()
        command = line.partition(" #")[0].rstrip(" &")
        lines.append(f"{command} &\nretry proxy_up" if command.endswith(" serve") else line)
    return "\n".join(lines) + "\n"


def run(script: str, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run it on a terminal, where somebody types PASSWORD when asked; return exit code and output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "setsid", "--ctty", "--wait",
         "bash", "-c", script, "bash", *arguments],
        cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    output, answered, end = b"", 0, time.monotonic() + 60
    try:
        while time.monotonic() < end:
            if not select.select([ours], [], [], 0.1)[0]:
                if output[answered:].rstrip().endswith(b"assword:"):
                    answered = len(output)
                    os.write(ours, PASSWORD.encode() + b"\n")
                continue
            try:
                piece = os.read(ours, 65536)
            except OSError:  # nobody has the terminal open any more
                break
            output += piece
    finally:
        if time.monotonic() > end:
            process.kill()
        os.close(ours)
    return process.wait(), output.decode(errors="replace").replace("\r\n", "\n")


def machine(inputs: Path, page: dict, settings: str, script: str) -> str:
    """Run a script in a machine with the configuration BASE, `settings` and that of a page; return its output."""
    whole = merged(merged(tomllib.loads(BASE), tomllib.loads(settings)), page)
    (inputs / "dispatcher.toml").write_text(tomli_w.dumps(whole))
    (inputs / "page.toml").write_text(tomli_w.dumps(page))
    (inputs / "program").write_text(PROGRAM)
    authority = Authority(inputs)
    authority.path.rename(inputs / "authority.pem")
    authority.issue("host", ["host", "apps.example.org", "localhost"])
    environment = {
        "PATH": os.environ["PATH"], "HOME": "/root", "TERM": "dumb", "LANG": "C.UTF-8",
        "PASSWORD": PASSWORD, "PYTHON_PREFIX": sys.prefix,
    }  # fmt: skip
    code, output = run(SHELL.replace("PROGRAMS", " ".join(PROGRAMS)) + script, [str(inputs)], environment)
    assert code == 0, output
    return output


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(not block.mark for block in blocks(page, "sh"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page_work(page: Path, tmp_path: Path) -> None:
    name = str(page.relative_to(ROOT))
    script = f"{BEFORE.get(name, '')}\nPS4='+ $SECONDS: '; set -x\n{commands(page, name)}"
    output = machine(tmp_path, configuration(page), SETTINGS.get(name, ""), script)
    if page.name == "monitor.md":
        named = re.findall(r"(?<!/)\bdispatcher_[a-z_]+", page.read_text())
        assert [metric for metric in named if metric not in output and metric != "dispatcher_agent_event"] == []


def test_a_proxy_that_root_started_reloads_root_s_file_and_needs_a_restart_for_port_443(tmp_path: Path) -> None:
    """docs/howto/install-as-a-service.md, Port 443."""
    output = machine(
        tmp_path,
        {},
        "",
        """
service
listen() { sed -i '/^\\[proxy/,$d' /etc/dispatcher/dispatcher.toml; printf '[proxy]\\nlisten = ["127.0.0.1:%s"]\\n' "$@" >> /etc/dispatcher/dispatcher.toml; }
says() { grep -q "$1" /tmp/proxy.log; }
serves() { curl -sf "http://127.0.0.1:$1/auth/health"; }
listen 8081
dispatcher reload
retry serves 8081
listen 443
dispatcher reload
retry says 'Cannot listen on 127.0.0.1:443: Permission denied'
serves 8081
kill "$(cat /tmp/proxy.pid)"
wait "$(cat /tmp/proxy.pid)"
dispatcher proxy 2> /dev/null &
retry serves 443
kill $!
wait $!
""",
    )
    assert "the proxy reloads the configuration" in output
