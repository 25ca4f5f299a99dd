"""Packaging: one distribution; each folder of `providers/` is a plugin as a third party would publish it."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PROVIDERS = ("subprocess", "docker", "libvirt")
DOCKER = ["docker>=7.1,<8", "paramiko>=3"]
LIBVIRT = ["libvirt-python>=9", "lxml>=5", "pycdlib>=1.14"]
TESTING = [
    "pytest>=8,<9.2",  # with 9.2 pytest-xdist 3.8 no longer keeps groups together
    "pytest-timeout",
    "pytest-xdist",
    "pytest-rerunfailures",
    "pytest-cov",
    "hypothesis",
    "h11",
    "websockets>=13",
    "kosoku>=0.1",  # the Autobahn test cases
    "playwright",
    "mypy",
    "ruff",
    "import-linter>=2",
    "types-docker",
    "types-psutil",
    "types-setuptools",
    "lxml-stubs",
]

setup(
    name="agent-dispatcher",
    version="0.1.0",
    description="Run many instances of a single-user web application, one isolated agent per person",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["dispatcher", "dispatcher.*"]),
        *(f"dispatcher_{name}" for name in PROVIDERS),
    ],
    package_dir={f"dispatcher_{name}": f"providers/dispatcher_{name}" for name in PROVIDERS},
    package_data={
        "dispatcher": ["py.typed"],
        "dispatcher.proxy.portal": ["templates/*", "static/*"],
        "dispatcher.demo": ["static/*"],
        "dispatcher.testing": ["probe.sh"],
    },
    install_requires=[
        "pluggy>=1.5",
        "flask>=3.1",
        "werkzeug>=3",
        "waitress>=3",
        "cheroot>=11,<12",  # wsgi_server knows its insides
        "click>=8.1",
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
        "simple-websocket>=1",
        "tomli>=2; python_version < '3.11'",
        "tomli_w>=1",
        "urllib3>=2",
    ],
    extras_require={
        "docker": DOCKER,
        "libvirt": LIBVIRT,
        "testing": TESTING,
        "all": DOCKER + LIBVIRT,
    },
    entry_points={
        "console_scripts": ["dispatcher = dispatcher.cli:main"],
        "dispatcher.plugins": [f"{name} = dispatcher_{name}" for name in PROVIDERS],
    },
)
