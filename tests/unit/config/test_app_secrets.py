"""Secrets of apps: from files and variables, read anew each time, each fault named without the content."""

import os

import pytest

from dispatcher.config.app_secrets import MAX_SECRET, check_secrets, read_secrets
from dispatcher.config.load import parse
from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.model import Level


def config(secrets):
    return parse({"apps": {"notes": {"secrets": secrets, "subprocess": {"command": ["x"]}}}})


def source(path, content=b"hunter2\n", mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_files_and_variables_are_read_byte_for_byte(tmp_path):
    sources = {"KEY": source(tmp_path / "key", "s3crét\n".encode()), "TOKEN": "env:NOTES_TOKEN"}
    assert config(sources).apps["notes"].secrets == sources
    assert read_secrets("notes", sources, {"NOTES_TOKEN": " t\n"}) == {"KEY": "s3crét\n", "TOKEN": " t\n"}


def test_a_rotated_file_is_read_anew(tmp_path):
    sources = {"KEY": source(tmp_path / "key")}
    assert read_secrets("notes", sources) == {"KEY": "hunter2\n"}
    os.replace(source(tmp_path / "new", b"hunter3"), tmp_path / "key")
    assert read_secrets("notes", sources) == {"KEY": "hunter3"}


def test_a_link_to_the_file_of_now_is_followed(tmp_path):
    """As a secret store that rotates by links has it."""
    (tmp_path / "link").symlink_to(source(tmp_path / "key"))
    assert read_secrets("notes", {"KEY": str(tmp_path / "link")}) == {"KEY": "hunter2\n"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file (create it, or correct the path)"),
        (b"hunter2" * MAX_SECRET, "is too large: a secret has at most 64 KiB"),
        (b"", "is empty: an app may take an empty password for none"),
        (b" \n", "is empty: an app may take an empty password for none"),
        (b"hunter2\0", "holds a NUL byte: a secret is text"),
        (b"hunter2\xff", "is not UTF-8: a secret is text"),
    ],
)
def test_a_file_that_cannot_be_a_secret_is_named_with_its_key(tmp_path, content, words):
    path = tmp_path / "key"
    if content is not None:
        source(path, content)
    with pytest.raises(ConfigError) as caught:
        read_secrets("notes", {"KEY": str(path)})
    assert str(caught.value).startswith("apps.notes.secrets.KEY: ")
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.fix
    assert "hunter2" not in str(caught.value)
    (finding,) = check_secrets("notes", {"KEY": str(path)})
    assert finding.level is Level.ERROR
    assert "hunter2" not in finding.what


def test_what_is_not_a_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="cannot read .*: (it is not a regular file|Is a directory)"):
            read_secrets("notes", {"KEY": str(path)})


def test_a_missing_variable_is_an_error_at_the_start_and_a_warning_in_the_check():
    with pytest.raises(ConfigError, match=r"apps\.notes\.secrets\.KEY: the variable NOTES_KEY is missing"):
        read_secrets("notes", {"KEY": "env:NOTES_KEY"}, {})
    (finding,) = check_secrets("notes", {"KEY": "env:NOTES_KEY"}, {})
    assert finding.level is Level.WARNING
    assert list(check_secrets("notes", {"KEY": "env:NOTES_KEY"}, {"NOTES_KEY": "x"})) == []


def test_a_file_that_everybody_can_read_is_a_warning(tmp_path):
    path = source(tmp_path / "key", mode=0o644)
    (finding,) = check_secrets("notes", {"KEY": path})
    assert finding.level is Level.WARNING
    assert finding.what == f"apps.notes.secrets.KEY: every user of this host can read {path}"
    assert finding.fix == f"run `chmod o-r {path}`"
    os.chmod(path, 0o640)
    assert list(check_secrets("notes", {"KEY": path})) == []


@pytest.mark.parametrize(
    ("secrets", "words"),
    [
        ({"my-key": "/k"}, "apps.notes.secrets.my-key: found 'my-key', expected the name of a variable"),
        ({"1": "/k"}, "apps.notes.secrets.1: found '1', expected the name of a variable"),
        ({"KEY": "hunter2"}, 'KEY: found a secret, expected the absolute path of a file, or "env:VARIABLE"'),
        ({"KEY": "/a/../b"}, "expected the absolute path of a file"),
        ({"KEY": "env:MY-KEY"}, 'expected the absolute path of a file, or "env:VARIABLE"'),
        ({"KEY": 7}, "apps.notes.secrets.KEY: found a secret, expected a text in quotes"),
        ("x", "apps.notes.secrets: found a secret, expected a table"),
    ],
)
def test_what_is_not_a_source_is_refused_and_not_shown(secrets, words):
    with pytest.raises(ConfigError) as caught:
        config(secrets)
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_defaults_have_no_secrets():
    with pytest.raises(ConfigError, match=r"defaults\.secrets: unknown key"):
        parse({"defaults": {"secrets": {"KEY": "/k"}}})
