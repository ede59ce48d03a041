"""Write the project's address, `home` in pyproject.toml, wherever a page or notebook names it.

    python .ci/home.py

With an empty address there is no badge and no clone line. Run it after changing the setting;
tests/test_repo.py compares.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

BEGIN, END = "<!-- home -->\n", "<!-- /home -->"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def setting(root: Path) -> str:
    """The address in pyproject.toml, without a slash at its end; empty until there is one."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["jaxlib-unlearn"]["home"].rstrip("/")


def page(text: str, home: str) -> str:
    """A page with the clone line between its two marks; a page without marks is unchanged."""
    line = f"```sh\ngit clone {home} jaxlib-unlearn && cd jaxlib-unlearn\n```\n" if home else ""
    marked = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(marked, lambda _: BEGIN + line + END, text, flags=re.DOTALL)


def notebook(text: str, home: str, name: str) -> str:
    """A notebook with the address it clones from, and a badge where Colab can open it."""
    cells = json.loads(text)
    opener = home.replace("https://github.com/", "https://colab.research.google.com/github/")
    badge = f"[![Open in Colab]({BADGE})]({opener}/blob/main/colab/{name})\n"
    for cell in cells["cells"]:
        source = "".join(cell["source"])
        source = re.sub(r'^REPOSITORY = "[^"]*"', f'REPOSITORY = "{home}"', source, flags=re.M)
        if cell["cell_type"] == "markdown" and source.startswith("# "):
            source = re.sub(r"^\[!\[Open in Colab\].*\n\n?", "", source, flags=re.M)
            title, _, rest = source.partition("\n\n")
            shown = badge + "\n" if opener != home else ""
            source = f"{title}\n\n{shown}{rest}"
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(cells, indent=1, ensure_ascii=False) + "\n"


def pages(root: Path) -> dict[Path, str]:
    """Every file that names the address, and its text with the address of the setting."""
    home = setting(root)
    found = {root / "README.md": page((root / "README.md").read_text(encoding="utf-8"), home)}
    for path in sorted((root / "colab").glob("*.ipynb")):
        found[path] = notebook(path.read_text(encoding="utf-8"), home, path.name)
    return found


if __name__ == "__main__":
    here = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    for path, text in pages(here).items():
        path.write_text(text, encoding="utf-8")
