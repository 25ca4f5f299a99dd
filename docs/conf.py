"""Configuration of Sphinx for the site of these pages (`make docs`).

The source directory is the repository, so that links to README.md, examples/ and packaging/ work.  The navigation is
made from the lists of docs/index.md.
"""

import re
from pathlib import Path
from posixpath import normpath

ROOT = Path(__file__).resolve().parent.parent
INDEX = "docs/index"

project = "Dispatcher"
extensions = ["myst_parser"]
root_doc = INDEX
include_patterns = ["docs/**.md", "examples/**.md", "bench/*.md", "*.md"]
exclude_patterns = [".*", "build", "dist", "tests"]
nitpicky = True
myst_heading_anchors = 3
html_theme = "furo"
html_title = "Dispatcher"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def navigation(text):
    """Return index.md's lists as hidden tables of contents: one for each bold heading, with its links in their order."""
    lines, seen = [], set()
    for part in re.split(r"^\*\*", text, flags=re.MULTILINE)[1:]:
        caption, _, rest = part.partition("**")
        lines += ["```{toctree}", ":hidden:", f":caption: {caption}", ""]
        for target in re.findall(r"\]\(([^):\s]+\.md)\)", rest):
            path = normpath(f"docs/{target}")
            folder = Path(path).parent
            group = sorted(ROOT.glob("docs/adr/*.md")) if folder.name == "adr" else [ROOT / path]
            pages = [page.relative_to(ROOT).with_suffix("") for page in group]
            lines += [f"/{page}" for page in pages if page not in seen]
            seen.update(pages)
        lines += ["```", ""]
    return "\n".join(lines)


def read(app, name, source):
    if name == INDEX:
        source[0] += "\n" + navigation(source[0])


def finish(app, error):
    if error is None:
        page = (
            f'<!doctype html><title>Dispatcher</title><meta http-equiv="refresh" content="0; url={INDEX}.html">\n'
        )
        Path(app.outdir, "index.html").write_text(page)


def setup(app):
    app.connect("source-read", read)
    app.connect("build-finished", finish)
