"""Waiting for the end of an agent's processes."""

import subprocess

from dispatcher_subprocess.processes import procfs
from dispatcher_subprocess.processes.run import Run
from dispatcher_subprocess.processes.run_record import Record

from dispatcher.plugin import Process, process_stat


def record(main, init):
    return Record(
        name="n",
        agent="ada",
        boot=procfs.boot_id(),
        spec_hash="",
        uid=0,
        endpoint="",
        owner_uid=None,
        log_dir="",
        run_dir="",
        token="",
        sandboxed=True,
        status="/nonexistent",
        pipe=0,
        main=main,
        init=init,
    )


def process_of(child):
    return Process(child.pid, process_stat(child.pid).start)


def test_the_wait_for_the_outer_process_sleeps_though_the_inner_one_has_ended():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as inner, subprocess.Popen(["sleep", "0.3"]) as outer:
        run, calls = Run(record(process_of(outer), process_of(inner)), None), []
        inner.stdin.close()  # it ends, and is not reaped
        run.wait_end(10.0, lambda: calls.append(1))
        assert run.gone
    assert len(calls) < 20
