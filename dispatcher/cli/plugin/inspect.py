"""Prints what plugins are, as JSON: `python -m dispatcher.cli.plugin.inspect NAME...`."""

from __future__ import annotations

import json
import sys

from dispatcher.config.plugins import Plugins
from dispatcher.plugin.errors import PluginError


def main(names: list[str]) -> None:
    """Load plugins and print name, kinds and error of each."""
    plugins, found = Plugins(), []
    for name in names:
        error = ""
        try:
            plugins.load(name)
            if not plugins.kinds(name):
                error = f"The plugin {name!r} implements none of the hooks"
        except PluginError as refusal:
            error = str(refusal)
        found.append({"name": name, "kinds": plugins.kinds(name), "error": error})
    print(json.dumps(found), flush=True)  # noqa: T201 - the check reads it


if __name__ == "__main__":
    main(sys.argv[1:])
