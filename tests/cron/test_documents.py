"""The SQL that the documents show runs: each document's from top to bottom, in one psql."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import CRON_DATABASE, ROOT, connect_to

NEW_RUN = """select pgflow.start_flow('greet', '{"names": ["Ada"]}') \\g /dev/null
select run_id as run from pgflow.runs order by started_at desc limit 1 \\gset
"""
# What happens around a reader before a statement.
BEFORE = {
    r"wait_for_run\(:'run'\)": "call pgflow_worker.work('greet', mode => 'drain');",
    r"wait_for_run\(:'run', ": f"select pgflow_worker.pause('greet');\n{NEW_RUN}",
    r"restart_run\(": "select pgflow_worker.cancel_run(:'run') \\g /dev/null",
    r"run_timeline\(:'run'\)|run_diagram\(": NEW_RUN,
    r"work\('greet'\)": "select pgflow_worker.resume('greet');",
}
FAILS = {
    r"wait_for_run\(:'run', ": "has not ended after",
    r"vault\.create_secret": 'schema "vault" does not exist',
}
SQL = re.compile(r"(select|call|table|create|insert|alter|grant|\\p?set)\b", re.IGNORECASE)
UUID = r"'[0-9a-f]{8}-[0-9a-f-]{27}'"


def statements(markdown: str) -> Iterator[str]:
    """What a document lets its reader type into psql."""
    for token in MarkdownIt().parse(markdown):
        if token.type not in ("fence", "code_block"):
            continue
        text = token.content
        if "=# " in text:
            # A session of psql's, with its prompts and answers.
            found = re.findall(r"(?m)^\w+=# (.*(?:\n\w+-# .*)*)", text)
            yield from (re.sub(r"\n\w+-# ", "\n", statement) for statement in found)
        elif token.info == "sql" or (not token.info and SQL.match(text)):
            yield from split(text)
        elif shell := re.search(r'(?m)^psql .*-c "(.*)"$', text):
            yield shell[1]


def split(text: str) -> Iterator[str]:
    """The statements of a block, without the answer that may be shown below the last one."""
    lines: list[str] = []
    for line in text.splitlines():
        lines.append(line)
        if re.search(r";\s*(--.*)?$|\\", line):
            yield "\n".join(lines).strip()
            lines = []
    yield "\n".join(lines).strip()


def script(statements: list[str], filled_in: dict[str, str]) -> str:
    """The statements as a script that tells psql's errors apart."""
    lines = [NEW_RUN]
    if not any("create table greetings" in statement for statement in statements):
        lines.insert(0, "create table greetings (text text);")
    for number, statement in enumerate(statements):
        for of_reader, ours in filled_in.items():
            statement = re.sub(of_reader, ours.replace("\\", r"\\"), statement)
        lines += [before for pattern, before in BEFORE.items() if re.search(pattern, statement)]
        statement = re.sub(r"(?m)\s+-- .*$", "", statement).rstrip()
        is_ended = statement.endswith(";") or "\\" in statement
        lines += [f"\\warn @@{number}", statement + ("" if is_ended else ";")]
    return "\n".join(lines) + "\n"


@pytest.fixture
def psql(libpq: PostgreSQLExecutor, tmp_path: Path) -> Iterator[list[str]]:
    """psql where README's first flow is deployed, in pg_cron's database."""
    readme = (ROOT / "README.md").read_text()
    [greet] = re.findall(r"Save this as `greet.py`:\n\n```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "greet.py").write_text(greet)
    with connect_to(libpq, CRON_DATABASE) as connection:
        connection.execute("select pgflow_worker.deploy('greet', %s)", [greet])
        connection.execute("create role ops login")
        try:
            yield [
                str(Path(libpq.executable).parent / "psql"),
                *("-X", "-h", libpq.host, "-p", str(libpq.port), "-U", libpq.user),
                *("-d", CRON_DATABASE),
            ]
        finally:
            connection.execute(f"""
                select cron.unschedule(jobid) from cron.job;
                drop table if exists greetings;
                drop owned by ops;
                drop role ops;
                select pgflow_worker.set_environment(null);
                truncate pgflow_worker.settings, pgflow_worker.pauses, pgflow_worker.attempts,
                    pgflow_worker.invocations, pgflow.runs cascade;
                select pgflow_worker.undeploy(module) from pgflow_worker.modules
                where current and module = 'greet';
                alter database {CRON_DATABASE} reset pgflow.notify
            """)


@pytest.fixture
def has_seconds(libpq: PostgreSQLExecutor) -> bool:
    """Whether pg_cron knows schedules in seconds."""
    with connect_to(libpq, CRON_DATABASE) as connection:
        [[has]] = connection.execute("select pgflow_worker._cron_has_seconds()").fetchall()
    return bool(has)


@pytest.mark.parametrize(
    ("document", "least"),
    [("README.md", 20), ("docs/operating.md", 20), ("docs/flows.md", 3), ("docs/security.md", 3)],
)
def test_what_a_document_shows_can_be_typed(
    psql: list[str], has_seconds: bool, tmp_path: Path, document: str, least: int
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir(mode=0o700)
    shown = list(filter(SQL.match, statements((ROOT / document).read_text())))
    assert len(shown) >= least
    filled_in = {
        r"\bmydb\b": CRON_DATABASE,
        "/srv/flows/venv": sys.prefix,
        "/etc/pgflow_worker/secrets": str(secrets),
        f"'<run_id>'|{UUID}": ":'run'",
        r"work\(flow_slug, ": "work('greet', ",
        r" \\watch 2$": ";",
    }
    if not has_seconds:
        filled_in["'5 seconds'"] = "'* * * * *'"
    done = subprocess.run(
        psql,
        input=script(shown, filled_in),
        cwd=tmp_path,
        env=os.environ | {"PSQL_PAGER": "", "PAGER": ""},
        capture_output=True,
        text=True,
    )
    errors: dict[str, str] = {}
    for number, said in re.findall(r"@@(\d+)\n(.*?)(?=@@|\Z)", done.stderr, re.DOTALL):
        statement = shown[int(number)]
        expected = [text for pattern, text in FAILS.items() if re.search(pattern, statement)]
        has_failed = "ERROR:" in said or "\\" in said
        if has_failed != bool(expected) or not all(text in said for text in expected):
            errors[statement] = said
    assert errors == {}
