"""`dispatcher.plugin`: every public name can be imported, and is documented."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dispatcher.plugin

PAGE = Path(__file__).parents[3] / "docs/reference/plugin.md"


def test_each_public_name_is_documented_and_no_other():
    cells = re.findall(r"^\| (`.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    documented = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(documented) == sorted(dispatcher.plugin.__all__)


@pytest.mark.parametrize("name", dispatcher.plugin.__all__)
def test_each_public_name_can_be_imported(name):
    assert getattr(dispatcher.plugin, name) is not None
    assert name in dir(dispatcher.plugin)


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="'dispatcher.plugin' has no attribute 'Providr'"):
        _ = dispatcher.plugin.Providr


def test_an_error_class_is_had_without_pydantic():
    """The command line needs the errors, and starts in the time of a bare Python."""
    program = "import sys; from dispatcher.plugin import NotFound; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
