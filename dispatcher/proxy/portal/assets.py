"""The portal's static files and templates, read when this module is imported.

Static files are served from memory under names that hold their hash: a name that changes with its content may be
cached without expiry (RFC 8246), so a known page costs one request.  Templates are read as early because the
proxy's user may have no access to where this program lies, once privileges are dropped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
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


def read(directory: Path) -> dict[str, Asset]:
    """Return the files of known types in a directory, by their plain names."""
    found = {}
    for path in directory.iterdir():
        if (kind := _TYPES.get(path.suffix)) is not None:
            body = path.read_bytes()
            name = f"{path.stem}.{hashlib.sha256(body).hexdigest()[:16]}{path.suffix}"
            found[path.name] = Asset(name, kind, body)
    return found


STATIC = read(_HERE / "static")
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in (_HERE / "templates").glob("*.html")}
