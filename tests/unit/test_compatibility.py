"""The table of what `make test-matrix` has tested."""

from pathlib import Path

import pytest

from scripts import compatibility

JUNIT = """<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"><properties>
<property name="PostgreSQL" value="17.6"/><property name="pgflow" value="0.8.1"/>
<property name="pgflow" value="0.10.0"/><property name="pgflow" value="0.8.1"/></properties>
<testcase><skipped message="too old"/></testcase><testcase><skipped message="too old"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "compatibility.md"
    known = "".join(f"| {name} (1) | - | 2020-01-01 |\n" for name in ("bookworm", "trixie"))
    path.write_text(
        f"before\n{compatibility.BEGIN}| Debian |\n|---|\n{known}{compatibility.END}after\n"
    )
    monkeypatch.setattr(compatibility, "DOCUMENT", path)
    return path


@pytest.fixture
def junit(tmp_path: Path) -> str:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    return str(path)


def rows(document: Path) -> list[list[str]]:
    lines = document.read_text().splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "(" in line]


def test_a_row_has_versions_and_counts_and_replaces_the_releases_last_one(
    document: Path, junit: str
) -> None:
    compatibility.main("tests/database tests/cron", "trixie", "13.2", "2", junit)
    assert [row[0] for row in rows(document)] == ["bookworm (1)", "trixie (13.2)"]
    assert rows(document)[1][1:-1] == [
        *("17.6", "-", "-", "-", "0.8.1, 0.10.0"),
        *("database cron", "5", "**2**", "2: too old"),
    ]
    assert document.read_text().startswith("before\n")
    assert document.read_text().endswith("after\n")


def test_an_environment_without_tests_has_failed(document: Path, tmp_path: Path) -> None:
    compatibility.main("tests", "sid", "sid", "2", str(tmp_path / "missing.xml"))
    assert rows(document)[2][8] == "**no test ran**"


@pytest.mark.parametrize("arguments", ["tests/database -k rescue", "tests/test_x.py::test_y"])
def test_a_selection_of_tests_is_not_written(document: Path, junit: str, arguments: str) -> None:
    before = document.read_text()
    compatibility.main(arguments, "trixie", "13.2", "0", junit)
    assert document.read_text() == before
