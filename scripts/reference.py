"""Writes docs/reference.md from the sources: what users may call and read, with its COMMENT.

Usage: reference.py [--check]. With --check it writes nothing, and fails if the file is not current.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs/reference.md"
CHAPTERS = {
    "procedure": "Procedures",
    "function": "Functions",
    "view": "Views",
    "table": "Tables",
}
_CREATED = re.compile(r"create (?:unlogged )?(procedure|function|table|view) pgflow_worker\.(\w+)")
_COMMENT = re.compile(r"^comment on (.+?) is\s+((?:'(?:[^']|'')*'\s*)+);", re.DOTALL | re.MULTILINE)
_TEXT = re.compile(r"'((?:[^']|'')*)'")


def _comments(sql: str) -> dict[str, str]:
    """The file's COMMENTs, by what they are on."""
    return {
        " ".join(on.split()): "".join(_TEXT.findall(text)).replace("''", "'")
        for on, text in _COMMENT.findall(sql)
    }


def _signature(sql: str) -> str:
    """What a caller has to know of a routine's definition."""
    start = sql.index("create ")
    signature = sql[start : sql.index("\nlanguage ", start)]
    return signature.removeprefix("create ").replace("pgflow_worker.", "", 1)


def _columns(comments: dict[str, str], name: str) -> list[str]:
    prefix = f"column pgflow_worker.{name}."
    return [
        f"- `{on.removeprefix(prefix)}`: {text}\n"
        for on, text in comments.items()
        if on.startswith(prefix)
    ]


def _entry(kind: str, name: str, sql: str) -> str:
    comments = _comments(sql)
    [text] = [t for on, t in comments.items() if on.startswith(f"{kind} pgflow_worker.{name}")]
    lines = [f"### {name}\n\n"]
    if kind in ("function", "procedure"):
        lines.append(f"```sql\n{_signature(sql)}\n```\n\n")
    lines.append(f"{text}\n")
    if columns := _columns(comments, name):
        lines += ["\n", *columns]
    return "".join(lines)


def reference() -> str:
    """The document's text."""
    entries: dict[str, dict[str, str]] = {}
    for path in sorted(ROOT.glob("sql/*/*.sql")):
        sql = path.read_text()
        if (created := _CREATED.search(sql)) and not created[2].startswith("_"):
            kind, name = created[1], created[2]
            entries.setdefault(kind, {})[name] = _entry(kind, name, sql)
    parts = [
        "# Reference\n",
        "Every object of schema `pgflow_worker` that is meant for users, with its COMMENT, as "
        "`make reference` writes it.\nFor Python see [Writing flows](flows.md).\n",
    ]
    for kind, chapter in CHAPTERS.items():
        if kind in entries:
            parts.append(f"## {chapter}\n")
            parts += [entries[kind][name] for name in sorted(entries[kind])]
    return "\n".join(parts)


def main() -> None:
    text = reference()
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(text)
    elif not DOCUMENT.exists() or DOCUMENT.read_text() != text:
        sys.exit("docs/reference.md is not current: run make reference")


if __name__ == "__main__":
    main()
