"""Plugins: found by name, loaded when named, and each way to break the contract told with who is at fault."""

import logging
import os
import shutil
import sys
import time
import types
from importlib.metadata import EntryPoint, entry_points

import pytest
from pydantic import BaseModel, ConfigDict

from dispatcher import __version__
from dispatcher.common import contained
from dispatcher.plugin import authenticator, provider
from dispatcher.plugin.authenticator import Authenticator
from dispatcher.plugin.errors import PluginError
from dispatcher.plugin.hooks import hookimpl
from dispatcher.plugin.model import Isolation
from dispatcher.config.plugins import GROUP, Plugins
from dispatcher.plugin.provider import Provider


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: str = "blue"


class AppOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    image: str


class FakeProvider(Provider):
    name = "fake"
    isolation = Isolation.PROCESS
    Options = Options
    AppOptions = AppOptions
    capabilities = frozenset()

    def check(self, *, deadline): ...
    def explain(self, app): ...
    def prepare(self, app, *, deadline, progress): ...
    def handle(self, spec): ...
    def ensure(self, spec, *, deadline, progress): ...
    def observe(self, handle, *, deadline): ...
    def stop(self, handle, *, grace, deadline, progress): ...
    def destroy(self, handle, *, data, deadline, progress): ...
    def list(self, *, deadline): ...


class FakeAuthenticator(Authenticator):
    name = "fake"
    Options = Options

    def authenticate(self, name, password, *, deadline): ...


def plugin(providers=None, authenticators=None, **others):
    module = types.ModuleType("some_plugin")
    if providers is not None:
        module.dispatcher_register_providers = hookimpl(lambda: providers, specname=None)
        module.dispatcher_register_providers.__name__ = "dispatcher_register_providers"
    if authenticators is not None:
        module.dispatcher_register_authenticators = hookimpl(lambda: authenticators)
    for name, value in others.items():
        setattr(module, name, value)
    return module


async def observe(event): ...


async def authenticators():
    yield FakeAuthenticator


def generator():
    def dispatcher_agent_event(event):
        yield

    return dispatcher_agent_event


def collector():
    return (yield)


def broken(**attributes):
    return type("Broken", (FakeProvider,), attributes)


class Distribution:
    version = "1.2"

    def __init__(self, name):
        self.name = self.metadata = name


def entry(name, value, distribution="acme-plugin"):
    found = EntryPoint(name, value, GROUP)
    vars(found).update(dist=Distribution(distribution))
    return found


def test_the_built_in_providers_take_the_way_of_a_third_party():
    available = Plugins().available()
    assert {"subprocess", "docker", "libvirt"} <= set(available)
    assert available["docker"].startswith("agent-dispatcher ")


def test_a_registered_class_is_found_by_its_name():
    plugins = Plugins([])
    plugins.register("fake", plugin([FakeProvider], [FakeAuthenticator]))
    assert plugins.provider("fake") is FakeProvider
    assert plugins.authenticator("fake") is FakeAuthenticator


def test_only_the_plugin_that_is_named_is_imported(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "good_plugin", plugin([FakeProvider]))
    plugins = Plugins([entry("fake", "good_plugin"), entry("bad", "no_such_module_anywhere")])
    assert plugins.provider("fake") is FakeProvider
    assert list(plugins.available()) == ["bad", "fake"]


def test_loading_twice_is_once(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "good_plugin", plugin([FakeProvider]))
    plugins = Plugins([entry("fake", "good_plugin")])
    plugins.load("fake")
    plugins.load("fake")


def test_one_distribution_that_is_seen_twice_is_one(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "good_plugin", plugin([FakeProvider]))
    assert Plugins([entry("fake", "good_plugin"), entry("fake", "good_plugin")]).provider("fake") is FakeProvider


@pytest.mark.parametrize(
    ("directory", "files", "why"),
    [
        ("acme-1.dist-info", {}, "no name"),
        (".dist-info", {}, "no name"),
        ("acme-1.dist-info", {"METADATA": b"Name: acme\nVersion: 1\nAuthor: Andr\xe9\n"}, "UnicodeDecodeError"),
        ("acme-1.dist-info", {"entry_points.txt": b"[console_scripts]\nnonsense\n"}, "TypeError"),
        ("acme-1.dist-info", {"entry_points.txt": b"[console_scripts]\ncaf\xe9 = a\n"}, "UnicodeDecodeError"),
    ],
)
def test_damaged_metadata_of_a_distribution_harms_no_other(tmp_path, monkeypatch, caplog, directory, files, why):
    (tmp_path / directory).mkdir()
    declared = {"entry_points.txt": f"[{GROUP}]\nacme = acme\n".encode()}
    for name, content in (declared | files).items():
        (tmp_path / directory / name).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Plugins().available()
    assert {"docker", "libvirt", "subprocess"} <= found.keys() and "acme" not in found
    (told,) = caplog.messages
    assert directory in told and why in told and "reinstall it" in told


def test_an_empty_directory_that_an_upgrade_left_hides_no_plugin(tmp_path, monkeypatch):
    (tmp_path / "agent_dispatcher-0.0.9.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "subprocess" in Plugins().available()


def test_a_name_that_two_distributions_claim_names_both():
    plugins = Plugins([entry("fake", "one"), entry("fake", "two", "rival-plugin")])
    with pytest.raises(PluginError) as caught:
        plugins.load("fake")
    assert "one of acme-plugin 1.2 and two of rival-plugin 1.2" in str(caught.value)


def test_an_unknown_name_names_its_neighbour():
    with pytest.raises(
        PluginError, match=r"There is no plugin 'dokcer': installed are: docker.*did you mean 'docker'"
    ):
        Plugins([entry("docker", "x")]).load("dokcer")
    with pytest.raises(PluginError, match="installed are: none"):
        Plugins([]).load("docker")


def test_a_hook_that_cannot_import_a_library_says_what_to_install():
    class Lazy:
        @hookimpl
        def dispatcher_register_providers(self):
            from no_such_library_anywhere import Provider

            return [Provider]

    with pytest.raises(
        PluginError, match=r"'lazy' of acme 1 cannot be imported: the Python module .* is not.*pip install"
    ):
        Plugins([]).register("lazy", Lazy(), "acme 1")


def test_a_plugin_that_cannot_be_imported_names_its_distribution():
    plugins = Plugins([entry("bad", "no_such_module_anywhere")])
    with pytest.raises(
        PluginError, match=r"The plugin 'bad' of acme-plugin 1\.2 cannot be imported: the Python module"
    ):
        plugins.load("bad")


def test_a_plugin_that_exits_when_imported_names_its_distribution(tmp_path, monkeypatch):
    (tmp_path / "exiting_plugin.py").write_text("raise SystemExit(4)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(
        PluginError, match=r"The plugin 'bad' of acme-plugin 1\.2 cannot be imported: SystemExit: 4"
    ):
        Plugins([entry("bad", "exiting_plugin")]).load("bad")


def speaks(monkeypatch, first, last):
    """A core that accepts these versions of the contracts."""
    for contract in (provider, authenticator):
        monkeypatch.setattr(contract, "API_VERSIONS", range(first, last + 1))


@pytest.mark.parametrize("kind", ["provider", "authenticator"])
def test_a_plugin_of_an_older_contract_works_and_a_warning_says_what_to_upgrade(monkeypatch, caplog, kind):
    speaks(monkeypatch, 1, 2)
    old, new = (
        type(name, (FakeProvider if kind == "provider" else FakeAuthenticator,), {"api_version": version})
        for name, version in (("Old", 1), ("New", 2))
    )
    for cls in (old, new):
        plugins = Plugins([])
        plugins.register("fake", plugin(**{f"{kind}s": [cls]}), "acme 1.2")
        assert getattr(plugins, kind)("fake") is cls
    assert [record.getMessage() for record in caplog.records] == [
        f"Old of acme 1.2 is written for version 1 of the {kind} contract; agent-dispatcher {__version__} "
        "still accepts it, and prefers version 2: upgrade acme"
    ]


@pytest.mark.parametrize("kind", ["provider", "authenticator"])
def test_a_class_that_names_no_version_follows_the_first_one(monkeypatch, kind):
    """Not the newest one: it was written before that existed."""
    cls = FakeProvider if kind == "provider" else FakeAuthenticator
    speaks(monkeypatch, 2, 2)
    with pytest.raises(PluginError, match="is written for version 1 of"):
        Plugins([]).register("fake", plugin(**{f"{kind}s": [cls]}), "acme 1.2")


@pytest.mark.parametrize(
    ("first", "last", "shown", "told"),
    [
        (1, 1, 2, "accepts version 1 (upgrade agent-dispatcher, or install another release of acme)"),
        (1, 2, 3, "accepts versions 1 to 2 (upgrade agent-dispatcher, or install another release of acme)"),
        (2, 3, 1, "accepts versions 2 to 3 (upgrade acme, or install another release of agent-dispatcher)"),
        (1, 2, "'True'", "accepts versions 1 to 2 (upgrade acme"),
        (1, 2, "'1'", "accepts versions 1 to 2 (upgrade acme"),
    ],
)
def test_another_version_names_both_and_what_to_upgrade(monkeypatch, first, last, shown, told):
    speaks(monkeypatch, first, last)
    version = {"'True'": True, "'1'": "1"}.get(shown, shown)
    with pytest.raises(PluginError) as caught:
        Plugins([]).register("fake", plugin([broken(api_version=version)]), "acme 1.2")
    assert f"Broken of acme 1.2 is written for version {shown} of the provider contract" in str(caught.value)
    assert f"agent-dispatcher {__version__} {told}" in str(caught.value)


def failing():
    raise RuntimeError("boom")


def exiting():
    raise SystemExit(4)


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (plugin([int]), "int of acme 1 is not a subclass of dispatcher's Provider"),
        (plugin(["text"]), "'text' of acme 1 is not a subclass"),
        (plugin([FakeAuthenticator]), "is not a subclass of dispatcher's Provider"),
        (
            plugin([broken(api_version=99)]),
            "Broken of acme 1 is written for version 99 of the provider contract: agent-dispatcher",
        ),
        (plugin([broken(api_version=None)]), "written for version 'None'"),
        (plugin([broken(name=None)]), "Broken of acme 1 has no name"),
        (plugin([broken(Options=dict)]), "Broken of acme 1 has no Options"),
        (plugin([broken(AppOptions=None)]), "Broken of acme 1 has no AppOptions"),
        (plugin([FakeProvider, broken()]), "The plugin 'fake' of acme 1 registers several classes"),
        (plugin([broken(isolation="container")]), "Broken of acme 1 has no isolation: found 'container'"),
        (plugin([broken(name="other")]), "Broken of acme 1 calls itself 'other'"),
        (
            plugin([type("Partial", (Provider,), {"name": "p"})]),
            "Partial of acme 1 is incomplete: it does not implement capabilities, check",
        ),
        (
            plugin(dispatcher_register_provider=hookimpl(lambda: [])),
            "implements an unknown hook 'dispatcher_register_provider'",
        ),
        (plugin(dispatcher_agent_event=hookimpl(lambda evnt: None)), "breaks a hook's contract"),
        (plugin(dispatcher_agent_event=hookimpl(observe)), "'dispatcher_agent_event' as a coroutine"),
        (
            plugin(dispatcher_register_authenticators=hookimpl(authenticators)),
            "'dispatcher_register_authenticators' as a coroutine",
        ),
    ],
)
def test_each_breach_of_contract_names_the_one_at_fault(made, complaint):
    with pytest.raises(PluginError) as caught:
        Plugins([]).register("fake", made, "acme 1")
    assert complaint in str(caught.value)
    assert "acme 1" in str(caught.value)


@pytest.mark.parametrize(("hook", "why"), [(failing, "RuntimeError: boom"), (exiting, "SystemExit: 4")])
def test_a_hook_that_raises_is_the_plugin_s_fault(hook, why):
    module = types.ModuleType("some_plugin")
    module.dispatcher_register_providers = hookimpl(hook)
    with pytest.raises(PluginError, match=f"dispatcher_register_providers of acme 1 failed: {why}"):
        Plugins([]).register("fake", module, "acme 1")


def test_a_hook_that_is_nearly_one_names_it():
    made = plugin(dispatcher_agent_evnt=hookimpl(lambda event: None))
    with pytest.raises(PluginError, match="did you mean 'dispatcher_agent_event'"):
        Plugins([]).register("fake", made, "acme 1")


def test_a_plugin_without_the_class_that_its_name_promises(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "good_plugin", plugin([FakeProvider]))
    with pytest.raises(PluginError, match=r"of acme-plugin 1\.2 calls itself 'fake': the entry point 'other'"):
        Plugins([entry("other", "good_plugin")]).provider("other")
    with pytest.raises(
        PluginError, match="'fake' of acme-plugin 1.2 registers no authenticator: it registers: provider"
    ):
        Plugins([entry("fake", "good_plugin")]).authenticator("fake")


def test_a_plugin_cannot_take_the_name_of_another_one(monkeypatch):
    """Whichever is loaded first."""
    usurper = plugin([broken(name="subprocess")])
    monkeypatch.setitem(sys.modules, "usurping_plugin", usurper)
    entries = [entry("fast", "usurping_plugin"), *entry_points(group=GROUP)]
    plugins = Plugins(entries)
    with pytest.raises(PluginError) as caught:
        plugins.provider("fast")
    assert "acme-plugin 1.2 calls itself 'subprocess'" in str(caught.value)
    assert "'subprocess' is the provider of agent-dispatcher" in str(caught.value)
    assert plugins.provider("subprocess").__module__.startswith("dispatcher_subprocess")


@pytest.mark.parametrize("name", ["local", "dispatcher-log"])
def test_the_names_of_the_program_s_own_parts_are_taken(monkeypatch, name):
    monkeypatch.setitem(
        sys.modules, "usurping_plugin", plugin([], [type("Own", (FakeAuthenticator,), {"name": name})])
    )
    with pytest.raises(
        PluginError, match=f"The plugin '{name}' of acme-plugin 1.2 is refused: the name belongs to"
    ):
        Plugins([entry(name, "usurping_plugin")]).load(name)


def test_a_refusal_is_remembered_until_plugins_are_tried_again(tmp_path, monkeypatch):
    (tmp_path / "repaired_plugin.py").write_text("raise SystemExit(4)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    plugins = Plugins([entry("fake", "repaired_plugin")])
    for _ in range(2):
        with pytest.raises(PluginError, match="SystemExit: 4"):
            plugins.provider("fake")
    (tmp_path / "repaired_plugin.py").write_text("raise SystemExit(55)\n")
    with pytest.raises(PluginError, match="SystemExit: 4"):
        plugins.provider("fake")
    plugins.refresh()
    with pytest.raises(PluginError, match="SystemExit: 55"):
        plugins.provider("fake")


def installed(site, version, source, module="acme_repaired"):
    """Install a plugin in a directory, in place of its other versions."""
    for old in site.glob("acme_plugin-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"acme_plugin-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-plugin\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nfake = {module}\n")
    (site / f"{module}.py").write_text(source)


WORKS = """from dispatcher.plugin import hookimpl
from tests.unit.config.test_plugins import FakeProvider
@hookimpl
def dispatcher_register_providers():
    return [FakeProvider]
"""


def test_a_plugin_that_was_repaired_or_installed_meanwhile_is_found_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Plugins()
    assert "fake" not in plugins.available()
    later = WORKS.replace("[FakeProvider]", "[type('F', (FakeProvider,), {'api_version': 7})]")
    installed(tmp_path, "1.0", later)
    assert plugins.refresh() == []
    with pytest.raises(PluginError, match="version 7"):
        plugins.provider("fake")
    installed(tmp_path, "1.10.0", WORKS)
    assert plugins.refresh() == []
    assert plugins.provider("fake") is FakeProvider
    assert plugins.ref("provider", "fake").distribution == "acme-plugin 1.10.0"


def test_a_plugin_in_use_that_was_replaced_or_removed_needs_a_restart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(tmp_path, "1.0", WORKS)
    plugins = Plugins()
    plugins.load("fake")
    assert plugins.refresh() == []
    installed(tmp_path, "2.0", WORKS)
    [told] = plugins.refresh()
    assert "fake is in use as acme-plugin 1.0, and installed as acme-plugin 2.0" in told
    assert "restart of the manager" in told
    assert plugins.available()["fake"] == "acme-plugin 1.0"
    shutil.rmtree(tmp_path / "acme_plugin-2.0.dist-info")
    for _ in range(2):
        [told] = plugins.refresh()
        assert "fake is in use as acme-plugin 1.0, and no longer installed" in told
    assert plugins.available()["fake"] == "acme-plugin 1.0"
    assert plugins.ref("provider", "fake").distribution == "acme-plugin 1.0"


@pytest.mark.parametrize("value", ["", " ", ":", "a b", "1.2.3", "..x", "x:", "json:dumps:x", "\u00fcber"])
def test_an_entry_point_that_names_no_module_is_refused(value):
    plugins = Plugins([entry("odd", value)])
    with pytest.raises(PluginError, match="acme-plugin 1.2"):
        plugins.load("odd")
    plugins.refresh()


def test_what_an_import_changes_of_the_whole_process_is_set_back_and_told(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(tmp_path, "1.0", "import logging, os\nos.umask(0)\nlogging.disable(50)\n" + WORKS, "acme_unsettling")
    before = os.umask(0o022)
    try:
        assert Plugins().provider("fake") is FakeProvider
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert not logging.root.manager.disable
    assert "The plugin fake of acme-plugin 1.0 changed the whole process: the umask, the level" in caplog.text


@pytest.mark.parametrize(("hooks", "words"), [
    ({"dispatcher_agent_event": hookimpl(wrapper=True)(generator())}, "wraps the hook 'dispatcher_agent_event'"),
    ({"dispatcher_agent_event": hookimpl(hookwrapper=True)(generator())}, "wraps the hook"),
    ({"dispatcher_agent_event": hookimpl(generator())}, "as a generator"),
    ({"dispatcher_register_providers": hookimpl(wrapper=True)(collector)}, "wraps the hook"),
])  # fmt: skip
def test_a_hook_that_would_never_run_is_refused(hooks, words):
    with pytest.raises(PluginError, match=words) as caught:
        Plugins([]).register("odd", plugin(**hooks), "acme 1")
    assert "acme 1" in str(caught.value)
    assert caught.value.fix


def test_a_plugin_with_one_wrong_class_is_refused_as_a_whole():
    plugins = Plugins([])
    with pytest.raises(PluginError):
        plugins.register("fake", plugin([FakeProvider], [int]), "acme 1")
    with pytest.raises(PluginError, match="There is no plugin 'fake'"):
        plugins.provider("fake")


def test_an_import_that_hangs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(contained, "SECONDS", 0.2)
    (tmp_path / "hanging_plugin.py").write_text("import time\nwhile True: time.sleep(0.05)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    plugins = Plugins([entry("slow", "hanging_plugin")])
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(PluginError, match="The plugin slow does not return from its import.*acme-plugin 1.2"):
            plugins.load("slow")
        plugins.refresh()
    assert time.monotonic() - began < 0.1


def test_observers_are_called_through_the_hook():
    seen = []
    plugins = Plugins([])
    plugins.register("watch", plugin(dispatcher_agent_event=hookimpl(lambda event: seen.append(event))))
    plugins.hook.dispatcher_agent_event(event="something")
    assert seen == ["something"]


def test_two_registries_know_nothing_of_each_other():
    one, two = Plugins([]), Plugins([])
    one.register("fake", plugin([FakeProvider]))
    with pytest.raises(PluginError):
        two.provider("fake")


def test_hooks_are_called_by_pluggy_whatever_the_function_s_name():
    """`specname` is pluggy's way to give an implementation a name of its own."""
    plugins = Plugins([])
    plugins.register(
        "fake",
        plugin(providers_of_acme=hookimpl(lambda: [FakeProvider], specname="dispatcher_register_providers")),
    )
    assert plugins.provider("fake") is FakeProvider


def test_a_hook_is_called_for_the_plugin_that_is_loaded_alone():
    calls = []
    plugins = Plugins([])
    plugins.register(
        "fake", plugin(dispatcher_register_providers=hookimpl(lambda: calls.append("one") or [FakeProvider]))
    )
    plugins.register("two", plugin([], dispatcher_agent_event=hookimpl(lambda event: None)))
    assert calls == ["one"]


def test_a_plugin_that_was_refused_gets_no_events():
    seen = []
    plugins = Plugins([])
    with pytest.raises(PluginError):
        plugins.register("bad", plugin([int], dispatcher_agent_event=hookimpl(lambda event: seen.append(event))))
    plugins.hook.dispatcher_agent_event(event="something")
    assert seen == []


def test_a_plugin_may_be_an_object_without_a_hash():
    plugins = Plugins([])
    made = types.SimpleNamespace(dispatcher_register_providers=hookimpl(lambda: [FakeProvider]))
    plugins.register("fake", made)
    assert plugins.provider("fake") is FakeProvider


def test_a_plugin_that_is_registered_twice_is_an_error():
    made = plugin(dispatcher_agent_event=hookimpl(lambda event: None))
    plugins = Plugins([])
    plugins.register("one", made, "acme 1")
    for name in ("one", "two"):
        with pytest.raises(PluginError, match=f"The plugin '{name}' of acme 1 .* it is registered already"):
            plugins.register(name, made, "acme 1")
