"""Checks of a configuration on this host."""

import os

import pytest

from dispatcher.common.contained import PluginRef
from dispatcher.config.check import access_log_faults, faults, faults_of, tls_faults
from dispatcher.config.load import parse
from dispatcher.config.plugins import Plugins
from dispatcher.manager.rest.certificate import make_certificate
from dispatcher.plugin.model import App
from tests.unit.config.test_plugins import FakeProvider, plugin


def test_a_certificate_with_the_key_of_another_is_a_fault_of_its_table(tmp_path):
    for name in ("one", "two"):
        make_certificate(tmp_path / f"{name}.pem", tmp_path / f"{name}.key", ["localhost"])
    for table in ("proxy", "manager"):
        pair = {"tls_cert": f"{tmp_path}/one.pem", "tls_key": f"{tmp_path}/one.key"}
        assert list(tls_faults(parse({table: pair}))) == []
        (fault,) = tls_faults(parse({table: pair | {"tls_key": f"{tmp_path}/two.key"}}))
        assert fault.startswith(f"{table}.tls_cert and {table}.tls_key cannot be used")
        (fault,) = tls_faults(parse({table: pair | {"tls_key": f"{tmp_path}/none"}}))
        assert fault.startswith(f"{table}.tls_key: cannot read {tmp_path}/none")


def test_an_access_log_needs_a_directory_of_the_proxys_user(tmp_path):
    def found(path):
        return list(access_log_faults(parse({"proxy": {"access_log": str(path), "user": "nobody-at-all"}})))

    own = os.geteuid() or parse({}).manager.uid_range[0]  # root: as that user does not exist
    tmp_path.chmod(0o755)
    os.chown(tmp_path, own, -1)
    assert found("") == found("-") == found(tmp_path / "log") == []
    assert f"there is no directory {tmp_path}/none" in found(tmp_path / "none/log")[0]
    assert "is a directory, expected the path of a file" in found(tmp_path)[0]
    (tmp_path / "link").symlink_to("/proc/self/fd/1")  # as /dev/stdout is one
    (fault,) = found(tmp_path / "link")
    assert "is a symbolic link" in fault and '"-" for standard output' in fault and "chown" not in fault


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make directories of others")
def test_a_directory_of_another_user_is_named_with_what_to_do(tmp_path):
    config = parse({"proxy": {"access_log": f"{tmp_path}/log", "user": "nobody-at-all"}})
    (fault,) = access_log_faults(config)
    assert "the proxy cannot write to" in fault
    assert f"`chown {config.manager.uid_range[0]} {tmp_path}`" in fault
    log = tmp_path / "log"
    log.touch(mode=0o640)
    (fault,) = access_log_faults(config)
    assert f"`chown {config.manager.uid_range[0]} {log}`" in fault
    os.chown(log, config.manager.uid_range[0], -1)
    assert list(access_log_faults(config)) == []


def test_a_provider_whose_check_fails_is_named_and_the_others_are_checked():
    class Failing(FakeProvider):
        def faults(self, app):
            raise RuntimeError("boom")

    class Choosy(FakeProvider):
        name = "choosy"

        def faults(self, app):
            assert str(self.context.state_dir) == "/var/lib/x/providers/choosy"
            return [f"apps.{app.name}.choosy.image: no"]

    plugins = Plugins([])
    plugins.register("fake", plugin(providers=[Failing]))
    plugins.register("choosy", plugin(providers=[Choosy]), "acme 1")
    config = parse({
        "manager": {"state_dir": "/var/lib/x"},
        "apps": {"a": {"provider": "fake", "fake": {"image": "x"}}, "b": {"provider": "choosy", "choosy": {"image": "x"}}},
    })  # fmt: skip
    found = [fault for fault in faults(config, plugins) if "there is no plugin" not in fault]
    failed = "apps.a.provider: The provider fake failed in faults: RuntimeError: 'boom'"
    assert found == [f"{failed} (report this fault to the authors of the plugin)", "apps.b.choosy.image: no"]


def test_a_misspelt_placeholder_in_the_environment_is_named():
    app = App(
        name="a",
        provider="fake",
        options=FakeProvider.AppOptions(image="x"),
        environment={"X": "{sokcet} {other}"},
    )
    assert list(faults_of(app, lambda _: (), PluginRef("provider", "fake"))) == [
        "apps.a.environment.X: found '{sokcet}', did you mean '{socket}'?"
    ]
