"""The contents of the Debian package, and provision.sh as far as it changes nothing.  The rest: test_machine.py."""

import os
import socket
import subprocess
import sys

import pytest
from cryptography import x509

from dispatcher.common.tls import server_context
from tests.conftest import ROOT
from tests.support.package import HOME, package

PROVISION = ROOT / "packaging/provision.sh"
SETUP = {"__file__": str(ROOT / "setup.py")}
exec((ROOT / "setup.py").read_text().partition("\nMYPY = ")[0], SETUP)
COMPILED = sorted(SETUP["COMPILED"])
pytestmark = pytest.mark.xdist_group("machine")  # which has the package, too


BUILDS = pytest.mark.program("dpkg-buildpackage", "dh", "gcc", "pkg-config")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    target = tmp_path_factory.mktemp("package")
    subprocess.run(["dpkg-deb", "--extract", package(), target], check=True)
    return target


@BUILDS
def test_every_file_of_the_program_is_in_the_package(tree):
    (site,) = (tree / HOME / "lib").glob("python3.*/site-packages")
    when = package().stat().st_mtime  # somebody may be at work in the clone
    missing = [
        str(path.relative_to(ROOT))
        for top in (
            ROOT / "dispatcher",
            *ROOT.glob("providers/dispatcher_*"),
            *ROOT.glob("authenticators/dispatcher_*"),
        )
        for path in top.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__" and path.suffix not in {".pyc", ".so"}
        if path.stat().st_mtime < when and not (site / path.relative_to(top.parent)).exists()
    ]
    assert missing == []
    for path in COMPILED:
        assert list((site / path).parent.glob(f"{(site / path).stem}.*.so")), f"{path} is not compiled"


@BUILDS
def test_manual_pages_completion_and_documentation_are_in_the_package(tree):
    for path in (
        "usr/share/man/man1/dispatcher.1.gz",
        "usr/share/man/man1/dispatcher-add.1.gz",
        "usr/share/bash-completion/completions/dispatcher",
        "usr/share/doc/agent-dispatcher/README.md",
        "usr/share/doc/agent-dispatcher/docs/howto/install-as-a-service.md",
        "etc/logrotate.d/agent-dispatcher",
        "etc/pam.d/dispatcher",
    ):
        assert (tree / path).is_file() or (tree / f"{path}.gz").is_file(), path
    assert (tree / "usr/bin/dispatcher").is_symlink()


def test_the_sandbox_of_agents_comes_with_the_package_in_any_case():
    """`apt install --no-install-recommends` would leave agents of the default configuration without one."""
    control = (ROOT / "packaging/debian/control").read_text()
    assert "\n bubblewrap,\n" in control.partition("\nDepends:")[2].partition("\nRecommends:")[0]


@BUILDS
def test_needrestart_leaves_the_agents_alone(tree):
    """After an upgrade of a library it restarts all services that use the old one, agents' processes included."""
    never = (
        "our %nrconf; defined(do shift) or die; my $rules = $nrconf{override_rc};"
        "for my $unit (@ARGV) { for (keys %$rules) { print qq($unit ) if $unit =~ /$_/ && !$rules->{$_} } }"
    )
    units = [f"dispatcher-{name}.service" for name in ("agents", "manager", "proxy")]
    file = tree / "etc/needrestart/conf.d/agent-dispatcher.conf"
    done = subprocess.run(["perl", "-we", never, file, *units], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["dispatcher-agents.service"], "")


@pytest.mark.program("openssl")
def test_a_host_with_a_long_name_gets_a_certificate(tmp_path):
    """OpenSSL takes 64 characters for a common name; names in clouds have more."""
    name = f"{'worker-' * 8}17.internal.cloud.example.org"
    for program, code in {"hostname": f"echo {name}", "systemd-sysusers": "exit 0"}.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / program).chmod(0o755)
    script = (ROOT / "packaging/debian/agent-dispatcher.postinst").read_text()
    script = script.replace("/etc/dispatcher", str(tmp_path)).replace("dispatcher-proxy", str(os.getgid()))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", script, "postinst", "configure"], env=environment, check=True, capture_output=True)
    found = x509.load_pem_x509_certificate((tmp_path / "tls/cert.pem").read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert name in names.get_values_for_type(x509.DNSName)
    server_context(tmp_path / "tls/cert.pem", tmp_path / "tls/key.pem", "proxy")


@pytest.mark.root
def test_an_installation_that_does_not_start_says_why_and_announces_nothing(tmp_path):
    for program, code in {
        "apt-get": "exit 0",
        "journalctl": "echo 'Cannot listen on 203.0.113.99:443'",
        "systemctl": "exit 1",
    }.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / program).chmod(0o755)
    machine = f'mount -t tmpfs tmpfs /run; mkdir -p /run/systemd/system; PATH={tmp_path}:$PATH; exec "$@"'
    command = ["unshare", "--mount", "sh", "-ec", machine, "-", PROVISION, "--package", PROVISION]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Open" not in done.stdout
    assert "Cannot listen on 203.0.113.99:443" in done.stderr


PYTHON_OF_PACKAGE = "/usr/lib/agent-dispatcher/bin/python"


@pytest.mark.parametrize("script", ["provision.sh", "debian/agent-dispatcher.prerm"])
def test_root_s_scripts_import_nothing_from_the_working_directory(tmp_path, script):
    """Root may run them in a directory of another user, such as /tmp."""
    for program in ("apt-get", "systemctl"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "dispatcher.py").write_text("raise SystemExit('planted')")
    text = (
        (ROOT / "packaging" / script)
        .read_text()
        .replace('"$(id -u)"', "0")
        .replace("/run/systemd/system", str(tmp_path))
    )
    assert PYTHON_OF_PACKAGE in text
    text = (
        text.replace(PYTHON_OF_PACKAGE, sys.executable)
        .replace("/etc/dispatcher", "/none")
        .replace("/run/d", f"{tmp_path}/d")
    )
    (tmp_path / "dispatcher").mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "dispatcher/manager.sock"))
    words = ["remove"] if "prerm" in script else ["--package", __file__]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", text, script, *words], cwd=planted, env=environment, capture_output=True, text=True
    )
    assert "planted" not in done.stderr
    assert ("Cannot read /none" in done.stderr) or ("does not answer at" in done.stderr)


@pytest.mark.root
def test_a_purge_removes_the_sockets_of_agents_that_outlived_the_manager(tmp_path):
    """Their file system is still mounted then.  What else is mounted below the run directory is not emptied."""
    text = (ROOT / "packaging/debian/agent-dispatcher.postrm").read_text()
    for name in ("/etc/dispatcher", "/usr/lib/agent-dispatcher", "/var/lib/dispatcher", "/var/log/dispatcher"):
        text = text.replace(name, f"/run{name}")
    machine = """
mount -t tmpfs tmpfs /run
mkdir -p /run/dispatcher/a /run/dispatcher/p /run/etc/dispatcher/tls /run/var/lib/dispatcher/agents
mount -t tmpfs dispatcher-endpoints /run/dispatcher/a
mkdir /run/dispatcher/a/agent
[ "$2" = none ] || mount --bind "$2" /run/dispatcher/p
sh -c "$1" postrm purge && ! ls -d /run/dispatcher /run/etc/dispatcher
"""
    purge = ["unshare", "--mount", "sh", "-ec", machine, "-", text]
    done = subprocess.run([*purge, "none"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Users' data stay" in done.stdout
    (tmp_path / "work").touch()
    done = subprocess.run([*purge, tmp_path], capture_output=True, text=True)
    assert done.returncode != 0
    assert "/run/dispatcher/p" in done.stderr
    assert (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--nonsense"], "unknown option --nonsense"),
        (["--package", "/no/package.deb"], "there is no file /no/package.deb"),
    ],
)
@pytest.mark.root
def test_wrong_usage_is_told(options, complaint):
    done = subprocess.run([PROVISION, *options], capture_output=True, text=True)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_the_vagrant_machine_runs_the_same_script():
    text = (ROOT / "Vagrantfile").read_text()
    assert "/vagrant/packaging/provision.sh" in text
    assert "guest: 8080" in text
