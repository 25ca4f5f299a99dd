"""Plugins at fault, all in one manager at the same time: each is contained and named, everything else goes on.

The distribution is a real one (`tests.support.broken`); each of its providers has an app of its own.  Times after which a
call counts as hanging are short here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dispatcher.client.manager_client import ManagerClient
from dispatcher.common import contained
from dispatcher.config.load import parse
from dispatcher.config.plugins import GROUP, Plugins
from dispatcher.manager import app
from dispatcher.manager.agents import queries, reconciler
from dispatcher.manager.agents.operations import readiness, runner, task
from dispatcher.manager.backends import backend, contained_provider, logs, pool
from dispatcher.plugin.errors import DispatcherError
from tests.conftest import ROOT
from tests.support import broken
from tests.support.broken import providers
from tests.support.installation import PASSWORD, Installation

CASES = providers.CASES | {
    name: broken.Case("refused", (words,), {}) for name, (_, words) in broken.MODULES.items()
}
CASES["no-attribute"] = broken.Case("refused", ("there_is_none",), {})
OBSERVERS = ("observer-hangs", "observer-exits", "observer-interrupts")
BY_OUTCOME = {outcome: [name for name, case in CASES.items() if case.outcome == outcome] for outcome in
              ("refused", "fails", "unknown", "runs")}  # fmt: skip
LIMIT = 0.4  # seconds for a call

pytestmark = pytest.mark.xdist_group("plugins")  # one manager for all


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        for module, names in {
            contained: "SECONDS",
            readiness: "OBSERVE",
            runner: "OBSERVE SUSPEND_TIME DESTROY_TIME",
            reconciler: "OBSERVE LIST_TIME",
            task: "STOP_SLACK",
            backend: "USAGE_TIME",
            contained_provider: "HANDLE_TIME USUAL_TIME",
            logs: "TIMEOUT",
            queries: "CHECK",
        }.items():
            for name in names.split():
                patch.setattr(module, name, LIMIT)
        patch.setattr(contained, "SECONDS", 2.5)
        patch.setattr(contained_provider, "USUAL_TIME", 3.0)
        patch.setattr(pool, "SLACK", LIMIT)
        patch.setattr(app, "FREEZE", 1e6)
        yield patch


@pytest.fixture(scope="module")
def house(patched, tmp_path_factory, request):
    """A manager with every broken provider and observer, and one provider that works; its client."""
    base = tmp_path_factory.mktemp("plugins")
    entries = broken.install(base / "site")
    patched.syspath_prepend(str(base / "site"))
    entries.append(EntryPoint("good", "tests.integration.test_plugins:good", GROUP))
    run_dir = f"/tmp/plugins-{os.getpid()}"
    apps = {name: {"provider": name, "max_restarts": 0, "start_timeout": 2, "stop_grace": 0.1, **case.app}
            for name, case in CASES.items()}  # fmt: skip
    config = parse(
        {
            "manager": {"state_dir": str(base / "state"), "run_dir": run_dir, "reconcile_interval": 3600},
            "plugins": list(OBSERVERS),
            "apps": apps | {"good": {"provider": "good"}},
        }
    )
    manager = app.Manager(config, plugins=Plugins(entries))
    manager.start()
    client = ManagerClient(f"unix://{manager.paths.manager_socket}", timeout=60)
    client.create_agent("alice", app="good", password=PASSWORD)
    assert client.set_state("alice", "running", wait=10)["state"] == "running"
    started = {}

    def start(name):
        own = ManagerClient(f"unix://{manager.paths.manager_socket}", timeout=60)
        try:
            own.create_agent(f"alice:{name}")
            own.set_state(f"alice:{name}", "running")
        except DispatcherError as error:
            started[name] = error
        finally:
            own.close()

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(start, CASES))
    try:
        yield manager, client, started
    finally:
        client.close()
        manager.close()
        providers.release()


class _Good(providers.Good):
    name = "good"


good = providers.Plugin(lambda: [_Good])


def settled(client, name, *states, seconds=15):
    deadline = time.monotonic() + seconds
    while (view := client.agent(f"alice:{name}"))["state"] not in states and time.monotonic() < deadline:
        time.sleep(0.02)
    return view


def test_there_are_many_of_them():
    assert len(CASES) > 100


@pytest.mark.parametrize("name", BY_OUTCOME["refused"])
def test_an_app_of_a_plugin_that_cannot_be_used_is_refused(house, name):
    error = house[2][name]
    for words in CASES[name].words:
        assert words in f"{error}", f"{error}"
    assert broken.DISTRIBUTION in str(error)
    assert error.fix


@pytest.mark.parametrize("name", BY_OUTCOME["fails"])
def test_a_start_fails_with_the_reason(house, name):
    assert name not in house[2], house[2][name]
    view = settled(house[1], name, "failed")
    assert view["state"] == "failed", view
    failure = view["failure"]
    told = f"{failure['what']}: {failure['why']} ({failure['fix']})"
    for words in CASES[name].words:
        assert words in told
    assert len(told) < 6000
    assert told.isprintable() or "\n" in told
    if "Refused" not in told and "want to" not in told and "read its last lines" not in told:
        assert broken.DISTRIBUTION in told
    # A stop and a removal end within a time limit.
    house[1].set_state(f"alice:{name}", "stopped")


@pytest.mark.parametrize("name", BY_OUTCOME["unknown"])
def test_a_backend_without_a_list_is_not_reachable(house, name):
    def state():
        return next(each for each in house[1].providers()["providers"] if each["name"] == name)

    deadline = time.monotonic() + 10
    while state()["usable"] and time.monotonic() < deadline:
        time.sleep(0.05)
    for words in CASES[name].words:
        assert words in state()["error"]
    found = house[1].check_provider(name)["findings"]
    assert any(item["level"] == "error" and "cannot be listed" in item["what"] for item in found)
    assert any("does not answer" in line for line in house[1].why(f"alice:{name}")["sentences"])


@pytest.mark.parametrize("name", BY_OUTCOME["runs"])
def test_a_fault_in_what_is_asked_harms_no_agent(house, name):
    client, agent = house[1], f"alice:{name}"
    assert settled(client, name, "running")["state"] == "running"
    for ask in (
        lambda: client.runtime(agent),
        lambda: client.logs(agent, tail=5),
        lambda: client.check_provider(name, name),
        lambda: client.why(agent),
    ):
        began = time.monotonic()
        try:
            answer = str(ask())
        except DispatcherError as error:
            answer = str(error)
            assert name in answer
            assert broken.DISTRIBUTION in answer
        assert len(answer) < 200_000
        assert time.monotonic() - began < 20


def test_everything_else_goes_on(house):
    manager, client, _ = house
    health = client.healthz()
    assert health["status"] == "degraded"
    assert any(
        "observer-hangs" not in problem and broken.DISTRIBUTION in problem for problem in health["problems"]
    )
    assert {row["name"] for row in client.memory_usage()["agents"]} >= {"alice"}
    assert any(row["name"] == "alice" and row["memory"] for row in client.top()["agents"])
    proxy = ManagerClient(f"unix://{manager.paths.proxy_socket}", timeout=30)
    signed_in = proxy.login("alice", PASSWORD, "192.0.2.1", "")
    assert signed_in["token"]
    proxy.close()
    assert client.set_state("alice", "stopped", wait=10)["state"] == "stopped"
    assert client.set_state("alice", "running", wait=10)["state"] == "running"


def test_what_a_provider_changes_of_its_arguments_affects_nobody(house):
    manager, client, _ = house
    settled(client, "changes-arguments", "running")
    app = manager.supervisor.registry.specs.app("changes-arguments")
    assert "CHANGED" not in app.environment
    assert "CHANGED" not in app.fingerprint_text
    assert not client.agent("alice:changes-arguments")["outdated"]


def test_values_of_a_provider_s_own_types_are_plain_in_answers(house):
    client, agent = house[1], "alice:values-of-own-types"
    assert settled(client, "values-of-own-types", "running")["state"] == "running"
    assert client.runtime(agent)["started_at"] == "1970-01-01T00:00:05.000+00:00"
    assert client.logs(agent, tail=5)["lines"] == ["a line"]
    assert [row["memory"] for row in client.top()["agents"] if row["name"] == agent] == [5]
    assert client.set_state(agent, "stopped", wait=10)["state"] == "stopped"


def test_each_plugin_is_listed_with_its_distribution_and_its_fault(house):
    states = {state["name"]: state for state in house[1].plugins()["plugins"]}
    assert {states[name]["distribution"] for name in CASES} == {broken.DISTRIBUTION}
    for name in BY_OUTCOME["refused"]:
        if not name.startswith(("validator", "serialiser")):  # of the app: the provider itself works
            assert states[name]["error"], name
    assert states["observer-exits"]["kinds"] == ["observer"]
    assert not states["runs-nowhere"]["configured"]


def test_an_observer_that_hangs_is_told(house, patched):
    from dispatcher.manager.agents import observers

    patched.setattr(observers, "SLOW", 0.0)
    states = {state["name"]: state for state in house[1].plugins()["plugins"]}
    assert "has not returned" in states["observer-hangs"]["error"]
    text = house[0].services.metrics.text().decode()
    assert 'dispatcher_observer_waiting{plugin="observer-hangs"} 0.0' not in text
    assert 'dispatcher_observer_failures_total{plugin="observer-exits"} 0.0' not in text
    assert 'dispatcher_observer_waiting{plugin="dispatcher-log"} 0.0' in text


# --- as a process of its own


APPS = """

[apps.web.subprocess]
command = ["{python}", "{app}", "{{socket}}"]
read_only = ["{app}"]
"""


@pytest.fixture
def place(short_tmp, monkeypatch):
    broken.install(short_tmp / "site")
    monkeypatch.setenv("PYTHONPATH", f"{short_tmp / 'site'}:{ROOT}")
    (short_tmp / "i").mkdir()
    (short_tmp / "i").chmod(0o755)
    apps = APPS + '[apps.bad]\nprovider = "exits"\n'
    with Installation(short_tmp / "i", apps, 'default_app = "web"') as place:
        yield place


def test_plugins_that_leave_do_not_take_the_manager_with_them(place):
    """At the start and at a reload; the listeners go on."""
    place.start("manager")
    place.add("alice")
    assert place.admin("PUT", "/agents/alice/state?wait=20", {"state": "running"}).status == 200
    text = place.config.read_text()
    for name in ("interrupts", "init-exits", "hook-interrupts", "observer-exits", "fatal"):
        more = f'[apps.x]\nprovider = "{name}"\n' if "observer" not in name else ""
        first = f'plugins = ["{name}"]\n' if "observer" in name else ""
        place.config.write_text(first + text + more)
        answer = place.admin("POST", "/reload")
        if name in {"interrupts", "hook-interrupts", "fatal"}:
            assert (answer.status, broken.DISTRIBUTION in answer.body.decode()) == (400, True)
        assert place.admin("GET", "/agents/alice").json()["state"] == "running"
    assert place.processes["manager"].poll() is None
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(place.base / "run/proxy.sock"))
    log = (place.base / "manager.log").read_text()
    assert "The plugin 'exits' of acme-broken 1.2 cannot be imported: SystemExit: 3" in log


UNSETTLING = """
import atexit, logging, os, threading, time
os.umask(0)
logging.disable(logging.CRITICAL)
logging.basicConfig(force=True, filename=os.devnull)
atexit.register(time.sleep, 1000)
threading.Thread(target=time.sleep, args=(1000,)).start()
os.close(2)
raise SystemExit("unsettled")
"""


def test_a_plugin_that_changes_the_whole_process_is_named_and_the_manager_ends_in_time(place):
    (place.base.parent / "site/acme_exits.py").write_text(UNSETTLING)
    process = place.start("manager")
    log = place.base / "manager.log"
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "Umask:\t0000" not in status
    place.add("alice")
    assert place.admin("PUT", "/agents/alice/state?wait=20", {"state": "running"}).status == 200
    process.terminate()
    assert process.wait(15) == 0
    assert "acme-broken 1.2" in log.read_text()


def test_a_plugin_that_hangs_while_the_manager_starts_does_not_keep_it_from_stopping(place):
    text = place.config.read_text()
    place.config.write_text(text + '[apps.slow]\nprovider = "hangs"\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "dispatcher", "--config", str(place.config), "manager"], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 20
    while not (place.base / "state/dispatcher.db").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=20)
    place.config.write_text(text)
    assert process.returncode == 0, told.decode()
    assert b"stopped before it was ready" in told


PRINTS = """
print("loading acme")
from dispatcher.plugin import hookimpl
from tests.support.broken.providers import Good
class Provider(Good):
    name = "acme"
    def __init__(self, **more):
        print("made")
        super().__init__(**more)
    def check(self, *, deadline):
        print("checking")
@hookimpl
def dispatcher_register_providers():
    print("registering")
    return [Provider]
"""


def test_what_a_plugin_prints_is_not_in_the_output_of_a_command(tmp_path, monkeypatch):
    """Nor does a damaged distribution beside it keep any command from running."""
    (tmp_path / "acme.py").write_text(PRINTS)
    for name, entries in {
        "acme": "[dispatcher.plugins]\nacme = acme\n",
        "odd": "[console_scripts]\nnonsense\n",
    }.items():
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(entries)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    config = tmp_path / "d.toml"
    config.write_text(f'[manager]\nrun_dir = "{tmp_path}/run"\n[apps.a]\nprovider = "acme"\n')
    command = [sys.executable, "-m", "dispatcher", "--config", str(config), "--json", "providers", "check", "acme"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert [one["level"] for one in json.loads(done.stdout)["acme"]][0] == "ok", done.stderr
    assert all(words in done.stderr for words in ("loading acme", "registering", "made", "checking"))
    assert f"The metadata in {tmp_path}/odd-1.dist-info cannot be read" in done.stderr
