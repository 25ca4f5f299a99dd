"""A key in the wrong table: the error names the right one."""

from types import ModuleType

import pytest

from dispatcher.config import plugins
from dispatcher.config.misplaced import hint

GETS = ", the app gets it as {%s} in its command"


@pytest.mark.parametrize(
    ("key", "table", "provider", "said"),
    [
        ("command", "apps.lab", "subprocess", ", it belongs in [apps.lab.subprocess]"),
        ("command", "providers.subprocess", "subprocess", ", it belongs in [apps.NAME.subprocess]"),
        ("command", "defaults", "subprocess", ", it belongs in [apps.NAME.subprocess]"),
        ("command", "proxy", "subprocess", ", it belongs in [apps.NAME.subprocess]"),
        ("image", "apps.lab", "docker", ", it belongs in [apps.lab.docker]"),
        ("image", "providers.docker", "subprocess", ", it belongs in [apps.NAME.docker]"),
        ("port", "apps.lab", "docker", ", it belongs in [apps.lab.docker]"),
        ("port", "apps.lab", "subprocess", GETS % "port"),
        ("port", "apps.lab.subprocess", "subprocess", GETS % "port"),
        ("socket", "apps.lab.docker", "docker", GETS % "socket"),
        ("socket", "providers.subprocess", "subprocess", GETS % "socket"),
        ("ports", "apps.lab.subprocess", "subprocess", ", it belongs in [providers.subprocess]"),
        ("memory", "apps.lab.subprocess", "subprocess", ", it belongs in [apps.lab]"),
        ("title", "defaults", "subprocess", ", it belongs in [apps.NAME]"),
        ("gpus", "apps.lab", "subprocess", ", it belongs in [apps.lab.docker] with that provider"),
        ("state_dir", "proxy", "subprocess", ", it belongs in [manager]"),
        ("listen", "auth", "subprocess", ", it belongs in [manager] or [proxy]"),
        ("workers", "", "subprocess", ", it belongs in [proxy]"),
        ("plugins", "manager", "subprocess", ", it belongs in the top of the file"),
        ("subprocess", "", "subprocess", ", it belongs in [providers.subprocess] or [apps.NAME.subprocess]"),
        ("sokcet", "apps.lab", "subprocess", ""),
        ("command", "apps.lab", "no-such-provider", None),
    ],
)
def test_the_right_table_is_named(key, table, provider, said):
    pytest.importorskip("docker", reason="the extra [docker] is not installed")
    found = hint(key, table, provider)
    assert found.startswith(", it belongs in [apps.lab.") if said is None else found == said


def test_a_hint_runs_no_code_of_plugins_that_nothing_uses(tmp_path, monkeypatch):
    (tmp_path / "acme_unused-1.dist-info").mkdir()
    (tmp_path / "acme_unused-1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: acme-unused\nVersion: 1\n"
    )
    (tmp_path / "acme_unused-1.dist-info/entry_points.txt").write_text(
        "[dispatcher.plugins]\nunused = acme_unused\n"
    )
    (tmp_path / "acme_unused.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    imported = []
    monkeypatch.setattr(plugins, "_import", lambda name, entry: imported.append(name) or ModuleType(name))
    assert hint("gpus", "apps.lab", "subprocess") == ""
    assert imported
    assert "unused" not in imported
