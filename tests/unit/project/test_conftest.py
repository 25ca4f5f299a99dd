"""The rules of tests/conftest.py: skips fail in CI, heavy groups come first and stay together."""

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester, monkeypatch):
    from tests.conftest import ROOT

    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = docker\n  libvirt\n  browser\n  root\n  bubblewrap\n  program\n")
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


def test_a_program_that_is_not_installed_is_named(suite):
    suite.makepyfile("""
import pytest
@pytest.mark.program("sh", "no-such-program")
def test_skipped(): pass
@pytest.mark.program("sh")
def test_passes(): pass
""")
    result = suite.runpytest_subprocess("-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*needs program: no-such-program not installed*"])


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
def test_libvirt(request): assert request.node.get_closest_marker("xdist_group").args == ("machines",)
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


def test_a_restart_of_libvirtd_meets_no_other_test_with_it(suite, tmp_path):
    from tests.conftest import LIBVIRT_LOCK, ROOT

    text = (ROOT / "tests/conftest.py").read_text().replace(str(LIBVIRT_LOCK), str(tmp_path / "lock"))
    suite.makeconftest(text + "\n\ndef missing(marker):\n    return ''\n")
    work = f"""
import time, pytest
pytestmark = pytest.mark.libvirt
def work(kind):
    begin = time.monotonic()
    time.sleep(0.15)
    with open({str(tmp_path / "seen")!r}, "a") as file:
        file.write(f"{{kind}} {{begin}} {{time.monotonic()}}\\n")
@pytest.mark.parametrize("n", range(8))
def test_uses(n): work("use")
"""
    restart = """
@pytest.mark.libvirt_restart
@pytest.mark.parametrize("n", range(3))
def test_restarts(n): work("restart")
"""
    suite.mkpydir("tests")
    for folder, content in (("tests/contract", work), ("tests/integration", restart.join([work, ""]))):
        (suite.path / folder).mkdir()
        (suite.path / folder / f"test_{folder[6:]}.py").write_text(content)
    result = suite.runpytest_subprocess("-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder")
    result.assert_outcomes(passed=19)
    lines = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    spans = [(kind, float(begin), float(end)) for kind, begin, end in lines]
    uses = [span for span in spans if span[0] == "use"]
    assert any(a[1] < b[1] < a[2] for a in uses for b in uses), "two workers use it at the same time"
    for kind, begin, end in spans:
        if kind == "restart":
            assert not [span for span in spans if begin < span[1] < end or begin < span[2] < end]
