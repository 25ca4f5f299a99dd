"""The Debian package on a whole machine: Debian or Ubuntu with its own kernel, systemd and cgroup version 2, emulated.

One machine serves all tests, in their order, from the installation to the removal.  Agents run the kit's probe, which
does in an agent what it is asked to.  The data is on a file system with project quotas.
"""

import json
import re
import shutil
import time
from shlex import quote

import pytest

from tests.support.package import newer, package
from tests.support.real_machine import ROOT, SUITE, Machine

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("machine"), pytest.mark.timeout(900)]

PASSWORD = "correct horse battery"
AGENTS = "/sys/fs/cgroup/dispatcher.slice/dispatcher-agents.service"
CONFIG = """
[providers.subprocess]
private_network = "{network}"
deny = ["198.18.99.0/24", "fd77:99::/64"]

[apps.probe]
start_timeout = "3m"  # a fifth of an emulated processor
memory = "64M"
cpus = 0.2
pids = 30
idle_timeout = "1h"

[apps.probe.subprocess]
command = ["/usr/bin/python3", "-S", "/usr/local/lib/probe.py", "--unix", "{{socket}}"]

[apps.small]
disk = "16M"

[apps.small.subprocess]
command = ["/usr/bin/python3", "-S", "/usr/local/lib/probe.py", "--unix", "{{socket}}"]

[apps.net]
network = "private"

[apps.net.subprocess]
command = ["/usr/bin/python3", "-S", "/usr/local/lib/probe.py", "--unix", "{{socket}}"]
"""
#: For private networks.  Ubuntu 22.04 has no pasta, without which an app's port is reached at the agent's address only.
HELPERS = ("slirp4netns",) if SUITE == "jammy" else ("pasta", "slirp4netns")
if "pasta" in HELPERS:
    CONFIG += """
[apps.port]
network = "private"

[apps.port.subprocess]
command = ["/usr/bin/python3", "-S", "/usr/local/lib/probe.py", "--tcp", "127.0.0.1:{{port}}"]
"""
DOCKER = """
[apps.box]
provider = "docker"
disk = "16M"

[apps.box.docker]
image = "skeleton"
command = ["/usr/bin/python3", "-S", "/usr/local/lib/probe.py", "--unix", "{socket}"]
mounts = [{ source = "/usr", target = "/usr" }]
"""
INSTALL = """
truncate -s 2G /srv/data && mkfs.ext4 -q -O quota,project /srv/data
echo "/srv/data /var/lib/dispatcher ext4 loop,prjquota 0 0" >>/etc/fstab
/srv/project/packaging/provision.sh --no-systemd --package /srv/package.deb >/srv/provision.out
cp /srv/project/dispatcher/testing/probe.py /usr/local/lib/
cat /srv/extra.toml >>/etc/dispatcher/dispatcher.toml
sed -i 's/^# access_log/access_log/' /etc/dispatcher/dispatcher.toml
"""
CONFIG_FILE = "/etc/dispatcher/dispatcher.toml"


class Service:
    """The service in the machine, through its REST interface: the command line takes seconds under emulation."""

    helper = ""  # the program of private networks
    socket = "/run/dispatcher/manager.sock"
    url = "https://localhost:8080"
    agents = AGENTS
    units = "-u 'dispatcher-*'"

    def __init__(self, machine):
        self.machine, self.run = machine, machine.run

    def api(self, method, path, body=None, status=range(200, 300)):
        data = f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'" if body else ""
        done = self.run(
            f"curl -sS -m 100 -X {method} {data} -w '\\n%{{http_code}}' --unix-socket {self.socket}"
            f" 'http://localhost{path}'",
            check=False,
        )
        assert done.code == 0, f"{method} {path}: {done.all}\n{self.journal()}"
        text, _, code = done.out.rpartition("\n")
        assert int(code) in status, f"{method} {path}: {done.out}"
        return json.loads(text) if text else None

    def add(self, name, app):
        self.api("POST", "/agents", {"name": name, "password": PASSWORD, "app": app})
        self.want(name, "running")

    def want(self, name, state):
        self.api("PUT", f"/agents/{name}/state?wait=60", {"state": state})
        self.until(f"{name} is {state}", lambda: self.state(name) == state)

    def state(self, name):
        return self.api("GET", f"/agents/{name}")["state"]

    def until(self, what, check, seconds=120):
        end = time.monotonic() + seconds
        while not (found := check()):
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.journal()}"
            time.sleep(1)
        return found

    def fill(self, name, mebibytes, start=0):
        """Let an agent write files of 1 MiB; return the answers, a word for each."""
        directory = re.search(r"DISPATCHER_DATA=([^\0]+)", self.ask(name, "/env"))[1]
        return self.run(
            "head -c 1M /dev/zero >/tmp/mebibyte; "
            f"for n in $(seq {start} {start + mebibytes - 1}); do curl -sS -m 60 --data-binary @/tmp/mebibyte"
            f" {self.endpoint(name)}/write?path={directory}/$n; echo; done"
        ).out.split()

    def disk(self, name):
        return self.api("GET", f"/agents/{name}")["disk"]

    def ask(self, name, path, data=None):
        """Send the probe of an agent a request, past the proxy, as root may."""
        method = "" if data is None else f"--data-binary '{data}'"
        return self.run(f"curl -g -sS -m 110 {method} {self.endpoint(name)}'{path}'", check=False).out

    def endpoint(self, name):
        """Return what curl needs for requests past the proxy, but the path."""
        kind, _, where = self.api("GET", f"/agents/{name}/runtime")["endpoint"].partition(":")
        return f"--unix-socket {where} http://localhost" if kind == "unix" else f"http://{where}"

    def sign_in(self, name):
        """Sign in through the proxy; return a command that sends its argument, an address, a request."""
        ask = f"curl -sS --fail -m 90 --cacert /etc/dispatcher/tls/cert.pem -b /tmp/jar-{name} -c /tmp/jar-{name}"
        ask += f" -H 'Accept: application/json' -H 'Origin: {self.url}'"
        body = json.dumps({"user": name, "password": PASSWORD})
        self.run(f"{ask} -H 'Content-Type: application/json' -d '{body}' {self.url}/auth/login")
        return ask

    def group(self, name):
        return self.run(f"ls -d {self.agents}/dispatcher-*/dispatcher-*-{name}-*").out.strip()

    def read(self, name, file):
        return self.run(f"cat {self.group(name)}/{file}").out.strip()

    def processes(self, name):
        return set(self.read(name, "cgroup.procs").split())

    def journal(self, since=""):
        return self.run(
            f"uptime; journalctl -b --no-pager {self.units} {since and f'--since=@{since}'} | tail -n 60"
        ).out

    def now(self):
        return self.run("sleep 1; date +%s").out.strip()


class OwnService(Service):
    """That of an ordinary user, zoe, who is logged in only while a command runs."""

    socket = "/run/user/2000/dispatcher/manager.sock"
    url = "http://127.0.0.1:8090"
    agents = (
        "/sys/fs/cgroup/user.slice/user-2000.slice/user@2000.service/dispatcher.slice/dispatcher-agents.service"
    )
    units = "_UID=2000"

    def login(self, script, **options):
        return self.run(f"runuser -l zoe -c {quote(script)}", **options)

    def documented(self, heading):
        """Return the last commands of a section of the documentation."""
        page = (ROOT / "docs/howto/run-as-an-ordinary-user.md").read_text().partition(f"## {heading}\n")[2]
        commands = page.partition("\n## ")[0].rpartition("```sh\n")[2].partition("```")[0]
        return f"set -e; cd /srv/project; {commands}"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    work = tmp_path_factory.mktemp("machine")
    project = work / "project"
    for name in ("dispatcher/testing", "packaging", "tests/support"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (work / "extra.toml").write_text(CONFIG.format(network=HELPERS[0]))
    files = {path.name: path for path in (project, work / "extra.toml")}
    built = package(SUITE)
    files |= {"package.deb": built, "newer.deb": newer(built, work / "newer.deb")}
    machine = Machine(files, install=INSTALL)
    try:
        machine.run("systemctl start dispatcher-manager dispatcher-proxy", timeout=300)
        made = Service(machine)
        made.add("alice", "demo")
        made.add("bob", "probe")
        yield made
    finally:
        machine.close()


def test_what_was_not_started_is_not_announced(service):
    told = service.run("cat /srv/provision.out").out
    assert "Open" not in told
    assert "systemctl start dispatcher-manager dispatcher-proxy" in told


def test_the_package_gives_each_file_to_its_owner(service):
    paths = (
        f"/etc/dispatcher/tls /etc/dispatcher/tls/key.pem {CONFIG_FILE} /var/lib/dispatcher /run/dispatcher/proxy"
    )
    found = service.run(f"stat -c '%a %U %G' {paths} /var/log/dispatcher").out.splitlines()
    assert found == [
        "750 root dispatcher-proxy",
        "640 root dispatcher-proxy",
        "644 root root",
        "711 root root",
        "700 dispatcher-proxy dispatcher-proxy",
        "750 dispatcher-proxy dispatcher-proxy",
    ]
    assert service.run("getent group dispatcher-admin").out


def test_the_units_are_what_systemd_understands(service):
    done = service.run("systemd-analyze verify /lib/systemd/system/dispatcher-*.service", check=False)
    assert not done.all


def test_the_daemons_have_the_rights_of_their_units_and_no_more(service):
    def status(unit):
        text = service.run(f"cat /proc/$(systemctl show -P MainPID dispatcher-{unit})/status").out
        return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)

    manager, proxy = status("manager"), status("proxy")
    assert manager["NoNewPrivs"] == proxy["NoNewPrivs"] == "1"
    assert 0 < int(manager["CapBnd"], 16).bit_count() <= 15
    assert "0" not in proxy["Uid"].split()
    assert {int(proxy[key], 16) for key in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh")} == {0}


def test_the_doctor_finds_no_error(service):
    findings = json.loads(service.run("dispatcher doctor --json", check=False).out)["findings"]
    assert [finding for finding in findings if finding["level"] == "error"] == []
    assert any("tls/cert.pem is valid until" in finding["what"] for finding in findings)


@pytest.mark.parametrize(("unit", "most"), [("manager", 5.0), ("proxy", 1.5), ("agents", 5.0)])
def test_the_exposure_of_the_units(service, unit, most):
    told = service.run(f"systemd-analyze security --no-pager dispatcher-{unit}").out
    assert float(re.search(r"exposure level for \S+: ([0-9.]+)", told)[1]) <= most


def test_people_sign_in_through_the_proxy(service):
    ask = f"{service.sign_in('alice')} {service.url}/about"
    assert json.loads(service.run(ask).out)["user"] == "alice"
    service.want("alice", "suspended")
    assert service.read("alice", "cgroup.events").splitlines()[1] == "frozen 1"
    assert json.loads(service.run(ask).out)["user"] == "alice"
    assert service.state("alice") == "running"


def test_the_access_log_is_rotated_while_the_proxy_goes_on(service):
    def lines(file):
        return service.run(f"grep -c /auth/login /var/log/dispatcher/{file}", check=False).out.strip()

    main = service.run("systemctl show -P MainPID dispatcher-proxy").out
    service.until("sign-in is logged", lambda: lines("access.log") == "1")
    service.run("logrotate --force /etc/logrotate.d/agent-dispatcher")
    assert lines("access.log.1") == "1"
    service.run("curl -sS -o /dev/null --insecure https://localhost:8080/auth/login")
    service.until("the next request is logged", lambda: lines("access.log") == "1")
    assert service.run("systemctl show -P MainPID dispatcher-proxy").out == main


def test_each_process_is_in_the_group_of_its_unit(service):
    assert len(service.processes("alice")) >= 3
    service.run(f"grep -q log_collector $(sed 's#.*#/proc/&/cmdline#' {AGENTS}/helpers/cgroup.procs)")
    (main,) = service.run(
        "cat /sys/fs/cgroup/dispatcher.slice/dispatcher-manager.service/cgroup.procs"
    ).out.split()
    assert main == service.run("systemctl show -P MainPID dispatcher-manager").out.strip()
    assert not service.run("ls -d /sys/fs/cgroup/dispatcher-*", check=False).out


def test_an_agent_cannot_end_the_others_by_a_message_to_systemd(service):
    """Without a sandbox, or with /run among its files, it reaches the socket for messages of services."""
    before = service.processes("alice")
    user = "setpriv --reuid=1999999999 --regid=1999999999 --clear-groups"
    message = f"NOTIFY_SOCKET=/run/systemd/notify {user} systemd-notify STOPPING=1"
    service.run(f"echo $$ >{service.group('bob')}/cgroup.procs; {message}", check=False)
    assert service.run("systemctl show -P SubState dispatcher-agents").out.strip() == "running"
    assert service.processes("alice") == before


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


def test_the_services_are_started_until_they_work(service):
    """A database server that boots for minutes, a certificate that is missing: systemd does not give up.

    Its default is to do so after five attempts within ten seconds, which an emulated machine does not manage: here
    after the first.
    """
    units = ("dispatcher-manager", "dispatcher-proxy")
    folders = [f"/run/systemd/system/{unit}.service.d" for unit in units]
    failing = "[Unit]\nStartLimitBurst=1\n[Service]\nExecStart=\nExecStart=/bin/false\nRestartSec=50ms\n"
    write = "; ".join(f"mkdir -p {folder} && cp /tmp/failing {folder}/failing.conf" for folder in folders)
    service.run(f"cat >/tmp/failing; {write}; systemctl daemon-reload", stdin=failing)
    for unit in reversed(units):  # the proxy's attempts wait for the end of the manager's
        service.run(f"systemctl restart --no-block {unit}")
        restarts = f"systemctl show -P NRestarts {unit}"
        service.until("three attempts", lambda restarts=restarts: int(service.run(restarts).out) >= 3)
    service.run(f"rm -r {' '.join(folders)} && systemctl daemon-reload")
    active = lambda: service.run(f"systemctl is-active {' '.join(units)}", check=False).out.split()
    service.until("both work", lambda: active() == ["active"] * 2)
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
        if "pasta" in HELPERS:  # as at the boot of a real machine
            service.run("apparmor_parser --replace /etc/apparmor.d/usr.bin.pas*")
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


@pytest.mark.release
@pytest.mark.skipif("pasta" not in HELPERS, reason="this release has no pasta")
def test_a_port_of_the_loopback_interface_in_a_private_network(service):
    private_network(service, "pasta")
    service.add("paul", "port")
    assert "uid=" in service.ask("paul", "/id")
    service.api("DELETE", "/agents/paul?wait=60")


@pytest.mark.parametrize(
    ("helper", "host"),
    [
        pytest.param(helper, host, marks=[pytest.mark.release] if helper == "slirp4netns" else [])
        for helper in HELPERS
        for host in (*OUTSIDE, *DENIED)
        if (helper, host) != ("slirp4netns", "[fd77:3::2]")  # it speaks IPv4 only
    ],
)
def test_a_private_network_leads_outside_but_not_to_what_is_denied(service, helper, host):
    private_network(service, helper)
    connect = lambda to: service.ask("carol", f"/connect?to=tcp:{to}:7777").strip()
    if host in DENIED:
        assert re.fullmatch("E[A-Z]+", connect(host))
    assert connect(host if host in OUTSIDE else OUTSIDE[0]) == "connected"


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


def fills_its_data_alone(service, name):
    """An agent with disk = "16M" is refused more, and another goes on."""
    answers = service.fill(name, 18)
    assert answers[:12] == ["done"] * 12
    assert answers[-1] == "EDQUOT"
    service.until("full data is shown", lambda: service.disk(name)["full"])
    assert service.disk(name)["limit"] == 16 << 20
    assert service.fill("carol", 1) == ["done"]


def test_a_project_quota_limits_the_data_of_an_agent(service):
    service.add("dora", "small")
    fills_its_data_alone(service, "dora")
    assert "full" in json.dumps(service.api("GET", "/agents/dora/why"))


def test_a_limit_of_data_is_raised_and_lowered(service):
    def limited(size, reload):
        service.run(f"sed -i 's/^disk = .*/disk = \"{size}\"/' {CONFIG_FILE} && {reload}")
        service.api("POST", "/agents/dora/restart?wait=60")
        service.want("dora", "running")

    limited("24M", "systemctl reload dispatcher-manager")
    assert service.fill("dora", 4, start=20) == ["done"] * 4
    limited("16M", "curl -sS -X POST --unix-socket /run/dispatcher/manager.sock http://localhost/reload")
    assert service.fill("dora", 1, start=30) == ["EDQUOT"]
    service.until("the use is shown; nothing is deleted", lambda: service.disk("dora")["used"] > 19 << 20)


def test_data_that_is_reset_or_purged_is_counted_no_more(service):
    uid = service.api("GET", "/agents/dora/runtime")["uid"]
    service.api("PUT", "/agents/dora/reset_data?wait=60")
    service.want("dora", "running")
    assert service.fill("dora", 4) == ["done"] * 4
    service.api("DELETE", "/agents/dora?data=keep&wait=60")
    code = (
        "import os, sys; from dispatcher.manager.files.quota import Kernel;"
        "print(Kernel().read(os.open('/var/lib/dispatcher/agents', os.O_RDONLY), int(sys.argv[1])).used >> 20)"
    )
    used = lambda: int(service.run(f'/usr/lib/agent-dispatcher/bin/python -c "{code}" {uid}').out)
    assert used() == 4
    assert service.api("DELETE", "/agents/dora/copies") == {"purged": 1}
    assert used() == 0


def test_a_project_quota_limits_the_data_of_a_container(service):
    service.run(
        "mkdir -p /tmp/i/{dev,etc,proc,run,sys,tmp,usr,var} && ln -sfn usr/bin usr/lib usr/lib64 /tmp/i"
        " && systemctl start docker && tar -C /tmp/i -c . | docker import - skeleton",
        timeout=300,
    )
    service.run(f"cat >>{CONFIG_FILE}", stdin=DOCKER)
    service.api("POST", "/reload")
    service.add("erin", "box")
    fills_its_data_alone(service, "erin")


def container(service, name, field="State.Pid"):
    filters = f"--filter label=dispatcher.agent={name}"
    return service.run(f"docker inspect -f '{{{{.{field}}}}}' $(docker ps -q {filters})").out.strip()


def test_a_container_is_confined_by_apparmor_in_a_group_of_systemds(service):
    assert service.run("docker info -f '{{.CgroupDriver}} {{.CgroupVersion}}'").out.split() == ["systemd", "2"]
    pid = container(service, "erin")
    assert service.run(f"cat /proc/{pid}/attr/current").out.strip("\n\0") == "docker-default (enforce)"
    assert f"system.slice/docker-{container(service, 'erin', 'Id')}" in service.run(f"cat /proc/{pid}/cgroup").out


def test_an_account_of_the_machine_signs_in_by_pam(service):
    """The unit leaves pam_unix the hashes; without the right to audit, libpam finds a kernel without it."""
    config = "[auth]\nauthenticator = ['local', 'pam']\n"
    service.run(
        f"useradd --no-create-home paula && chpasswd && printf {quote(config)} >>{CONFIG_FILE}"
        " && systemctl restart dispatcher-manager",
        stdin=f"paula:{PASSWORD}\nroot:{PASSWORD}\n",
        timeout=300,
    )
    assert service.run("dpkg-query -S /etc/pam.d/dispatcher").out.startswith("agent-dispatcher:")
    checks = service.api("GET", "/authenticator/check?plugin=pam")["findings"]
    assert [found["level"] for found in checks] == ["ok"], checks
    ask = service.sign_in("paula")
    assert json.loads(service.run(f"{ask} {service.url}/about").out)["user"] == "paula"
    for name, password in (("paula", "wrong"), ("root", PASSWORD)):
        body = quote(json.dumps({"user": name, "password": password}))
        head = f"-H 'Content-Type: application/json' -H 'Accept: application/json' -H 'Origin: {service.url}'"
        login = f"curl -sS -m 90 -o /dev/null -w '%{{http_code}}' --insecure {head} -d {body}"
        assert service.run(f"{login} {service.url}/auth/login").out == "403"
    assert "audit_log_acct_message" not in service.run("journalctl -b --no-pager --facility=authpriv").out
    service.api("DELETE", "/agents/paula?wait=60")


def test_a_port_below_1024_needs_a_capability_which_is_told(service):
    since = service.now()
    listen = 'listen = ["0.0.0.0:443"]\\nredirect_listen = ["0.0.0.0:80"]'
    service.run(
        f"sed -i 's/^listen = .*/{listen}/' {CONFIG_FILE} && systemctl reload dispatcher-proxy", timeout=300
    )
    service.until("the reload", lambda: "not applied" in service.journal(since))
    assert "systemctl edit dispatcher-proxy" in service.journal(since)
    assert service.run("curl -sS -o /dev/null --insecure https://localhost:8080/auth/login").code == 0
    text = (ROOT / "docs/howto/install-as-a-service.md").read_text()
    unit = text.partition("## Port 443\n")[2].partition("```ini\n")[2].partition("```")[0]
    service.run(
        "mkdir -p /etc/systemd/system/dispatcher-proxy.service.d"
        " && cat >/etc/systemd/system/dispatcher-proxy.service.d/override.conf"
        " && systemctl daemon-reload && systemctl restart dispatcher-proxy",
        stdin=unit,
        timeout=300,
    )
    found = service.run(
        "curl -sS -o /dev/null -w '%{http_code} ' --insecure https://localhost/auth/login;"
        " curl -sS -o /dev/null -w '%{http_code} %{redirect_url}' http://localhost/auth/login"
    ).out
    assert re.fullmatch(r"200 30[18] https://localhost/auth/login", found)
    assert service.run("curl -sS --insecure https://localhost:8080/", check=False).code == 7, "refused"
    service.url = "https://localhost"


#: Opens one connection after the other, and says for each what was answered.
VISITOR = """
import socket, ssl, time
context = ssl._create_unverified_context()
while True:
    try:
        with socket.create_connection(("127.0.0.1", 443), 200) as raw, context.wrap_socket(raw) as sock:
            sock.sendall(b"GET /auth/login HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
            print(sock.recv(20)[9:12].decode() or "nothing", flush=True)
    except OSError as error:
        print(error, flush=True)
    time.sleep(0.5)
"""


def test_an_upgrade_keeps_the_agents_running_and_refuses_no_connection(service):
    kept = lambda: (
        service.processes("alice"),
        service.processes("carol"),
        service.run("docker inspect -f '{{.State.Pid}}' $(docker ps -q)").out,
    )
    before = kept()
    mains = "systemctl show -P MainPID dispatcher-manager dispatcher-proxy dispatcher-agents"
    old = service.run(mains).out.split()
    service.run(
        'systemd-run --unit=visitor -p StandardOutput=file:/tmp/answers python3 -c "$(cat)"', stdin=VISITOR
    )
    service.until("a visitor", lambda: service.run("cat /tmp/answers", check=False).out)
    done = service.run("/srv/project/packaging/provision.sh --package /srv/newer.deb", timeout=600)
    assert re.search(r"Open https://machine/\nSHA-256 of its certificate: ([0-9A-F]{2}:){31}", done.out)
    time.sleep(2)
    service.run("systemctl stop visitor")
    answers = service.run("cat /tmp/answers").out.splitlines()
    assert set(answers) == {"200"}, answers
    assert len(answers) > 10
    new = service.run(mains).out.split()
    assert (new[0] != old[0], new[1] != old[1], new[2] == old[2]) == (True, True, True)
    assert kept() == before
    assert {service.state(name) for name in ("alice", "carol", "erin")} == {"running"}
    service.api("DELETE", "/agents/erin?wait=60")
    assert service.run("dpkg-query -Wf '${Version}' agent-dispatcher").out.startswith("1:")


OWN_CONFIG = """
[proxy]
listen = ["127.0.0.1:8090"]
"""


@pytest.fixture(scope="module")
def own(service):
    return OwnService(service.machine)


@pytest.mark.release
def test_an_ordinary_user_starts_the_service_by_units_of_its_own(own):
    config = OWN_CONFIG + CONFIG.format(network="auto")
    if SUITE == "jammy":
        own.run(own.documented("Ubuntu 22.04"))
    own.run("useradd --create-home --uid 2000 --shell /bin/bash zoe && loginctl enable-linger zoe")
    own.login("mkdir -p .local/bin .config/dispatcher; ln -s /usr/bin/dispatcher .local/bin")
    own.run("cat >/home/zoe/.config/dispatcher/dispatcher.toml", stdin=config)
    if SUITE == "noble":
        told = own.login("dispatcher providers check subprocess", check=False).all
        assert "without a sandbox: bwrap" in told
        assert "allow it by a profile of AppArmor" in told
        own.run(own.documented("Ubuntu 23.10 and later"))
    own.login(own.documented("Install"), timeout=300)
    own.add("alice", "probe")
    limits = {file: own.read("alice", file) for file in ("memory.max", "cpu.max", "pids.max")}
    assert limits == {"memory.max": str(64 << 20), "cpu.max": "20000 100000", "pids.max": "30"}


@pytest.mark.release
def test_the_agents_of_an_ordinary_user_live_on_without_a_login_and_over_a_restart(own):
    before = own.processes("alice")
    # From systemd 256 on the user's manager is a session, too.
    sessions = lambda: own.run("loginctl list-sessions --no-legend | grep zoe | grep -v manager", check=False).out
    own.until("the logout", lambda: not sessions())
    own.want("alice", "suspended")
    assert own.read("alice", "cgroup.events").splitlines()[1] == "frozen 1"
    own.run(f"{own.sign_in('alice')} {own.url}/env")
    assert own.state("alice") == "running"
    own.login("systemctl --user restart dispatcher-manager", timeout=200)
    assert own.processes("alice") == before
    assert own.state("alice") == "running"


@pytest.mark.release
def test_an_ordinary_users_agent_cannot_exceed_its_limits(own):
    assert int(own.ask("alice", "/fork?count=100", "")) < 30
    own.ask("alice", f"/memory?bytes={200 << 20}", "")
    own.until("its end is told", lambda: "out of memory" in json.dumps(own.api("GET", "/agents/alice/events")))
    own.want("alice", "running")


@pytest.mark.release
def test_a_rootless_engine_of_an_ordinary_user_is_refused(own):
    # As dockerd-rootless.sh, which Ubuntu's docker.io does not have.
    engine = "rm -f /run/docker /run/containerd /run/xtables.lock; exec dockerd"
    script = f"rootlesskit --net=slirp4netns --copy-up=/etc --copy-up=/run sh -c {quote(engine)}"
    script = f"PATH=$PATH:/usr/sbin:/sbin exec {script}"
    own.login(f"systemd-run --user --unit=rootless sh -c {quote(script)}")
    host = "unix:///run/user/2000/docker.sock"
    own.until("the engine", lambda: own.login(f"docker -H {host} info", check=False).code == 0)
    config = (
        f'[manager]\nrun_dir = "/home/zoe/no"\nstate_dir = "/home/zoe/no"\n[providers.docker]\nurl = "{host}"\n'
    )
    config += '[apps.box]\nprovider = "docker"\n[apps.box.docker]\nimage = "none"\n'
    own.run("cat >/home/zoe/rootless.toml", stdin=config)
    told = own.login("dispatcher --config rootless.toml providers check docker", check=False)
    own.login("systemctl --user stop rootless")
    assert told.code != 0
    assert "The Docker engine is rootless" in told.all
    assert "use the provider subprocess" in told.all


@pytest.mark.release
def test_an_engine_that_misses_the_parser_of_apparmor_is_told(service):
    """Not that the image has no such program."""
    service.add("fred", "box")
    service.want("fred", "stopped")
    service.run("mv /sbin/apparmor_parser /root/ && echo -n docker-default >/sys/kernel/security/apparmor/.remove")
    try:
        service.api("PUT", "/agents/fred/state?wait=60", {"state": "running"}, status=range(200, 600))
        told = lambda: json.dumps(service.api("GET", "/agents/fred/why"))
        service.until("the fix", lambda: "install apparmor on the engine's host" in told())
    finally:
        service.run("mv /root/apparmor_parser /sbin/")
    service.want("fred", "running")


@pytest.mark.release
def test_a_request_brings_an_agent_back_after_a_restart_of_the_engine(service):
    """The engine ends its containers."""
    ask, before = service.sign_in("fred"), container(service, "fred")
    service.run("systemctl restart docker", timeout=200)
    service.until("an answer", lambda: service.run(f"{ask} {service.url}/id", check=False).out)
    assert service.state("fred") == "running"
    assert container(service, "fred") != before


@pytest.mark.release
def test_a_container_is_to_run_over_a_reboot(service):
    service.run("systemctl enable docker", timeout=200)
    assert service.state("fred") == "running"


def test_after_a_reboot_agents_are_in_their_desired_state(service):
    service.want("bob", "stopped")
    service.machine.reboot()
    service.until("alice is back", lambda: service.state("alice") == "running")
    assert service.state("bob") == "stopped"
    assert service.run("systemctl --failed --plain --no-legend").out == ""


@pytest.mark.release
def test_after_a_reboot_the_container_runs_again(service):
    service.until("fred is back", lambda: service.state("fred") == "running")
    assert "uid=" in service.ask("fred", "/id")


@pytest.mark.release
def test_after_a_reboot_the_service_of_an_ordinary_user_is_back(own):
    own.until("zoe's manager is back", lambda: own.run(f"test -S {own.socket}", check=False).code == 0)
    own.until("her agent is back", lambda: own.state("alice") == "running")


@pytest.mark.release
def test_an_ordinary_user_removes_the_service(own):
    own.login(own.documented("Remove"), timeout=200)
    own.run("loginctl disable-linger zoe && loginctl terminate-user zoe", check=False)
    own.until("all ends", lambda: not own.run("pgrep -u zoe -a", check=False).out)
    own.run("userdel -r zoe")


def test_the_removal_of_the_package_as_documented(service):
    """It ends everything and keeps configuration and data, the purge keeps data; then nothing is left."""
    left = lambda: (
        service.run(
            "pgrep -af 'agent-dispatche[r]|bwra[p]|prob[e].py'; ls -d /sys/fs/cgroup/dispatcher* /dev/shm/dispatcher*;"
            " systemctl list-units --all --plain --no-legend 'dispatcher*' | grep -v -e not-found -e masked",
            check=False,
        ).out
    )
    data = "/var/lib/dispatcher/agents /var/lib/dispatcher/dispatcher.db"
    apt = "DEBIAN_FRONTEND=noninteractive apt-get -y -qq"
    text = (ROOT / "docs/howto/install-as-a-service.md").read_text()
    commands = text.partition("## Remove\n")[2].partition("```sh\n")[2].partition("```")[0]
    purge, _, rest = commands.partition("\n")
    assert purge == "apt purge agent-dispatcher"
    service.run(f"{apt} remove agent-dispatcher", timeout=300)
    assert left() == ""
    service.run(f"ls {CONFIG_FILE} /etc/dispatcher/tls/key.pem {data}")
    done = service.run(purge.replace("apt", apt), timeout=300)
    assert "rm -r /var/lib/dispatcher" in done.out
    service.run(f"ls {data}; umount /var/lib/dispatcher")
    service.run(f"{rest}\nrm -r /etc/systemd/system/dispatcher-proxy.service.d")  # as of `systemctl edit`
    found = service.run(
        "grep dispatcher /etc/passwd /etc/group;"
        " find / -xdev \\( -path /srv -o -path /proc -o -path /var/log/journal"
        " -o -path /var/lib/docker -o -path /var/lib/containerd \\) -prune"
        " -o -iname '*dispatcher*' -print",
        check=False,
    ).out
    assert [line for line in found.splitlines() if "networkd-dispatcher" not in line] == []
    assert left() == ""
