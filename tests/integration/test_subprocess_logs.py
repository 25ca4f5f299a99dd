"""Output of agents: bounded whoever is away, never lost for long, never in the agent's way."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dispatcher.plugin.deadline import Deadline
from tests.support.subprocess_world import PYTHON, World, destroy, eventually, lines, shell, stop

ROOTED = Path(__file__).parent.parent.parent
WRITER = textwrap.dedent(
    """
    import os, socket, sys, threading
    def flood(megabytes):
        block = (b"x" * 99 + b"\\n") * 655
        for _ in range(megabytes * 16):
            os.write(1, block)
        os.write(1, b"flooded\\n")
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1] + ".new")
    server.listen()
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    while True:
        c, _ = server.accept()
        word = c.recv(100).decode().split()
        if word and word[0] == "flood":
            threading.Thread(target=flood, args=(int(word[1]),), daemon=True).start()
        elif word and word[0] == "say":
            os.write(1, word[1].encode() + b"\\n")
        c.sendall(b"yes")
        c.close()
    """
)


@pytest.fixture
def world():
    made = World("7e570030", log_size=65536, log_files=3)
    yield made
    made.close()


def writer(world, agent="alice", **changes):
    return world.spec(agent, [PYTHON, "-S", "-c", WRITER, "{socket}"], **changes)


def say(spec, text):
    """Tell the writer what to do; it answers although its output may be stuck."""
    from dispatcher.plugin.endpoints import connect
    from dispatcher.plugin.model import Endpoint

    with connect(Endpoint.unix(spec.socket), None, 5) as sock:
        sock.sendall(text.encode())
        assert sock.recv(10) == b"yes"


def collector_of(world):
    """The log collector's pid: it has log files of this world open."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"dispatcher_subprocess/log_collector.py" not in command:
                continue
            logs = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(str(world.base) in log for log in logs):
            return int(process.name)
    return 0


def last_bytes(path):
    try:
        return path.read_bytes()[-20:]
    except FileNotFoundError:  # between two rotated files
        return b""


def size(spec):
    return sum(path.stat().st_size for path in spec.log_dir.iterdir())


def test_output_stays_bounded_while_the_manager_is_down(world):
    program = (
        "import os, sys\n"
        "from tests.support.subprocess_world import World\n"
        "from tests.integration.test_subprocess_logs import writer, eventually\n"
        "world = World(sys.argv[2], base=sys.argv[1], log_size=65536, log_files=3)\n"
        "provider = world.provider()\n"
        "spec = writer(world)\n"
        "world.start(provider, spec, ready=False)\n"
        "eventually(spec.socket.exists)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(world.base), world.installation], cwd=ROOTED, timeout=30)
    spec = writer(world)
    eventually(spec.socket.exists)
    say(spec, "flood 60")
    provider_log = spec.log_dir / "output.log"
    eventually(lambda: b"flooded" in last_bytes(provider_log), 60)
    assert 65536 < size(spec) <= 3 * 65536
    provider = world.provider()
    handle = provider.handle(spec)
    assert lines(provider, handle, 2) == [b"x" * 99, b"flooded"]
    assert len(lines(provider, handle, 100_000)) > 1000, "rotated files count too"


def test_a_flood_is_slowed_down_and_others_are_not(world):
    """32 MiB at 16 MiB a second: the writer waits; what the collector takes of a processor stays small."""
    provider = world.provider()
    provider.watch(lambda name: None)
    flooder, other = writer(world, "alice"), writer(world, "bob")
    handles = [world.start(provider, spec, ready=False)[0] for spec in (flooder, other)]
    for spec in (flooder, other):
        eventually(spec.socket.exists)
    began = time.monotonic()
    say(flooder, "flood 32")
    say(other, "say meanwhile")
    eventually(lambda: b"meanwhile" in lines(provider, handles[1]), 1.0)
    fields = Path(f"/proc/{collector_of(world)}/stat").read_text().rpartition(")")[2].split()
    before = int(fields[11]) + int(fields[12])
    eventually(lambda: b"flooded" in last_bytes(flooder.log_dir / "output.log"), 30)
    seconds = time.monotonic() - began
    assert seconds > 1.5
    fields = Path(f"/proc/{collector_of(world)}/stat").read_text().rpartition(")")[2].split()
    used = (int(fields[11]) + int(fields[12]) - before) / os.sysconf("SC_CLK_TCK")
    assert used < seconds / 2


def test_a_killed_collector_is_replaced_and_gets_every_agent_again(world):
    provider = world.provider()
    provider.watch(lambda name: None)
    specs = [writer(world, name) for name in ("alice", "bob")]
    handles = [world.start(provider, spec, ready=False)[0] for spec in specs]
    for spec in specs:
        eventually(spec.socket.exists)
        say(spec, "say one")
    for handle in handles:
        eventually(lambda: b"one" in lines(provider, handle))
    old = collector_of(world)
    os.kill(old, 9)
    for spec in specs:
        say(spec, "say two")
    for handle in handles:
        eventually(lambda: lines(provider, handle)[-1:] == [b"two"])
    assert collector_of(world) not in {0, old}


def test_an_agent_survives_without_manager_and_collector_and_loses_nothing(world):
    provider = world.provider()
    spec = writer(world)
    handle, _ = world.start(provider, spec, ready=False)
    eventually(spec.socket.exists)
    say(spec, "say first")
    eventually(lambda: b"first" in lines(provider, handle))
    collector = collector_of(world)
    provider.close()
    os.kill(collector, 9)
    for number in range(20):
        say(spec, f"say line{number}")
    time.sleep(0.2)
    fresh = world.provider()
    ((_, seen),) = fresh.list(deadline=Deadline(10))
    assert seen.state.value == "running", "no SIGPIPE"
    eventually(lambda: lines(fresh, handle)[-1:] == [b"line19"])
    assert lines(fresh, handle) == [b"first", *(f"line{number}".encode() for number in range(20))]


def test_the_collector_ends_when_nobody_needs_it(world):
    provider = world.provider()
    spec = writer(world)
    handle, _ = world.start(provider, spec, ready=False)
    eventually(spec.socket.exists)
    say(spec, "say something")
    collector = eventually(lambda: collector_of(world))
    destroy(provider, handle)
    provider.close()
    eventually(
        lambda: (
            not Path(f"/proc/{collector}/cmdline").exists() or not Path(f"/proc/{collector}/cmdline").read_bytes()
        ),
        10,
    )


@pytest.mark.root
def test_a_full_disk_does_not_stop_an_agent(world):
    spec = writer(world)
    shell("mount", "-t", "tmpfs", "-o", "size=40k,mode=0700", "tmpfs", str(spec.log_dir))
    try:
        provider = world.provider()
        handle, _ = world.start(provider, spec, ready=False)
        eventually(spec.socket.exists)
        (spec.log_dir / "ballast").write_bytes(b"x" * 36864)
        say(spec, "flood 1")
        time.sleep(1.5)  # until the log collector has taken it all
        say(spec, "say still-here")
        (spec.log_dir / "ballast").unlink()
        eventually(lambda: say(spec, "say again") or b"again" in lines(provider, handle))
        assert any(b"were dropped here" in line for line in lines(provider, handle, 1000))
        destroy(provider, handle)
        world.close()
    finally:
        shell("umount", "-l", str(spec.log_dir))


def test_following_goes_on_across_rotations(world):
    provider = world.provider()
    spec = writer(world)
    handle, _ = world.start(provider, spec, ready=False)
    eventually(spec.socket.exists)
    say(spec, "say zero")
    eventually(lambda: b"zero" in lines(provider, handle))
    followed = provider.logs(handle, tail=1, follow=True, deadline=Deadline(3))
    assert next(followed) == b"zero"
    for number in range(40):
        say(spec, f"say {number:03}{'y' * 90}")
        say(spec, "say " + "z" * 60)
    got = [line[:3] for line in followed]
    assert [line for line in got if line != b"zzz"] == [f"{number:03}".encode() for number in range(40)]


def test_logs_outlive_a_stop_and_go_with_the_data(world):
    provider = world.provider()
    spec = writer(world)
    handle, _ = world.start(provider, spec, ready=False)
    eventually(spec.socket.exists)
    say(spec, "say remembered")
    eventually(lambda: b"remembered" in lines(provider, handle))
    stop(provider, handle)
    assert b"remembered" in lines(provider, handle)
    provider.destroy(handle, data=False, deadline=Deadline(10), progress=lambda *a, **k: None)
    assert b"remembered" in lines(provider, handle), "an absent agent yields what is still known"
    destroy(provider, handle)
    assert lines(provider, handle) == []
