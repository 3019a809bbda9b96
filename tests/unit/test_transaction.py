"""SQL for handlers: values on their way in and out, and a `tx` that is used at the wrong time."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from pgflow_worker.database import Column, Row
from pgflow_worker.errors import Interrupted, QueryCanceled
from pgflow_worker.transaction import DatabaseTransaction
from tests.unit.fakes import FakeDatabase

SOME_UUID = UUID("12345678-1234-5678-1234-567812345678")


@dataclass
class Pair:
    x: int
    y: str


class Shown(float):
    def __repr__(self) -> str:
        return "Shown(1.5)"


class Unwritable:
    def __str__(self) -> str:
        raise LookupError("no text")


# pg_type's OIDs: the type, the array of it.
OIDS = {
    "bool": (16, 1000),
    "int8": (20, 1016),
    "text": (25, 1009),
    "json": (114, 199),
    "date": (1082, 1182),
    "time": (1083, 1183),
    "timestamp": (1114, 1115),
    "timestamptz": (1184, 1185),
    "numeric": (1700, 1231),
    "uuid": (2950, 2951),
    "jsonb": (3802, 3807),
}


def sent(type_name: str, value: object) -> object:
    """What a value becomes as the parameter of a statement."""
    database = FakeDatabase(types=[type_name])
    assert DatabaseTransaction(database).execute("select $1", [value]) == []
    [(sql, [parameter])] = database.queries
    assert sql == "select $1"
    return parameter


def received(type_name: str, value: object, *, array: bool = False) -> Any:
    """What a column's value becomes."""
    columns = [Column("x", OIDS[type_name][array])]
    database = FakeDatabase(columns=columns, rows=[{"x": value}])
    [row] = DatabaseTransaction(database).execute("select x")
    return row["x"]


# Parameters


@pytest.mark.parametrize(
    ("type_name", "value", "parameter"),
    [
        ("integer", 5, "5"),
        ("text", "a", "a"),
        ("text", None, None),
        ("numeric", Decimal("1.10"), "1.10"),
        ("double precision", 0.1, "0.1"),
        ("double precision", float("nan"), "nan"),
        ("double precision", Shown(1.5), "1.5"),
        ("boolean", True, True),
        ("boolean", False, False),
        ("boolean", None, None),
        ("bytea", b"\0", b"\0"),
        ("date", date(2024, 2, 29), "2024-02-29"),
        ("time without time zone", time(12, 30), "12:30:00"),
        ("timestamp without time zone", datetime(2024, 2, 29, 12), "2024-02-29 12:00:00"),
        (
            "timestamp with time zone",
            datetime(2024, 2, 29, 12, tzinfo=UTC),
            "2024-02-29 12:00:00+00:00",
        ),
        ("uuid", SOME_UUID, str(SOME_UUID)),
        ("text", SOME_UUID, str(SOME_UUID)),
        ("interval", timedelta(1, 2, 3), "1 days 2 seconds 3 microseconds"),
        ("interval", timedelta(seconds=-1), "-1 days 86399 seconds 0 microseconds"),
        ("integer[]", [1, None, 2], ["1", None, "2"]),
        ("integer[]", (1, 2), ["1", "2"]),
        ("integer[]", range(2), ["0", "1"]),
        ("integer[]", [], []),
        ("integer[]", [[1, 2], [3, 4]], [["1", "2"], ["3", "4"]]),
        ("integer[]", None, None),
        ("uuid[]", [SOME_UUID], [str(SOME_UUID)]),
        ("interval[]", [timedelta(1)], ["1 days 0 seconds 0 microseconds"]),
        ("interval[]", [[timedelta(1)]], [["1 days 0 seconds 0 microseconds"]]),
        ("boolean[]", [True, None], [True, None]),
        ("boolean[]", [[True], [False]], [[True], [False]]),
        ("a_composite", {"x": 1, "y": None}, {"x": "1", "y": None}),
        ("a_composite", (1, [2]), ["1", ["2"]]),
        ("a_composite", Pair(1, "a"), {"x": "1", "y": "a"}),
    ],
)
def test_parameters(type_name: str, value: object, parameter: object) -> None:
    result = sent(type_name, value)
    assert result == parameter
    assert type(result) is type(parameter)


@pytest.mark.parametrize("type_name", ["json", "jsonb"])
@pytest.mark.parametrize(
    ("value", "parameter"),
    [
        ("text", '"text"'),
        ('{"a": 1}', '"{\\"a\\": 1}"'),
        ("", '""'),
        (0, "0"),
        (False, "false"),
        (True, "true"),
        (1.5, "1.5"),
        ([], "[]"),
        ([1, [None]], "[1,[null]]"),
        ({"a": None}, '{"a":null}'),
        (date(2024, 2, 29), '"2024-02-29"'),
        (Decimal("1.10"), "1.10"),
        (SOME_UUID, f'"{SOME_UUID}"'),
        (None, None),
    ],
)
def test_a_json_parameter_takes_any_json_value_and_none_is_sqls_null(
    type_name: str, value: object, parameter: object
) -> None:
    assert sent(type_name, value) == parameter


def test_a_json_arrays_elements_are_json_values() -> None:
    assert sent("jsonb[]", [{"a": 1}, "x", [1], None]) == ['{"a":1}', '"x"', "[1]", None]


def test_a_json_parameter_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="a is NaN"):
        sent("jsonb", {"a": float("nan")})


@pytest.mark.parametrize("value", ["false", "true", "", 0, 1, [True]])
def test_a_boolean_takes_nothing_but_booleans(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        sent("boolean", value)
    assert str(caught.value) == f"$1 is boolean, not {value!r}"


def test_a_boolean_array_takes_nothing_but_booleans() -> None:
    with pytest.raises(TypeError, match="is boolean, not 'false'"):
        sent("boolean[]", [True, "false"])


@pytest.mark.parametrize("value", ["{a,b}", b"ab", {"a": 1}, 5])
def test_an_array_takes_no_text_and_no_single_value(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        sent("text[]", value)
    assert str(caught.value) == f"$1 is text[], not {value!r}"


@pytest.mark.parametrize("value", ["ab", [1, 2], {1: 1}, 5])
def test_bytea_takes_nothing_but_bytes(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        sent("bytea", value)
    assert str(caught.value) == f"$1 is bytea, not {value!r}"


@pytest.mark.parametrize(
    ("type_name", "value", "message"),
    [
        pytest.param(
            "numeric", 10**5000, "$1 cannot be written: ValueError: Exceeds", id="long number"
        ),
        ("integer", Unwritable(), "$1 cannot be written: LookupError: no text"),
        ("integer[]", [1, Unwritable()], "$1 cannot be written: LookupError: no text"),
        ("a_composite", {"x": [Unwritable()]}, "$1.x[0] cannot be written: LookupError"),
        ("text", "a\0b", "$1 has the character \\u0000, which PostgreSQL cannot store"),
        ("text[]", ["\0"], "$1 has the character \\u0000, which PostgreSQL cannot store"),
        ("text", "\ud800", "$1 has half of a surrogate pair, which is no character"),
    ],
)
def test_what_cannot_be_written_is_refused_before_plpython_sees_it(
    type_name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sent(type_name, value)


def test_the_parameter_that_is_wrong_is_named() -> None:
    transaction = DatabaseTransaction(FakeDatabase(types=["integer", "boolean"]))
    with pytest.raises(TypeError, match=r"\$2 is boolean, not 'x'"):
        transaction.execute("select $1, $2", [1, "x"])


@pytest.mark.parametrize(
    ("types", "args"), [(["integer"], [1, 2]), (["integer", "text"], [1]), ([], [1])]
)
def test_as_many_arguments_as_parameters(types: list[str], args: list[object]) -> None:
    database = FakeDatabase(types=types)
    with pytest.raises(TypeError) as caught:
        DatabaseTransaction(database).execute("select", args)
    assert str(caught.value) == (
        f"parameters in the statement: {len(types)}, values in args: {len(args)}"
    )
    assert database.queries == []


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (b"select 1", "the statement must be text, not b'select 1'"),
        (None, "the statement must be text, not None"),
        ("select '\0'", "the statement has the character \\u0000"),
        ("select '\ud800'", "the statement has half of a surrogate pair"),
    ],
)
def test_a_statement_is_text_that_can_be_written(sql: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        DatabaseTransaction(FakeDatabase()).execute(sql)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("args", ["text", b"bytes", {"a": 1}])
def test_arguments_are_a_list(args: Any) -> None:
    database = FakeDatabase(types=["text"])
    with pytest.raises(TypeError) as caught:
        DatabaseTransaction(database).execute("select $1", args)
    assert str(caught.value) == f"args must be a list of values for $1, $2, ..., not {args!r}"


@pytest.mark.parametrize("args", [5, 0, "", {}])
def test_a_single_value_is_not_taken_for_a_list_or_for_none(args: Any) -> None:
    database = FakeDatabase(types=["text"])
    with pytest.raises(TypeError, match="args must be a list of values"):
        DatabaseTransaction(database).execute("select $1", args)


@pytest.mark.parametrize("args", [[], ()])
def test_without_arguments_the_sql_is_sent_as_it_is(args: Sequence[object]) -> None:
    database = FakeDatabase()
    DatabaseTransaction(database).execute("set local work_mem = '1MB'; select 1", args)
    assert database.queries == [("set local work_mem = '1MB'; select 1", [])]


# Results


@pytest.mark.parametrize(
    ("type_name", "value", "result"),
    [
        ("json", '{"a": [1, null]}', {"a": [1, None]}),
        ("json", ' \n{"a": 1} ', {"a": 1}),
        ("jsonb", '"text"', "text"),
        ("jsonb", "null", None),
        ("jsonb", "0", 0),
        ("date", "2024-02-29", date(2024, 2, 29)),
        ("time", "12:30:00.5", time(12, 30, 0, 500_000)),
        ("timestamp", "2024-02-29 12:00:00.123", datetime(2024, 2, 29, 12, 0, 0, 123_000)),
        ("timestamptz", "2024-02-29 12:00:00+00", datetime(2024, 2, 29, 12, tzinfo=UTC)),
        ("timestamptz", "2024-02-29 14:30:00+02:30", datetime(2024, 2, 29, 12, tzinfo=UTC)),
        ("uuid", str(SOME_UUID), SOME_UUID),
        ("numeric", Decimal("1.10"), Decimal("1.10")),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("bool", False, False),
        *((name, None, None) for name in OIDS),
    ],
)
def test_columns(type_name: str, value: object, result: object) -> None:
    converted = received(type_name, value)
    assert converted == result
    assert type(converted) is type(result)


def test_array_columns() -> None:
    assert received("uuid", [str(SOME_UUID), None], array=True) == [SOME_UUID, None]
    assert received("date", [["2024-01-01"], ["2024-01-02"]], array=True) == [
        [date(2024, 1, 1)],
        [date(2024, 1, 2)],
    ]
    assert received("jsonb", ['{"a": 1}', "[]"], array=True) == [{"a": 1}, []]
    assert received("int8", [1, 2], array=True) == [1, 2]
    assert received("uuid", [], array=True) == []


@pytest.mark.parametrize(
    ("type_name", "value"),
    [
        ("date", "infinity"),
        ("timestamptz", "-infinity"),
        ("date", "0044-03-15 BC"),
        ("date", "10000-01-01"),
        ("jsonb", "1" + "0" * 90 + "e400.5"),
        ("json", "1e400"),
    ],
)
def test_a_value_that_python_does_not_have_is_named_with_its_column(
    type_name: str, value: str
) -> None:
    with pytest.raises(ValueError, match="column") as caught:
        received(type_name, value)
    assert str(caught.value) == f'column "x": Python has no value for {value!r:.100}'


def test_every_row_and_column_is_converted() -> None:
    columns = [Column("id", OIDS["uuid"][0]), Column("n", 20), Column("day", OIDS["date"][0])]
    rows = [{"id": str(SOME_UUID), "n": n, "day": f"2024-01-0{n}"} for n in (1, 2)]
    database = FakeDatabase(columns=columns, rows=rows)
    assert DatabaseTransaction(database).execute("select") == [
        {"id": SOME_UUID, "n": n, "day": date(2024, 1, n)} for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("oids", "value", "result"),
    [
        ((OIDS["uuid"][0], OIDS["uuid"][0]), str(SOME_UUID), SOME_UUID),
        ((OIDS["jsonb"][0], 20), 5, 5),
        ((20, OIDS["jsonb"][0]), "[5]", [5]),
        ((OIDS["date"][0], 25), "2024-01-01", "2024-01-01"),
    ],
)
def test_of_two_columns_with_one_name_the_last_counts(
    oids: tuple[int, int], value: object, result: object
) -> None:
    # As in `select a.*, b.*`: PL/Python's rows keep the last.
    database = FakeDatabase(columns=[Column("x", oid) for oid in oids], rows=[{"x": value}])
    assert DatabaseTransaction(database).execute("select") == [{"x": result}]


# Streams


def test_a_stream_converts_and_fetches_piece_by_piece() -> None:
    database = FakeDatabase(
        types=["uuid"],
        columns=[Column("day", OIDS["date"][0])],
        rows=[{"day": f"2024-01-0{n}"} for n in range(1, 6)],
    )
    rows = DatabaseTransaction(database).stream("select $1", [SOME_UUID], size=2)
    assert next(rows) == {"day": date(2024, 1, 1)}
    assert database.fetches == 1
    assert [row["day"].day for row in rows] == [2, 3, 4, 5]
    assert database.fetches == 3
    assert database.queries == [("select $1", [str(SOME_UUID)])]


def test_a_stream_of_nothing() -> None:
    assert list(DatabaseTransaction(FakeDatabase()).stream("select")) == []


@pytest.mark.parametrize("size", [0, -1])
def test_a_streams_size_is_at_least_one(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be at least 1, not {size}"):
        list(DatabaseTransaction(FakeDatabase()).stream("select", size=size))


# Where it must not be used

OVER = "tx was used after its handler had returned"
THREAD = "tx was used in another thread; SQL is for the main thread only"


def test_after_the_handler_it_is_closed() -> None:
    database = FakeDatabase()
    transaction = DatabaseTransaction(database)
    transaction.close()
    with pytest.raises(RuntimeError, match=OVER):
        transaction.execute("select 1")
    with pytest.raises(RuntimeError, match=OVER):
        list(transaction.stream("select 1"))
    assert database.queries == []


def test_a_stream_ends_with_its_handler_without_another_fetch() -> None:
    database = FakeDatabase(rows=[{"n": 1}, {"n": 2}, {"n": 3}])
    transaction = DatabaseTransaction(database)
    rows = transaction.stream("select", size=1)
    next(rows)
    transaction.close()
    with pytest.raises(RuntimeError, match=OVER):
        next(rows)
    assert database.fetches == 1


def in_another_thread(action: Any) -> BaseException | None:
    caught: list[BaseException] = []

    def target() -> None:
        try:
            action()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_another_thread_may_not_use_it() -> None:
    database = FakeDatabase(rows=[{"n": 1}, {"n": 2}])
    transaction = DatabaseTransaction(database)
    assert str(in_another_thread(lambda: transaction.execute("select"))) == THREAD
    assert str(in_another_thread(lambda: next(transaction.stream("select")))) == THREAD
    assert database.queries == []
    rows = transaction.stream("select", size=1)
    next(rows)
    assert str(in_another_thread(lambda: next(rows))) == THREAD
    assert database.fetches == 1


# Cancels that a handler may catch


class Canceled(FakeDatabase):
    """In which every statement is canceled, while it begins or later."""

    def __init__(self, error: QueryCanceled, at: str) -> None:
        super().__init__(types=["integer"], rows=[{"n": 1}])
        self._error, self._at = error, at

    def query(self, sql: str, args: Sequence[object]) -> tuple[list[Row], list[Column]]:
        super().query(sql, args)
        raise self._error

    def parameter_types(self, sql: str) -> list[str]:
        if self._at == "types":
            raise self._error
        return super().parameter_types(sql)

    def stream(
        self, sql: str, args: Sequence[object], size: int
    ) -> Iterator[tuple[list[Row], list[Column]]]:
        yield from super().stream(sql, args, size)
        raise self._error


USES: dict[str, Callable[[DatabaseTransaction], object]] = {
    "execute": lambda tx: tx.execute("select 1"),
    "execute with arguments": lambda tx: tx.execute("select $1", [1]),
    "stream": lambda tx: list(tx.stream("select 1")),
    "stream with arguments": lambda tx: list(tx.stream("select $1", [1])),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("at", ["types", "end"])
@pytest.mark.parametrize("kind", [QueryCanceled, Interrupted])
def test_a_cancel_that_a_handler_catches_is_raised_at_its_end(
    use: str, at: str, kind: type[QueryCanceled]
) -> None:
    error = kind("canceling statement")
    transaction = DatabaseTransaction(Canceled(error, at))

    def returning() -> str:
        with pytest.raises(kind):
            USES[use](transaction)
        return "done"

    def failing() -> None:
        returning()
        raise ValueError

    for handler in (returning, failing):
        transaction.canceled = None
        with pytest.raises(kind) as caught:
            transaction.watch(handler)
        assert caught.value is error


def test_a_handler_whose_sql_was_not_canceled_has_its_result_or_its_error() -> None:
    transaction = DatabaseTransaction(FakeDatabase(rows=[{"n": 1}]))
    assert transaction.watch(lambda: transaction.execute("select 1")) == [{"n": 1}]
    with pytest.raises(ZeroDivisionError):
        transaction.watch(lambda: 1 // 0)
    assert transaction.canceled is None
