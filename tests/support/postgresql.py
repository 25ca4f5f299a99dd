"""Where the programs of PostgreSQL are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def programs() -> Path | None:
    """Return the directory of `initdb` and `pg_ctl`; Debian does not put it into $PATH."""
    found = shutil.which("postgres")
    if found:
        return Path(os.path.realpath(found)).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
