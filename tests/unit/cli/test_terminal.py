"""The command line on a terminal: what it asks, what it draws, and that it fits."""

import re

import pytest

from dispatcher.cli.ui.output import fitting
from tests.support.fake_manager import FakeManager
from tests.support.terminal import on_a_terminal


@pytest.fixture
def forked_manager(short_tmp):
    with FakeManager(short_tmp / "m.sock") as fake:
        yield fake


def test_add_asks_twice_on_a_terminal(forked_manager):
    code, out = on_a_terminal(
        ["-k", "add", "alice"], {"DISPATCHER_MANAGER": forked_manager.url}, [b"secret-horse\n", b"secret-horse\n"]
    )
    assert code == 0, out
    assert "secret-horse" not in out
    assert out.count("Password") == 1
    assert out.count("Repeat password") == 1
    assert out.endswith("alice was added\n")
    assert forked_manager.users == {"alice": "secret-horse"}


def test_add_checks_everything_else_before_it_asks(forked_manager, short_tmp):
    where = {"DISPATCHER_MANAGER": forked_manager.url}
    code, out = on_a_terminal(["add", "alice", "--app", "nope"], where)
    assert (code, out) == (2, "dispatcher: There is no app nope\n")
    forked_manager.apps.remove(None)
    assert on_a_terminal(["add", "alice"], where) == (2, "dispatcher: There is no app None\n")
    code, out = on_a_terminal(["add", "a/b"], where)
    assert (code, "Password" in out) == (2, False)
    code, out = on_a_terminal(["add", "alice"], {"DISPATCHER_MANAGER": f"unix://{short_tmp}/none"})
    assert (code, "Password" in out) == (5, False)


def test_remove_asks_on_a_terminal_and_no_is_no(forked_manager):
    forked_manager.add("alice")
    code, out = on_a_terminal(["remove", "alice"], {"DISPATCHER_MANAGER": forked_manager.url}, [b"n\n"])
    assert code == 1
    assert "Remove alice and all its data?" in out
    assert out.endswith("dispatcher: alice was not removed\n")
    assert "alice" in forked_manager.agents
    assert on_a_terminal(["remove", "alice"], {"DISPATCHER_MANAGER": forked_manager.url}, [b"\n"])[0] != 0
    assert "alice" in forked_manager.agents
    assert on_a_terminal(["remove", "alice"], {"DISPATCHER_MANAGER": forked_manager.url}, [b"y\n"])[0] == 0
    assert forked_manager.agents == {}


@pytest.mark.parametrize("command", ["remove", "reset-data"])
def test_yes_is_an_answer_beforehand(forked_manager, command):
    forked_manager.add("alice")
    for yes in ("-y", "--yes"):
        forked_manager.add("alice")
        code, out = on_a_terminal([command, yes, "alice"], {"DISPATCHER_MANAGER": forked_manager.url})
        assert code == 0
        assert "?" not in out


def test_reset_data_asks_on_a_terminal_of_who_exists(forked_manager):
    where = {"DISPATCHER_MANAGER": forked_manager.url}
    code, out = on_a_terminal(["reset-data", "alice"], where)
    assert (code, "?" in out) == (3, False)
    forked_manager.add("alice")
    code, out = on_a_terminal(["reset-data", "alice"], where, [b"n\n"])
    assert code == 1
    assert "Delete all data of alice?" in out
    assert out.endswith("dispatcher: the data of alice was not deleted\n")
    assert not [request for request in forked_manager.requests if request[0] == "PUT"]


def test_purge_asks_on_a_terminal_and_shows_what_would_go(forked_manager):
    where = {"DISPATCHER_MANAGER": forked_manager.url}
    forked_manager.keep("alice")
    code, out = on_a_terminal(["purge", "alice"], where, [b"n\n"])
    assert code == 1
    assert out.endswith("dispatcher: nothing was purged\n")
    code, out = on_a_terminal(["purge", "alice"], where, [b"\x04"])
    assert (code, out.endswith("dispatcher: nothing was purged\n")) == (1, True), "the end of the input is a no"
    assert "3.0 MiB in subprocess" in out
    assert "Delete this data of alice?" in out
    assert "alice" in forked_manager.copies
    assert on_a_terminal(["purge", "alice"], where, [b"y\n"])[0] == 0
    assert forked_manager.copies == {}


def test_start_shows_its_stages_on_a_terminal(forked_manager):
    forked_manager.add("alice")
    step = {"state": "starting", "stage": "pulling", "detail": "layer 3", "fraction": 0.42}
    forked_manager.script = [step] * 8 + [{"state": "running", "stage": "", "detail": "", "fraction": None}]
    code, out = on_a_terminal(["start", "alice"], {"DISPATCHER_MANAGER": forked_manager.url})
    assert code == 0
    assert "alice starting: pulling, layer 3 (42%)" in out
    assert out.rpartition("\r")[2].strip() == "alice is running"


def test_a_table_on_a_terminal_shows_whole_names_and_no_escape_of_theirs(forked_manager):
    forked_manager.add("alice", "running", stage="\x1b]0;title\x07")
    code, out = on_a_terminal(["list"], {"DISPATCHER_MANAGER": forked_manager.url})
    assert code == 0
    assert "alice" in out
    assert "\x1b]0" not in out


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (100, ["NAME", "APP", "STATE", ""]),
        (33, ["NAME", "APP", "STATE", ""]),
        (32, ["NAME", "STATE", ""]),
        (25, ["NAME", "STATE", ""]),
        (24, None),
    ],
)
def test_a_narrow_table_goes_without_what_matters_least(width, shown):
    headings, widths = ["NAME", "APP", "HOST", "STATE", ""], [8, 6, 0, 7, 6]
    found = fitting(headings, widths, ["HOST", "APP"], width)
    assert (found and [headings[at] for at in found]) == shown


@pytest.mark.parametrize("columns", [200, 60, 45, 40, 30])
def test_no_word_of_a_table_is_cut_however_narrow_the_terminal(forked_manager, columns):
    forked_manager.add("alice", "running")
    forked_manager.add("carol")
    forked_manager.fail("carol")
    where = {"DISPATCHER_MANAGER": forked_manager.url, "NO_COLOR": "1"}
    code, out = on_a_terminal(["list"], where, columns=columns)
    assert code == 0
    assert {"alice", "running", "carol", "failed", "become", "ready"} <= set(
        re.sub(r"\x1b\[\d+m", " ", out).split()
    )
    assert max(len(re.sub(r"\x1b\[\d+m", "", line).rstrip()) for line in out.splitlines()) <= max(columns, 39)
    assert ("PROVIDER" in out) == (columns in {200, 30})  # left out, or below the name


def test_a_narrow_terminal_gets_blocks_with_everything(forked_manager):
    forked_manager.add("somebody-with-a-long-name@example.org", "running")
    code, out = on_a_terminal(["list"], {"DISPATCHER_MANAGER": forked_manager.url}, columns=40)
    assert code == 0
    assert out.splitlines()[:3] == [
        "somebody-with-a-long-name@example.org",
        "  APP        demo",
        "  PROVIDER   subprocess",
    ]
