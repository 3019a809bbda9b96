"""`tx`: exactly once, parameter types, conversions."""

from typing import Any

import pytest

from tests.database.conftest import Session, counts


def result_of(session: Session, body: str) -> Any:
    """What a handler with `tx` and this body returns."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    session.deploy(
        "import datetime, decimal, uuid\n"
        'flow = Flow("f", max_attempts=1)\n'
        f"@flow.step\ndef step(flow_input, tx: Transaction, ctx: Context):\n{lines}\n"
    )
    session.start("f")
    report = session.work("f")
    assert counts(report) == {"completed": 1}, session.rows(
        "select error_message from pgflow.step_tasks"
    )
    return session.value("select output from pgflow.step_tasks")


def test_sql_and_completion_are_committed_together(session: Session) -> None:
    session.run("create table written (id int, xid xid8 default pg_current_xact_id())")
    session.run("create table completed (xid xid8)")
    session.run("""
        create function note() returns trigger language plpgsql as $$
        begin
            insert into public.completed values (pg_current_xact_id());
            return null;
        end $$;
        create trigger note after update on pgflow.step_tasks for each row
        when (new.status = 'completed') execute function note();
    """)
    result_of(session, 'tx.execute("insert into written values (1)")')
    # The subtransaction's own id is not what counts: pg_current_xact_id() is the transaction's.
    assert session.rows("select id, xid::text from written") == [
        (1, session.value("select xid::text from completed"))
    ]


def test_a_handler_that_fails_leaves_no_row_and_its_retry_one(session: Session) -> None:
    session.run("create table written (attempt int)")
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def step(tx: Transaction, ctx: Context):
            tx.execute("insert into written values ($1)", [ctx.attempt])
            if ctx.attempt == 1:
                raise ValueError("after the insert")
    """)
    session.start("f")
    assert counts(session.work_batch("f")) == {"retried": 1}
    assert session.rows("select attempt from written") == []
    assert counts(session.work_batch("f", ignore_delay=True)) == {"completed": 1}
    assert session.rows("select attempt from written") == [(2,)]


def test_a_result_that_is_no_json_leaves_no_row(session: Session) -> None:
    session.run("create table written (id int)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("insert into written values (1)")
            return {"items": [1, {"score": float("nan")}]}
    """)
    session.start("f")
    assert counts(session.work("f")) == {"failed": 1}
    assert session.rows("select error_message from pgflow.step_tasks") == [
        ('result of step "step": $.items[1].score is NaN',)
    ]
    assert session.rows("select id from written") == []


def test_an_error_can_be_caught_and_the_transaction_goes_on(session: Session) -> None:
    session.run("create table written (id int primary key)")
    states = result_of(
        session,
        """states = []
for statement in ("insert into written values (1)",) * 2 + ("select 1/0", "selekt", "commit"):
    try:
        tx.execute(statement)
    except DatabaseError as error:
        states.append([error.sqlstate, str(error)])
return states""",
    )
    assert states == [
        ["23505", 'duplicate key value violates unique constraint "written_pkey"'],
        ["22012", "division by zero"],
        ["42601", 'syntax error at or near "selekt"'],
        ["2D000", "a handler cannot commit or roll back"],
    ]
    assert session.rows("select id from written") == [(1,)]


def test_an_error_with_a_state_of_ones_own(session: Session) -> None:
    assert result_of(
        session,
        """try:
    tx.execute("do $$ begin raise exception using errcode='AB12Z', message='m', hint='h'; end $$")
except DatabaseError as error:
    return [error.sqlstate, str(error), error.hint]""",
    ) == ["AB12Z", "m", "h"]


@pytest.mark.parametrize(
    ("sql_type", "value", "expected"),
    [
        ("jsonb", '{"a": [1, None, "x"]}', {"a": [1, None, "x"]}),
        ("jsonb", '"text"', "text"),
        ("jsonb", "False", False),
        ("json", "[1, 2]", [1, 2]),
        ("jsonb[]", '[{"a": 1}, [2]]', [{"a": 1}, [2]]),
        ("text[]", '["a", "b c", None]', ["a", "b c", None]),
        ("int[]", "[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("boolean", "True", True),
        ("numeric", 'decimal.Decimal("12345678901234567890.5")', 12345678901234567890.5),
        ("timestamptz", "datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)", None),
        ("date", "datetime.date(2026, 1, 2)", "2026-01-02"),
        (
            "interval",
            "datetime.timedelta(days=-1, hours=2)",
            "-1 days +02:00:00",
        ),
        ("uuid", 'uuid.UUID("0123456789abcdef0123456789abcdef")', None),
        ("text", "None", None),
    ],
)
def test_values_cross_in_both_directions(
    session: Session, sql_type: str, value: str, expected: object
) -> None:
    output = result_of(
        session,
        f"""value = {value}
[row] = tx.execute("select $1::{sql_type} as v, pg_typeof($1::{sql_type})::text as t", [value])
same = row["v"] == value and type(row["v"]) is type(value)
return [same, row["v"]]""",
    )
    same, arrived = output
    assert same or sql_type == "interval"
    if expected is not None:
        assert arrived == expected


def test_types_are_found_in_statements(session: Session) -> None:
    session.run("create table t (id int, doc jsonb, day date)")
    assert result_of(
        session,
        """tx.execute("insert into t values ($1, $2, $3)", [1, {"a": 1}, datetime.date(2026, 1, 2)])
tx.execute("insert into t values ($1, $2, $3)", ["2", "text", "2026-01-03"])
rows = tx.execute("select * from t where id = any($1) order by id", [[1, 2]])
return [[type(v).__name__ for v in row.values()] for row in rows]""",
    ) == [["int", "dict", "date"], ["int", "str", "date"]]


def test_dates_arrive_whatever_the_datestyle_is(session: Session) -> None:
    session.run("set datestyle = 'German'")
    output = result_of(
        session,
        """[row] = tx.execute("select date '2026-01-02' as d, '2026-01-02 03:04+00'::timestamptz t")
return [row["d"].isoformat(), row["t"].timestamp()]""",
    )
    assert output == ["2026-01-02", 1767323040]
    assert session.value("show datestyle") == "German, DMY"


def test_a_large_result_can_be_streamed(session: Session) -> None:
    assert (
        result_of(
            session,
            """total = 0
for row in tx.stream("select n from generate_series(1, $1) as n", [2500], size=1000):
    total += row["n"]
return total""",
        )
        == 2500 * 2501 // 2
    )


def test_several_statements_with_arguments_run_once(session: Session) -> None:
    session.run("create table written (id int)")
    result_of(
        session,
        """tx.execute("insert into written values ($1); insert into written values (2)", [1])""",
    )
    assert session.rows("select id from written order by 1") == [(1,), (2,)]


def test_statements_without_rows_return_none(session: Session) -> None:
    assert result_of(
        session,
        """return [
    tx.execute("create temp table t (id int) on commit drop"),
    tx.execute("insert into t values (1)"),
    tx.execute("select id from t where false"),
    tx.execute("insert into t values (2) returning id"),
]""",
    ) == [[], [], [], [{"id": 2}]]
