"""Agents outlive the manager and are adopted; ends reach everything; nothing is ever taken for what it is not."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import NotFound, ProviderError
from dispatcher.plugin.model import BackendState, Depth
from dispatcher.plugin.provider import no_progress
from dispatcher.testing.kit import processes_of
from tests.support.subprocess_world import (
    PROBE_COMMAND,
    PYTHON,
    ROOT,
    World,
    destroy,
    eventually,
    lines,
    observe,
    shell,
    stop,
)

WAYS = [
    pytest.param({}, id="sandbox", marks=pytest.mark.bubblewrap),
    pytest.param({"cgroups": "never"}, id="sandbox-no-cgroups", marks=pytest.mark.bubblewrap),
    pytest.param({"bubblewrap": "never"}, id="open"),
    pytest.param({"bubblewrap": "never", "cgroups": "never"}, id="open-no-cgroups"),
]
needs_root = pytest.mark.root


EXTREMES = [WAYS[0], WAYS[3]]


@pytest.fixture(params=WAYS)
def world(request):
    made = World("7e570020", **request.param)
    yield made
    made.close()


@pytest.fixture
def sandboxes():
    made = World("7e570021")
    yield made
    made.close()


MANAGER = textwrap.dedent(
    """
    import json, os, signal, sys
    from tests.support.subprocess_world import World, PROBE_COMMAND
    from dispatcher_subprocess.start import Start

    base, options, dies_at = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    world = World(sys.argv[4], base=base, **options)
    provider = world.provider()

    def dying(name):
        step = getattr(Start, name)
        def wrapper(self, *arguments):
            result = step(self, *arguments)
            if dies_at == f"after {name}":
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(Start, name, wrapper)

    for name in ("prepare", "spawn", "confine", "release"):
        dying(name)
    if dies_at == "at the journal":
        append = provider._journals.append
        def appended(*arguments):
            append(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        provider._journals.append = appended
    if dies_at == "at the collector":
        provider._collector.attach = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    handle, inside = world.start(provider, world.spec("alice"))
    print(inside.id()["start"], flush=True)
    sys.stdin.read()
    """
)


def manager(world, dies_at="never"):
    """Run a manager in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", MANAGER, str(world.base), json.dumps(world.options), dies_at, world.installation],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )


def test_a_fresh_manager_adopts_what_the_killed_one_started(world):
    old = manager(world)
    start = old.stdout.readline().strip()
    assert start
    old.kill()
    old.communicate()
    fresh = world.provider()
    heard = []
    fresh.watch(heard.append)
    ((handle, seen),) = fresh.list(deadline=Deadline(10))
    assert seen.state is BackendState.RUNNING
    spec = world.spec("alice")
    assert seen.spec_hash == spec.hash
    inside = world.inside(fresh, handle)
    assert inside.id()["start"] == start, "the same process"
    assert fresh.ensure(spec, deadline=Deadline(10), progress=no_progress) == handle
    assert world.inside(fresh, handle).id()["start"] == start
    inside.post("/log", b"after the change of managers")
    eventually(lambda: b"after the change of managers" in lines(fresh, handle))
    assert heard == []
    began = time.monotonic()
    inside.post("/exit", code=5)
    eventually(lambda: handle.name in heard, 3)
    assert time.monotonic() - began < 1.5, "its end is noticed within a second, though it is nobody's child"
    seen = observe(fresh, handle)
    assert seen.state is BackendState.STOPPED
    # Without bubblewrap nobody but its parent can know the exit code.
    assert seen.exit_reason == ("exit code 5" if "bubblewrap" not in world.options else "ended, reason unknown")


@pytest.mark.parametrize("world", EXTREMES, indirect=True)
@pytest.mark.parametrize(
    "dies_at",
    ["after prepare", "after spawn", "after confine", "at the journal", "at the collector", "after release"],
)
def test_a_manager_killed_in_the_middle_of_a_start_leaves_no_orphan_and_no_double(world, dies_at):
    old = manager(world, dies_at)
    old.communicate(timeout=30)
    assert old.returncode == -signal.SIGKILL
    time.sleep(0.1)
    fresh = world.provider()
    spec = world.spec("alice")
    handle = fresh.handle(spec)
    states = {found.agent: seen.state for found, seen in fresh.list(deadline=Deadline(10))}
    assert states["alice"] in {BackendState.STOPPED, BackendState.RUNNING}
    if states["alice"] is BackendState.STOPPED and ROOT:
        assert eventually(lambda: not processes_of(spec.uid)), "stopped means that nothing executes"
    _, inside = world.start(fresh, spec)
    first = inside.id()
    assert inside.post("/fork", count=2), "it works"
    inside.post("/log", b"x" * 1000, repeat=200)  # more than a pipe holds: somebody reads it
    inside.post("/log", b"the last line")
    eventually(lambda: lines(fresh, handle)[-1:] == [b"the last line"])
    if ROOT:
        alive = [pid for pid in processes_of(spec.uid) if b"probe" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(alive) == 1, "one agent, not two"
    assert world.inside(fresh, handle).id() == first
    destroy(fresh, handle)
    if ROOT:
        assert not processes_of(spec.uid)
    assert observe(fresh, handle).state is BackendState.ABSENT


def test_a_reused_pid_is_never_taken_for_an_agent(world):
    provider = world.provider()
    spec = world.spec("alice")
    handle, _ = world.start(provider, spec)
    path = provider._journals.path(handle.name)
    stop(provider, handle)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        documents = [json.loads(line) for line in path.read_text().splitlines()]
        for document in documents:
            for key in ("main", "init"):
                if document.get(key):
                    document[key]["pid"] = bystander.pid
            document.pop("ended", None)
            document.pop("stop_requested", None)
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        other = world.provider()
        other.watch(lambda name: None)
        assert observe(other, handle).state is BackendState.STOPPED
        assert other.usage([handle], deadline=Deadline(5)) == {}
        with pytest.raises(NotFound):
            other.suspend(handle, depth=Depth.RAM, deadline=Deadline(5), progress=no_progress)
        stop(other, handle)
        destroy(other, handle)
        assert bystander.poll() is None, "somebody else's process lives on"
    finally:
        bystander.kill()
        bystander.wait()


def test_after_a_reboot_an_agent_is_stopped_and_the_reason_is_told(world):
    provider = world.provider()
    handle, _ = world.start(provider, world.spec("alice"))
    path = provider._journals.path(handle.name)
    text = path.read_text()
    stop(provider, handle)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        # The pids of before the boot mean nothing now, not even where start times agree by chance.
        document = json.loads(text.splitlines()[0]) | {"boot": "00000000-0000-0000-0000-000000000000"}
        start = int(Path(f"/proc/{bystander.pid}/stat").read_text().rpartition(")")[2].split()[19])
        up = {"main": {"pid": bystander.pid, "start": start}, "started_at": 1.0}
        path.write_text(json.dumps(document) + "\n" + json.dumps(up) + "\n")
        fresh = world.provider()
        ((_, seen),) = fresh.list(deadline=Deadline(5))
        assert seen.state is BackendState.STOPPED
        assert seen.exit_reason == "the machine was restarted"
        destroy(fresh, handle)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_damaged_journal_harms_nobody(world):
    provider = world.provider()
    handle, inside = world.start(provider, world.spec("alice"))
    bob, _ = world.start(provider, world.spec("bob"))
    path = provider._journals.path(handle.name)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"stop_requested": tr')  # cut in the middle of a line
    assert observe(world.provider(), handle).state is BackendState.RUNNING
    assert inside.answers()
    provider._journals.path("dispatcher-7e570020-junk-000000000000").write_bytes(b"\0\xff garbage")
    assert {found.agent for found, _ in world.provider().list(deadline=Deadline(5))} == {"alice", "bob"}
    path.write_bytes(whole)
    stop(provider, bob)


ESCAPIST = textwrap.dedent(
    """
    import os, signal, socket, sys, time
    from pathlib import Path
    data = Path(os.environ["DISPATCHER_DATA"])
    print("begins", flush=True)

    wanted = sys.argv[3].split(",")

    def child(name, prepare):
        if name not in wanted or os.fork():
            return
        prepare()
        if os.fork():
            os._exit(0)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if name == "closed":
            os.closerange(0, 256)
        if name == "bare":
            os.execve(sys.executable, [sys.executable, "-S", "-c", BEAT, str(data / name)], {})
        while True:
            (data / name).write_text(str(time.time()))
            time.sleep(0.02)

    BEAT = sys.argv[2]
    child("session", os.setsid)
    child("group", os.setpgrp)
    child("closed", os.setsid)
    child("bare", os.setsid)
    if "forks" in wanted and not os.fork():  # forks for ever, so that no list of processes is ever right
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            (data / "forks").write_text(str(time.time()))
            if os.fork():
                os._exit(0)
            time.sleep(0.002)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        while True:
            server.accept()[0].close()
    """
)
BEAT = textwrap.dedent(
    """
    import signal, sys, time
    signal.signal(15, signal.SIG_IGN)
    while True:
        with open(sys.argv[1], "w") as file:
            file.write(str(time.time()))
        time.sleep(0.02)
    """
)
BEATS = ("session", "group", "closed", "bare", "forks")


def beats(spec):
    found = {}
    for name in BEATS:
        try:
            found[name] = float((spec.data_dir / name).read_text() or 0)
        except (OSError, ValueError):
            found[name] = 0.0
    return found


def quiet(spec, names):
    """Whether nothing of these moves any more."""
    before = beats(spec)
    time.sleep(0.3)
    after = beats(spec)
    return all(before[name] == after[name] for name in names)


@pytest.fixture
def escapist(world):
    provider = world.provider()
    # As an ordinary user without a sandbox, what hides all traces of itself cannot be found: nor by this test,
    # which must not leave it behind.
    caught = BEATS if ROOT or "bubblewrap" not in world.options else ("session", "group")
    spec = world.spec("mallory", [PYTHON, "-S", "-c", ESCAPIST, "{socket}", BEAT, ",".join(caught)])
    handle, _ = world.start(provider, spec, ready=False)
    eventually(lambda: all(beats(spec)[name] for name in caught), 10)
    yield provider, spec, handle, caught
    destroy(provider, handle)


def test_stop_reaches_every_descendant(escapist):
    provider, spec, handle, caught = escapist
    began = time.monotonic()
    stop(provider, handle, grace=0.5)
    assert time.monotonic() - began < 8
    assert quiet(spec, caught)
    if ROOT:
        assert eventually(lambda: not processes_of(spec.uid), 2)  # killed, and perhaps not yet put away
    assert observe(provider, handle).state in {BackendState.STOPPED, BackendState.ABSENT}


def test_suspend_freezes_every_descendant(escapist):
    provider, spec, handle, caught = escapist
    provider.suspend(handle, depth=Depth.RAM, deadline=Deadline(10), progress=no_progress)
    assert quiet(spec, caught)
    assert observe(provider, handle).state is BackendState.SUSPENDED
    provider.resume(handle, deadline=Deadline(10), progress=no_progress)
    before = beats(spec)
    eventually(lambda: all(beats(spec)[name] > before[name] for name in caught), 5)


def test_what_an_app_leaves_behind_goes_with_it(escapist):
    provider, spec, handle, caught = escapist
    heard = []
    provider.watch(heard.append)
    record = provider._journals.read(handle.name)
    mains = [
        process
        for process in provider._parts.stopper.run(record).members()
        if process.parent == (record.init.pid if record.init else os.getpid())
        and (record.init or process.pid == record.main.pid)
    ]
    main = min(mains, key=lambda process: process.start)
    os.kill(main.pid, signal.SIGKILL)
    eventually(lambda: handle.name in heard, 3)
    seen = observe(provider, handle)
    assert seen.state is BackendState.STOPPED
    assert seen.exit_reason == "killed by signal 9 (SIGKILL)"
    assert quiet(spec, caught)
    if ROOT:
        assert eventually(lambda: not processes_of(spec.uid))


def test_jobs_that_were_stopped_stay_so_on_resume(world):
    provider = world.provider()
    program = (
        "import os, signal, socket, sys, time\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    open(os.environ['DISPATCHER_DATA'] + '/continued', 'w').close()\n"
        "    time.sleep(60)\n"
        "server = socket.socket(socket.AF_UNIX)\n"
        "server.bind(sys.argv[1])\n"
        "server.listen()\n"
        "while True:\n"
        "    server.accept()[0].close()\n"
    )
    spec = world.spec("alice", [PYTHON, "-S", "-c", program, "{socket}"])
    handle, _ = world.start(provider, spec, ready=False)
    eventually(spec.socket.exists, 10)
    time.sleep(0.1)
    for _ in range(2):
        provider.suspend(handle, depth=Depth.RAM, deadline=Deadline(10), progress=no_progress)
        fresh = world.provider()
        assert observe(fresh, handle).state is BackendState.SUSPENDED, "a fresh manager knows that it sleeps"
        fresh.resume(handle, deadline=Deadline(10), progress=no_progress)
        assert observe(provider, handle).state is BackendState.RUNNING
    time.sleep(0.2)
    assert not (spec.data_dir / "continued").exists()


@needs_root
@pytest.mark.bubblewrap
def test_the_sandbox_outlives_bubblewraps_outer_process(sandboxes):
    """Whoever kills the outer bwrap neither ends the agent nor makes it look ended."""
    provider = sandboxes.provider()
    handle, inside = sandboxes.start(provider, sandboxes.spec("alice"))
    record = provider._journals.read(handle.name)
    os.kill(record.main.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert observe(provider, handle).state is BackendState.RUNNING
    assert inside.answers()
    inside.post("/exit", code=3)
    assert eventually(lambda: observe(provider, handle).state is BackendState.STOPPED)
    assert "reason unknown" in observe(provider, handle).exit_reason


def test_a_program_that_cannot_begin_says_why(world):
    provider = world.provider()
    broken = world.base / "broken"
    broken.write_text("#!/nonexistent/interpreter\n")
    broken.chmod(0o755)
    spec = world.spec("alice", [str(broken), "{socket}"])
    handle, _ = world.start(provider, spec, ready=False)
    seen = eventually(lambda: (one := observe(provider, handle)).state is BackendState.STOPPED and one)
    assert seen.exit_reason.startswith("exit code 1")
    eventually(lambda: any(b"broken" in line for line in lines(provider, handle)))
    with pytest.raises(ProviderError, match="there is no program"):
        world.start(provider, world.spec("alice", ["/nonexistent", "{socket}"]), ready=False)


def test_a_script_that_the_sandbox_hides_is_named_in_the_reason(world):
    script = world.base / "script.sh"
    script.write_text("exit 3")
    provider = world.provider()
    spec = world.spec("alice", ["sh", str(script), "{socket}"])
    handle, _ = world.start(provider, spec, ready=False)
    seen = eventually(lambda: (one := observe(provider, handle)).state is BackendState.STOPPED and one)
    hidden = provider._parts.host.sandboxed
    assert (f"its command names {script}, which the sandbox does not show" in seen.exit_reason) is hidden
    told = [one for one in provider.faults(spec.app) if f"{script} exists on this host, but is not visible" in one]
    assert bool(told) is hidden


def test_a_leftover_socket_is_in_nobodys_way(world):
    provider = world.provider()
    spec = world.spec("alice", [*PROBE_COMMAND])
    target = world.base / "target"
    target.write_text("precious")
    spec.socket.symlink_to(target)
    handle, inside = world.start(provider, spec)
    assert inside.answers()
    assert target.read_text() == "precious"
    destroy(provider, handle)


@pytest.mark.parametrize("world", EXTREMES, indirect=True)
def test_fifty_starts_at_once(world):
    provider = world.provider()
    specs = [world.spec(f"user{number}") for number in range(50)]
    with ThreadPoolExecutor(20) as pool:
        started = list(pool.map(lambda spec: world.start(provider, spec)[1].id()["uid"], specs))
        if ROOT:
            assert started == [str(spec.uid) for spec in specs]
        list(pool.map(lambda spec: destroy(provider, provider.handle(spec)), specs))
    assert list(provider.list(deadline=Deadline(10))) == []
    assert [name for name in os.listdir(provider.context.state_dir) if "alice" not in name] == []


@pytest.mark.parametrize("world", EXTREMES, indirect=True)
def test_nothing_an_agent_leaves_in_its_run_directory_stops_the_next_start(world):
    provider = world.provider()
    spec = world.spec("alice")
    handle, inside = world.start(provider, spec)
    directory = "/run/agent" if "bubblewrap" not in world.options else str(spec.run_dir)
    inside.write(f"{directory}/junk", b"x" * 100_000)
    provider.stop(handle, grace=5, deadline=Deadline(10), progress=no_progress)
    assert list(spec.run_dir.iterdir()) == [], "memory of the host is given back"
    (spec.run_dir / "s").mkdir()
    (spec.run_dir / "s/deep").mkdir()
    (spec.run_dir / "s/link").symlink_to("/etc")
    _, inside = world.start(provider, spec)
    assert inside.answers() and Path("/etc/passwd").exists()


def test_lookalikes_are_not_confused(world):
    """Handles of other agents, and of no agent, do not touch this one."""
    provider = world.provider()
    handle, inside = world.start(provider, world.spec("a-b"))
    for name in ("a", "a-b-c", "A-B", "a_b"):
        other = provider.handle(world.spec(name))
        assert observe(provider, other).state is BackendState.ABSENT
        stop(provider, other)
        destroy(provider, other)
    assert inside.answers()
    assert observe(provider, handle).state is BackendState.RUNNING


@needs_root
@pytest.mark.parametrize("world", EXTREMES, indirect=True)
def test_a_full_disk_does_not_prevent_a_stop(world):
    """Its journal cannot be written: the agent ends all the same, and is removed."""
    journals = world.base / "state/providers"
    journals.mkdir(parents=True)
    shell("mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(journals))
    try:
        provider = world.provider()
        spec = world.spec("alice")
        handle, _ = world.start(provider, spec)
        path = provider._journals.path(handle.name)
        with path.open("ab") as file:  # up to the end of its last page: the next line finds no room
            file.write(b" " * (4096 - path.stat().st_size % 4096 - 3) + b"{}\n")
        with contextlib.suppress(OSError), (journals / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(ProviderError, match="No space left"):
            provider._journals.append(handle.name, {"stop_requested": True})
        stop(provider, handle)
        assert not processes_of(spec.uid)
        assert observe(provider, handle).state is BackendState.STOPPED
        destroy(provider, handle)
        assert observe(provider, handle).state is BackendState.ABSENT
    finally:
        shell("umount", "-l", str(journals))
