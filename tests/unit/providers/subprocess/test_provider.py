"""Where an agent's secrets are."""

import shutil
import tempfile
from pathlib import Path

import pytest
from dispatcher_subprocess.provider import SubprocessProvider

from dispatcher.plugin import ProviderContext


@pytest.fixture
def memory():
    path = Path(tempfile.mkdtemp(prefix="run-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("privileged", [False, True])
def test_an_ordinary_users_secrets_are_where_logind_removes_nothing(memory, tmp_path, privileged):
    """It empties /dev/shm of what a user has there at the end of the last login session; root is spared."""
    provider = SubprocessProvider(
        context=ProviderContext(
            installation="7e570001", state_dir=tmp_path, run_dir=memory, proxy_gid=0, privileged=privileged
        ),
        options=SubprocessProvider.Options(),
    )
    place = provider._secret_files.path("alice").parent.parent
    assert place == (Path("/dev/shm") if privileged else memory)
