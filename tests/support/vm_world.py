"""The environment that the core provides for the libvirt provider, for tests that call it directly."""

from __future__ import annotations

import http.client
import os
import random
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Unsupported
from dispatcher.plugin.model import AgentSpec, App, Limits, Network
from dispatcher.plugin.provider import ProviderContext
from dispatcher.testing.probe_client import Inside
from dispatcher.testing.kit import eventually
from tests.support import vm


def quiet(step, detail="", fraction=None):
    """Discard progress."""


def get(endpoint, path, method="GET", body=None, timeout=20):
    """Return the body of an answer from an agent."""
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=timeout)
    try:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        answer = response.read()
        return b"" if response.status == 303 and path == "/notes" else answer
    finally:
        connection.close()


class World:
    """One installation with a provider; removed at the end."""

    def __init__(self, **options) -> None:
        self.installation = secrets.token_hex(4)
        self.root = Path(tempfile.mkdtemp(prefix="vm-"))
        self.root.chmod(0o711)
        self.machines = self.root / "machines"
        self.specs: dict[str, AgentSpec] = {}
        self.handles = {}
        self._uids: dict[str, int] = {}
        self._next = random.randrange(300_000, 2_000_000) * 1000
        (self.root / "run").mkdir(mode=0o700)
        self.context = ProviderContext(
            installation=self.installation,
            state_dir=self.root,
            run_dir=self.root / "run",
            proxy_gid=os.getegid(),
            privileged=os.geteuid() == 0,
        )
        self.options = options
        self.provider = self.another()

    def another(self, **options):
        """Return a fresh instance."""
        from dispatcher_libvirt.provider import LibvirtProvider

        given = LibvirtProvider.Options.model_validate(self.options | options)
        return LibvirtProvider(context=self.context, options=given)

    def restart_provider(self, **options) -> None:
        """Go on with another instance with other options."""
        self.provider.close()
        self.options = self.options | options
        self.provider = self.another()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for handle, _seen in self.provider.list(deadline=Deadline(20)):
                self.provider.destroy(handle, data=True, deadline=Deadline(60), progress=quiet)
            self.provider.close()
            left = vm.leftovers(self.installation)
            assert not left, left
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    def spec(self, agent, *, limits=Limits(), network=Network.NONE, environment=None, values=None, **options):
        """Return the spec of an agent; one name has one user id."""
        from dispatcher_libvirt.provider import LibvirtProvider

        app = App(
            name="vm",
            provider="libvirt",
            options=LibvirtProvider.AppOptions.model_validate(options),
            limits=limits,
            network=network,
            environment=environment or {},
        )
        if agent not in self._uids:
            self._next += 1
            self._uids[agent] = self._next
        home = self.root / f"home-{agent}"
        for name in ("data", "run", "log"):
            (home / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        spec = AgentSpec(
            installation=self.installation,
            agent=agent,
            user=agent,
            app=app,
            uid=self._uids[agent],
            gid=self._uids[agent],
            proxy_gid=os.getegid(),
            data_dir=home / "data",
            run_dir=home / "run",
            log_dir=home / "log",
            secrets=values or {},
        )
        self.specs[agent] = spec
        self.handles[agent] = self.provider.handle(spec)
        return spec

    def ensure(self, spec, seconds=90):
        """Start."""
        return self.provider.ensure(spec, deadline=Deadline(seconds), progress=quiet)

    def observe(self, handle):
        """Observe."""
        return self.provider.observe(handle, deadline=Deadline(20))

    def state(self, handle):
        """Return the state."""
        return self.observe(handle).state

    def logs(self, handle):
        """Return all lines."""
        try:
            return list(self.provider.logs(handle, tail=1000, follow=False, deadline=Deadline(5)))
        except Unsupported:
            return []

    def ready(self, handle, seconds=150):
        """Return the endpoint once the app answers there."""
        end = time.monotonic() + seconds
        while True:
            seen = self.observe(handle)
            try:
                get(seen.endpoint, "/count", timeout=3)
                return seen.endpoint
            except (OSError, AttributeError, http.client.HTTPException):
                assert time.monotonic() < end, (seen, self.logs(handle)[-10:])
                time.sleep(0.1)

    def probe(self, agent, **options):
        """Start an agent with the kit's probe; return the view from inside."""
        handle = self.ensure(self.spec(agent, **vm.app_options(**options)))
        return self.inside(handle)

    def inside(self, handle, seconds=150):
        """Return the view from inside once the probe answers."""
        end = time.monotonic() + seconds
        while not (endpoint := self.observe(handle).endpoint):
            assert time.monotonic() < end, self.logs(handle)[-10:]
            time.sleep(0.1)
        inside = Inside(endpoint, timeout=20)
        assert eventually(inside.answers, end - time.monotonic()), self.logs(handle)[-10:]
        return inside

    def fresh_directory(self) -> Path:
        """Return an empty directory."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def export(self, handle) -> Path:
        """Export the data into a fresh directory."""
        directory = self.fresh_directory()
        self.provider.export_data(handle, directory, deadline=Deadline(60), progress=quiet)
        return directory
