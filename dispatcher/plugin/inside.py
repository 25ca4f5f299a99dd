"""An agent's paths as it sees them: placeholders, and the environment that every provider gives to an app."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dispatcher.plugin.model import AgentSpec, Limits
from dispatcher.plugin.names import slug
from dispatcher.plugin.options import check_environment
from dispatcher.plugin.processes.command import SYSTEM_PATH

_PLACEHOLDER = re.compile(r"\{(socket|port|data)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """Paths and port, as an agent sees them.

    :ivar tmp: directory for large temporary files, "" for the system's; :ivar secrets: directory of its secrets.
    """

    socket: str
    data: str
    port: int = 0
    tmp: str = ""
    secrets: str = ""

    def fill(self, text: str) -> str:
        """Return `text` with ``{socket}``, ``{port}`` and ``{data}`` replaced; other braces stay as they are."""
        values = {"socket": self.socket, "port": str(self.port), "data": self.data}
        return _PLACEHOLDER.sub(lambda match: values[match[1]], text)

    @staticmethod
    def placeholders(*texts: str) -> set[str]:
        """Return which of ``socket``, ``port`` and ``data`` some texts contain as placeholders."""
        return {name for text in texts for name in _PLACEHOLDER.findall(text)}

    def environment(
        self,
        spec: AgentSpec,
        *,
        limits: Limits | None = None,
        shell: str = "/bin/sh",
        others: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """Return the whole environment of an app, as the contract demands it.

        :param limits: those that are enforced, by default the app's; :param others: more variables, which those of
            `App.environment` replace.
        :raises ConfigError: something in it cannot be a variable.
        """
        name = slug(spec.user)
        user = {"HOME": self.data, "USER": name, "LOGNAME": name, "SHELL": shell}
        variables = {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", **user, **(others or {})}
        if self.tmp:
            variables["TMPDIR"] = self.tmp
        variables |= {name: self.fill(value) for name, value in spec.app.environment.items()}
        variables |= spec.variables(self.data, self.secrets, limits=limits)
        check_environment(spec.app.name, variables)
        return variables
