"""Images: pulled, built or verified.

A pull holds a lock for its image only: other apps do not wait for it.

How progress reaches a user's waiting page: docs/explanation/lifecycle.md.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from docker.types import CancellableStream

from dispatcher.plugin import App, Deadline, DeadlineExceeded, Progress, ProviderError
from dispatcher_docker.container_config import image_reference, options_of
from dispatcher_docker.engine import Engine
from dispatcher_docker.errors import NoSuchObject
from dispatcher_docker.options import LABEL, DockerAppOptions, DockerOptions

_BUILD_LABEL = f"{LABEL}build"


class Images:
    """The images of one installation's apps."""

    def __init__(self, engine: Engine, options: DockerOptions, installation: str) -> None:
        self._engine = engine
        self._options = options
        self._installation = installation
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        #: Image name -> id at the last lookup, "" if not known.
        self.current: dict[str, str] = {}

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> str:
        """Pull, build or find an app's image, as its options say; return its id.

        :raises ProviderError: the image is not available.
        """
        options = options_of(app)
        reference = image_reference(app, self._installation)
        progress("looking for the image", reference)
        known = "" if options.build or options.pull == "always" else self.look_up(reference, deadline)
        if known:
            return known
        if options.pull == "never" and not options.build:
            raise missing(app, reference, 'pull = "never", and the engine does not have it')
        with self._locked(reference, deadline, progress):
            if options.build:
                self._build(app, options.build, reference, deadline, progress)
            elif options.pull == "always" or not self.look_up(reference, deadline):
                try:
                    self._pull(options, reference, deadline, progress)
                except (NoSuchObject, ProviderError) as error:
                    raise _pull_failed(app, reference, error.why) from error
            known = self.look_up(reference, deadline)
        if not known:
            raise missing(app, reference, "it is not there after its pull or build")
        return known

    def resolve(self, app: App, *, deadline: Deadline, progress: Progress) -> str:
        """Return the id of an app's image for a start; an image that exists is not pulled, whatever the policy."""
        reference = image_reference(app, self._installation)
        return self.look_up(reference, deadline) or self.prepare(app, deadline=deadline, progress=progress)

    def look_up(self, reference: str, deadline: Deadline) -> str:
        """Return an image's id, "" if the engine does not have it."""
        return str(self._inspect(reference, deadline).get("Id", ""))

    def _inspect(self, reference: str, deadline: Deadline) -> Mapping[str, Any]:
        try:
            with self._engine.call(f"look for the image {reference}", deadline) as client:
                found = client.image(reference)
        except NoSuchObject:
            self.current.pop(reference, None)
            return {}
        self.current[reference] = str(found["Id"])
        return found

    def look_up_all(self, references: Iterable[str], deadline: Deadline) -> None:
        """Look up these names, and all that were looked up before, in one request."""
        if not (wanted := {*references, *self.current}):
            return
        with self._engine.call("list the images", deadline) as client:
            found = client.images()
        names = {
            name: str(one["Id"])
            for one in found
            for name in (*(one.get("RepoTags") or ()), *(one.get("RepoDigests") or ()))
        }
        self.current = {reference: names.get(_tagged(reference), "") for reference in wanted}

    def last_id(self, reference: str) -> str:
        """Return the id that a name had at the last lookup, "" if not known; from now on it is looked up."""
        return self.current.setdefault(reference, "")

    # -- pulling and building ----------------------------------------------------------------------------

    def _pull(self, options: DockerAppOptions, reference: str, deadline: Deadline, progress: Progress) -> None:
        step = "pulling the image"
        layers = Layers()
        credentials = self._credentials(reference)
        with self._engine.call(f"pull the image {reference}", deadline) as client:
            stream = client.pull(
                *_repository_and_tag(reference),
                stream=True,
                decode=True,
                auth_config=credentials,
                platform=options.platform or None,
            )
            for message in _messages(stream, step, deadline, progress):
                if "error" in message:
                    raise ProviderError("The pull failed", why=str(message["error"]))
                if report := layers.update(message):
                    progress(step, *report)

    def _credentials(self, reference: str) -> dict[str, str] | None:
        registry = self._options.registries.get(_host(reference))
        if registry is None:
            return None  # docker-py then looks into ~/.docker/config.json
        try:
            password = registry.password_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ProviderError(
                f"The password for {_host(reference)} cannot be read",
                why=f"{registry.password_file}: {error.strerror}",
                fix=f'correct providers.docker.registries."{_host(reference)}".password_file',
            ) from error
        return {"username": registry.username, "password": password}

    def _build(self, app: App, directory: Path, reference: str, deadline: Deadline, progress: Progress) -> None:
        """Build an image, unless it was built from the same files."""
        options = options_of(app)
        step = "building the image"
        if not (directory / options.dockerfile).is_file():
            raise ProviderError(
                f"The image of {app.name} cannot be built",
                why=f"there is no {directory / options.dockerfile}",
                fix=f"correct apps.{app.name}.docker.build or .dockerfile",
            )
        wanted = directory_digest(directory, options.dockerfile, options.build_args)
        found = self._inspect(reference, deadline)
        if found and (found["Config"].get("Labels") or {}).get(_BUILD_LABEL) == wanted:
            return
        lines: deque[str] = deque(maxlen=20)
        with self._engine.call(f"build the image of {app.name}", deadline) as client:
            stream = client.build(
                path=str(directory),
                dockerfile=options.dockerfile,
                tag=reference,
                rm=True,
                forcerm=True,
                decode=True,
                buildargs=options.build_args,
                labels={_BUILD_LABEL: wanted, f"{LABEL}installation": self._installation},
                platform=options.platform or None,
                pull=options.pull == "always",
            )
            for message in _messages(stream, step, deadline, progress):
                if "error" in message:
                    raise ProviderError(
                        f"The image of {app.name} could not be built",
                        why=" ".join(str(message["error"]).split())[:600],
                        fix=f"correct {directory / options.dockerfile}",
                        details={"log": list(lines)},
                    )
                if line := str(message.get("stream", "")).strip():
                    lines.append(line[:500])
                    progress(step, line[:120])

    @contextmanager
    def _locked(self, reference: str, deadline: Deadline, progress: Progress) -> Iterator[None]:
        """Hold the lock of one image."""
        with self._lock:
            lock = self._locks.setdefault(reference, threading.Lock())
        while not lock.acquire(timeout=min(0.5, max(0.01, deadline.remaining()))):
            progress("waiting for the image", f"another start prepares {reference}")
            if deadline.expired:
                raise DeadlineExceeded(
                    f"The image {reference} was not ready in time",
                    why="another start prepares it",
                    fix="wait, then start the agent again",
                )
        try:
            yield
        finally:
            lock.release()


def _messages(stream: Any, step: str, deadline: Deadline, progress: Progress) -> Iterator[Mapping[str, Any]]:
    """Yield the messages of a streamed answer until the deadline, and report progress in between.

    :raises TimeoutError: at the deadline.
    """
    assert isinstance(stream, CancellableStream)
    messages: queue.Queue[Mapping[str, Any] | Exception | None] = queue.Queue()

    def read() -> None:
        try:
            for message in stream:
                messages.put(message)
            messages.put(None)
        except Exception as error:  # for the thread that waits
            messages.put(error)

    reader = threading.Thread(target=read, name="docker-stream", daemon=True)
    reader.start()
    try:
        while True:
            try:
                message = messages.get(timeout=min(0.5, max(0.01, deadline.remaining())))
            except queue.Empty:
                if deadline.expired:
                    raise TimeoutError from None
                progress(step)
                continue
            if message is None:
                return
            if isinstance(message, Exception):
                raise message
            yield message
    finally:
        if reader.is_alive():
            stream.close()
        reader.join(2)


class Layers:
    """Sums up the progress of a pull over its layers."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[float, float]] = {}

    def update(self, message: Mapping[str, Any]) -> tuple[str, float | None] | None:
        """Take a message; return detail and fraction, None if it has no news."""
        layer, status = str(message.get("id", "")), str(message.get("status", ""))
        detail = message.get("progressDetail") or {}
        if not layer or status.startswith(("Pulling from", "Status")):
            return (status, None) if status else None
        total = float(detail.get("total") or 0)
        if status in {"Pull complete", "Already exists"}:
            size = self._layers.get(layer, (0.0, 1.0))[1]
            self._layers[layer] = (size, size)
        elif total and status in {"Downloading", "Extracting"}:
            half = 0.5 * total if status == "Extracting" else 0.0
            self._layers[layer] = (half + 0.5 * float(detail.get("current") or 0), total)
        else:
            self._layers.setdefault(layer, (0.0, 1.0))
        done = sum(one for one, _ in self._layers.values())
        size = sum(two for _, two in self._layers.values())
        complete = sum(1 for one, two in self._layers.values() if one >= two)
        words = f"{complete} of {len(self._layers)} layers, {layer} {status.lower()}"
        return words, min(1.0, done / size) if size else None


def missing(app: App, reference: str, why: str) -> ProviderError:
    """Return the error for an image that is not available."""
    return ProviderError(
        f"There is no image {reference}",
        why=why,
        fix=f"correct apps.{app.name}.docker.image, or load it into the engine (docker pull, docker load)",
    )


def _pull_failed(app: App, reference: str, why: str) -> ProviderError:
    text = why.lower()
    if any(phrase in text for phrase in ("denied", "unauthorized", "authentication", "no basic auth")):
        return ProviderError(
            f"The image {reference} could not be pulled",
            why=why,
            fix=f'set providers.docker.registries."{_host(reference)}", or docker login as the manager\'s user',
        )
    if any(phrase in text for phrase in ("manifest unknown", "not found", "no such image", "does not exist")):
        return missing(app, reference, why)
    return ProviderError(
        f"The image {reference} could not be pulled",
        why=why,
        fix=f"check whether {_host(reference)} can be reached",
    )


def directory_digest(directory: Path, dockerfile: str, arguments: Mapping[str, str]) -> str:
    """Return a digest over a build directory: names, modes, sizes, times, links, and the build's arguments."""
    total = hashlib.sha256(repr((dockerfile, sorted(arguments.items()))).encode())
    for path in sorted(_tree(directory)):
        status = os.lstat(path)
        link = os.readlink(path) if os.path.islink(path) else ""
        entry = (os.path.relpath(path, directory), status.st_mode, status.st_size, status.st_mtime_ns, link)
        total.update(repr(entry).encode())
    return total.hexdigest()


def _tree(directory: Path) -> Iterable[str]:
    for here, names, files in os.walk(directory):
        for name in (*names, *files):
            yield os.path.join(here, name)


def _repository_and_tag(reference: str) -> tuple[str, str | None]:
    if "@" in reference:
        repository, _, digest = reference.partition("@")
        return repository.rpartition(":")[0] if ":" in repository.rpartition("/")[2] else repository, digest
    head, colon, tag = reference.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (reference, "latest")


def _tagged(reference: str) -> str:
    repository, tag = _repository_and_tag(reference)
    return f"{repository}@{tag}" if "@" in reference else f"{repository}:{tag}"


def _host(reference: str) -> str:
    first, slash, _ = reference.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"
