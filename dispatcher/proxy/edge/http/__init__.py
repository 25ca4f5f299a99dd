"""HTTP/1.1 and WebSocket framing without I/O: bytes in, values out.

The modules of this package are compiled where a C compiler is found at the installation (docs/adr/0010), otherwise
they are interpreted; both behave the same.  The interpreted ones also run with ``DISPATCHER_PURE=1`` in the
environment, in a checkout whose sources are newer than the compiled modules, and in a copy without
their common library.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).parent
_LIBRARY = "dispatcher_edge__mypyc"  # holds the code of all compiled modules


def _outdated() -> bool:
    """Whether a module of a checkout was changed after it was compiled."""
    if not (_HERE.parents[3] / "setup.py").exists():
        return False
    for source in _HERE.glob("*.py"):
        compiled = source.with_suffix(EXTENSION_SUFFIXES[0])
        if compiled.exists() and compiled.stat().st_mtime < source.stat().st_mtime:
            return True
    return False


if os.environ.get("DISPATCHER_PURE", "") not in {"", "0"} or _outdated() or find_spec(_LIBRARY) is None:
    # A finder that knows no compiled modules, for this directory alone.
    sys.path_importer_cache[str(_HERE)] = FileFinder(str(_HERE), (SourceFileLoader, SOURCE_SUFFIXES))
