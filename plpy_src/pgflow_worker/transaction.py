"""SQL for handlers: what `tx: Transaction` can do, and how values cross between SQL and Python."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from typing import Any, Protocol, TypeVar, cast
from uuid import UUID

from pgflow_worker import codec
from pgflow_worker.database import Column, Database, Row
from pgflow_worker.errors import QueryCanceled
from pgflow_worker.tracebacks import reason

T = TypeVar("T")
# A statement that changes a setting, or runs others that may. `update ... set` does not.
_SETS = re.compile(
    r"(^|;|\*/|--[^\n]*\n)\s*(set|reset|discard|do|call)\b|set_config", re.IGNORECASE
)
Converter = Callable[[str], object]

JSON_TYPES = ("json", "jsonb")
TEXT_TYPES = ("text", "character varying", "character", "name")

# Type OIDs of pg_type.dat, which never change: the type, then the array of it. What is not here
# arrives as PL/Python converts it (bool, int, float, Decimal, bytes, else text).
_CONVERTERS: dict[int, Converter] = {
    oid: converter
    for oids, converter in (
        # As it was written, with white space around it.
        ((114, 199), lambda text: codec.decode(text.strip())),
        ((3802, 3807), codec.decode),
        ((1082, 1182), date.fromisoformat),
        ((1083, 1183), time.fromisoformat),
        ((1114, 1115), datetime.fromisoformat),
        ((1184, 1185), datetime.fromisoformat),
        ((2950, 2951), UUID),
    )
    for oid in oids
}


class Transaction(Protocol):
    """SQL in the transaction that also completes the task. Asked for by annotation.

    Everything done through it is committed together with the task's completion, or not at all.
    Parameters are $1, $2, ...; PostgreSQL finds their types. A json or jsonb parameter takes any
    JSON value. Results: json and jsonb parsed, numeric as Decimal, uuid as UUID, date, time and
    timestamps as Python's, arrays as lists, bytea as bytes; other types as text.
    """

    def execute(self, sql: str, args: Sequence[object] = ()) -> list[dict[str, Any]]:
        """Run a statement; the rows it returns, empty for one that returns none.

        Raises DatabaseError if the statement fails; the handler may catch it and go on.
        """
        ...

    def stream(
        self, sql: str, args: Sequence[object] = (), size: int = 1000
    ) -> Iterator[dict[str, Any]]:
        """Run a query and yield its rows, holding `size` of them in memory at a time."""
        ...


class DatabaseTransaction:
    """The Transaction of a task, usable until its handler returns, in the main thread only.

    used: whether any SQL was run through it. may_set: whether that may have changed a setting of
    the session's. canceled: a cancel that has ended one of its
    statements, which the handler may have caught.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._thread = threading.get_ident()
        self._closed = False
        self.used = False
        self.may_set = False
        self._streams: list[Any] = []
        self.canceled: QueryCanceled | None = None

    def execute(self, sql: str, args: Sequence[object] = ()) -> list[dict[str, Any]]:
        with self._remembering_cancels():
            parameters = self._parameters(sql, args)
            return _converted(*self._database.query(sql, parameters))

    def stream(
        self, sql: str, args: Sequence[object] = (), size: int = 1000
    ) -> Iterator[dict[str, Any]]:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        with self._remembering_cancels():
            parameters = self._parameters(sql, args)
        batches = self._database.stream(sql, parameters, size)
        self._streams.append(batches)
        while True:
            self._check_usable()
            with self._remembering_cancels():
                batch = next(batches, None)
            if batch is None:
                return
            yield from _converted(*batch)

    def close(self) -> None:
        """Make every later use an error: the task's transaction is over."""
        self._closed = True
        for stream in self._streams:
            stream.close()

    def watch(self, function: Callable[[], T]) -> T:
        """Call what uses this transaction. Raises the cancel that it may have caught."""
        try:
            return function()
        finally:
            if self.canceled is not None:
                raise self.canceled

    @contextmanager
    def _remembering_cancels(self) -> Iterator[None]:
        try:
            yield
        except QueryCanceled as error:
            self.canceled = error
            raise

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("tx was used after its handler had returned")
        if threading.get_ident() != self._thread:
            raise RuntimeError("tx was used in another thread; SQL is for the main thread only")
        if self.canceled is not None:
            raise self.canceled  # once more: nothing would end this statement

    def _parameters(self, sql: str, args: Sequence[object]) -> list[object]:
        self._check_usable()
        if not isinstance(sql, str):
            raise TypeError(f"the statement must be text, not {sql!r:.100}")
        codec.check_text(sql, "the statement")
        if not isinstance(args, list | tuple):
            raise TypeError(f"args must be a list of values for $1, $2, ..., not {args!r}")
        self.used = True
        self.may_set |= _SETS.search(sql) is not None
        if not args:
            return []
        types = self._database.parameter_types(sql)
        if len(types) != len(args):
            raise TypeError(
                f"parameters in the statement: {len(types)}, values in args: {len(args)}"
            )
        return [
            _to_parameter(value, type_name, position)
            for position, (value, type_name) in enumerate(zip(args, types, strict=True), 1)
        ]


def _to_parameter(value: object, type_name: str, position: int) -> object:
    """The value as PL/Python takes it for a parameter of this type."""
    if value is None:
        return None
    if type_name in JSON_TYPES:
        try:
            return codec.encode(value)
        except codec.NotJson as error:
            raise codec.NotJson(f"${position}: {error}") from None
    if type_name.endswith("[]"):
        if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__getitem__"):
            # PL/Python would make an array of a text's characters.
            raise TypeError(f"${position} is {type_name}, not {value!r:.100}")
        element_type = type_name.removesuffix("[]")
        return [
            # Of a json array each element is one value, of any other it may be a dimension.
            _to_parameter(
                element,
                type_name
                if isinstance(element, list | tuple) and element_type not in JSON_TYPES
                else element_type,
                position,
            )
            for element in cast("Sequence[object]", value)
        ]
    if type_name == "boolean" and not isinstance(value, bool):
        # PL/Python would take any text, "false" included, for true.
        raise TypeError(f"${position} is boolean, not {value!r}")
    if type_name in TEXT_TYPES and isinstance(value, Mapping | list | tuple | bytes):
        # PL/Python would store Python's way of writing it.
        raise TypeError(f"${position} is {type_name}, not {value!r}")
    if type_name == "bytea" and not isinstance(value, bytes | bytearray | memoryview):
        # PL/Python would take a list or a dict of numbers for bytes.
        raise TypeError(f"${position} is bytea, not {value!r:.100}")
    if isinstance(value, timedelta):
        return f"{value.days} days {value.seconds} seconds {value.microseconds} microseconds"
    return _plain(value, f"${position}")


def _plain(value: object, path: str) -> object:
    """The value as PL/Python can write it: where str() fails PL/Python crashes the server.

    Raises ValueError for what PostgreSQL's text cannot hold; PL/Python would cut it at a NUL.
    """
    if value is None or isinstance(value, bool | bytes | bytearray | memoryview):
        return value
    if is_dataclass(value) and not isinstance(value, type):  # of a composite type, as a dict is
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(member, f"{path}.{key}") for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member, f"{path}[{index}]") for index, member in enumerate(value)]
    try:
        # That of numpy's float64 says np.float64(1.5).
        text = float.__repr__(value) if isinstance(value, float) else str(value)
    except Exception as error:
        raise ValueError(f"{path} cannot be written: {reason(error)}") from error
    codec.check_text(text, path)
    return text


def _converted(rows: list[Row], columns: Sequence[Column]) -> list[dict[str, Any]]:
    # Of columns with one name, as in `select a.*, b.*`, PL/Python keeps the last.
    for column in {column.name: column for column in columns}.values():
        converter = _CONVERTERS.get(column.type_oid)
        if converter is None:
            continue
        for row in rows:
            try:
                row[column.name] = _convert(row[column.name], converter)
            except ValueError:
                raise ValueError(
                    f'column "{column.name}": Python has no value for {row[column.name]!r:.100}'
                ) from None
    return rows


def _convert(value: object, converter: Converter) -> object:
    if value is None:
        return None
    if isinstance(value, list):
        return [_convert(element, converter) for element in value]
    assert isinstance(value, str)
    return converter(value)
