"""`[apps.X.secrets]` with each provider: the agent has the secret, at its next start a rotated one, nothing else shows it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

from dispatcher.testing import PROBE
from tests.support.installation import Installation, until

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap, pytest.mark.slow]

VARIABLE = "PROBE_KEY_OF_THE_MANAGER"
APP = """
[defaults]
idle_timeout = false
max_restarts = 0
start_timeout = "4m"
stop_grace = "5s"
[apps.probe]
provider = "PROVIDER"
memory = "192M"
[apps.probe.PROVIDER]
OPTIONS
[apps.probe.secrets]
FILE_KEY = "{base}/key"
VARIABLE_KEY = "env:{variable}"
"""
SECONDS = 240  # an emulated machine on a busy host


def subprocess_app():
    command = [sys.executable, str(PROBE), "--unix", "{{socket}}"]
    return {"command": command, "read_only": [str(PROBE.parent)]}


def docker_app():
    from tests.support.docker_tools import images

    images()
    return {"image": "dispatcher-test/probe", "command": ["python3", "/probe.py", "--unix", "{{socket}}"]}


def libvirt_app():
    from tests.support.vm import app_options

    return app_options()


class Place:
    """An installation whose only agent, alice's, has two secrets."""

    def __init__(self, base: Path, provider: str, options: dict[str, object]) -> None:
        self.provider = provider
        self.values = {"FILE_KEY": secrets.token_hex(12) + "\n", "VARIABLE_KEY": os.environ[VARIABLE]}
        self.key = base / "key"
        self.rotate(self.values["FILE_KEY"])
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
        text = APP.replace("PROVIDER", provider).replace("OPTIONS", lines)
        text = text.replace("{base}", str(base)).replace("{variable}", VARIABLE)
        self.site = Installation(base, text)

    def rotate(self, value: str) -> None:
        self.key.touch(0o600)
        self.key.write_text(value)

    def begin(self) -> None:
        self.site.start("manager")
        self.site.start("proxy")
        self.site.add("alice")
        self.cookie = self.site.login("alice")

    def ask(self, path: str) -> str:
        def answered():
            answer = self.site.web("GET", path, Cookie=self.cookie, Accept="*/*")
            return answer.body.decode() if answer.status == 200 else None

        return until(f"the app answers {path}", answered, SECONDS)

    def environment(self) -> dict[str, str]:
        return dict(one.split("=", 1) for one in self.ask("/env").split("\0") if "=" in one)

    def seen(self) -> dict[str, str]:
        """Return the secrets as the agent reads them."""
        directory = self.environment()["DISPATCHER_SECRETS"]
        return {name: self.ask(f"/read?path={quote(f'{directory}/{name}')}") for name in self.values}

    def restart(self) -> None:
        answer = self.site.admin("POST", "/agents/alice/restart?wait=60")
        assert answer.status in {200, 202}, answer.body

    def shown(self) -> dict[str, str]:
        """Return what other people can see of the agent, by where they would look."""
        name = self.site.admin("GET", "/agents/alice/runtime").json()["handle"]["name"]
        found = {f"command line of {path}": read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
        for log in ("manager.log", "proxy.log"):
            found[log] = read(self.site.base / log)
        for resource in ("", "/state", "/runtime", "/logs", "/events", "/why", "/copies"):
            found[f"REST {resource}"] = self.site.admin("GET", f"/agents/alice{resource}").body.decode()
        found["REST /agents"] = self.site.admin("GET", "/agents").body.decode()
        for path in (self.site.base / "state").rglob("*"):
            if path.is_file() and not path.is_symlink():
                found[str(path)] = read(path)
        if self.provider == "docker":
            found["docker inspect"] = output("docker", "inspect", name)
        if self.provider == "libvirt":
            found["domain XML"] = output("virsh", "dumpxml", "--security-info", name)
        found["config show"] = output(
            sys.executable, "-m", "dispatcher", "--config", str(self.site.config), "config", "show"
        )
        return found


def read(path: Path) -> str:
    with contextlib.suppress(OSError):  # processes come and go
        return path.read_bytes().decode(errors="replace")
    return ""


def output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.fixture(
    scope="module",
    params=[
        "subprocess",
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("libvirt", marks=[pytest.mark.libvirt, pytest.mark.xdist_group("machines")]),
    ],
)
def place(request):
    options = {"subprocess": subprocess_app, "docker": docker_app, "libvirt": libvirt_app}[request.param]()
    base = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    base.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, secrets.token_hex(12))
        place = Place(base, request.param, options)
        with place.site:
            place.begin()
            yield place


def test_the_agent_sees_its_secrets_and_others_do_not(place):
    assert place.seen() == place.values
    names = [value.strip() for value in place.values.values()]
    assert not [value for value in place.environment().values() if any(name in value for name in names)]
    shown = place.shown()
    assert [where for where, text in shown.items() if any(name in text for name in names)] == []


def test_a_rotated_file_is_used_at_the_next_start_and_makes_nothing_outdated(place):
    before = place.seen()
    place.values["FILE_KEY"] = secrets.token_hex(12)
    place.rotate(place.values["FILE_KEY"])
    assert place.seen() == before
    assert not place.site.admin("GET", "/agents/alice").json()["outdated"]
    place.restart()
    until("the agent has the new secret", lambda: place.seen() == place.values, SECONDS)


def test_a_start_without_its_secret_fails_and_says_which(place):
    until("it runs", lambda: place.site.admin("GET", "/agents/alice").json()["state"] == "running", 60)
    place.key.rename(place.key.with_suffix(".away"))
    try:
        answer = place.site.admin("POST", "/agents/alice/restart?wait=60")
        assert answer.status == 400, answer.body
        assert answer.json()["detail"] == "there is no such file"
        assert place.site.admin("GET", "/agents/alice").json()["state"] == "running", (
            "it was not stopped for nothing"
        )
        assert place.site.admin("PUT", "/agents/alice/state?wait=60", {"state": "stopped"}).status in {200, 202}
        place.site.admin("PUT", "/agents/alice/state?wait=60", {"state": "running"})
        row = until("it fails", lambda: failed(place), 60)
        text = json.dumps(row["failure"])
        assert "apps.probe.secrets.FILE_KEY: cannot read" in text
        assert "there is no such file" in text
    finally:
        place.key.with_suffix(".away").rename(place.key)
    answer = place.site.admin("PUT", "/agents/alice/state?wait=60", {"state": "running"})
    assert answer.status in {200, 202}, answer.body
    assert place.seen() == place.values


def failed(place):
    row = place.site.admin("GET", "/agents/alice").json()
    return row if row["state"] == "failed" else None
