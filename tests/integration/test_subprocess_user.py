"""The provider `subprocess` passes the conformance kit as an ordinary user too: this starts pytest as one."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
UID = 64987
# A private mount namespace in which the interpreter can be reached by everybody, wherever root installed it.
OPEN_UP = """
set -e
hold=$(mktemp -d)
mount -t tmpfs -o mode=0755 hold "$hold"
for prefix; do
    [ "$prefix" = -- ] && break
    mkdir -p "$hold$prefix" && mount --bind "$prefix" "$hold$prefix"
done
while [ "$1" != -- ]; do
    top=$(dirname "$1")
    while [ "$(dirname "$top")" != / ]; do top=$(dirname "$top"); done
    mountpoint -q "$top" || mount -t tmpfs -o mode=0755 open "$top"
    mkdir -p "$1" && mount --bind "$hold$1" "$1"
    shift
done
shift
exec setpriv --reuid=UID --regid=UID --clear-groups --inh-caps=-all -- "$@"
""".replace("UID", str(UID))


def private_prefixes():
    """The directories below which everybody must come, and cannot."""
    found = []
    for prefix in {sys.base_prefix, sys.prefix, str(HERE.parent.parent)}:
        if any(not parent.stat().st_mode & 0o001 for parent in [Path(prefix), *Path(prefix).parents]):
            found.append(prefix)
    return sorted(found, key=len)


@pytest.mark.root
@pytest.mark.parametrize("bubblewrap", [pytest.param("Sandboxed", marks=pytest.mark.bubblewrap), "Unconfined"])
def test_contract_as_an_ordinary_user(bubblewrap):
    home = tempfile.mkdtemp(prefix="u-", dir="/tmp")
    os.chown(home, UID, UID)
    command = ["unshare", "--mount", "sh", "-c", OPEN_UP, "sh", *private_prefixes(), "--"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={home}/t"]
    command += [str(HERE / "test_subprocess_contract.py"), "-k", bubblewrap]
    environment = {"PATH": os.environ["PATH"], "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"}
    environment |= {name: os.environ[name] for name in ("CI",) if name in os.environ}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, cwd=HERE.parent.parent
        )
    finally:
        shutil.rmtree(home)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 60, done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
