"""What stands in for the server: a database, a plpy, and what it wants of its process."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pgflow_worker.database import Column, Row, Statement
from pgflow_worker.interrupts import Interrupts
from pgflow_worker.process import Process

Answer = Sequence[Row] | BaseException | Callable[..., Sequence[Row]]


class FakeFlags:
    """What PostgreSQL wants of this process. forgotten: how often a cancel was taken back."""

    def __init__(self) -> None:
        self.cancel = False
        self.die = False
        self.forgotten = 0

    def forget_cancel(self) -> None:
        self.cancel = False
        self.forgotten += 1


@contextmanager
def process_with(
    flags: FakeFlags | None = None, notes: list[str] | None = None, memory_mb: int = 512
) -> Iterator[Process]:
    """This process as a backend, and then as it was."""
    note = (notes if notes is not None else []).append
    process = Process(note, memory_mb=memory_mb, interrupts=Interrupts(flags or FakeFlags()))
    try:
        yield process
    finally:
        process.close()


class FakeDatabase:
    """A Database that runs no SQL.

    answers: what to do with a statement of the package, or with what has no SQL, that contains a
    text: rows, an exception to raise, or a function of the arguments; other statements return no
    rows. errors_at: exceptions to raise at the n-th thing done, from 1. types, columns and rows:
    of a handler's SQL, unless there is an exception for it among the answers. events: all that was
    done, in order; what has no SQL in brackets.
    """

    def __init__(
        self,
        answers: Mapping[str, Answer] | None = None,
        *,
        errors_at: Mapping[int, BaseException] | None = None,
        types: Sequence[str] = (),
        columns: Sequence[Column] = (),
        rows: Sequence[Row] = (),
    ) -> None:
        self.answers = dict(answers or {})
        self.errors_at = dict(errors_at or {})
        self.types = list(types)
        self.columns = list(columns)
        self.rows = list(rows)
        self.events: list[str] = []
        self.shown: list[str] = []
        self.executed: list[tuple[str, tuple[object, ...]]] = []
        self.queries: list[tuple[str, list[object]]] = []
        self.fetches = 0
        self.seconds_in_sql = 0.0
        self.is_autonomous = True
        self._begun: list[tuple[str, tuple[object, ...]]] = []
        self._committed: list[tuple[str, tuple[object, ...]]] = []

    def execute(self, statement: Statement, *args: object) -> list[Row]:
        assert len(args) == len(statement.types), statement.sql
        self.executed.append((statement.sql, args))
        rows = self._do(statement.sql, *args)
        self._begun.append((statement.sql, args))
        return [dict(row) for row in rows]

    def query(self, sql: str, args: Sequence[object]) -> tuple[list[Row], list[Column]]:
        self.queries.append((sql, list(args)))
        error = self.answers.get(sql)
        if isinstance(error, BaseException):
            raise error
        return [dict(row) for row in self.rows], self.columns

    def stream(
        self, sql: str, args: Sequence[object], size: int
    ) -> Iterator[tuple[list[Row], list[Column]]]:
        self.queries.append((sql, list(args)))
        for start in range(0, len(self.rows), size):
            self.fetches += 1
            yield [dict(row) for row in self.rows[start : start + size]], self.columns

    def parameter_types(self, sql: str) -> list[str]:  # noqa: ARG002
        return self.types

    def show(self, text: str) -> None:
        self.shown.append(text)

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        with self._transaction("[begin durable]" if durable else "[begin]"):
            yield

    @contextmanager
    def handlers_transaction(self) -> Iterator[None]:
        with self._transaction("[begin handler's]"):
            yield

    def end_handlers_part(self, *, used: bool, may_set: bool = False) -> None:  # noqa: ARG002
        self._do("[end handler's part]" if used else "[end unused handler's part]")

    def analyze(self, tables: Sequence[str]) -> None:
        for table in tables:
            self._do(f"[analyze {table}]")

    def discard_temporary(self) -> None:
        self._do("[discard temporary]")

    def check_interrupts(self) -> None:
        self._do("[check interrupts]")

    def ran(self, text: str) -> list[tuple[object, ...]]:
        """The arguments of every statement of the package that contains the text."""
        return [args for sql, args in self.executed if text in sql]

    def kept(self, text: str) -> list[tuple[object, ...]]:
        """The same of those that did not fail and were committed."""
        return [args for sql, args in self._committed if text in sql]

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._begun = []
        self._do(begin)
        try:
            yield
            self._do("[commit]")
        except BaseException:
            self.events.append("[rollback]")
            raise
        self._committed += self._begun

    def _do(self, what: str, *args: object) -> Sequence[Row]:
        self.events.append(what)
        if len(self.events) in self.errors_at:
            raise self.errors_at[len(self.events)]
        for text, answer in self.answers.items():
            if text in what:
                if isinstance(answer, BaseException):
                    raise answer
                return answer(*args) if callable(answer) else answer
        return []


class SPIError(Exception):
    """plpy.SPIError: conditions that PostgreSQL knows have a class with a sqlstate, others none."""

    def __init__(
        self, message: str, sqlstate: str, detail: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        # MAKE_SQLSTATE of elog.h.
        packed = sum((ord(c) - ord("0") & 0x3F) << 6 * place for place, c in enumerate(sqlstate))
        self.spidata = (packed, detail, hint, None, 0, None, None, None, None, None)


class KnownSPIError(SPIError):
    """One of plpy.spiexceptions."""

    def __init__(self, message: str, sqlstate: str) -> None:
        super().__init__(message, sqlstate)
        self.sqlstate = sqlstate


class Result(list[Row]):
    """plpy's result; of a query (SPI_OK_SELECT), if it has columns, else of SPI_OK_DELETE."""

    def __init__(self, rows: Sequence[Row], oids: Sequence[int]) -> None:
        super().__init__(dict(row) for row in rows)
        self._oids = oids

    def status(self) -> int:
        return 5 if self or self._oids else 8

    def colnames(self) -> list[str]:
        if self.status() == 8:
            raise SPIError("command did not produce a result set", "XX000")
        return list(self[0]) if self else [f"column{n}" for n in range(len(self._oids))]

    def coltypes(self) -> list[int]:
        return list(self._oids)


class Plan:
    """What plpy.prepare() returns."""

    def __init__(self, sql: str, types: Sequence[str]) -> None:
        self.sql = sql
        self.types = list(types)


# The settings of the session that calls.
SESSION: Row = {
    "search_path": "public",
    "datestyle": "German, DMY",
    "lock_timeout": "1s",
    "default_transaction_isolation": "serializable",
    "synchronous_commit": "off",
}


# A setting of the session's, and its new value as a literal.
_SET = re.compile(r"set_config\(E'(.*?)', E'(.*?)', false\)")


class FakePlpy:
    """PL/Python's plpy without a server.

    answers: rows or an exception for the statements that contain a text; others return no rows.
    oids: of the columns' types. settings: the session's; those of a transaction are not kept, nor
    is the role.
    events: all that was done, in order.
    """

    SPIError = SPIError

    def __init__(
        self, answers: Mapping[str, Answer] | None = None, oids: Sequence[int] = ()
    ) -> None:
        self.answers = dict(answers or {})
        self.oids = oids
        self.settings = dict(SESSION)
        self.events: list[str] = []
        self.prepared: list[Plan] = []
        self.executed: list[tuple[str, list[object]]] = []

    def _answer(self, what: str, args: Sequence[object] = ()) -> Sequence[Row]:
        for text, answer in self.answers.items():
            if text in what:
                if isinstance(answer, BaseException):
                    raise answer
                return answer(*args) if callable(answer) else answer
        if "pg_catalog.current_setting(" in what:
            return [{name: value for name, value in self.settings.items() if f"'{name}'" in what}]
        if "from pg_catalog.pg_settings" in what:
            return [{"name": name, "value": value} for name, value in self.settings.items()]
        if what == "reset all":
            self.settings = dict.fromkeys(self.settings, "the server's")
        self.settings.update(_SET.findall(what))
        if "pg_catalog.set_config(" in what and args and not args[-1]:
            names = [name for name in self.settings if f"'{name}'" in what]
            self.settings.update(zip(sorted(names, key=what.index), args, strict=False))
        return []

    def prepare(self, sql: str, types: Sequence[str]) -> Plan:
        plan = Plan(sql, types)
        self.prepared.append(plan)
        return plan

    def execute(self, query: str | Plan, args: Sequence[object] = ()) -> Result:
        sql = query.sql if isinstance(query, Plan) else query
        self.events.append(sql)
        self.executed.append((sql, list(args)))
        return Result(self._answer(sql, args), self.oids)

    def cursor(self, query: str | Plan, args: Sequence[object] = ()) -> "FakeCursor":
        return FakeCursor(self.execute(query, args), self.oids)

    def commit(self) -> None:
        self.events.append("[commit]")
        self._answer("[commit]")

    def rollback(self) -> None:
        self.events.append("[rollback]")

    @contextmanager
    def subtransaction(self) -> Iterator[None]:
        self.events.append("[savepoint]")
        try:
            yield
        except BaseException:
            self.events.append("[rollback to savepoint]")
            raise
        self.events.append("[release]")
        self._answer("[release]")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"plpy.{name} is not for the worker")


class FakeCursor:
    """What plpy.cursor() returns."""

    def __init__(self, rows: Sequence[Row], oids: Sequence[int]) -> None:
        self._rows = list(rows)
        self._oids = oids

    def fetch(self, count: int) -> Result:
        fetched, self._rows = self._rows[:count], self._rows[count:]
        return Result(fetched, self._oids)
