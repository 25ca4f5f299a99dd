"""Secrets of agents as files in memory."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from dispatcher.plugin import ConfigError, ProviderError, SecretFiles, in_memory
from dispatcher.plugin.tree_removal import remove_tree


@pytest.fixture
def memory():
    path = Path(tempfile.mkdtemp(prefix="secret-files-", dir="/dev/shm"))
    yield path
    remove_tree(path)


def write(files, values):
    return files.write("agent-1", values, os.geteuid(), os.getegid())


def test_secrets_belong_to_the_agent_alone(memory):
    files = SecretFiles("stem", [memory])
    directory = write(files, {"token": "t", "multi": "a\nb\n"})
    assert directory == files.path("agent-1") == memory / "stem/agent-1"
    assert (directory / "token").read_text() == "t"
    assert (directory / "multi").read_text() == "a\nb\n"
    assert stat.S_IMODE((directory / "token").stat().st_mode) == 0o400
    assert stat.S_IMODE(directory.stat().st_mode) == 0o500
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700


def test_new_secrets_replace_earlier_ones(memory):
    files = SecretFiles("stem", [memory], mode=0o711)
    write(files, {"token": "t"})
    assert os.listdir(write(files, {"other": "u"})) == ["other"]
    assert stat.S_IMODE((memory / "stem").stat().st_mode) == 0o711


def test_nothing_is_left_of_removed_secrets(memory):
    files = SecretFiles("stem", [memory])
    write(files, {"token": "t"})
    files.remove("agent-1")
    files.remove("agent-1")
    assert not os.listdir(memory)


def test_secrets_are_written_to_memory_only(memory, tmp_path):
    disk = Path("/usr/share")
    assert not in_memory(disk)
    assert not in_memory(tmp_path / "absent")
    assert write(SecretFiles("stem", [tmp_path / "absent", disk, memory]), {"a": "b"}).is_relative_to(memory)
    with pytest.raises(ProviderError, match="cannot be kept in memory"):
        write(SecretFiles("stem", [disk]), {"a": "b"})


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 200, "a\n"])
def test_bad_names_of_secrets_are_refused(memory, name):
    with pytest.raises(ConfigError):
        write(SecretFiles("stem", [memory]), {name: "x"})
