"""A Podman of one's own: its Docker API at a socket, its storage in a directory, no service of the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support.docker_tools import docker
from tests.support.installation import until

#: What a distribution's package sets, what a host without systemd and CAP_SYS_RESOURCE needs, and defaults of an
#: operator that must not reach agents.
CONFIGURATION = """
[containers]
log_driver = "json-file"
userns = "auto"
pidns = "host"
utsns = "host"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[engine.runtimes]
runc = ["{base}/runc"]
"""
#: The OCI runtime; limits that cannot be raised are lowered to what is allowed.
RUNTIME = """#!/usr/bin/python3 -I
import json, os, resource, sys
if "--bundle" in sys.argv:
    path = os.path.join(sys.argv[sys.argv.index("--bundle") + 1], "config.json")
    config = json.load(open(path))
    for one in config["process"].get("rlimits", []):
        most = resource.getrlimit(getattr(resource, one["type"]))[1]
        if most != resource.RLIM_INFINITY:
            one["hard"] = min(one["hard"], most)
            one["soft"] = min(one["soft"], one["hard"])
    json.dump(config, open(path, "w"))
os.execv("{runc}", ["runc", *sys.argv[1:]])
"""


class Podman:
    """Podman's service with one image, until `close`."""

    def __init__(self, image: str) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="podman-", dir="/tmp"))
        self.socket = self.base / "s"
        paths = {"base": self.base, "runc": shutil.which("runc", path="/usr/sbin:/usr/bin")}
        for name, text in {"containers.conf": CONFIGURATION, "runc": RUNTIME}.items():
            for key, value in paths.items():
                text = text.replace(f"{{{key}}}", str(value))
            (self.base / name).write_text(text)
        (self.base / "runc").chmod(0o755)
        self.program = ["podman", "--root", str(self.base / "root"), "--runroot", str(self.base / "run")]
        self.environment = {**os.environ, "CONTAINERS_CONF": str(self.base / "containers.conf")}
        self.start()
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            docker("load", host=self.url, stdin=saved.stdout)

    def start(self) -> None:
        """Start the service."""
        self.socket.unlink(missing_ok=True)
        with (self.base / "log").open("ab") as log:
            self.service = subprocess.Popen(
                [*self.program, "system", "service", "-t", "0", self.url],
                env=self.environment,
                cwd=self.base,  # conmon writes a file `oom` there
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until("Podman answers", self.socket.exists)

    def stop(self) -> None:
        """End the service; containers go on."""
        self.service.terminate()
        self.service.wait(20)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def close(self) -> None:
        """Remove everything."""
        for what in (["rm", "--all", "--force"], ["system", "reset", "--force"]):
            subprocess.run([*self.program, *what], env=self.environment, capture_output=True, timeout=60)
        self.stop()
        subprocess.run(["umount", "-l", self.base / "root/overlay"], capture_output=True)
        shutil.rmtree(self.base, ignore_errors=True)
