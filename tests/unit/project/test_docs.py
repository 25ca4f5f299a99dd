"""The documentation says what the code does: references are current, hooks complete, examples run, links lead somewhere."""

import inspect
import re
import subprocess
import sys
import types

import pytest

from dispatcher.config.load import parse
from dispatcher.config import schema
from dispatcher.plugin import hooks
from dispatcher.config.plugins import Plugins
from tests.conftest import ROOT
from tests.support.documentation import PAGES, blocks, configuration, tomllib

HOOKS = [
    function for name, function in inspect.getmembers(hooks, inspect.isfunction) if name.startswith("dispatcher_")
]
HOOKS_PAGE = (ROOT / "docs/reference/hooks.md").read_text()


def texts(page, language):
    return [block.text for block in blocks(page, language)]


def test_no_command_of_root_s_leaves_a_secret_readable_for_a_moment_or_imports_from_the_working_directory():
    """Every user may watch /etc/dispatcher, and opens a new file before a later `chmod`: use `install -m 600`."""
    lines = [line for page in PAGES for text in texts(page, "sh") for line in text.splitlines()]
    assert len(lines) > 100
    assert [line for line in lines if re.search(r"(?<!>)>\s*/etc/dispatcher/", line)] == []
    assert [line for line in lines if re.search(r"python\S* -c", line)] == []


def test_the_references_are_made_from_this_code():
    pytest.importorskip("libvirt", reason="the reference of its provider is made from its options")
    done = subprocess.run([sys.executable, ROOT / "docs/build", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_each_hook_s_exact_signature_is_a_heading(hook):
    assert f"\n## `{hook.__name__}{inspect.signature(hook)}`\n".replace("'", "") in HOOKS_PAGE


def test_the_page_names_no_hook_that_there_is_not():
    headings = re.findall(r"^## `(\w+)\(", HOOKS_PAGE, re.MULTILINE)
    assert sorted(headings) == sorted(hook.__name__ for hook in HOOKS)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_each_hook_has_a_test(hook):
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py") if path.name != "test_docs.py")
    assert hook.__name__ in tests


@pytest.mark.parametrize(
    "code",
    texts(ROOT / "docs/reference/hooks.md", "python"),
    ids=lambda code: re.search(r"def (dispatcher_\w+)", code)[1],
)
def test_the_hooks_examples_register(code):
    from tests.unit.config.test_plugins import FakeProvider

    module = types.ModuleType("example")
    module.MyProvider = FakeProvider
    exec(compile(code, "hooks.md", "exec"), vars(module))
    plugins = Plugins([])
    plugins.register("passphrase" if "OnePassphrase" in code else "fake", module)
    if "OnePassphrase" in code:
        authenticator = plugins.authenticator("passphrase")(options=module.Options(passphrase="open"))
        assert authenticator.authenticate("alice", "open", deadline=None).user == "alice"
        assert authenticator.authenticate("alice", "shut", deadline=None) is None
    if "SEEN" in code:
        plugins.hook.dispatcher_agent_event(event=types.SimpleNamespace(agent="alice", kind="ready"))
        assert module.SEEN == ["alice ready"]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_speak_of_the_project_alone(page):
    text = page.read_text()
    assert not re.search(r"/wo[r]k/|\.\./share[d]|/roo[t]/|pypi\.or[g]|deb\.debian\.or[g]", text)
    assert text.startswith("# ")


@pytest.mark.parametrize(
    "path",
    [
        *(page for page in PAGES if configuration(page)),
        *(path for path in ROOT.glob("examples/**/*.toml") if path.name != "pyproject.toml"),
        ROOT / "packaging/dispatcher.toml",
        ROOT / "packaging/container/dispatcher.toml",
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_configurations_in_the_documentation_are_good(path):
    found = parse(configuration(path) if path.suffix == ".md" else tomllib.loads(path.read_text()))
    names = {app.provider for app in found.apps.values()} | set(found.providers)
    of_pages = {"bare", "runc"}  # of plugins that pages and examples contain
    assert names <= {*Plugins().available(), *of_pages}
    if "libvirt" in names:
        pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    plugins = {entry.partition(".")[0] for entry in found.auth.authenticators}
    assert plugins <= {"local", "ldap", "oidc", "pam", "staff"}
    names |= plugins
    if not names & {*of_pages, "staff", "ldap", "oidc", "pam"} and all(
        app.model_extra for app in found.apps.values()
    ):
        found.validate_providers(Plugins())


def test_tables_of_authenticators_in_the_documentation_are_good():
    """Each block alone: those of one page are alternatives."""
    pytest.importorskip("ldap3", reason="ldap3 is not installed")
    pytest.importorskip("joserfc", reason="joserfc is not installed")
    for name, least in (("ldap", 3), ("pam", 1), ("oidc", 5)):
        found = [
            block for page in PAGES for block in texts(page, "toml") if re.search(rf"\[auth\.{name}[].]", block)
        ]
        assert len(found) >= least
        for block in found:
            config = parse(tomllib.loads(block))
            for entry in config.auth.authenticators if name == "oidc" else (name,):
                config.authenticator_options(entry, Plugins())


def test_commands_in_the_documentation_exist():
    """Each `dispatcher ...` line of a shell block parses up to its operands."""
    from dispatcher.cli import program
    from dispatcher.cli.lazy import LazyGroup

    assert isinstance(program, LazyGroup)
    known = {*program.lazy, *program.aliases}
    wrong = []
    for page in PAGES:
        for block in [*texts(page, "sh"), *re.findall(r"`(dispatcher [^`\n]+)`", page.read_text())]:
            for line in block.splitlines():
                match = re.search(
                    r"(?:^|\s|/)dispatcher((?: --?[a-z-]+(?:[ =][^-\s]\S*)?)*) ([a-z][a-z_-]+)", line
                )
                if match and match[2] not in known and "pip install" not in line and "adduser" not in line:
                    wrong.append(f"{page.name}: {line.strip()}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_block_of_commands_is_run_or_says_why_not(page):
    """Those of `sh` without a mark are run by tests/integration/test_docs_commands.py."""
    wrong = []
    for block in blocks(page):
        run, where = re.fullmatch(r"run by (tests/\S+\.py)::(test_\w+)", block.mark), block.text.splitlines()[0]
        if run and f"def {run[2]}(" not in (ROOT / run[1]).read_text():
            wrong.append(f"{block.mark}: there is no such test")
        elif block.mark and not run and not re.fullmatch(r"not run: .{10,}", block.mark):
            wrong.append(f"{block.mark}: neither a test nor a reason")
        elif not block.mark and block.language in {"console", "ini", "yaml"}:
            wrong.append(f"{where}: say which test runs it, or why none does")
        elif block.language not in {"console", "ini", "json", "python", "sh", "text", "toml", "yaml"}:
            wrong.append(f"{where}: unknown language {block.language!r}")
        elif block.language == "text" and re.search(r"^(?:[$#] |\S*dispatcher [a-z])", block.text, re.MULTILINE):
            wrong.append(f"{where}: commands are blocks of the language sh")
    assert wrong == []


@pytest.mark.parametrize("table", ["ManagerConfig", "ProxyConfig", "AuthConfig", "AppDefaults", "AppConfig"])
def test_every_key_is_described(table):
    fields = getattr(schema, table).model_fields
    assert [name for name, field in fields.items() if not field.description] == []


def test_every_page_of_the_documentation_can_be_found_from_its_index():
    linked, todo = set(), [ROOT / "docs/index.md"]
    while todo:
        page = todo.pop()
        if page in linked or page.suffix != ".md" or not page.exists():
            continue
        linked.add(page)
        todo += [
            (page.parent / target.partition("#")[0]).resolve()
            for target in re.findall(r"\]\(([^)\s:]+)\)", page.read_text())
        ]
    lost = [
        str(page.relative_to(ROOT))
        for page in ROOT.glob("docs/**/*.md")
        if page not in linked and page.parent.name != "adr"
    ]
    assert lost == []


def test_the_readme_begins_with_its_two_commands():
    first = texts(ROOT / "README.md", "sh")[0].splitlines()
    assert [line.partition("#")[0].strip() for line in first] == ["make demo", "make test"]
