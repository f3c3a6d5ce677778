"""The tree in docs/code.md: every file of lt_train with the first sentence of its docstring.

python -m tests.support.code_tree    writes it again
"""

import ast
import re
from pathlib import Path

from tests.support.repository import REPOSITORY

PAGE = REPOSITORY / "docs/code.md"
BEGIN, END = "<!-- tree: python -m tests.support.code_tree -->", "<!-- end of tree -->"
PACKAGE = REPOSITORY / "lt_train"


def tree() -> str:
    """A list in Markdown, folder by folder."""
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")}, key=lambda folder: str(folder.relative_to(PACKAGE)))
    lines = []
    for folder in folders:
        files = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]
        if files:
            lines += ["", f"**{folder.relative_to(REPOSITORY)}/**", ""]
            lines += [f"- `{path.name}`: {first_sentence(path)}" for path in files]
    return "\n".join(lines).strip()


def first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s(?=[A-Z])", paragraph)[0].rstrip(".:")


def page_with_tree(page: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tree()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
