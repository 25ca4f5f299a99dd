"""The journal of an agent."""

import dataclasses
import os
import pytest
from dispatcher_subprocess.processes.run_record import Journals, Record, parse

from dispatcher.plugin import Process


FIRST = Record(
    name="dispatcher-00000000-a-b",
    agent="a",
    boot="b",
    spec_hash="h",
    uid=200001,
    endpoint="unix:/r/s",
    owner_uid=200001,
    log_dir="/l",
    run_dir="/r",
    token="t",
    sandboxed=True,
    pipe=7,
    status="/s",
)


def begin(journals):
    """Begin the journal of FIRST; return the descriptor of its status file."""
    return journals.begin(dataclasses.replace(FIRST, status=str(journals.status_path(FIRST.name))))


def test_a_journal_grows_and_is_read_at_any_length(tmp_path):
    journals = Journals(tmp_path)
    os.close(begin(journals))
    name = FIRST.name
    record = journals.read(name)
    assert record.main is None and record.ended is None and not record.stop_requested
    journals.append(name, {"main": {"pid": 2, "start": 3}, "started_at": 1.5})
    journals.append(name, {"stop_requested": True})
    whole = journals.path(name).read_bytes()
    assert journals.read(name).main == Process(pid=2, start=3)
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        found = parse(whole[:length])
        assert (found is None) == (length < first - 1)
    assert parse(whole[:-2]).stop_requested is False
    journals.remove(name)
    assert journals.read(name) is None and list(tmp_path.iterdir()) == []
    journals.append(name, {"stop_requested": True})  # of one that is gone: nothing
    assert list(journals.records()) == []


def test_a_new_run_forgets_the_old_one(tmp_path):
    journals = Journals(tmp_path)
    for _ in range(2):
        status = begin(journals)
        assert journals.read(FIRST.name).sandbox_status() == {}
        os.write(status, b'{ "child-pid": 5, "pid-namespace": 6 }\n{ "exit-code": 3 }\n')
        os.close(status)
        said = journals.read(FIRST.name).sandbox_status()
        assert said == {"child-pid": 5, "pid-namespace": 6, "exit-code": 3}
        journals.append(FIRST.name, {"ended": "exit code 3"})
    os.close(begin(journals))
    assert journals.read(FIRST.name).ended is None


@pytest.mark.parametrize("text", [b"", b"\0\xff", b"[]\n", b'{"version": 99}\n', b'{"no": "version"}\n'])
def test_a_journal_that_is_none(text):
    assert parse(text) is None


def test_an_unreadable_journal_directory_is_unavailable_not_empty(tmp_path):
    from dispatcher.plugin.errors import Unavailable

    (tmp_path / "file").touch()
    with pytest.raises(Unavailable):
        Journals(tmp_path / "file").records()
    assert list(Journals(tmp_path / "absent").records()) == []
