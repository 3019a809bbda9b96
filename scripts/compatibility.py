"""Prints what test-matrix has tested, as a table, and writes it to docs/compatibility.md.

Usage: compatibility.py ARGUMENTS [RELEASE DEBIAN_VERSION STATUS JUNIT_XML]...

ARGUMENTS are pytest's, STATUS is the exit status of `make test`. Versions are properties of the
test suite, which the tests have asked from their server.
"""

import re
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

DOCUMENT = Path(__file__).parent.parent / "docs/compatibility.md"
BEGIN, END = "<!-- make test-matrix: begin -->\n", "<!-- make test-matrix: end -->\n"
VERSIONS = ("PostgreSQL", "Python", "pg_cron", "pgmq", "pgflow")
COLUMNS = ("Debian", *VERSIONS, "tests", "passed", "failed", "skipped", "date")


def _release(row: str) -> str:
    return row.split("|")[1].split()[0]


def _natural(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _row(arguments: str, release: str, debian: str, status: int, junit: Path) -> str:
    """One environment, as a row of the table."""
    versions: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    if junit.exists():
        tree = ElementTree.parse(junit)
        for suite in tree.iter("testsuite"):
            for name in ("tests", "failures", "errors", "skipped"):
                counts[name] += int(suite.get(name, 0))
        for recorded in tree.iter("property"):
            versions.setdefault(recorded.get("name", ""), set()).add(recorded.get("value", ""))
        reasons.update(skipped.get("message", "") for skipped in tree.iter("skipped"))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    said = str(failed)
    if not counts["tests"]:
        said = "no test ran"
    elif status and not failed:
        said = "0, but `make test` failed"
    cells = (
        f"{release} ({debian})",
        *(", ".join(sorted(versions.get(name, {"-"}), key=_natural)) for name in VERSIONS),
        " ".join(re.sub(r"\btests/", "", argument) for argument in arguments.split()),
        str(passed),
        f"**{said}**" if status else said,
        "; ".join(f"{number}: {reason}" for reason, number in reasons.items()) or "0",
        f"{datetime.now(UTC):%Y-%m-%d}",
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


def _table(rows: list[str]) -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n{''.join(rows)}"


def main(arguments: str, *environments: str) -> None:
    rows = [
        _row(arguments, release, debian, int(status), Path(junit))
        for release, debian, status, junit in zip(*[iter(environments)] * 4, strict=True)
    ]
    print(_table(rows), end="")
    if re.search(r"(^|\s)-|::", arguments):
        print("A selection of tests: docs/compatibility.md stays as it is.")
        return
    before, rest = DOCUMENT.read_text().split(BEGIN)
    table, after = rest.split(END)
    # The other environments keep the rows of the last time they were tested.
    known = {_release(row): row for row in table.splitlines(keepends=True)[2:]}
    known |= {_release(row): row for row in rows}
    DOCUMENT.write_text(f"{before}{BEGIN}{_table(list(known.values()))}{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
