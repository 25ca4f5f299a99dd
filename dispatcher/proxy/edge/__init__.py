"""The data plane: routes each request to an agent or to the portal.

The modules on the path of a request are compiled where a C compiler is found at the installation (docs/adr/0010),
otherwise they are interpreted; both behave the same.  The interpreted ones also run with ``DISPATCHER_PURE=1`` in
the environment, in a checkout whose sources are newer than the compiled modules, and in a copy without their
common library.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path

_FOLDERS = [Path(__file__).parent / name for name in ("http", "routing", "net")]
_LIBRARY = "dispatcher_edge__mypyc"  # holds the code of all compiled modules


def _outdated() -> bool:
    """Whether a module of a checkout was changed after it was compiled."""
    if not (Path(__file__).parents[3] / "setup.py").exists():
        return False
    for source in (source for folder in _FOLDERS for source in folder.glob("*.py")):
        compiled = source.with_suffix(EXTENSION_SUFFIXES[0])
        if compiled.exists() and compiled.stat().st_mtime < source.stat().st_mtime:
            return True
    return False


if os.environ.get("DISPATCHER_PURE", "") not in {"", "0"} or _outdated() or find_spec(_LIBRARY) is None:
    for folder in _FOLDERS:  # a finder that knows no compiled modules, for these directories alone
        sys.path_importer_cache[str(folder)] = FileFinder(str(folder), (SourceFileLoader, SOURCE_SUFFIXES))
