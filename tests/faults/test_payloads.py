"""Bad values and hostile names: the task or the call fails with the cause, and the work goes on."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import connect_to, install
from tests.database.conftest import Session, counts

# What tries to leave the place it is put in: SQL, a path, the end of a line, look-alikes.
HOSTILE = (
    "'; drop table pgflow.runs; --",
    '"; drop table pgflow.runs; --',
    "$$; drop table pgflow.runs; $$",
    "%s %I %%",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "\\'; drop table pgflow.runs; --",
    "a\nb",
    "f\n",
    " f",
    "f\u200b",  # a space without width
    "\uff46",  # the wide f
    "\u0444",  # a Cyrillic letter
    "e\u0301",
    "\ufeff",
)


def errors_of(session: Session, expressions: Iterable[str], setup: str = "") -> list[str]:
    """Run a task for each Python expression, all in one call with one that works; their errors."""
    session.deploy(f"""
        from decimal import Decimal
        from functools import reduce

        {setup}
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input, tx: Transaction):
            return eval(flow_input, globals() | {{"tx": tx}})
    """)
    expressions = list(expressions)
    for expression in (*expressions, "'good'"):
        session.start("f", expression)
    assert counts(session.work("f", mode="drain")) == {"failed": len(expressions), "completed": 1}
    *failed, last = session.rows(
        "select error_message, output from pgflow.step_tasks order by message_id"
    )
    assert last == (None, "good")
    return [error for error, _ in failed]


def assert_begin(errors: list[str], beginnings: Iterable[str]) -> None:
    for error, beginning in zip(errors, beginnings, strict=True):
        assert error[: len(beginning)] == beginning


def refusal(session: Session, statement: str, *args: Any) -> Any:
    """The fields of the error that a statement ends with."""
    with pytest.raises(psycopg.Error) as caught:
        session.run(statement, *args)
    return caught.value.diag


# Numbers


def test_a_result_that_is_no_number_of_json(session: Session) -> None:
    """The attempt fails; the error names the place in the result."""
    cases = {
        "[1e400]": "$[0] is Infinity",
        "{'n': -1e400}": "$.n is -Infinity",
        "float('nan')": "$ is NaN",
        "{'n': [Decimal('Infinity')]}": "$.n[0] is Infinity",
        "Decimal('1e200000')": "$ has more digits than PostgreSQL's numeric",
    }
    errors = errors_of(session, cases)
    assert errors == [f'result of step "step": {found}' for found in cases.values()]


def test_a_number_too_large_for_a_float_in_the_runs_input(session: Session) -> None:
    """Without a fraction it arrives exactly; with one the attempt fails and shows its beginning."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input): return [n == 10 ** 400 for n in flow_input]
    """)
    session.run("select pgflow.start_flow('f', %s::jsonb)", "[1" + 400 * "0" + ".5]")
    session.run("select pgflow.start_flow('f', '[1e400, -1e400]')")
    assert counts(session.work("f")) == {"failed": 1, "completed": 1}
    assert session.rows(
        "select error_message, output from pgflow.step_tasks order by message_id"
    ) == [
        (
            f"the input cannot be read as JSON: 1{19 * '0'}... is too large a number for "
            "Python's float",
            None,
        ),
        (None, [True, False]),
    ]


def test_a_maps_element_of_5000_digits(session: Session) -> None:
    """Only the element's attempt fails; its error says which limit of Python's it is."""
    session.deploy("""
        flow = Flow("f", max_attempts=2)

        @flow.map
        def each(element): return element
    """)
    session.run("select pgflow.start_flow('f', %s::jsonb)", f"[1, {5000 * '9'}, 3]")
    session.run("select pgflow.start_flow('f', '[4]')")
    assert counts(session.work("f")) == {"completed": 3, "retried": 1}
    [(index, error)] = session.rows(
        "select task_index, error_message from pgflow.step_tasks where error_message is not null"
    )
    assert index == 1
    assert error.startswith("the input cannot be read as JSON: Exceeds the limit (4300 digits)")


def test_a_result_that_the_next_step_cannot_read(session: Session) -> None:
    """A Decimal of 5,000 digits is stored; the step that gets it fails, which the error says."""
    session.deploy("""
        from decimal import Decimal
        flow = Flow("f", max_attempts=1)

        @flow.step
        def first(): return Decimal(5000 * "9")

        @flow.step
        def second(first): pass
    """)
    session.start("f")
    assert counts(session.work("f", mode="drain")) == {"completed": 1, "failed": 1}
    error = session.value("select error_message from pgflow.step_tasks where status = 'failed'")
    assert error.startswith("the input cannot be read as JSON: Exceeds the limit (4300 digits)")


# Values for SQL


def test_a_parameter_that_sql_cannot_take(session: Session) -> None:
    """The attempt fails; the error names the parameter and what is wrong with it."""
    session.run("create type pair as (x numeric, y text)")
    # PL/Python would crash the server over the first five, and store parts of others.
    cases = {
        ("$1::numeric", "10 ** 5000"): "ValueError: $1 cannot be written: ValueError: Exceeds the",
        ("$1::int[]", "[10 ** 5000]"): "ValueError: $1 cannot be written: ValueError: Exceeds the",
        ("($1::pair).x", "{'x': 10 ** 5000}"): "ValueError: $1.x cannot be written: ValueError: ",
        ("$1::text", "Broken()"): "ValueError: $1 cannot be written: LookupError: broken",
        ("$1::text[]", "[Broken()]"): "ValueError: $1 cannot be written: LookupError: broken",
        ("$1::text", "'a\\0b'"): "ValueError: $1 has the character \\u0000, which PostgreSQL ca",
        ("$1::text[]", "['\\0']"): "ValueError: $1 has the character \\u0000, which PostgreSQL c",
        ("$1::text", "'\\ud800'"): "ValueError: $1 has half of a surrogate pair, which is no",
        ("$1::text[]", "'{a,b}'"): "TypeError: $1 is text[], not '{a,b}'",
        ("$1::bytea", "'a'"): "TypeError: $1 is bytea, not 'a'",
        ("$1::int", "1e400"): 'DatabaseError: invalid input syntax for type integer: "inf"',
        ("$1::int[]", "circle"): "RecursionError: ",
        ("$1::jsonb", "10 ** 5000"): "NotJson: $1: $ cannot be written: Exceeds the limit (4300",
        ("$1::jsonb", "[-1e400]"): "NotJson: $1: $[0] is -Infinity",
        ("$1::jsonb", "{'\\0': 1}"): 'NotJson: $1: $["\\u0000"] has the character \\u0000, which',
        ("$1::jsonb", "['\\ud800']"): "NotJson: $1: $[0] has half of a surrogate pair, which is",
        ("$1::jsonb", "{1: 2}"): "NotJson: $1: $ has the key 1, and JSON's keys are text",
        ("$1::jsonb", "circle"): "NotJson: $1: $[0] contains itself",
        ("$1::jsonb", "deep"): "NotJson: $1: $[0][0][0]",
        ("$1 || '\0'", "'a'"): "ValueError: the statement has the character \\u0000, which Post",
    }
    errors = errors_of(
        session,
        (f"tx.execute({f'select {sql}'!r}, [{value}])" for sql, value in cases),
        """
        class Broken:
            def __str__(self): raise LookupError("broken")

        circle = []
        circle.append(circle)
        deep = reduce(lambda inner, _: [inner], range(10_000), [])
        """,
    )
    assert_begin(errors, cases.values())


def test_a_column_that_python_cannot_hold(session: Session) -> None:
    """The attempt fails; the error names the column and shows the value's beginning."""
    cases = {
        "('1' || repeat('0', 400) || '.5')::jsonb": "'1000",
        "'1e400'::json": "'1e400'",
        "repeat('9', 5000)::jsonb": "'9999",
    }
    errors = errors_of(session, (f"tx.execute({f'select {sql} as v'!r})" for sql in cases))
    assert_begin(
        errors, (f'ValueError: column "v": Python has no value for {v}' for v in cases.values())
    )
    assert max(map(len, errors)) < 250


def test_a_column_nested_deeper_than_python_follows(session: Session) -> None:
    """The attempt fails: Python before 3.14 cannot read the value, later ones cannot return it."""
    (error,) = errors_of(
        session, ["tx.execute(\"select (repeat('[', 9999) || repeat(']', 9999))::jsonb as v\")"]
    )
    assert re.match(
        r"""ValueError: column "v": Python has no value for '\[\[|"""
        r"""result of step "step": \$\[0\]\.v\[0\]""",
        error,
    )
    assert len(error) < 250


# Structure


def test_a_result_that_jsonb_cannot_hold(session: Session) -> None:
    """The attempt fails; the error names the place in the result."""
    cases = {
        "circle": "$[0].x contains itself",
        "{'\\ud800': 1}": '$["\\ud800"] has half of a surrogate pair, which is no character',
        "{'a': {'\\0': 1}}": '$.a["\\u0000"] has the character \\u0000, which PostgreSQL cannot',
        "['\\ud800']": "$[0] has half of a surrogate pair, which is no character",
        "{('a',): 1}": "$ has the key ('a',), and JSON's keys are text",
        "reduce(lambda inner, _: [inner], range(10_000), [])": "$[0][0][0]",
        "[0] * (2 ** 24 + 1)": "$ has 16777217 elements, the limit is 16777216",
    }
    errors = errors_of(session, cases, "circle = []\n        circle.append({'x': circle})")
    assert_begin(errors, (f'result of step "step": {found}' for found in cases.values()))


def test_a_log_line_that_postgresql_cannot_store(session: Session) -> None:
    """The line is kept with escapes in place of what cannot be stored."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(ctx: Context):
            ctx.log.info("one \\0 %s", "\\ud800")
            ctx.log.info("%d", "two")
            ctx.log.info({"three": "\\0"})
    """)
    session.start("f")
    assert counts(session.work("f")) == {"completed": 1}
    log = session.value("select log from pgflow_worker.attempts")
    lines = [line.partition("INFO ")[2] for line in log.splitlines()]
    assert lines == [
        "one \\0 \\ud800",
        "%d (TypeError: %d format: a real number is required, not str)",
        "{'three': '\\x00'}",
    ]


def test_a_database_that_cannot_hold_every_character(
    server: PostgreSQLExecutor, migrations: Path
) -> None:
    """PW004 says which encoding is needed, when the first module is deployed."""
    with connect_to(server, "postgres") as connection:
        connection.execute("create database latin1 template template0 encoding latin1 locale 'C'")
        try:
            install(server, "latin1", migrations)
            with connect_to(server, "latin1") as inside:
                diag = refusal(Session(inside), "select pgflow_worker.deploy('m', 'x = 1')")
        finally:
            connection.execute("drop database latin1 with (force)")
    assert (diag.sqlstate, diag.message_primary) == (
        "PW004",
        "the encoding of this database is LATIN1, not UTF8",
    )
    assert "encoding 'UTF8'" in diag.message_hint


# Size


def test_a_text_of_50_megabytes(session: Session) -> None:
    """It goes through input and result; of an error and a log what is longer is cut off."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input, ctx: Context):
            ctx.log.info(flow_input)
            if flow_input == "fail":
                ctx.log.info(50_000_000 * "l")
                raise ValueError(50_000_000 * "e")
            return flow_input
    """)
    session.run("set default_toast_compression = 'lz4'")  # only to be quicker
    session.run("select pgflow.start_flow('f', to_jsonb(repeat('x', 50000000)))")
    session.start("f", "fail")
    session.start("f", "good")
    assert counts(session.work("f")) == {"completed": 2, "failed": 1}
    assert session.rows(
        """select length(output #>> '{}'), length(error_message), length(attempt.log)
        from pgflow.step_tasks join pgflow_worker.attempts as attempt using (run_id)
        order by message_id"""
    ) == [(50_000_000, None, 10_000), (None, 1_031, 10_024), (4, None, 33)]


def test_a_result_of_200_megabytes(session: Session) -> None:
    """It is stored. The worker needs sixteen times the memory for a moment."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input): return flow_input * "x"
    """)
    session.run("set default_toast_compression = 'lz4'")  # only to be quicker
    session.start("f", 200_000_000)
    assert counts(session.work("f")) == {"completed": 1}
    assert session.value("select length(output #>> '{}') from pgflow.step_tasks") == 200_000_000
    session.start("f", 4)
    assert counts(session.work("f")) == {"completed": 1}


def test_dependencies_that_are_too_large_together(session: Session) -> None:
    """The task that would get them fails and says why; the flow's other tasks run."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def one(): return 1

        @flow.step
        def two(): return 2

        @flow.step
        def both(one, two): pass
    """)
    session.start("f")
    assert counts(session.work("f")) == {"completed": 2}
    session.run("""update pgflow.step_tasks set output = to_jsonb(repeat('x', 140000000))
        where step_slug in ('one', 'two')""")
    session.start("f")
    assert counts(session.work("f", mode="drain")) == {"failed": 1, "completed": 3}
    error = session.value("select error_message from pgflow.step_tasks where status = 'failed'")
    assert "total size of jsonb object elements exceeds the maximum" in error


# Names and texts that try to be something else


def test_a_hostile_module_name(session: Session) -> None:
    """PW007 says what a module's name looks like."""
    for name in HOSTILE:
        diag = refusal(session, "select pgflow_worker.deploy(%s, 'x = 1')", name)
        assert (diag.sqlstate, diag.message_primary) == (
            "PW007",
            f'"{name}" is not a name for a module',
        )
        assert diag.message_hint
        diag = refusal(session, "select pgflow_worker.undeploy(%s)", name)
        assert (diag.sqlstate, diag.message_primary) == (
            "PW007",
            f'module "{name}" is not deployed',
        )
    assert session.value("select count(*) from pgflow_worker.modules") == 0


def test_a_module_name_without_end(session: Session) -> None:
    """PW007 shows its beginning and the limit."""
    diag = refusal(session, "select pgflow_worker.deploy(%s, 'x = 1')", 100_000 * "a1_")
    assert diag.sqlstate == "PW007"
    assert diag.message_primary.endswith("has 300000 characters, the limit is 200")
    assert len(diag.message_primary) < 150
    assert diag.message_hint


@pytest.mark.parametrize("of", ["flow", "step"])
def test_a_hostile_slug_in_a_module(session: Session, of: str) -> None:
    """PW006 names the slug and says what a slug looks like; nothing is stored."""
    for slug in (*HOSTILE, "run", 1_000 * "a"):
        flow, step = (slug, "step") if of == "flow" else ("f", slug)
        source = (
            "from pgflow_worker import Flow\n"
            f"flow = Flow({flow!r})\n@flow.step({step!r})\ndef handler(): pass\n"
        )
        diag = refusal(session, "select pgflow_worker.deploy('m', %s)", source)
        assert diag.sqlstate == "PW006"
        assert diag.message_primary.startswith(f'flow "{flow}"')
        assert f'"{slug}"' in diag.message_primary
        assert "slug" in diag.message_primary.partition(f'"{slug}"')[2]
    assert session.value("select count(*) from pgflow_worker.modules") == 0
    assert session.value("select count(*) from pgflow.flows") == 0


def test_a_hostile_flow_slug_in_a_call(session: Session) -> None:
    """PW001 repeats it and names the flows that are there."""
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(): pass\n')
    session.start("f")
    for slug in (*HOSTILE, "F", "run", 10_000 * "a"):
        for statement in (
            "call pgflow_worker.work(%s)",
            "select pgflow_worker.work_batch(%s)",
            "select pgflow_worker.pause(%s)",
            "select pgflow_worker.resume(%s)",
        ):
            diag = refusal(session, statement, slug)
            assert (diag.sqlstate, diag.message_primary) == (
                "PW001",
                f'flow "{slug}" is not deployed',
            )
            assert diag.message_hint.startswith("Deployed flows: f.")
    assert counts(session.work("f")) == {"completed": 1}


def test_a_hostile_pause_reason(session: Session) -> None:
    """The report's note has it letter by letter."""
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(): pass\n')
    session.start("f")
    for reason in (*HOSTILE, 1_000_000 * "x"):
        session.run("select pgflow_worker.pause('f', %s)", reason)
        report = session.work("f")
        assert (report["status"], report["notes"]) == ("paused", [reason])
    session.run("select pgflow_worker.resume('f')")
    assert counts(session.work("f")) == {"completed": 1}


def test_a_hostile_environment(session: Session) -> None:
    """PW008 says that it is no virtual environment."""
    for path in (*HOSTILE, *(f"/{name}" for name in HOSTILE), "/" + 100_000 * "a/.."):
        diag = refusal(session, "select pgflow_worker.set_environment(%s)", path)
        assert diag.sqlstate == "PW008"
        assert f'"{path}" is not a' in diag.message_primary
        assert diag.message_hint
    assert session.value("select count(*) from pgflow_worker.settings") == 0


def test_values_that_are_sql(session: Session) -> None:
    """As input, key, result, parameter, log line and error they stay the text they are."""
    session.run("create table written (id serial, value text)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.map
        def each(element, tx: Transaction, ctx: Context):
            ctx.log.info(element)
            tx.execute("insert into written (value) values ($1)", [element])
            return {element: element}

        @flow.step
        def all(each): return each

        bad = Flow("bad", max_attempts=1)

        @bad.step
        def fail(flow_input, ctx: Context):
            ctx.log.info(flow_input)
            raise Fail(flow_input)
    """)
    session.start("f", HOSTILE)
    for text in HOSTILE:
        session.start("bad", text)
    assert counts(session.work("f", mode="drain")) == {"completed": len(HOSTILE) + 1}
    assert session.rows("select value from written order by id") == [(text,) for text in HOSTILE]
    assert session.value("select output -> 'all' from pgflow.runs where flow_slug = 'f'") == [
        {text: text} for text in HOSTILE
    ]
    assert counts(session.work("bad", mode="drain")) == {"failed": len(HOSTILE)}
    errors = session.rows(
        """select error, log from pgflow_worker.attempts where outcome = 'failed'
        order by attempt_id"""
    )
    for text, (error, log) in zip(HOSTILE, errors, strict=True):
        assert error.startswith(f"{text} (flows_of_test.py:")
        assert log.endswith(f" INFO {text}")


@pytest.mark.parametrize("argument", ["mode", "batch_size", "max_duration"])
def test_a_hostile_argument_of_work(session: Session, argument: str) -> None:
    """PW002 for the mode; what is no number or interval PostgreSQL refuses itself."""
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(): pass\n')
    for text in HOSTILE:
        diag = refusal(session, f"call pgflow_worker.work('f', {argument} => %s)", text)
        if argument == "mode":
            assert (diag.sqlstate, diag.message_primary) == ("PW002", f'unknown mode "{text}"')
        else:
            assert diag.sqlstate in ("22P02", "22007")


def test_no_json_in_a_runs_input(session: Session) -> None:
    """pgflow refuses it before there is a run."""
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(): pass\n')
    for text in ("NaN", '{"n": Infinity}', '"\\u0000"', '"\\ud800"', "[1e200000]"):
        with pytest.raises(psycopg.DataError):
            session.run("select pgflow.start_flow('f', %s::jsonb)", text)
    with pytest.raises(psycopg.DataError):
        session.start("f", "\0")
    assert session.value("select count(*) from pgflow.runs") == 0
