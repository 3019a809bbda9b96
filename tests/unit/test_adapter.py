"""PL/Python's plpy as the Database that the worker sees."""

import pytest

from pgflow_worker.adapter import PlpyDatabase
from pgflow_worker.database import Column, Statement
from pgflow_worker.errors import DatabaseError, InTransaction, QueryCanceled
from tests.unit.fakes import FakePlpy, KnownSPIError, SPIError

ONE = Statement("select $1 as n", ("integer",))


def connected(plpy: FakePlpy, *, autonomous: bool = True) -> PlpyDatabase:
    """A database on the plpy, whose events begin after what its making takes."""
    answers, plpy.answers = plpy.answers, {}
    database = PlpyDatabase(plpy, autonomous=autonomous)
    plpy.answers = answers
    plpy.events.clear()
    plpy.executed.clear()
    plpy.prepared.clear()
    return database


# Statements of ours


def test_a_plan_is_prepared_once() -> None:
    plpy = FakePlpy({"select $1": lambda n: [{"n": n}]})
    database = connected(plpy)
    assert [database.execute(ONE, n) for n in (1, 2, 3)] == [[{"n": n}] for n in (1, 2, 3)]
    assert [(plan.sql, plan.types) for plan in plpy.prepared] == [("select $1 as n", ["integer"])]
    assert plpy.executed == [("select $1 as n", [n]) for n in (1, 2, 3)]
    database.execute(Statement("select $1 as n", ("text",)), "x")
    assert len(plpy.prepared) == 2


# Errors


@pytest.mark.parametrize("sqlstate", ["23505", "40P01", "PW001", "XX000", "0A000", "ZZZZZ"])
def test_a_sqlstate_without_a_class_is_unpacked(sqlstate: str) -> None:
    database = connected(FakePlpy({"select": SPIError("no", sqlstate, "Detail.", "Hint.")}))
    with pytest.raises(DatabaseError, match="no") as caught:
        database.query("select 1", [])
    error = caught.value
    assert (error.sqlstate, error.detail, error.hint) == (sqlstate, "Detail.", "Hint.")
    assert isinstance(error.__cause__, SPIError)


def test_the_sqlstate_of_a_class_is_taken() -> None:
    error = KnownSPIError("no", "23505")
    error.spidata = None  # type: ignore[assignment]
    with pytest.raises(DatabaseError) as caught:
        connected(FakePlpy({"select": error})).query("select 1", [])
    assert (caught.value.sqlstate, caught.value.detail, caught.value.hint) == ("23505", None, None)


@pytest.mark.parametrize("error", [SPIError, KnownSPIError])
def test_a_cancel_is_no_database_error(error: type[KnownSPIError]) -> None:
    database = connected(FakePlpy({"select": error("canceling statement", "57014")}))
    with pytest.raises(QueryCanceled, match="canceling statement"):
        database.execute(ONE, 1)


def test_other_exceptions_stay_what_they_are() -> None:
    database = connected(FakePlpy({"select": TypeError("from plpy")}))
    with pytest.raises(TypeError, match="from plpy"):
        database.execute(ONE, 1)


# A handler's SQL

TYPES = {"pg_prepared_statements": [{"types": ["integer", "text"]}]}


def test_without_arguments_the_sql_is_executed_as_it_is() -> None:
    plpy = FakePlpy({"select": [{"n": 1, "day": "2024-01-01"}]}, oids=[23, 1082])
    database = connected(plpy)
    rows, columns = database.query("select 1 as n, today as day", [])
    assert rows == [{"n": 1, "day": "2024-01-01"}]
    assert columns == [Column("n", 23), Column("day", 1082)]
    assert plpy.prepared == []


def test_a_statement_without_rows_has_no_columns() -> None:
    assert connected(FakePlpy()).query("delete from t", []) == ([], [])


def test_parameter_types_are_found_once_and_the_plan_is_prepared_with_them_once() -> None:
    plpy = FakePlpy(TYPES)
    database = connected(plpy)
    for _ in range(3):
        assert database.parameter_types("select $1, $2") == ["integer", "text"]
        database.query("select $1, $2", [1, "a"])
    assert [(plan.sql, plan.types) for plan in plpy.prepared] == [
        ("select $1, $2", ["integer", "text"])
    ]
    prepares = [sql for sql, _ in plpy.executed if sql.startswith("prepare ")]
    deallocates = [sql for sql, _ in plpy.executed if sql.startswith("deallocate ")]
    assert len(prepares) == len(deallocates) == 1
    name = prepares[0].split()[1]
    assert prepares == [f"prepare {name} as select $1, $2"]
    assert deallocates == [f"deallocate {name}"]
    assert plpy.executed[-1] == ("select $1, $2", [1, "a"])


def test_types_of_a_wrong_statement_are_a_database_error_each_time() -> None:
    plpy = FakePlpy({"prepare": SPIError("syntax error", "42601")})
    database = connected(plpy)
    for _ in range(2):
        with pytest.raises(DatabaseError, match="syntax error"):
            database.parameter_types("selekt $1")


def test_a_stream_fetches_until_nothing_is_left() -> None:
    plpy = FakePlpy({"select n": [{"n": n} for n in range(5)]}, oids=[23])
    pieces = list(connected(plpy).stream("select n", [], 2))
    assert [[row["n"] for row in rows] for rows, _ in pieces] == [[0, 1], [2, 3], [4]]
    assert all(columns == [Column("n", 23)] for _, columns in pieces)


def test_a_stream_with_arguments_has_a_plan() -> None:
    plpy = FakePlpy(TYPES | {"select n": [{"n": 1}]}, oids=[23])
    database = connected(plpy)
    assert len(list(database.stream("select n where $1 = $2", [1, "a"], 10))) == 1
    assert plpy.executed[-1] == ("select n where $1 = $2", [1, "a"])
    assert plpy.prepared[-1].types == ["integer", "text"]


def test_a_streams_query_may_end_with_a_semicolon_or_a_comment() -> None:
    for sql in ("select n ;\n", "select n -- all of them"):
        plpy = FakePlpy({"select n": [{"n": 1}]}, oids=[23])
        assert len(list(connected(plpy).stream(sql, [], 10))) == 1
        probe, query = plpy.events
        assert query == sql
        assert ";" not in probe
        assert probe.splitlines()[-1].startswith(")")


def test_an_error_while_a_stream_is_opened() -> None:
    plpy = FakePlpy({"select n": SPIError("no", "42P01")})
    with pytest.raises(DatabaseError, match="no"):
        next(connected(plpy).stream("select n", [], 2))


# Transactions


def test_a_transaction_is_committed() -> None:
    plpy = FakePlpy()
    database = connected(plpy)
    with database.transaction():
        database.query("select 1", [])
    settings, *rest = plpy.events
    assert rest == ["select 1", "[commit]"]
    assert "set local search_path = pg_catalog, pg_temp" in settings
    assert "synchronous_commit" not in settings


def test_a_durable_transaction() -> None:
    plpy = FakePlpy()
    with connected(plpy).transaction(durable=True):
        pass
    assert "set local synchronous_commit = on" in plpy.events[0]
    # SET takes no snapshot, SELECT would.
    assert "select" not in plpy.events[0]


@pytest.mark.parametrize("error", [ValueError("x"), QueryCanceled("x"), SystemExit("x")])
def test_a_transaction_is_rolled_back_on_any_exception(error: BaseException) -> None:
    plpy = FakePlpy()
    database = connected(plpy)
    with pytest.raises(type(error), match="x"), database.transaction():
        raise error
    assert plpy.events[1:] == ["[rollback]"]


def test_an_sql_error_rolls_back_and_is_a_database_error() -> None:
    plpy = FakePlpy({"select 1": SPIError("no", "23505")})
    database = connected(plpy)
    with pytest.raises(DatabaseError) as caught, database.transaction():
        database.query("select 1", [])
    assert caught.value.sqlstate == "23505"
    assert plpy.events[1:] == ["select 1", "[rollback]"]


def test_an_error_of_the_commit_is_a_database_error() -> None:
    plpy = FakePlpy()
    database = connected(plpy)
    plpy.answers["[commit]"] = SPIError("deferred", "23503")
    with pytest.raises(DatabaseError) as caught, database.transaction():
        pass
    assert caught.value.sqlstate == "23503"


def test_a_subtransaction() -> None:
    plpy = FakePlpy()
    database = connected(plpy)
    with database.subtransaction():
        database.query("select 1", [])
    assert plpy.events == ["[savepoint]", "select 1", "[release]"]
    plpy.events.clear()
    with pytest.raises(ValueError, match="x"), database.subtransaction():
        raise ValueError("x")
    assert plpy.events == ["[savepoint]", "[rollback to savepoint]"]


def test_in_a_callers_transaction_nothing_is_committed() -> None:
    plpy = FakePlpy()
    database = connected(plpy, autonomous=False)
    with database.transaction(durable=True):
        database.query("select 1", [])
    with pytest.raises(ValueError, match="x"), database.transaction():
        raise ValueError("x")
    assert plpy.events[0] == "[savepoint]"
    assert plpy.events[-1] == "[rollback to savepoint]"
    assert "[release]" in plpy.events
    assert not {"[commit]", "[rollback]"} & set(plpy.events)


def test_a_callers_transaction_gets_its_search_path_back() -> None:
    plpy = FakePlpy()
    database = connected(plpy, autonomous=False)
    with database.transaction():
        pass
    paths = [args[0] for sql, args in plpy.executed if "'search_path', $1" in sql]
    assert paths[-1] == "public"


def test_a_handlers_sql_meets_the_callers_search_path() -> None:
    plpy = FakePlpy()
    database = connected(plpy)
    with database.transaction(), database.callers_settings():
        database.query("select 1", [])
    assert [args for sql, args in plpy.executed if "'search_path', $1, true" in sql] == [
        # Dates are read by Python: the session's DateStyle must not matter.
        ["public", "ISO", "1s"],
        ["pg_catalog, pg_temp", "German, DMY", "0"],
    ]


def test_where_it_cannot_commit_it_says_what_to_do() -> None:
    plpy = FakePlpy({"[commit]": SPIError("invalid transaction termination", "2D000")})
    with pytest.raises(InTransaction) as caught:
        PlpyDatabase(plpy, autonomous=True)
    assert str(caught.value) == (
        "work() cannot run inside a transaction, because it commits every task"
    )
    assert caught.value.hint is not None
    assert "select pgflow_worker.work_batch(...)" in caught.value.hint


def test_inside_a_transaction_it_does_not_try_to_commit() -> None:
    plpy = FakePlpy({"[commit]": SPIError("invalid transaction termination", "2D000")})
    PlpyDatabase(plpy, autonomous=False)
    assert "[commit]" not in plpy.events


def test_a_session_gets_its_settings_back() -> None:
    plpy = FakePlpy()
    connected(plpy).restore_session()
    [(sql, args)] = [(sql, args) for sql, args in plpy.executed if "'search_path'" in sql]
    assert "$1, false" in sql
    assert args[0] == "public"
    assert plpy.events[-1] == "[commit]"


def test_a_callers_session_is_left_alone() -> None:
    plpy = FakePlpy()
    connected(plpy, autonomous=False).restore_session()
    assert plpy.events == []
