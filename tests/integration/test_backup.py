"""The backup that docs/howto/install-as-a-service.md describes: taken from a running manager, restored into an empty place."""

import os
import re
import shutil
import sqlite3
import subprocess

import pytest

from tests.conftest import ROOT
from tests.support.installation import Installation, until

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap]


def test_a_backup_of_a_running_manager_is_restored_with_everybodys_data(short_tmp):
    page = (ROOT / "docs/howto/install-as-a-service.md").read_text()
    commands = re.search(r"## Back up.*?```sh\n(.*?)```", page, re.DOTALL)[1].splitlines()
    backup = short_tmp / "backup"
    short_tmp.chmod(0o755)
    with Installation(short_tmp) as site:
        state = short_tmp / "state"
        site.start("manager")
        site.add("alice")
        site.admin("PUT", "/agents/alice/state?wait=30", {"state": "running"})
        site.admin("PUT", "/agents/alice/state?wait=30", {"state": "stopped"})
        data = next(state.glob("agents/*/data"))
        (data / "work").write_text("hers")
        owner = data.stat().st_uid

        def here(command):
            return command.replace("/var/lib/dispatcher", str(state)).replace("/srv/backup", str(backup))

        subprocess.run(here(commands[0]), shell=True, check=True)
        assert backup.stat().st_mode & 0o777 == 0o700
        # The command line of SQLite may be absent; Python's has the same backup.
        assert here(commands[1]) == f"sqlite3 {state}/dispatcher.db \".backup '{backup}/dispatcher.db'\""
        source, copy = sqlite3.connect(state / "dispatcher.db"), sqlite3.connect(backup / "dispatcher.db")
        source.backup(copy)
        source.close()
        copy.close()
        subprocess.run(here(commands[2]), shell=True, check=True)
        site.processes["manager"].terminate()
        site.processes["manager"].wait(20)
        shutil.rmtree(state)
        state.mkdir()
        shutil.copy(backup / "dispatcher.db", state / "dispatcher.db")
        subprocess.run(["tar", "-xpf", backup / "data.tar", "-C", state], check=True)
        site.start("manager")
        until(
            "alice is there",
            lambda: [one["name"] for one in site.admin("GET", "/agents").json()["agents"]] == ["alice"],
        )
        site.admin("PUT", "/agents/alice/state?wait=30", {"state": "running"})
        assert (data / "work").read_text() == "hers"
        assert data.stat().st_uid == owner
        assert site.admin("GET", "/agents/alice/state").json()["state"] == "running"


def test_files_of_a_home_are_copied_as_the_agent_s_user(short_tmp):
    """As root, `cp` would write through the agent's links; the user has an account on this host and is not trusted."""
    page = (ROOT / "docs/howto/from-jupyterhub.md").read_text()
    commands = re.search(
        r"^dispatcher stop alice\ndata=[^\n]*\n(.*?)^dispatcher start", page, re.DOTALL | re.MULTILINE
    )[1]
    short_tmp.chmod(0o755)
    home, data, file_of_host = short_tmp / "home", short_tmp / "data", short_tmp / "passwd"
    for directory, uid, mode in ((home, 1900000001, 0o755), (data, 1900000002, 0o700)):
        directory.mkdir()
        directory.chmod(mode)
        os.chown(directory, uid, uid)
    (home / "papers").mkdir()
    (home / "papers/notes").write_text("hers")
    (home / "tool").touch()
    (home / "tool").chmod(0o4755)
    (home / "settings").write_text("hers")
    file_of_host.write_text("the host's")
    (data / "settings").symlink_to(file_of_host)
    os.lchown(data / "settings", 1900000002, 1900000002)
    subprocess.run(
        ["sh", "-ec", commands.replace("/home/alice", str(home))],
        env={**os.environ, "data": str(data)},
        check=True,
    )
    assert file_of_host.read_text() == "the host's"
    assert (data / "settings").read_text() == (data / "papers/notes").read_text() == "hers"
    assert {path.stat().st_uid for path in data.rglob("*")} == {1900000002}
    assert data.stat().st_mode & 0o777 == 0o700
