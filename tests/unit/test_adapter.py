"""PL/Python's plpy as the Database that the worker sees."""

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import pytest

from pgflow_worker import adapter, definition, pgflow, registry
from pgflow_worker.adapter import AutonomousDatabase, JoinedDatabase, PlpyDatabase
from pgflow_worker.database import Column, Row, Statement
from pgflow_worker.errors import DatabaseError, InTransaction, QueryCanceled
from pgflow_worker.process import Process
from tests.unit.fakes import SESSION, FakePlpy, KnownSPIError, SPIError

ONE = Statement("select $1 as n", ("integer",))
D = TypeVar("D", bound=PlpyDatabase)


def made(kind: type[D], plpy: FakePlpy) -> D:
    """A database on the plpy, whose events begin after what its making takes."""
    answers, plpy.answers = plpy.answers, {}
    database = kind(plpy)
    plpy.answers = answers
    plpy.events.clear()
    plpy.executed.clear()
    plpy.prepared.clear()
    return database


def autonomous(plpy: FakePlpy) -> AutonomousDatabase:
    return made(AutonomousDatabase, plpy)


def joined(plpy: FakePlpy) -> JoinedDatabase:
    return made(JoinedDatabase, plpy)


def ready(plpy: FakePlpy) -> AutonomousDatabase:
    """The same, once it has learned what handlers may change."""
    database = autonomous(plpy)
    answers, plpy.answers = plpy.answers, {}
    with database.handlers_transaction():
        pass
    plpy.answers = answers
    plpy.events.clear()
    plpy.executed.clear()
    return database


def settings_given(plpy: FakePlpy, *, local: bool) -> list[str]:
    """search_path, lock_timeout, isolation, DateStyle and synchronous_commit, each time."""
    return [
        ", ".join(str(value) for value in args[:-1])
        for sql, args in plpy.executed
        if "pg_catalog.set_config(" in sql and args[-1] is local
    ]


CALLERS = "public, 1s, serializable, German, DMY, off"


# Statements of ours


def test_a_plan_is_prepared_once() -> None:
    plpy = FakePlpy({"select $1": lambda n: [{"n": n}]})
    database = autonomous(plpy)
    assert [database.execute(ONE, n) for n in (1, 2, 3)] == [[{"n": n}] for n in (1, 2, 3)]
    assert [(plan.sql, plan.types) for plan in plpy.prepared] == [("select $1 as n", ["integer"])]
    assert plpy.executed == [("select $1 as n", [n]) for n in (1, 2, 3)]


def test_statements_of_ours_differ_by_their_sql_which_names_the_plan() -> None:
    types: dict[str, tuple[str, ...]] = {}
    for module in (adapter, definition, pgflow, registry):
        for statement in vars(module).values():
            if isinstance(statement, Statement):
                assert types.setdefault(statement.sql, statement.types) == statement.types
    assert len(types) > 20


# Errors


@pytest.mark.parametrize("sqlstate", ["23505", "40P01", "PW001", "XX000", "0A000", "ZZZZZ"])
def test_a_sqlstate_without_a_class_is_unpacked(sqlstate: str) -> None:
    database = autonomous(FakePlpy({"select": SPIError("no", sqlstate, "Detail.", "Hint.")}))
    with pytest.raises(DatabaseError, match="no") as caught:
        database.query("select 1", [])
    error = caught.value
    assert (error.sqlstate, error.detail, error.hint) == (sqlstate, "Detail.", "Hint.")
    assert isinstance(error.__cause__, SPIError)


def test_the_sqlstate_of_a_class_is_taken() -> None:
    error = KnownSPIError("no", "23505")
    error.spidata = None  # type: ignore[assignment]
    with pytest.raises(DatabaseError) as caught:
        autonomous(FakePlpy({"select": error})).query("select 1", [])
    assert (caught.value.sqlstate, caught.value.detail, caught.value.hint) == ("23505", None, None)


@pytest.mark.parametrize("error", [SPIError, KnownSPIError])
def test_a_cancel_is_no_database_error(error: type[KnownSPIError]) -> None:
    database = autonomous(FakePlpy({"select": error("canceling statement", "57014")}))
    with pytest.raises(QueryCanceled, match="canceling statement"):
        database.execute(ONE, 1)


def test_other_exceptions_stay_what_they_are() -> None:
    database = autonomous(FakePlpy({"select": TypeError("from plpy")}))
    with pytest.raises(TypeError, match="from plpy"):
        database.execute(ONE, 1)


# A handler's SQL

TYPES = {"pg_prepared_statements": [{"types": ["integer", "text"]}]}


def test_without_arguments_the_sql_is_executed_as_it_is() -> None:
    plpy = FakePlpy({"select": [{"n": 1, "day": "2024-01-01"}]}, oids=[23, 1082])
    database = autonomous(plpy)
    rows, columns = database.query("select 1 as n, today as day", [])
    assert rows == [{"n": 1, "day": "2024-01-01"}]
    assert columns == [Column("n", 23), Column("day", 1082)]
    assert plpy.prepared == []


def test_a_statement_without_rows_has_no_columns() -> None:
    assert autonomous(FakePlpy()).query("delete from t", []) == ([], [])


def test_parameter_types_are_found_once_and_the_plan_is_prepared_with_them_once() -> None:
    plpy = FakePlpy(TYPES)
    database = autonomous(plpy)
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
    database = autonomous(plpy)
    for _ in range(2):
        with pytest.raises(DatabaseError, match="syntax error"):
            database.parameter_types("selekt $1")


def test_a_stream_fetches_until_nothing_is_left() -> None:
    plpy = FakePlpy({"select n": [{"n": n} for n in range(5)]}, oids=[23])
    pieces = list(autonomous(plpy).stream("select n", [], 2))
    assert [[row["n"] for row in rows] for rows, _ in pieces] == [[0, 1], [2, 3], [4]]
    assert all(columns == [Column("n", 23)] for _, columns in pieces)


def test_a_stream_with_arguments_has_a_plan() -> None:
    plpy = FakePlpy(TYPES | {"select n": [{"n": 1}]}, oids=[23])
    database = autonomous(plpy)
    assert len(list(database.stream("select n where $1 = $2", [1, "a"], 10))) == 1
    assert plpy.executed[-1] == ("select n where $1 = $2", [1, "a"])
    assert plpy.prepared[-1].types == ["integer", "text"]


def test_a_streams_query_may_end_with_a_semicolon_or_a_comment() -> None:
    for sql in ("select n ;\n", "select n -- all of them"):
        plpy = FakePlpy({"select n": [{"n": 1}]}, oids=[23])
        assert len(list(autonomous(plpy).stream(sql, [], 10))) == 1
        probe, query = plpy.events
        assert query == sql
        assert ";" not in probe
        assert probe.splitlines()[-1].startswith(")")


def test_an_error_while_a_stream_is_opened() -> None:
    plpy = FakePlpy({"select n": SPIError("no", "42P01")})
    with pytest.raises(DatabaseError, match="no"):
        next(autonomous(plpy).stream("select n", [], 2))


# Time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock tells, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(adapter, "perf_counter", lambda: now[0])
    return now


def test_time_in_sql_is_measured(clock: list[float]) -> None:
    def taking(seconds: float) -> list[Row]:
        clock[0] += seconds
        return []

    answers = {"select 1": lambda: taking(1), "[commit]": lambda: taking(2)}
    database = autonomous(FakePlpy(answers))
    with database.transaction():
        database.query("select 1", [])
        clock[0] += 50
    assert database.seconds_in_sql == 3


def test_time_in_sql_that_fails_is_measured_too(clock: list[float]) -> None:
    def failing() -> list[Row]:
        clock[0] += 1
        raise SPIError("no", "23505")

    database = autonomous(FakePlpy({"select 1": failing}))
    for _ in range(2):
        with pytest.raises(DatabaseError):
            database.query("select 1", [])
        clock[0] += 50
    assert database.seconds_in_sql == 2


def test_time_to_find_a_statements_types_counts_once(clock: list[float]) -> None:
    def finding() -> list[Row]:
        clock[0] += 1
        return [{"types": ["integer"]}]

    database = autonomous(FakePlpy({"pg_prepared_statements": finding}))
    database.query("select $1", [1])
    assert database.seconds_in_sql == clock[0] - 100 > 0


def test_time_in_sql_that_is_not_over_counts_already(clock: list[float]) -> None:
    seen: list[float] = []

    def looking() -> list[Row]:
        clock[0] += 1
        seen.append(database.seconds_in_sql)
        return []

    database = autonomous(FakePlpy({"select 1": looking}))
    database.query("select 1", [])
    database.query("select 1", [])
    assert seen == [1, 2]


def test_a_streams_time_is_that_of_its_fetches(clock: list[float]) -> None:
    def fetching() -> list[Row]:
        clock[0] += 1
        return [{"n": n} for n in range(3)]

    database = autonomous(FakePlpy({"select n": fetching}, oids=[23]))
    for _ in database.stream("select n", [], 1):
        clock[0] += 50
    assert database.seconds_in_sql == 2  # the query that tells the types, and the cursor


# What the process is told

SIGNAL = signal.SIGRTMIN


def is_blocked() -> bool:
    return SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("kind", [AutonomousDatabase, JoinedDatabase])
@pytest.mark.parametrize("fails", [False, True])
def test_in_sql_a_handler_is_left_alone(
    process: Process, kind: type[PlpyDatabase], fails: bool
) -> None:
    looks: list[str] = []

    def answer(*_: object) -> list[Row]:
        assert is_blocked()
        looks.append("in SQL")
        if fails:
            raise SPIError("no", "23505")
        return [{"n": 1, "types": ["integer"]}]

    plpy = FakePlpy(dict.fromkeys(("select 1", "select $1", "pg_prepared", "analyze"), answer))
    plpy.oids = [23, 1009]
    database = kind(plpy, process)
    uses: list[Callable[[], object]] = [
        lambda: database.execute(ONE, 1),
        lambda: database.query("select 1", []),
        lambda: database.query("select $1", [1]),
        lambda: list(database.stream("select 1", [], 10)),
        lambda: database.run("analyze"),
        lambda: database.parameter_types("select $1 + 1"),
    ]

    def handler() -> None:
        for use in uses:
            looks.clear()
            if fails:
                with pytest.raises(DatabaseError):
                    use()
            else:
                use()
            assert looks
            assert not is_blocked()

    process.call(handler, 60, runs_sql=True)
    assert is_blocked()


def test_interrupts_are_looked_at_in_sql() -> None:
    plpy = FakePlpy({"pg_sleep(0)": SPIError("canceling statement", "57014")})
    with pytest.raises(QueryCanceled):
        autonomous(plpy).check_interrupts()


def test_temporary_objects_are_dropped_in_a_transaction() -> None:
    plpy = FakePlpy()
    autonomous(plpy).discard_temporary()
    assert plpy.events[1:] == ["discard temp", "[commit]"]


# Transactions that are committed


def test_a_transaction_is_committed() -> None:
    plpy = FakePlpy()
    database = autonomous(plpy)
    with database.transaction():
        database.query("select 1", [])
    settings, *rest = plpy.events
    assert rest == ["select 1", "[commit]"]
    assert "set local search_path = pg_catalog, pg_temp" in settings
    assert "set local lock_timeout = 0" in settings
    assert "synchronous_commit" not in settings


def test_a_durable_transaction() -> None:
    plpy = FakePlpy()
    with autonomous(plpy).transaction(durable=True):
        pass
    assert "set local synchronous_commit = on" in plpy.events[0]
    # SET takes no snapshot, SELECT would.
    assert "select" not in plpy.events[0]


@pytest.mark.parametrize("level", ["on", "local", "remote_apply"])
def test_a_session_whose_commits_are_durable_keeps_its_own_kind(level: str) -> None:
    plpy = FakePlpy()
    plpy.settings["synchronous_commit"] = level
    with autonomous(plpy).transaction(durable=True):
        pass
    assert "synchronous_commit" not in plpy.events[0]


@pytest.mark.parametrize("error", [ValueError("x"), QueryCanceled("x"), SystemExit("x")])
def test_a_transaction_is_rolled_back_on_any_exception(error: BaseException) -> None:
    plpy = FakePlpy()
    database = autonomous(plpy)
    with pytest.raises(type(error), match="x"), database.transaction():
        raise error
    assert plpy.events[1:] == ["[rollback]"]


def test_an_sql_error_rolls_back_and_is_a_database_error() -> None:
    plpy = FakePlpy({"select 1": SPIError("no", "23505")})
    database = autonomous(plpy)
    with pytest.raises(DatabaseError) as caught, database.transaction():
        database.query("select 1", [])
    assert caught.value.sqlstate == "23505"
    assert plpy.events[1:] == ["select 1", "[rollback]"]


def test_an_error_of_the_commit_is_a_database_error() -> None:
    plpy = FakePlpy({"[commit]": SPIError("deferred", "23503")})
    with pytest.raises(DatabaseError) as caught, autonomous(plpy).transaction():
        pass
    assert caught.value.sqlstate == "23503"


def test_where_it_cannot_commit_it_says_what_to_do() -> None:
    plpy = FakePlpy({"[commit]": SPIError("invalid transaction termination", "2D000")})
    with pytest.raises(InTransaction) as caught:
        AutonomousDatabase(plpy)
    assert str(caught.value) == (
        "work() cannot run inside a transaction, because it commits every task"
    )
    assert caught.value.hint is not None
    assert "select pgflow_worker.work_batch(...)" in caught.value.hint


def test_a_call_has_its_callers_settings_but_for_dates_and_isolation() -> None:
    plpy = FakePlpy()
    AutonomousDatabase(plpy)
    assert settings_given(plpy, local=False) == ["public, 1s, read committed, ISO, off"]
    assert plpy.events[-1] == "[commit]"


def test_a_session_gets_its_settings_back() -> None:
    plpy = FakePlpy()
    autonomous(plpy).restore_session()
    assert settings_given(plpy, local=False) == [CALLERS]
    assert plpy.settings == SESSION
    assert plpy.events[-1] == "[commit]"


def test_tables_are_analyzed_one_by_one() -> None:
    plpy = FakePlpy()
    autonomous(plpy).analyze(["pgflow.runs", 'pgmq."q_f"'])
    assert [args for sql, args in plpy.executed if "_analyze(" in sql] == [
        ["pgflow.runs"],
        ['pgmq."q_f"'],
    ]
    assert [event for event in plpy.events if not event.startswith("set local")][1::2] == [
        "[commit]",
        "[commit]",
    ]


# A handler's transaction


def test_a_handlers_transaction_is_a_subtransaction_and_costs_no_more_than_that() -> None:
    plpy = FakePlpy()
    database = ready(plpy)
    with database.handlers_transaction():
        database.query("select 1", [])
    assert plpy.events == ["[savepoint]", "select 1", "[release]", "[commit]"]


@pytest.mark.parametrize("error", [ValueError("x"), QueryCanceled("x"), SystemExit("x")])
def test_a_handlers_transaction_is_rolled_back_on_any_exception(error: BaseException) -> None:
    plpy = FakePlpy()
    database = ready(plpy)
    with pytest.raises(type(error), match="x"), database.handlers_transaction():
        raise error
    assert plpy.events == ["[savepoint]", "[rollback to savepoint]", "[rollback]"]


@pytest.mark.parametrize("place", ["[release]", "[commit]"])
def test_an_error_at_the_end_of_a_handlers_transaction_is_a_database_error(place: str) -> None:
    plpy = FakePlpy({place: SPIError("no", "23505")})
    with (
        pytest.raises(DatabaseError, match="no") as caught,
        ready(plpy).handlers_transaction(),
    ):
        pass
    assert caught.value.sqlstate == "23505"
    if place == "[release]":
        assert plpy.events == ["[savepoint]", "[release]", "[rollback]"]


def test_a_handler_that_commits_is_told_that_it_cannot() -> None:
    database = ready(FakePlpy({"commit": SPIError("SPI_ERROR_TRANSACTION", "XX000")}))
    with pytest.raises(DatabaseError, match="a handler cannot commit or roll back") as caught:
        database.query("commit", [])
    assert caught.value.sqlstate == "2D000"


def test_after_a_handlers_sql_its_constraints_are_checked_and_nothing_gives_up_on_locks() -> None:
    plpy = FakePlpy()
    ready(plpy).end_handlers_part(used=True)
    assert plpy.events[0] == "set constraints all immediate"
    assert plpy.events[-1] == "set local lock_timeout = 0"


def test_a_handler_that_ran_no_sql_has_violated_nothing() -> None:
    plpy = FakePlpy()
    ready(plpy).end_handlers_part(used=False)
    assert plpy.events == ["set local lock_timeout = 0"]


def test_where_nothing_gives_up_on_locks_nothing_is_set() -> None:
    plpy = FakePlpy()
    plpy.settings["lock_timeout"] = "0"
    database = ready(plpy)
    database.end_handlers_part(used=False)
    assert plpy.events == []
    database.end_handlers_part(used=True)
    assert "set local lock_timeout = 0" not in plpy.events


def test_a_violated_constraint_is_a_database_error() -> None:
    plpy = FakePlpy({"set constraints": SPIError("violates foreign key", "23503")})
    with pytest.raises(DatabaseError, match="violates foreign key"):
        ready(plpy).end_handlers_part(used=True)


def test_what_handlers_may_change_is_read_once_before_the_first_of_their_transactions() -> None:
    plpy = FakePlpy()
    database = autonomous(plpy)
    for _ in range(2):
        with database.handlers_transaction():
            pass
    read, *rest = plpy.events
    assert "from pg_catalog.pg_settings" in read
    assert rest == ["[commit]", *["[savepoint]", "[release]", "[commit]"] * 2]


# In a caller's transaction


def test_in_a_callers_transaction_nothing_is_committed() -> None:
    plpy = FakePlpy({"[commit]": SPIError("invalid transaction termination", "2D000")})
    database = JoinedDatabase(plpy)
    for transaction in (database.transaction(durable=True), database.handlers_transaction()):
        plpy.events.clear()
        with transaction:
            database.query("select 1", [])
        assert plpy.events[0] == "[savepoint]"
        assert plpy.events[-1] == "[release]"
    for transaction in (database.transaction(), database.handlers_transaction()):
        with pytest.raises(ValueError, match="x"), transaction:
            raise ValueError("x")
        assert plpy.events[-1] == "[rollback to savepoint]"
    assert not {"[commit]", "[rollback]"} & set(plpy.events)


def test_a_callers_transaction_gets_its_settings_back() -> None:
    plpy = FakePlpy()
    database = joined(plpy)
    with database.transaction():
        pass
    assert "set local search_path = pg_catalog, pg_temp" in plpy.events[1]
    assert settings_given(plpy, local=True) == [CALLERS]


def test_a_handlers_sql_meets_the_callers_settings() -> None:
    plpy = FakePlpy()
    database = joined(plpy)
    with database.handlers_transaction():
        # Dates are read by Python: the session's DateStyle must not matter.
        assert settings_given(plpy, local=True) == ["public, 1s, serializable, ISO, off"]
    assert settings_given(plpy, local=True)[1:] == [CALLERS]


@pytest.mark.parametrize("used", [True, False])
def test_the_end_of_a_handlers_part_in_a_callers_transaction(used: bool) -> None:
    plpy = FakePlpy()
    database = joined(plpy)
    with database.handlers_transaction():
        database.end_handlers_part(used=used)
        # Some may be the caller's own.
        assert "set constraints all immediate" not in plpy.events
        assert plpy.events[-1] == "set local lock_timeout = 0"
        # The session's settings are the caller's.
        assert "reset all" not in plpy.events


def test_an_sql_error_in_a_callers_transaction_is_a_database_error() -> None:
    for place in ("[release]", "set local"):
        plpy = FakePlpy({place: SPIError("no", "23505")})
        with pytest.raises(DatabaseError, match="no"), joined(plpy).transaction():
            pass


def test_a_callers_session_is_left_alone() -> None:
    plpy = FakePlpy()
    database = joined(plpy)
    database.restore_session()
    database.analyze(["pgflow.runs"])
    assert plpy.events == []


# application_name


def test_what_is_shown_already_costs_no_statement() -> None:
    plpy = FakePlpy({"'application_name'": [{"name": "psql"}]})
    database = autonomous(plpy)
    for text in ("a/b", "a/b", "a"):
        database.show(text)
        with database.transaction():
            pass
    shown = [sql for sql, _ in plpy.executed if sql.startswith("set application_name")]
    assert shown == ["set application_name = 'a/b'", "set application_name = 'a'"]


def test_it_is_shown_again_after_a_rollback() -> None:
    plpy = FakePlpy({"'application_name'": [{"name": "psql"}]})
    database = autonomous(plpy)
    database.show("a")
    with suppress(ZeroDivisionError), database.transaction():
        raise ZeroDivisionError
    database.show("a")
    assert [sql for sql, _ in plpy.executed].count("set application_name = 'a'") == 2
