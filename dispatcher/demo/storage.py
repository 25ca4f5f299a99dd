"""The demo's data: notes in one JSON file, uploads in one folder."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

MAX_NOTE = 10_000
MAX_NOTES = 1_000
MAX_FILE_NAME = 150
_UPLOAD = ".upload-"


class StorageError(Exception):
    """A note or file cannot be stored or found.

    :param status: the HTTP status of the response.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Note:
    """One note; `created` is Unix time in seconds."""

    id: str
    text: str
    created: float


def file_name(raw: str) -> str:
    """Return `raw` as a safe name of one file.

    :raises StorageError: empty, hidden, with a slash or a control character, or over 150 bytes.
    """
    name = unicodedata.normalize("NFC", raw)
    bad = any(unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} or char in "/\\" for char in name)
    if bad or not name.strip() or name.startswith(".") or len(name.encode(errors="replace")) > MAX_FILE_NAME:
        raise StorageError(400, f"A file's name has 1 to {MAX_FILE_NAME} bytes, no slash and no dot in front")
    return name


class Notes:
    """The notes, newest first, in ``notes.json``; every change is on disk before it is confirmed."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "notes.json"

    def all(self) -> list[Note]:
        """Return all notes.

        :raises StorageError: the file is damaged.
        """
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        try:
            return [Note(str(item["id"]), str(item["text"]), float(item["created"])) for item in json.loads(text)]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(500, f"{self._path.name} is damaged: {error}") from error

    def add(self, text: str) -> Note:
        """Store a new note.

        :raises StorageError: empty, too long, one too many, or the disk refuses.
        """
        text = text.strip()
        notes = self.all()
        if not text or len(text) > MAX_NOTE:
            raise StorageError(400, f"A note has 1 to {MAX_NOTE:,} characters")
        if len(notes) >= MAX_NOTES:
            raise StorageError(409, f"There are {MAX_NOTES:,} notes already: delete some first")
        note = Note(secrets.token_hex(8), text, time.time())
        self._write([note, *notes])
        return note

    def remove(self, note_id: str) -> None:
        """Delete a note.

        :raises StorageError: there is none of that id, or the disk refuses.
        """
        notes = self.all()
        left = [note for note in notes if note.id != note_id]
        if len(left) == len(notes):
            raise StorageError(404, "There is no such note")
        self._write(left)

    def _write(self, notes: list[Note]) -> None:
        temporary = self._path.with_suffix(".new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump([asdict(note) for note in notes], file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            raise StorageError(507, f"The note cannot be stored: {error.strerror}") from error


class Files:
    """Uploads, each a regular file in ``files/``; an incomplete upload never has its name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "files"
        self._directory.mkdir(parents=True, exist_ok=True)
        for left in self._directory.glob(f"{_UPLOAD}*"):
            left.unlink(missing_ok=True)

    def all(self) -> list[dict[str, object]]:
        """Return name, size in bytes and Unix time of every file, by name."""
        found = []
        for entry in os.scandir(self._directory):
            if entry.is_file(follow_symlinks=False) and not entry.name.startswith("."):
                status = entry.stat(follow_symlinks=False)
                found.append({"name": entry.name, "size": status.st_size, "modified": status.st_mtime})
        return sorted(found, key=lambda item: str(item["name"]))

    def path(self, name: str) -> Path:
        """Return the path of a file.

        :raises StorageError: bad name, or there is no such regular file; a link is none.
        """
        path = self._directory / file_name(name)
        if path.is_symlink() or not path.is_file():
            raise StorageError(404, "There is no such file")
        return path

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Yield a file to write; it gets its name when the block succeeds and is removed when it fails.

        :raises StorageError: bad name, or the disk refuses.
        """
        target = self._directory / file_name(name)
        temporary = self._directory / f"{_UPLOAD}{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as file:
                yield file
            temporary.replace(target)
        except OSError as error:
            raise StorageError(507, f"The file cannot be stored: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a file.

        :raises StorageError: bad name, or there is no such file.
        """
        try:
            (self._directory / file_name(name)).unlink()
        except OSError as error:
            raise StorageError(404, "There is no such file") from error
