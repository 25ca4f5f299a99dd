"""The program of an app, the files that it needs, and ports."""

import sys
from pathlib import Path
import pytest
from dispatcher_subprocess import plan
from dispatcher.plugin.errors import ProviderError


def test_ports_go_round_and_avoid_what_is_taken(free_port):
    ports = plan.Ports(free_port, free_port)
    assert ports.choose(list) == free_port
    with pytest.raises(ProviderError, match="No TCP port is free") as caught:
        ports.choose(lambda: [free_port])
    assert caught.value.fix


def test_a_virtual_environment_brings_the_python_it_was_made_from(tmp_path):
    base = tmp_path / "opt/python"
    (base / "bin").mkdir(parents=True)
    (base / "bin/python3.12").write_bytes(b"\x7fELF")
    venv = tmp_path / "home/venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text(f"home = {base}/bin\nversion = 3.12\n")
    (venv / "bin/python").symlink_to(base / "bin/python3.12")
    (venv / "bin/app").write_text(f"#!{venv}/bin/python\n")
    for program in ("python", "app"):
        assert set(plan.needed(venv / "bin" / program)) == {venv, base}


def test_a_single_program_and_its_interpreter(tmp_path):
    (tmp_path / "run").write_text("#!/bin/sh\n")
    assert plan.needed(tmp_path / "run") == (tmp_path / "run",)
    assert plan.needed(Path("/usr/bin/env")) == ()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert plan.needed(tmp_path / "loop") == ()
    assert Path(sys.base_prefix) in {Path("/usr"), *plan.needed(Path(sys.executable))}


@pytest.mark.parametrize("name", ["nothing-of-that-name", "/nonexistent/app", "relative/app", "./app"])
def test_a_program_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app").write_text("#!/bin/sh\n")
    (tmp_path / "app").chmod(0o755)
    with pytest.raises(ProviderError) as caught:
        plan.find_program(name, "/usr/bin:/bin", "notes")
    assert caught.value.fix and "apps.notes" in str(caught.value)
