"""The configuration: what is legal, and for what is not one sentence each that helps."""

import itertools
import os
import re

import pytest

from dispatcher.common.contained import PluginRef
from dispatcher.config.load import load, parse
from dispatcher.config import schema
from dispatcher.plugin import options
from dispatcher.config.load import AppConfig, AppDefaults, Config
from dispatcher.plugin.errors import ConfigError, PluginError
from dispatcher.config.plugins import Plugins


def complaint(data):
    with pytest.raises(ConfigError) as caught:
        parse(data)
    return caught.value.why


def test_nothing_at_all_is_a_demo():
    found = parse({})
    assert list(found.apps) == ["demo"]
    assert found.proxy.listen == ["127.0.0.1:8080"]
    assert found.apps["demo"].provider == "subprocess"


def test_no_apps_are_no_apps():
    assert parse({"apps": {}}).apps == {}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"manger": {}}, "manger: unknown key, did you mean 'manager'?"),
        (
            {"zzz": 1},
            "zzz: unknown key, valid are: apps, auth, default_app, defaults, groups, manager, plugins, providers, proxy",
        ),
        ({"manager": "x"}, "manager: found 'x', expected a table"),
        ({"manager": {"state_dri": "/x"}}, "manager.state_dri: unknown key, did you mean 'state_dir'?"),
        ({"manager": {"state_dir": 7}}, "manager.state_dir: found 7, expected a path in quotes"),
        ({"manager": {"threads": "many"}}, "manager.threads: found 'many', expected a whole number"),
        ({"manager": {"threads": "7"}}, "manager.threads: found '7', expected a whole number"),
        ({"manager": {"threads": 2.5}}, "manager.threads: found 2.5, expected a whole number"),
        ({"manager": {"threads": True}}, "manager.threads: found true, expected a whole number"),
        ({"manager": {"threads": 0}}, "manager.threads: found 0, expected at least 2"),
        ({"manager": {"threads": 1000}}, "manager.threads: found 1000, expected at most 256"),
        (
            {"manager": {"uid_range": [7000]}},
            "manager.uid_range.1: is missing, expected one more element of the list",
        ),
        (
            {"proxy": {"user": "root"}},
            "proxy.user: found 'root', expected a user without privileges; the proxy faces the web",
        ),
        (
            {"manager": {"admin_group": "staff", "proxy_group": "staff"}},
            "manager.proxy_group: found 'staff', expected another group than admin_group; the proxy may not administer",
        ),
        ({"manager": {"uid_range": 7000}}, "manager.uid_range: found 7000, expected a list in square brackets"),
        (
            {"manager": {"uid_range": [9000, 8000]}},
            "manager.uid_range: found [9000, 8000], expected two user ids from 1000 on, the lower one first",
        ),
        (
            {"manager": {"log_level": "loud"}},
            "manager.log_level: found 'loud', expected 'debug', 'info', 'warning' or 'error'",
        ),
        ({"manager": {"tls_cert": "/c.pem"}}, "manager.tls_key: is missing, tls_cert requires it"),
        ({"proxy": {"tls_key": "/k.pem"}}, "proxy.tls_cert: is missing, tls_key requires it"),
        (
            {"proxy": {"routing": "subdomain"}},
            'proxy.public_url: is missing, routing = "subdomain" requires it: agents get subdomains of its host',
        ),
        ({"proxy": {"listen": 8080}}, "proxy.listen: found 8080, expected a list in square brackets"),
        (
            {"proxy": {"listen": ["127.0.0.1:1", "nowhere"]}},
            "proxy.listen.1: found 'nowhere', expected an address such as 127.0.0.1:8080, [::1]:8080, unix:/PATH or systemd",
        ),
        (
            {"proxy": {"prefix": "auth/"}},
            "proxy.prefix: found 'auth/', expected a path such as /auth, without a slash at the end",
        ),
        (
            {"proxy": {"public_url": "apps.example.org"}},
            "proxy.public_url: found 'apps.example.org', expected an address such as https://apps.example.org,"
            " without a path",
        ),
        (
            {"proxy": {"trusted_proxies": ["10.0.0.0/99"]}},
            "proxy.trusted_proxies.0: found '10.0.0.0/99', expected a network such as 10.0.0.0/8, an address, or unix",
        ),
        ({"proxy": {"proxy_protocol": 1}}, "proxy.proxy_protocol: found 1, expected true or false"),
        ({"proxy": {"hsts": True}}, 'proxy.hsts: found true, expected a duration such as "90s", "30m" or "1h30m"'),
        ({"apps": 3}, "apps: found 3, expected a table"),
        ({"apps": {"a": 3}}, "apps.a: found 3, expected a table"),
        ({"apps": {"A B": {}}}, "apps.'A B': use 1 to 32 of a-z, 0-9, _ and -"),
        ({"apps": {"a": {"memori": "1G"}}}, "apps.a.memori: unknown key, did you mean 'memory'?"),
        ({"apps": {"a": {"cpus": 0}}}, "apps.a.cpus: found 0, expected a number above 0, or false"),
        ({"apps": {"a": {"cpus": float("nan")}}}, "apps.a.cpus: found NaN, expected a number above 0, or false"),
        (
            {"apps": {"a": {"pids": True}}},
            "apps.a.pids: found true, expected a whole number of at least 1, or false",
        ),
        (
            {"apps": {"a": {"memory": True}}},
            'apps.a.memory: found true, expected a size such as "512M" or "2G"',
        ),
        ({"apps": {"a": {"health": "x"}}}, "apps.a.health: found 'x', expected a path that begins with /"),
        (
            {"apps": {"a": {"environment": {"A=B": "x"}}}},
            "apps.a.environment: found a table, expected names of letters, digits and _, and values without NUL",
        ),
        ({"apps": {"one": {}}, "default_app": "on"}, "default_app: there is no app 'on', did you mean 'one'?"),
        ({"apps": {}, "default_app": "x"}, "default_app: there is no app 'x', there are: none"),
        ({"auth": {"autenticator": "x"}}, "auth.autenticator: unknown key, did you mean 'authenticator'?"),
        ({"providers": {"docker": 3}}, "providers.docker: found 3, expected a table"),
        ({"plugins": "x"}, "plugins: found 'x', expected a list in square brackets"),
        ({"default_app": 3}, "default_app: found 3, expected a text in quotes"),
    ],
)
def test_each_fault_has_its_sentence(data, sentence):
    assert complaint(data) == sentence


def test_faults_of_every_kind_are_told_together():
    told = complaint(
        {
            "manager": {"threads": 0, "nonsense": 1},
            "proxy": {"tls_cert": "/c", "routing": "subdomain"},
            "apps": {"A": {"memory": "lots"}, "b": {"healt": "/"}},
            "auth": {"x": 1},
            "default_app": "c",
        }
    ).split("; ")
    assert [sentence.partition(":")[0] for sentence in told] == [
        "manager.threads",
        "manager.nonsense",
        "apps.A.memory",
        "proxy.tls_key",
        "proxy.public_url",
        "apps.A",
        "apps.b.healt",
        "auth.x",
        "default_app",
    ]


def test_a_fault_in_the_defaults_is_told_once():
    told = complaint({"defaults": {"memory": "lots", "environment": {"A": 1}}, "apps": {"a": {}, "b": {}}})
    assert told.count("lots") == 1
    assert told.count("defaults.environment.A") == 1
    assert "apps." not in told


def test_an_app_that_overrides_a_wrong_default_with_another_wrong_value_is_told_both():
    told = complaint({"defaults": {"memory": "lots"}, "apps": {"a": {"memory": "more"}, "b": {}}})
    assert "defaults.memory: found 'lots'" in told
    assert "apps.a.memory: found 'more'" in told


@pytest.mark.parametrize("key", ["password", "token", "api_key", "client_secret"])
def test_a_secret_of_the_wrong_type_is_not_shown(key):
    from pydantic import create_model

    from dispatcher.config.messages import validate

    model = create_model("Options", **{key: (int, ...)})
    with pytest.raises(ConfigError) as caught:
        validate(PluginRef("provider", "x"), model, {key: "hunter2"}, "providers.x")
    assert "hunter2" not in str(caught.value)
    assert f"providers.x.{key}: found a secret, expected a whole number" in str(caught.value)


def test_odd_text_is_shown_escaped_and_cut():
    told = complaint({"manager": {"log_level": "\x1b[31m" + "x" * 5000}})
    assert "\x1b" not in told
    assert len(told) < 250


def test_defaults_reach_apps_and_apps_override_them():
    found = parse(
        {
            "defaults": {"memory": "1G", "provider": "docker", "environment": {"A": "1", "B": "1"}},
            "apps": {"one": {}, "two": {"memory": "2G", "environment": {"B": "2"}}},
        }
    )
    assert found.apps["one"].memory == 1024**3
    assert found.apps["one"].provider == "docker"
    assert found.apps["two"].memory == 2 * 1024**3
    assert found.apps["two"].environment == {"A": "1", "B": "2"}


def test_every_default_can_be_overridden():
    assert set(AppDefaults.model_fields) < set(AppConfig.model_fields)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("2 d", 172800),
        (7, 7),
        (0.5, 0.5),
        ("1.5h", 5400),
    ],
)
def test_durations(text, seconds):
    assert options.duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "m", "-5s", "5 parsecs", -1, True, None, [], float("inf"), float("nan")]
)
def test_no_durations(text):
    with pytest.raises(ValueError, match="a duration such as"):
        options.duration(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("512M", 512 * 1024**2), ("1.5G", 1536 * 1024**2), ("2GiB", 2 * 1024**3), ("1k", 1024), ("100", 100), (5, 5)],
)
def test_sizes(text, count):
    assert options.size(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1M", "0", 0, -1, 1.5, True, None, "1X", "1 2"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="a size such as"):
        options.size(text)


@pytest.mark.parametrize(
    "text", ["127.0.0.1:8080", "0.0.0.0:0", "[::1]:8080", "[fe80::1%eth0]:1", "localhost:1", "unix:/s", "systemd"]
)
def test_addresses(text):
    assert parse({"proxy": {"listen": [text]}}).proxy.listen == [text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":8080",
        "*:80",
        "8080",
        "localhost",
        "::1:80",
        "[::g]:80",
        "h:65536",
        "h:-1",
        "unix:s",
        "http://h:1",
        "h h:1",
    ],
)
def test_no_addresses(text):
    assert "expected an address such as" in complaint({"proxy": {"listen": [text]}})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://a.example", "https://a.example"),
        ("http://a.localhost:8080/", "http://a.localhost:8080"),
        ("", ""),
    ],
)
def test_origins(text, kept):
    assert parse({"proxy": {"public_url": text}}).proxy.public_url == kept


@pytest.mark.parametrize(
    "text",
    ["ftp://a", "https://a/b", "https://u@a", "https://a?x", "https://a b", "https://:1", "//a", "https://a:x"],
)
def test_no_origins(text):
    assert "public_url: found" in complaint({"proxy": {"public_url": text}})


@pytest.mark.parametrize("table", ["manager", "proxy"])
def test_a_single_address_needs_no_brackets(table):
    assert getattr(parse({table: {"listen": "127.0.0.1:4443"}}), table).listen == ["127.0.0.1:4443"]


def test_never_is_false():
    assert parse({"apps": {"a": {"idle_timeout": False}}}).apps["a"].idle_timeout is False


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse({}).manager.threads = 3


@pytest.mark.parametrize(
    ("proxy", "secure"),
    [
        ({}, False),
        ({"tls_cert": "/c", "tls_key": "/k"}, True),
        ({"public_url": "https://a.example"}, True),
        ({"public_url": "http://a.example"}, False),
    ],
)
def test_secure_says_whether_browsers_come_over_https(proxy, secure):
    assert parse({"proxy": proxy}).secure is secure


def test_an_unknown_app_names_its_neighbour():
    with pytest.raises(ConfigError, match="did you mean 'notebook'"):
        parse({"apps": {"notebook": {}}}).app("notebok")


# Files.


def test_a_file_is_read(tmp_path):
    path = tmp_path / "d.toml"
    path.write_text('[manager]\nstate_dir = "/srv/d"\n')
    assert str(load(path).manager.state_dir) == "/srv/d"


@pytest.mark.parametrize(
    ("content", "what", "why"),
    [
        (b"[manager\n", "is not TOML", "line 1"),
        (b"\xff\xfe", "is not TOML", "it is not UTF-8"),
        (b"[manager]\nthreads = 0\n", "is wrong", "manager.threads"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, what, why):
    path = tmp_path / "d.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.what == f"{path} {what}"
    assert why in caught.value.why


def test_a_missing_file_is_an_error_when_it_was_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "none.toml")
    monkeypatch.setenv("DISPATCHER_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="there is no such file"):
        load()


def test_a_missing_default_file_means_the_defaults(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPATCHER_CONFIG", raising=False)
    monkeypatch.setattr("dispatcher.config.default_paths.config_file", lambda: tmp_path / "none.toml")
    assert list(load().apps) == ["demo"]


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


# Plugins' tables.


@pytest.fixture
def plugins():
    from tests.unit.config.test_plugins import FakeProvider, plugin

    found = Plugins([])
    found.register("fake", plugin(providers=[FakeProvider]))
    return found


def test_plugins_tables_are_validated_by_their_models(plugins):
    found = parse({"providers": {"fake": {"colr": 1}}, "apps": {"a": {"provider": "fake", "fake": {"imag": "x"}}}})
    with pytest.raises(ConfigError) as caught:
        found.validate_providers(plugins)
    assert caught.value.why.split("; ")[:3] == [
        "providers.fake.colr: unknown key, did you mean 'colour'?",
        "apps.a.fake.image: is missing",
        "apps.a.fake.imag: unknown key, did you mean 'image'?",
    ]


def test_a_fault_in_a_plugin_s_table_names_the_file_as_every_other_does(plugins, tmp_path):
    path = tmp_path / "d.toml"
    path.write_text('[providers.fake]\ncolr = 1\n[apps.a]\nprovider = "fake"\n[apps.a.fake]\nimag = "x"\n')
    found = load(path)
    for check in (
        lambda: found.validate_providers(plugins),
        lambda: found.provider_options("fake", plugins),
        lambda: found.template("a", plugins),
    ):
        with pytest.raises(ConfigError) as caught:
            check()
        assert caught.value.what == f"{path} is wrong"
        assert caught.value.why.startswith(("providers.fake.colr: unknown key", "apps.a.fake.image: is missing"))


def test_an_authenticator_s_table_is_checked_with_the_others(plugins, monkeypatch):
    class Options(options.Table):
        url: str

    monkeypatch.setattr(plugins, "available", lambda: {"fake": "some-plugin", "directory": "some-plugin"})
    monkeypatch.setattr(
        plugins, "authenticator", lambda _name: type("Directory", (), {"Options": Options, "several": False})
    )
    found = parse({"apps": {}, "auth": {"authenticator": "directory", "directory": {"ulr": "x"}}})
    with pytest.raises(ConfigError) as caught:
        found.validate_providers(plugins)
    assert "auth.directory.ulr: unknown key, did you mean 'url'?" in caught.value.why


def test_the_table_of_a_provider_that_is_not_chosen_is_pointed_at(plugins, monkeypatch):
    monkeypatch.setattr(plugins, "available", lambda: {"fake": "some-plugin", "other": "some-plugin"})
    found = parse({"apps": {"a": {"provider": "fake", "other": {"image": "x"}}}})
    with pytest.raises(ConfigError) as caught:
        found.validate_providers(plugins)
    assert caught.value.why == 'apps.a.fake.image: is missing (there is [apps.a.other]: add provider = "other"?)'


def test_a_table_of_no_plugin_is_a_fault(plugins):
    found = parse({"apps": {"a": {"provider": "fake", "fake": {"image": "x"}, "fakr": {}}}})
    with pytest.raises(ConfigError, match=r"apps\.a\.fakr: there is no plugin of this name"):
        found.validate_providers(plugins)


def test_a_provider_that_is_not_installed_is_a_fault(plugins):
    found = parse({"apps": {"a": {"provider": "dokcer"}}})
    with pytest.raises(ConfigError, match="apps.a.provider: there is no plugin 'dokcer'"):
        found.validate_providers(plugins)
    with pytest.raises(PluginError):
        found.template("a", plugins)


def test_a_template_holds_what_the_file_says(plugins):
    found = parse(
        {"apps": {"a": {"provider": "fake", "memory": "1G", "network": "private", "fake": {"image": "x"}}}}
    )
    app = found.template("a", plugins)
    assert (app.name, app.provider, app.limits.memory, app.network.value) == ("a", "fake", 1024**3, "private")
    assert app.options.image == "x"


def limits_of(defaults=None, **app):
    return parse({"defaults": defaults or {}, "apps": {"a": app}}).apps["a"].limits()


def test_every_agent_is_limited_unless_the_configuration_says_false():
    found = limits_of()
    assert (found.pids, found.swap, found.cpus, found.disk) == (4096, 0, None, None)
    assert found.memory == schema.default_memory()
    assert found.demanded("memory") is None
    assert limits_of(memory=False).memory is None
    assert limits_of(memory=False).swap is None  # without a limit there is no "beyond memory"
    assert limits_of({"pids": False}).pids is None
    assert limits_of({"pids": 100}, memory="1G", swap="1G").demanded("pids") == 100
    assert limits_of({"pids": False}, pids=7, cpus=False).pids == 7


GIB = 1 << 30
HOST = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("groups", "files", "available"),
    [
        ("", {}, HOST),
        ("0::/system.slice/d.service\n", {"system.slice/d.service/memory.max": "max"}, HOST),
        ("0::/system.slice/d.service\n", {"system.slice/d.service/memory.max": f"{GIB}"}, GIB),
        ("0::/a.slice/d.service\n", {"a.slice/memory.max": f"{GIB}", "a.slice/d.service/memory.max": "max"}, GIB),
        ("0::/\n", {"memory.max": f"{GIB}"}, GIB),  # a container, in a namespace of its own
        ("4:memory:/docker/12\n0::/\n", {"memory/memory.limit_in_bytes": f"{GIB}"}, GIB),  # version 1
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, HOST),
    ],
)
def test_the_default_of_memory_follows_the_smaller_of_host_and_control_group(tmp_path, groups, files, available):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    expected = max(available // 4, min(GIB, available // 2))
    assert schema.default_memory(tmp_path) == expected


def test_the_memory_of_another_host_does_not_make_an_agent_outdated(plugins, monkeypatch):
    table = {"apps": {"a": {"provider": "fake", "fake": {"image": "x"}}}}
    before = parse(table).template("a", plugins).fingerprint()
    monkeypatch.setattr(schema, "default_memory", lambda: 12345)
    after = parse(table).template("a", plugins)
    assert (after.limits.memory, after.fingerprint()) == (12345, before)


def test_sentences_do_not_repeat_pydantic():
    """No sentence may leak the words of the library that found the fault."""
    wrong = [None, 3, -1, 1.5, "x", True, [], {}, [1], {"a": 1}]
    leaked = []
    for model_name in ("manager", "proxy", "auth", "defaults"):
        model = Config.model_fields[model_name].annotation
        for key, value in itertools.product(model.model_fields, wrong):
            try:
                parse({model_name: {key: value}})
            except ConfigError as error:
                if any(word in error.why for word in ("Input", "pydantic", "valid ", "instance of", "parse")):
                    leaked.append(error.why)
    assert leaked == []


@pytest.mark.parametrize(
    ("bounds", "value", "expected"),
    [
        ({"min_length": 1}, "", "a text with a length of at least 1"),
        ({"max_length": 2}, "abc", "a text with a length of at most 2"),
        ({"pattern": "^[a-z]+$"}, "A", "a text that matches ^[a-z]+$"),
    ],
)
def test_bounds_of_a_plugins_texts_are_said_in_a_sentence(bounds, value, expected):
    from pydantic import Field, create_model

    from dispatcher.config.messages import validate

    model = create_model("Options", host=(str, Field(**bounds)))
    with pytest.raises(ConfigError) as caught:
        validate(PluginRef("authenticator", "x"), model, {"host": value}, "auth.x")
    assert f"auth.x.host: found '{value}', expected {expected}" in str(caught.value)


def test_bounds_of_a_plugins_lists_are_said_in_a_sentence():
    from pydantic import Field, create_model

    from dispatcher.config.messages import validate

    model = create_model("Options", hosts=(list[str], Field(min_length=1, max_length=2)))
    for value, expected in (([], "a length of at least 1"), (["a", "b", "c"], "a length of at most 2")):
        with pytest.raises(ConfigError, match=f"expected {expected}"):
            validate(PluginRef("authenticator", "x"), model, {"hosts": value}, "auth.x")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ([], "at least one"),
        (["local", "local"], "each once"),
        ("oidc.Uni", "lower-case"),
        (["a.b.c"], "lower-case"),
        (5, ""),
    ],
)
def test_a_list_of_authenticators_is_checked(value, fault):
    with pytest.raises(ConfigError, match=r"auth\.authenticator") as caught:
        parse({"apps": {}, "auth": {"authenticator": value}})
    assert fault in str(caught.value)


def test_authenticators_are_one_or_several(plugins, monkeypatch):
    assert parse({}).auth.authenticators == ("local",)
    found = parse({"apps": {}, "auth": {"authenticator": ["oidc.uni", "local"]}})
    assert found.auth.authenticators == ("oidc.uni", "local")


@pytest.mark.parametrize(
    ("entry", "several", "fault"),
    [
        ("directory.one", False, r"configured by \[auth\.directory\]"),
        ("directory", True, r"configured by \[auth\.directory\.NAME\] and directory\.NAME"),
        ("directory.two", True, r"auth\.directory\.two\.url: is missing"),
        ("directory.one", True, None),
    ],
)
def test_several_authenticators_of_one_plugin_have_a_table_each(plugins, monkeypatch, entry, several, fault):
    class Options(options.Table):
        url: str

    monkeypatch.setattr(plugins, "available", lambda: {"fake": "some-plugin", "directory": "some-plugin"})
    cls = type("Directory", (), {"Options": Options, "several": several})
    monkeypatch.setattr(plugins, "authenticator", lambda _name: cls)
    table = {"authenticator": [entry, "local"], "directory": {"one": {"url": "x"}}}
    found = parse({"apps": {}, "auth": table})
    if fault is None:
        found.validate_providers(plugins)
        assert found.authenticator_options(entry, plugins).url == "x"
        return
    with pytest.raises(ConfigError) as caught:
        found.validate_providers(plugins)
    assert re.search(fault, caught.value.why)
