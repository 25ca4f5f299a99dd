"""Tier *isolation*: no agent reaches what belongs to another, to the manager or to the backend.

Tested from inside, through the probe.  `explain` must state what a provider does not isolate.
"""

from __future__ import annotations

import os
import re
import socket
import stat

from dispatcher.plugin.model import Capability, Isolation, Level
from dispatcher.plugin.provider import Provider
from dispatcher.testing.base import Contract, rule
from dispatcher.testing.driver import Driver, expect
from dispatcher.testing.kit import Agent, Kit
from dispatcher.testing.probe_client import Refused

#: Programs by which providers start apps.
_STARTERS = ("bash", "bwrap", "env", "ip", "mount", "nsenter", "runuser", "setpriv", "sh", "su", "tini", "unshare")


class IsolationChecks(Contract, page="docs/explanation/security.md"):
    """Agents are isolated."""

    def promised(self, what: str) -> bool:
        """Whether the class leaves `what` promised."""
        return what not in self.unpromised

    def test_missing_isolation_is_explained(self, provider: Provider, kit: Kit) -> None:
        """Each promise in `unpromised` is a warning of `explain`, in the words that the class names."""
        said = [
            finding.what
            for app in (None, kit.app())
            for finding in provider.explain(app)
            if finding.level in {Level.WARNING, Level.ERROR}
        ]
        for what, words in self.unpromised.items():
            expect(
                any(words in one for one in said),
                f"{what} is unpromised, yet no warning of explain() says {words!r}: operators must read it",
            )

    def test_cannot_reach_the_other_endpoint(self, alice: Agent, bob: Agent) -> None:
        """Alice's app cannot connect to Bob's endpoint."""
        if not self.promised("endpoint"):
            return
        refusal = alice.inside.refused("/connect", to=str(bob.inside.endpoint))
        expect(
            refusal,
            f"one agent can connect to another's endpoint {bob.inside.endpoint}: hide it, or list 'endpoint' in "
            "`unpromised` and say so in explain()",
        )

    def test_cannot_read_the_others_files(self, alice: Agent, bob: Agent) -> None:
        """Alice's app cannot read Bob's data, by the path on the host or by its own path."""
        if not self.promised("files"):
            return
        bob.inside.write(bob.within("diary"), b"bob's diary\n")
        for path in (str(bob.spec.data_dir / "diary"), str(bob.spec.log_dir), str(bob.spec.run_dir)):
            refusal = alice.inside.refused(
                "/list" if path != str(bob.spec.data_dir / "diary") else "/read", path=path
            )
            expect(refusal, f"one agent can read another's {path}: hide it and keep file modes tight")
        expect(
            alice.inside.refused("/read", path=alice.within("diary")),
            "one agent finds another's file in its own data: give each its own directory",
        )

    def test_cannot_write_outside_its_own(self, alice: Agent, bob: Agent) -> None:
        """Alice's app cannot write to Bob's data, to the logs, or over the programs it runs from."""
        if not self.promised("files"):
            return
        for directory in (bob.spec.data_dir, bob.spec.run_dir, alice.spec.log_dir, "/etc", "/usr/bin"):
            target = f"{directory}/kit-was-here"
            try:
                alice.inside.write(target, b"x")
            except Refused:
                pass
            expect(
                not os.path.lexists(target),
                f"an agent can write to {directory} of the host: mount it read-only or not at all",
            )

    def test_cannot_see_the_others_processes(self, alice: Agent, bob: Agent) -> None:
        """Alice's app cannot read the environment of any process of Bob's."""
        if not self.promised("processes"):
            return
        needle = f"DISPATCHER_AGENT={bob.spec.agent}".encode()
        for pid in alice.inside.get("/list", path="/proc").decode().split():
            if not pid.isdigit():
                continue
            try:
                seen = alice.inside.read(f"/proc/{pid}/environ")
            except Refused:
                continue
            expect(
                needle not in seen,
                "one agent can read another's environment: use a pid namespace and own user ids",
            )

    def test_cannot_reach_the_managers_socket(self, alice: Agent, kit: Kit) -> None:
        """The manager's socket is out of reach, even if its mode allows access for all."""
        if not self.promised("files") and not self.promised("uid"):
            return
        path = kit.context.run_dir.parent / "manager.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            path.chmod(0o666 if self.promised("files") else 0o660)
            refusal = alice.inside.refused("/connect", to=f"unix:{path}")
        path.unlink()
        expect(refusal, "an agent can connect to the manager's socket: hide the host's directories")

    def test_cannot_reach_the_backend(self, alice: Agent) -> None:
        """The sockets of the backend (Docker's, libvirt's) are out of reach."""
        if not self.promised("files"):
            return
        for to in (*self.backend_sockets(), "unix:/var/run/docker.sock", "unix:/var/run/libvirt/libvirt-sock"):
            expect(
                alice.inside.refused("/connect", to=to),
                f"an agent can connect to the backend's {to}: that is root on the host; never mount it",
            )

    def test_runs_as_its_own_user(self, alice: Agent, bob: Agent, kit: Kit, provider: Provider) -> None:
        """On the host, an agent's processes and socket belong to its own user id, never to root."""
        if not kit.privileged or not self.promised("uid"):
            return
        expect(alice.spec.uid != bob.spec.uid, "the kit gave two agents one uid")
        peer = alice.inside.peer_uid()
        if peer is not None:
            expect(
                peer == alice.spec.uid,
                f"the app listens as host user {peer}: it must be spec.uid ({alice.spec.uid}), "
                "not only renamed in a namespace",
            )
            owner = os.stat(alice.inside.endpoint.path).st_uid
            expect(
                alice.inside.owner_uid == owner == alice.spec.uid,
                f"the socket belongs to {owner}, the observation's owner_uid is {alice.inside.owner_uid}: both "
                f"must be spec.uid ({alice.spec.uid})",
            )
        if type(provider).isolation is not Isolation.VM:
            uid = alice.inside.id()["uid"]
            expect(uid != "0", "the app is root inside: run it as spec.uid")

    def test_has_no_privileges(self, alice: Agent, provider: Provider) -> None:
        """The app has no capabilities, and no way to gain any."""
        if type(provider).isolation is Isolation.VM or not self.promised("capabilities"):
            return
        status = alice.inside.read("/proc/self/status").decode()
        for name in ("CapEff", "CapPrm", "CapBnd"):
            value = re.search(rf"^{name}:\s*([0-9a-f]+)", status, re.MULTILINE)
            expect(
                value and int(value[1], 16) == 0,
                f"{name} of the app is {value and value[1]}: drop all capabilities",
            )
        expect("NoNewPrivs:\t1" in status, "the app may gain privileges through setuid programs: set no_new_privs")

    @rule("programs that run as another user (root) before the app do not see")
    def test_variables_are_for_the_app_alone(self, driver: Driver, kit: Kit) -> None:
        """No program of another user (root) gets the app's variables, such as `PATH` and `LD_PRELOAD`."""
        if not kit.privileged or driver.can(Capability.OWN_DATA):
            return
        found_by_path = "PATH", "{data}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        loaded = ("LD_DEBUG", "statistics"), ("LD_DEBUG_OUTPUT", "{data}/ran")  # glibc writes a file ran.PID
        spec = kit.spec("variables", environment=dict((found_by_path, *loaded)))
        programs = spec.data_dir / "bin"
        programs.mkdir()
        programs.chmod(0o755)
        for name in _STARTERS:
            script = f'#!/bin/sh\n: >"${{0%/*}}/../ran.$$"\nPATH=${{PATH#*:}}\nexec {name} "$@"\n'
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        kit.start(driver, spec)
        strangers = {path.lstat().st_uid for path in spec.data_dir.glob("ran.*")} - {spec.uid}
        expect(
            not strangers,
            f"a program that runs as host user {min(strangers, default=0)} gets the app's variables (PATH, "
            "LD_PRELOAD); the agent may write to what they name: pass them behind the change of user: `env -i`",
        )

    def test_cannot_open_sockets_that_no_namespace_separates(self, alice: Agent, provider: Provider) -> None:
        """AF_VSOCK is one space for the host and its agents, whatever their network; a machine has its own."""
        if type(provider).isolation is Isolation.VM or not self.promised("sockets"):
            return
        refusal = alice.inside.refused("/socket", family=40)
        expect(
            refusal in {"EAFNOSUPPORT", "EPERM", "EACCES"},
            f"an agent without a network got {refusal or 'a socket'} for AF_VSOCK: refuse it by a seccomp filter",
        )

    def test_endpoint_directory_is_not_open(self, alice: Agent) -> None:
        """A Unix endpoint lies in the agent's run_dir, which stays closed to all but agent and proxy."""
        endpoint = alice.inside.endpoint
        if endpoint.kind == "unix":
            expect(
                endpoint.path.startswith(f"{alice.spec.run_dir}/"),
                f"the endpoint {endpoint} lies outside spec.run_dir: use spec.socket",
            )
            mode = stat.S_IMODE(os.stat(alice.spec.run_dir).st_mode)
            expect(mode & 0o007 == 0, f"run_dir has the mode {mode:o} now: leave it closed to others")
        elif endpoint.kind == "tcp":
            expect(
                endpoint.host not in {"0.0.0.0", "::", ""},  # noqa: S104 - compared, not bound
                f"the endpoint {endpoint} is open to every network: publish it on a loopback address",
            )

    def test_data_of_the_removed_is_not_inherited(self, driver: Driver, kit: Kit) -> None:
        """After `destroy` with its data an agent that is created again finds none of it, otherwise all of it."""
        spec = kit.spec("victim")
        agent = kit.start(driver, spec)
        agent.inside.write(agent.within("old"), b"old\n")
        driver.destroy(agent.handle, data=True)
        (spec.data_dir / "old").unlink(missing_ok=True)  # the core deletes the canonical data
        again = kit.start(driver, spec)
        expect(
            again.inside.refused("/read", path=again.within("old")),
            "after destroy(data=True) a new agent of the same name finds the old data: delete it",
        )
        if driver.can(Capability.OWN_DATA):
            again.inside.write(again.within("kept"), b"kept\n")
            driver.stop(again.handle, grace=self.patience / 2)
            driver.destroy(again.handle, data=False)
            third = kit.start(driver, spec)
            expect(
                not third.inside.refused("/read", path=third.within("kept")),
                "destroy(data=False) deleted the provider's own data: remove the agent alone",
            )
