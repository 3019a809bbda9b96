"""What stands in for the server: a database that answers as it is told."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from pgflow_worker.database import Column, Row, Statement

Answer = Sequence[Row] | BaseException | Callable[..., Sequence[Row]]


class FakeDatabase:
    """A Database that runs no SQL.

    answers: what to do with a statement of the package that contains a text: rows, an exception
    to raise, or a function of the arguments; other statements return no rows. types, columns and
    rows: of a handler's SQL. events: all that was done, in order; what has no SQL in brackets.
    """

    def __init__(
        self,
        answers: Mapping[str, Answer] | None = None,
        *,
        types: Sequence[str] = (),
        columns: Sequence[Column] = (),
        rows: Sequence[Row] = (),
    ) -> None:
        self.answers = dict(answers or {})
        self.types = list(types)
        self.columns = list(columns)
        self.rows = list(rows)
        self.events: list[str] = []
        self.executed: list[tuple[str, tuple[object, ...]]] = []
        self.queries: list[tuple[str, list[object]]] = []
        self.fetches = 0

    def execute(self, statement: Statement, *args: object) -> list[Row]:
        assert len(args) == len(statement.types), statement.sql
        self.events.append(statement.sql)
        self.executed.append((statement.sql, args))
        for text, answer in self.answers.items():
            if text in statement.sql:
                if isinstance(answer, BaseException):
                    raise answer
                return [dict(row) for row in (answer(*args) if callable(answer) else answer)]
        return []

    def query(self, sql: str, args: Sequence[object]) -> tuple[list[Row], list[Column]]:
        self.queries.append((sql, list(args)))
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

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        self.events.append("[begin durable]" if durable else "[begin]")
        try:
            yield
        except BaseException:
            self.events.append("[rollback]")
            raise
        self.events.append("[commit]")

    @contextmanager
    def subtransaction(self) -> Iterator[None]:
        self.events.append("[savepoint]")
        try:
            yield
        except BaseException:
            self.events.append("[rollback to savepoint]")
            raise
        self.events.append("[release]")

    @contextmanager
    def callers_settings(self) -> Iterator[None]:
        self.events.append("[caller's settings]")
        yield
        self.events.append("[our settings]")

    def ran(self, text: str) -> list[tuple[object, ...]]:
        """The arguments of every statement of the package that contains the text."""
        return [args for sql, args in self.executed if text in sql]
