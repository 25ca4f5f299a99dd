"""The portal's static files and templates, read when this module is imported.

Static files are served from memory under names that hold their hash: a name that changes with its content may be
cached without expiry (RFC 8246), so a known page costs one request.  Templates are read as early because the
proxy's user may have no access to where this program lies, once privileges are dropped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file: its name with the hash in it, its media type, its bytes."""

    name: str
    type: str
    body: bytes


class Assets:
    """All static files.

    :param directory: where they are; files of unknown types are left alone.
    """

    def __init__(self, directory: Path = HERE) -> None:
        self._hashed: dict[str, Asset] = {}
        self._names: dict[str, str] = {}
        for path in sorted(directory.iterdir()):
            if (kind := _TYPES.get(path.suffix)) is not None:
                body = path.read_bytes()
                name = f"{path.stem}.{hashlib.sha256(body).hexdigest()[:16]}{path.suffix}"
                self._names[path.name] = name
                self._hashed[name] = Asset(name, kind, body)

    def name(self, plain: str) -> str:
        """Return the name with the hash in it.

        :raises KeyError: there is no such file.
        """
        return self._names[plain]

    def get(self, hashed: str) -> Asset | None:
        """Return a file by its name with the hash in it."""
        return self._hashed.get(hashed)


#: What this program ships.
SHIPPED = Assets()
TEMPLATES = {
    path.name: path.read_text(encoding="utf-8") for path in (HERE.parent / "templates").iterdir() if path.is_file()
}
