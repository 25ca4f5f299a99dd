"""The authenticator: asks PAM in a helper process, one for each question (`helper.py`).

Some modules wait a random time after a refusal, others none, and no password is hashed for an unknown name.  So
the helper never waits, and every refusal is answered at the same time after the attempt began.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
import time
from pathlib import Path
from string import punctuation
from typing import Any

from dispatcher.plugin import (
    Authenticator,
    Deadline,
    DeadlineExceeded,
    Identity,
    ProviderError,
    Unavailable,
    Unsupported,
    run_command,
)
from dispatcher_pam.options import PamOptions

MAX_PASSWORD = 511  # bytes; modules cut a longer one (PAM_MAX_RESP_SIZE)
MAX_NAME = 255
#: Helpers at a time, of 20 MiB each with the hash.  The core lets one name try 16 passwords at once.
MAX_HELPERS = 32
#: Without the packages of Python's environment, which the helper does not need.
FLAGS = ("-I", "-S", "-B", "-X", "utf8")
HELPER = (sys.executable, *FLAGS, str(Path(__file__).with_name("helper.py")))
_FORBIDDEN = frozenset(punctuation) - frozenset("._-@+") | {" "}

_log = logging.getLogger("dispatcher.plugin.authenticator.pam")


class PamAuthenticator(Authenticator):
    """Verifies passwords of this host's accounts."""

    name = "pam"
    api_version = 1
    Options = PamOptions
    options: PamOptions
    changes_passwords = False

    def __init__(self, *, options: PamOptions) -> None:
        super().__init__(options=options)
        self._places = threading.BoundedSemaphore(MAX_HELPERS)

    @property
    def refusal_time(self) -> float:
        """See `Authenticator`."""
        return self.options.refusal_time

    def authenticate(self, name: str, password: str, *, deadline: Deadline) -> Identity | None:
        """See `Authenticator`."""
        answer = Deadline(self.options.refusal_time)
        try:
            length = len(password.encode())
            name.encode()
        except UnicodeEncodeError:
            return None
        if not _can_exist(name) or not 0 < length <= MAX_PASSWORD or "\0" in password:
            return None
        found = self._identity(self._ask("authenticate", deadline, name=name, password=password), name)
        if found is None:
            time.sleep(min(answer.remaining(), deadline.remaining()))
        return found

    def lookup(self, name: str, *, deadline: Deadline) -> Identity | None:
        """See `BaseAuthenticator`.  An account whose password must be changed is one that may sign in."""
        return self._identity(self._ask("lookup", deadline, name=name), name) if _can_exist(name) else None

    def set_password(self, name: str, password: str, *, deadline: Deadline) -> None:
        """See `Authenticator`."""
        raise Unsupported("Passwords are not changed here", fix="change it on the host, with passwd")

    def check(self, *, deadline: Deadline) -> None:
        """Read the service's files, and try a password for a name that does not exist.

        :raises Unavailable: what is wrong.
        """
        self._ask("check", deadline, password=secrets.token_hex())

    def _identity(self, found: dict[str, Any], name: str) -> Identity | None:
        if "refused" in found:
            _log.info("PAM: %s may not sign in: %s", name, found["refused"])
            return None
        return Identity(user=found["user"], groups=frozenset(found["groups"]), subject=str(found["uid"]))

    def _ask(self, action: str, deadline: Deadline, **question: str) -> dict[str, Any]:
        """Return the helper's answer.

        :raises Unavailable: there is none, or it is a fault.
        """
        options = self.options.model_dump(include={"service", "allow_groups", "min_uid"})
        what, fix = f"The PAM service {self.options.service} does not answer", "check its modules"
        late = DeadlineExceeded(what, why="a module takes too long", fix=fix)
        if deadline.expired or not self._places.acquire(timeout=deadline.remaining()):
            raise late
        try:
            text = json.dumps({"action": action, **options, **question}).encode()
            with open(os.memfd_create("answer"), "rb") as answer:  # a module's daemon could keep a pipe open
                run_command(HELPER, what, deadline=deadline, stdin=text, stdout=answer.fileno())
                answer.seek(0)
                found: dict[str, Any] = json.load(answer)
        except DeadlineExceeded as error:
            raise late from error
        except (ProviderError, ValueError) as error:
            why = error.why if isinstance(error, ProviderError) else "a module ended the process"
            raise Unavailable(what, why=f"a module failed: {why}", fix=fix) from error
        finally:
            self._places.release()
        if "fault" in found:
            raise Unavailable(found["fault"], why=found["why"], fix=found["fix"])
        return found


def _can_exist(name: str) -> bool:
    """Whether it may be an account's: letters, digits and ``._-@+``, beginning with a letter or a digit."""
    return 0 < len(name) <= MAX_NAME and name[0].isalnum() and name.isprintable() and not _FORBIDDEN & set(name)
