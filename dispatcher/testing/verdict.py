"""Verdicts of the checks: what is wrong, and where to read what is right."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import pytest

from dispatcher.plugin import provider
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.provider import Provider
from dispatcher.testing.probe_client import Refused

PAGE = "docs/reference/conformance-kit.md"
_T = TypeVar("_T")
_Check = TypeVar("_Check", bound=Callable[..., None])
_checks: dict[str, Any] = {}


class Hangs(Exception):
    """A call has not returned in time."""


@contextlib.contextmanager
def judging(what: str) -> Iterator[None]:
    """Add to a verdict what to read; make one of an error that nothing else has judged.

    :param what: in which such an error came, for the message.
    """
    __tracebackhide__ = True
    try:
        yield
    except pytest.fail.Exception as verdict:
        verdict.msg = "\n".join([verdict.msg or "", *places()])
        raise
    except (DispatcherError, OSError, Refused) as error:
        advice = f"{what} ended with {type(error).__name__} ({error})"
        if not isinstance(error, DispatcherError):
            advice += ": the probe in the agent did not answer as it should"
        pytest.fail("\n".join([advice, *places()]))


def register(check: _Check, page: str, rule: str) -> _Check:
    """Return a check of the kit whose verdicts, and other errors, say what to read.

    :param page: of the documentation, about the whole tier; :param rule: words of the contract's own text.
    """
    name = check.__name__
    _checks[name] = (check, page, rule)

    @functools.wraps(check)
    def judged(*arguments: Any, **fixtures: Any) -> None:
        __tracebackhide__ = True
        with judging("the check"):
            check(*arguments, **fixtures)

    return cast("_Check", judged)


def places() -> list[str]:
    """Return what to read about the check that runs now: its description, the contract's lines, a page."""
    found = re.search(r"::(test_\w+)", os.environ.get("PYTEST_CURRENT_TEST", ""))
    if not found or found[1] not in _checks:
        return []
    check, page, rule = _checks[found[1]]
    about = " ".join((inspect.getdoc(check) or "").split())
    return [
        f"The check `{found[1].removeprefix('test_')}` ({PAGE}): {about}",
        *(f"Read {place}" for place in [*contract_lines(about, rule), page] if place),
    ]


def contract_lines(about: str, rule: str) -> list[str]:
    """Return the places in the contract that a text is about: methods that it names, and the line of a rule."""
    found = []
    for name in dict.fromkeys(re.findall(r"`([a-z_]+)[`(]", about)):
        member = vars(Provider).get(name)
        function = member.fget if isinstance(member, property) else member
        if inspect.isfunction(function):
            found.append(f"{provider.__file__}:{inspect.getsourcelines(function)[1]} Provider.{name}")
    text = inspect.getsource(provider).splitlines()
    lines = [number for number, line in enumerate(text, 1) if rule and rule in line]
    return found + [f"{provider.__file__}:{number} {text[number - 1].strip()}" for number in lines[:1]]


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """Return the result of a call, made in its own thread, which is left alone if it does not return.

    :raises Hangs: it has not returned in time.
    :raises BaseException: whatever the call raises, SystemExit and KeyboardInterrupt too.
    """
    __tracebackhide__ = True
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="kit-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Hangs
    return outcome.result()
