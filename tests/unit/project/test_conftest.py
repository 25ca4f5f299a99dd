"""The rules of tests/conftest.py: skips fail in CI, heavy groups come first and stay together."""

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester, monkeypatch):
    from tests.conftest import ROOT

    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = docker\n  libvirt\n  browser\n  root\n  bubblewrap\n")
    monkeypatch.delenv("CI", raising=False)
    return pytester


SKIPS = """
import pytest
def test_passes(): pass
def test_skips(): pytest.skip("no moon")
@pytest.mark.docker
def test_needs_docker(): pass
"""


def test_outside_ci_a_missing_backend_is_skipped_with_its_reason(suite, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    suite.makepyfile(SKIPS)
    result = suite.runpytest_subprocess("-rs")
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["*needs docker: /nonexistent.sock*", "*no moon*"])


def test_in_ci_every_skip_is_a_failure(suite, monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    suite.makepyfile(SKIPS)
    suite.makepyfile(test_module="import pytest\npytest.importorskip('no_such_module')\n")
    result = suite.runpytest_subprocess("--continue-on-collection-errors")
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] == 1
    assert outcomes["failed"] + outcomes["errors"] == 3
    assert "skipped" not in outcomes
    assert result.ret != 0


def test_in_ci_an_expected_failure_stays_one(suite, monkeypatch):
    monkeypatch.setenv("CI", "true")
    suite.makepyfile("import pytest\n@pytest.mark.xfail(strict=True)\ndef test_known(): assert 0\n")
    suite.runpytest_subprocess().assert_outcomes(xfailed=1)


def test_heavy_tests_come_first_in_their_group(suite, monkeypatch):
    suite.makepyfile("""
import pytest
def test_light(): pass
@pytest.mark.browser
def test_browser(request): assert request.node.get_closest_marker("xdist_group").args == ("browser",)
@pytest.mark.libvirt
def test_libvirt(): pass
""")
    result = suite.runpytest_subprocess("--collect-only", "-q")
    names = [line.split("::")[-1] for line in result.stdout.lines if "::" in line]
    assert names == ["test_libvirt", "test_browser", "test_light"]


def test_a_group_stays_on_one_worker(suite):
    suite.makepyfile(
        """
import os, pytest
@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("n", range(12))
def test_together(n, tmp_path_factory):
    seen = tmp_path_factory.getbasetemp().parent / "workers"
    with seen.open("a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")
    assert len(set(seen.read_text().split())) == 1
@pytest.mark.parametrize("n", range(12))
def test_spread(n): pass
"""
    )
    result = suite.runpytest_subprocess("-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder")
    result.assert_outcomes(passed=24)
