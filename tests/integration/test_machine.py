"""The installed service on a whole machine: Debian with its own kernel, systemd and cgroup version 2, emulated.

One machine serves all tests, in their order.  Agents run the kit's probe, which does in an agent what it is asked to.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.support.real_machine import PYTHON, ROOT, Machine

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("machine"), pytest.mark.timeout(900)]

PASSWORD = "correct horse battery"
AGENTS = "/sys/fs/cgroup/dispatcher.slice/dispatcher-agents.service"
CONFIG = """
[providers.subprocess]
private_network = "{network}"
deny = ["198.18.99.0/24", "fd77:99::/64"]

[apps.probe]
memory = "64M"
cpus = 0.2
pids = 30
idle_timeout = "1h"

[apps.probe.subprocess]
command = ["/usr/bin/python3", "-S", "/usr/local/lib/probe.py", "--unix", "{{socket}}"]

[apps.net]
network = "private"

[apps.net.subprocess]
command = ["/usr/bin/python3", "-S", "/usr/local/lib/probe.py", "--unix", "{{socket}}"]
"""
INSTALL = """
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/srv/wheels
/srv/project/packaging/provision.sh --no-systemd --wheel /srv/wheels/agent_dispatcher-*.whl
cp /srv/project/dispatcher/testing/probe.py /usr/local/lib/
cp /etc/dispatcher/dispatcher.toml /etc/dispatcher/own.toml
cat /srv/extra.toml >>/etc/dispatcher/dispatcher.toml
"""


class Service:
    """The service in the machine, through its REST interface: the command line takes seconds under emulation."""

    helper = ""  # the program of private networks

    def __init__(self, machine):
        self.machine, self.run = machine, machine.run

    def api(self, method, path, body=None, status=range(200, 300)):
        data = f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'" if body else ""
        done = self.run(
            f"curl -sS -m 100 -X {method} {data} -w '\\n%{{http_code}}' --unix-socket /run/dispatcher/manager.sock"
            f" 'http://localhost{path}'"
        )
        text, _, code = done.out.rpartition("\n")
        assert int(code) in status, f"{method} {path}: {done.out}"
        return json.loads(text) if text else None

    def add(self, name, app):
        self.api("POST", "/agents", {"name": name, "password": PASSWORD, "app": app})
        self.want(name, "running")

    def want(self, name, state):
        found = self.api("PUT", f"/agents/{name}/state?wait=60", {"state": state})
        assert found["state"] == state, found

    def state(self, name):
        return self.api("GET", f"/agents/{name}")["state"]

    def until(self, what, check, seconds=120):
        end = time.monotonic() + seconds
        while not (found := check()):
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.journal()}"
            time.sleep(1)
        return found

    def ask(self, name, path, data=None):
        """Send the probe of an agent a request, past the proxy, as root may."""
        socket = self.api("GET", f"/agents/{name}/runtime")["endpoint"].removeprefix("unix:")
        method = "" if data is None else f"--data-binary '{data}'"
        return self.run(
            f"curl -g -sS -m 60 {method} --unix-socket {socket} 'http://localhost{path}'", check=False
        ).out

    def group(self, name):
        return self.run(f"ls -d {AGENTS}/dispatcher-*/dispatcher-*-{name}-*").out.strip()

    def read(self, name, file):
        return self.run(f"cat {self.group(name)}/{file}").out.strip()

    def processes(self, name):
        return set(self.read(name, "cgroup.procs").split())

    def journal(self, since=""):
        return self.run(
            f"journalctl -b --no-pager -u 'dispatcher-*' {since and f'--since=@{since}'} | tail -n 60"
        ).out

    def now(self):
        return self.run("sleep 1; date +%s").out.strip()


def build(work):
    """Return what the machine gets: the project, and wheels for its Python, pure ones of the project itself."""
    project, wheels = work / "project", work / "wheels"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("dispatcher", "providers", "packaging", "tests/machine", "tests/support", "docs/howto"):
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    for name in "setup.py pyproject.toml README.md LICENSE CHANGELOG.md constraints.txt".split():
        shutil.copy(ROOT / name, project)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    environment = os.environ | {"DISPATCHER_PURE": "1"}
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, project], check=True, env=environment)
    shutil.rmtree(project / "build", ignore_errors=True)
    target = ["--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp"]
    target += [f"--abi={abi}" for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none")]
    target += [f"--platform={name}" for name in ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "any")]
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "download", *target, "-c", ROOT / "constraints.txt", "-d", wheels, wheel], check=True)
    (work / "extra.toml").write_text(CONFIG.format(network="pasta"))
    return {path.name: path for path in (project, wheels, work / "extra.toml")}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    machine = Machine(build(tmp_path_factory.mktemp("machine")), install=INSTALL)
    try:
        machine.run(
            "systemctl daemon-reload; systemctl enable --now dispatcher-manager dispatcher-proxy", timeout=300
        )
        made = Service(machine)
        made.add("alice", "demo")
        made.add("bob", "probe")
        yield made
    finally:
        machine.close()


@pytest.mark.parametrize(("unit", "most"), [("manager", 5.0), ("proxy", 1.5), ("agents", 5.0)])
def test_the_exposure_of_the_units(service, unit, most):
    told = service.run(f"systemd-analyze security --no-pager dispatcher-{unit}").out
    assert float(re.search(r"exposure level for \S+: ([0-9.]+)", told)[1]) <= most


def test_people_sign_in_through_the_proxy(service):
    ask = "curl -sS -m 90 --cacert /etc/dispatcher/tls/cert.pem -b /tmp/jar -c /tmp/jar -H 'Accept: application/json'"
    ask += " -H 'Origin: https://localhost:8080'"
    body = json.dumps({"user": "alice", "password": PASSWORD})
    json_type = "-H 'Content-Type: application/json'"
    service.run(f"{ask} --fail {json_type} -d '{body}' https://localhost:8080/auth/login")
    assert json.loads(service.run(f"{ask} https://localhost:8080/about").out)["user"] == "alice"
    service.want("alice", "suspended")
    assert service.read("alice", "cgroup.events").splitlines()[1] == "frozen 1"
    assert json.loads(service.run(f"{ask} https://localhost:8080/about").out)["user"] == "alice"
    assert service.state("alice") == "running"


def test_each_process_is_in_the_group_of_its_unit(service):
    assert len(service.processes("alice")) >= 3
    service.run(f"grep -q log_collector $(sed 's#.*#/proc/&/cmdline#' {AGENTS}/helpers/cgroup.procs)")
    (main,) = service.run(
        "cat /sys/fs/cgroup/dispatcher.slice/dispatcher-manager.service/cgroup.procs"
    ).out.split()
    assert main == service.run("systemctl show -P MainPID dispatcher-manager").out.strip()
    assert not service.run("ls -d /sys/fs/cgroup/dispatcher-*", check=False).out


@pytest.mark.parametrize("unit", ["manager", "proxy"])
def test_agents_survive_the_restart_of_a_daemon(service, unit):
    before, since = service.processes("alice"), service.now()
    service.run(f"systemctl restart dispatcher-{unit}", timeout=200)
    assert service.processes("alice") == before
    assert service.state("alice") == "running"
    told = service.journal(since)
    assert "left-over" not in told and "remains running" not in told and "Killing process" not in told, told


def test_daemon_reload_changes_no_limit_of_agents(service):
    service.want("alice", "suspended")
    files = ["memory.max", "cpu.max", "pids.max", "cgroup.freeze", "cgroup.procs"]
    before = [service.read(name, file) for name in ("alice", "bob") for file in files]
    service.run("systemctl daemon-reload && systemctl set-property --runtime dispatcher-agents CPUWeight=90")
    assert [service.read(name, file) for name in ("alice", "bob") for file in files] == before
    service.want("alice", "running")


@pytest.mark.parametrize("unit", ["manager", "proxy"])
def test_a_service_is_started_until_it_works(service, unit):
    """A database server that boots for minutes, a certificate that is missing: systemd does not give up."""
    folder = f"/run/systemd/system/dispatcher-{unit}.service.d"
    failing = "[Service]\nExecStart=\nExecStart=/bin/false\nRestartSec=50ms\n"
    service.run(f"mkdir -p {folder} && cat >{folder}/failing.conf && systemctl daemon-reload", stdin=failing)
    service.run(f"systemctl restart --no-block dispatcher-{unit}")
    restarts = f"systemctl show -P NRestarts dispatcher-{unit}"
    service.until("twenty attempts", lambda: int(service.run(restarts).out) >= 20)
    service.run(f"rm -r {folder} && systemctl daemon-reload")
    service.until(
        f"{unit} works",
        lambda: service.run(f"systemctl is-active dispatcher-{unit}", check=False).out.strip() == "active",
    )
    assert service.state("alice") == "running"


def test_the_limits_of_an_agent_are_the_kernels(service):
    found = {file: service.read("bob", file) for file in ("memory.max", "cpu.max", "pids.max")}
    assert found == {"memory.max": str(64 << 20), "cpu.max": "20000 100000", "pids.max": "30"}


def test_a_process_bomb_stays_in_its_agent(service):
    assert int(service.ask("bob", "/fork?count=100", "")) < 30
    assert int(re.search(r"max (\d+)", service.read("bob", "pids.events"))[1]) > 0
    assert service.ask("alice", "/about")


def test_processor_time_is_limited_and_counted(service):
    used = lambda: int(re.search(r"usage_usec (\d+)", service.read("bob", "cpu.stat"))[1])
    before, begun = used(), time.monotonic()
    service.ask("bob", "/burn?seconds=5", "")
    took = time.monotonic() - begun
    assert (used() - before) / 1e6 < took * 0.35, "a fifth of a processor"
    assert int(re.search(r"nr_throttled (\d+)", service.read("bob", "cpu.stat"))[1]) > 0
    told = service.api("GET", "/stats/memory_usage")
    assert "bob" in json.dumps(told)


def test_a_memory_bomb_ends_its_agent_alone_and_is_told(service):
    others = service.processes("alice")
    service.ask("bob", f"/memory?bytes={200 << 20}", "")
    service.until(
        "bob's end is told", lambda: "out of memory" in json.dumps(service.api("GET", "/agents/bob/events"))
    )
    assert "memory" in service.run("dispatcher why bob").all
    assert service.processes("alice") == others
    assert service.run("systemctl is-active dispatcher-agents dispatcher-manager").out.split() == ["active"] * 2
    service.want("bob", "running")


def test_the_ceilings_of_memory_fit_the_machine(service):
    total = int(service.run("sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo").out) << 10
    most = {
        unit: int(service.run(f"cat /sys/fs/cgroup/dispatcher.slice/dispatcher-{unit}.service/memory.max").out)
        for unit in ("agents", "manager", "proxy")
    }
    assert total * 0.7 < most["agents"] < total * 0.85
    assert 512 << 20 < most["manager"] < total * 0.8
    assert 512 << 20 < most["proxy"] < total * 0.8
    used = int(service.run("cat /sys/fs/cgroup/dispatcher.slice/dispatcher-manager.service/memory.current").out)
    assert used < most["manager"] / 3


def test_the_agents_end_with_their_unit_and_come_back_with_the_manager(service):
    service.want("bob", "suspended")
    before = service.processes("alice") | service.processes("bob")
    service.run("systemctl stop dispatcher-agents", timeout=200)
    alive = [pid for pid in before if service.run(f"test -e /proc/{pid}", check=False).code == 0]
    assert not alive
    assert service.run("systemctl is-active dispatcher-manager", check=False).out.strip() == "inactive"
    service.run("systemctl start dispatcher-manager", timeout=200)
    service.until("alice is back", lambda: service.state("alice") == "running")


#: Answers behind the machine: what an agent with a private network reaches, and what it must not.
OUTSIDE = ("198.18.77.2", "[fd77:3::2]", "name.example")
DENIED = (
    "169.254.169.254",
    "[fd00:ec2::254]",
    "198.18.99.1",
    "[fd77:99::1]",
    "198.18.77.1",
    "[fd77:2::1]",
    "[fd77:2::2]",
)
INTERNET = """
import pathlib, subprocess, sys, time
from tests.support.outside import Outside
outside = Outside("203.0.113.7", "169.254.169.254", "fd00:ec2::254", "198.18.99.1", "fd77:99::1", "fd77:3::2")
with outside:
    code = "from tests.support.outside import serve_names; serve_names('198.18.77.2', 7); import time; time.sleep(1e6)"
    subprocess.Popen(["ip", "netns", "exec", outside.name, sys.executable, "-c", code])
    own = "import socket; s = socket.create_server(('::', 7777), family=socket.AF_INET6, dualstack_ipv6=True); s.listen()"
    subprocess.Popen([sys.executable, "-c", own + "\\nwhile True: s.accept()"])
    pathlib.Path("/etc/resolv.conf").write_text("nameserver 198.18.77.2\\n")
    subprocess.run(["ip", "route", "add", "default", "via", "198.18.77.2"], check=True)
    subprocess.run(["ip", "-6", "route", "add", "default", "via", "fd77:2::2"], check=True)
    time.sleep(1e6)
"""


def private_network(service, helper):
    """Let the agent carol have a private network by that program, with an outside behind the machine."""
    if service.helper == helper:
        return
    if not service.helper:
        service.run(
            'systemctl is-active internet || systemd-run --unit=internet -E PYTHONPATH=/srv/project python3 -c "$(cat)"',
            stdin=INTERNET,
        )
        reachable = " && ".join(f"exec 3<>/dev/tcp/{host.strip('[]')}/7777" for host in (*OUTSIDE, *DENIED))
        service.until("the outside", lambda: service.run(reachable, check=False).code == 0)
    config = "/etc/dispatcher/dispatcher.toml"
    service.run(
        f"sed -i 's/^private_network = .*/private_network = \"{helper}\"/' {config} && systemctl restart dispatcher-manager",
        timeout=300,
    )
    service.helper = helper
    if any(agent["name"] == "carol" for agent in service.api("GET", "/agents")["agents"]):
        service.want("carol", "stopped")
        service.want("carol", "running")
    else:
        service.add("carol", "net")


@pytest.mark.parametrize(
    ("helper", "host"),
    [
        (helper, host)
        for helper in ("pasta", "slirp4netns")
        for host in (*OUTSIDE, *DENIED)
        if (helper, host) != ("slirp4netns", "[fd77:3::2]")  # it speaks IPv4 only
    ],
)
def test_a_private_network_leads_outside_but_not_to_what_is_denied(service, helper, host):
    private_network(service, helper)
    found = service.ask("carol", f"/connect?to=tcp:{host}:7777").strip()
    assert found == "connected" if host in OUTSIDE else re.fullmatch("E[A-Z]+", found)


def test_a_renewed_certificate_is_served_after_a_reload_that_fails_if_it_cannot_be(service):
    """With certbot's deploy hook of the documentation, and without it: a key that only root can read."""
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=new -keyout {} -out {}"
    tls = "/etc/dispatcher/tls"
    served = lambda: (
        service.run("openssl s_client -connect localhost:8080 </dev/null 2>&1 | openssl x509 -noout -subject").out
    )
    service.run(
        f"cp -a {tls} /root/tls; {made.format(f'{tls}/key.pem', f'{tls}/cert.pem')}; chmod 600 {tls}/key.pem; chown root:root {tls}/key.pem"
    )
    done = service.run("systemctl reload dispatcher-proxy", check=False, timeout=200)
    assert done.code != 0
    assert "proxy.tls_key: cannot read" in service.run("journalctl -b --no-pager -u dispatcher-proxy -n 20").out
    assert service.run("systemctl is-active dispatcher-proxy").out.strip() == "active" and "new" not in served()
    hook = (ROOT / "docs/howto/install-as-a-service.md").read_text()
    hook = hook.partition("renewal-hooks/deploy/dispatcher`")[2].partition("```sh\n")[2].partition("```")[0]
    service.run(f"mkdir -m 700 /root/live; cd /root/live; {made.format('privkey.pem', 'fullchain.pem')}")
    service.run(
        "cat >/root/hook && chmod +x /root/hook && RENEWED_LINEAGE=/root/live /root/hook", stdin=hook, timeout=200
    )
    service.until("the new certificate", lambda: "new" in served())
    service.run(f"rm -r {tls}; cp -a /root/tls {tls}; systemctl reload dispatcher-proxy", timeout=200)


def test_an_upgrade_keeps_the_agents_running(service):
    before = service.processes("alice")
    done = service.run(
        "PIP_NO_INDEX=1 PIP_FIND_LINKS=/srv/wheels"
        " /srv/project/packaging/provision.sh --wheel /srv/wheels/agent_dispatcher-*.whl",
        timeout=600,
    )
    assert "Open https://" in done.out
    assert service.processes("alice") == before
    assert service.state("alice") == "running"


def test_after_a_reboot_agents_are_in_their_desired_state(service):
    service.want("bob", "stopped")
    service.machine.reboot()
    service.until(
        "the manager", lambda: service.run("systemctl is-active dispatcher-manager", check=False).code == 0
    )
    service.until("alice is back", lambda: service.state("alice") == "running")
    assert service.state("bob") == "stopped"
    assert service.run("systemctl --failed --plain --no-legend").out == ""


def test_the_removal_as_documented_leaves_nothing(service):
    text = (ROOT / "docs/howto/install-as-a-service.md").read_text()
    commands = text.partition("## Remove\n")[2].partition("```sh\n")[2].partition("```")[0]
    assert "disable" in commands
    service.run(commands, timeout=200)
    rest = service.run(
        "pgrep -af 'dispatcher|bwrap' | grep -v pgrep; ls -d /sys/fs/cgroup/dispatcher* /dev/shm/dispatcher*;"
        " find / -xdev -path /srv -prune -o -iname '*dispatcher*' -not -path '/var/log/*' -not -path '/proc/*' -print;"
        " grep dispatcher /etc/passwd /etc/group; systemctl list-units --all --plain --no-legend 'dispatcher*'",
        check=False,
    )
    assert [line for line in rest.out.splitlines() if "networkd-dispatcher" not in line] == []
