"""The published examples are configurations that work, apart from where the programs are."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.config.load import load
from dispatcher.config.plugins import Plugins

EXAMPLES = Path(__file__).parents[3] / "examples"
CONFIGURATIONS = sorted(path for path in EXAMPLES.rglob("*.toml") if path.name != "pyproject.toml")


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_an_example_is_valid_and_told_of(path: Path) -> None:
    loaded = load(path)
    if any(app.provider == "libvirt" for app in loaded.apps.values()):
        pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    loaded.validate_providers(Plugins())
    assert loaded.apps
    assert all(app.title for app in loaded.apps.values())
    assert f"({path.name})" in (path.parent / "README.md").read_text(encoding="utf-8")


def test_there_are_examples() -> None:
    assert {"jupyterlab", "marimo"} <= {path.stem for path in EXAMPLES.glob("*.toml")}
