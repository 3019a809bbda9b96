"""The adapter to PL/Python: what the SQL functions call, with the `plpy` they were given."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pgflow_worker
from pgflow_worker import environment
from pgflow_worker.database import Column, Row, Statement
from pgflow_worker.deploy import Deployment
from pgflow_worker.errors import (
    DatabaseError,
    InTransaction,
    MissingFiles,
    QueryCanceled,
    UnknownFlow,
    WorkerError,
)
from pgflow_worker.flow import Flow
from pgflow_worker.modules import StoredModules
from pgflow_worker.registry import Registry
from pgflow_worker.report import Report
from pgflow_worker.worker import Worker

# What load() has read, as the extension's owner, for the functions that run as the caller.
_modules = StoredModules({})
_flow_modules: dict[str, str] = {}

_NAME_TYPES = "pgflow_worker_statement"


class PlpyDatabase:
    """The Database protocol on PL/Python's `plpy`.

    autonomous: whether this call may commit, as a procedure may that was called on its own.
    """

    def __init__(self, plpy: Any, *, autonomous: bool) -> None:
        self._plpy = plpy
        self._autonomous = autonomous
        self._plans: dict[Statement, Any] = {}
        self._callers_plans: dict[str, Any] = {}
        self._types: dict[str, list[str]] = {}
        if autonomous:
            self._leave_gates_transaction()
        [row] = plpy.execute("select pg_catalog.current_setting('search_path') as search_path")
        self._search_path: str = row["search_path"]

    def execute(self, statement: Statement, *args: object) -> list[Row]:
        with self._errors():
            plan = self._plans.get(statement)
            if plan is None:
                plan = self._plpy.prepare(statement.sql, list(statement.types))
                self._plans[statement] = plan
            return list(self._plpy.execute(plan, list(args)))

    def query(self, sql: str, args: Sequence[object]) -> tuple[list[Row], list[Column]]:
        with self._errors():
            if args:
                result = self._plpy.execute(self._callers_plan(sql), list(args))
            else:
                result = self._plpy.execute(sql)
            return list(result), _columns(result)

    def stream(
        self, sql: str, args: Sequence[object], size: int
    ) -> Iterator[tuple[list[Row], list[Column]]]:
        with self._errors():
            if args:
                cursor = self._plpy.cursor(self._callers_plan(sql), list(args))
            else:
                cursor = self._plpy.cursor(sql)
        while True:
            with self._errors():
                result = cursor.fetch(size)
                rows = list(result)
            if not rows:
                return
            yield rows, _columns(result)

    def parameter_types(self, sql: str) -> list[str]:
        types = self._types.get(sql)
        if types is None:
            # plpy.prepare() wants to be told the types; SQL's PREPARE finds them.
            with self._errors():
                self._plpy.execute(f"prepare {_NAME_TYPES} as {sql}")
                [row] = self._plpy.execute(
                    "select parameter_types::text[] as types "
                    f"from pg_catalog.pg_prepared_statements where name = '{_NAME_TYPES}'"
                )
                self._plpy.execute(f"deallocate {_NAME_TYPES}")
            types = list(row["types"])
            self._types[sql] = types
        return types

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        if not self._autonomous:
            with self._joined_transaction():
                yield
            return
        settings = (
            "set local transaction_isolation = 'read committed'; "
            "set local search_path = pg_catalog, pg_temp"
        )
        if durable:
            settings += "; set local synchronous_commit = on"
        with self._errors():
            self._plpy.execute(settings)
            try:
                yield
            except BaseException:
                self._plpy.rollback()
                raise
            self._plpy.commit()

    @contextmanager
    def subtransaction(self) -> Iterator[None]:
        with self._errors(), self._plpy.subtransaction():
            yield

    @contextmanager
    def callers_settings(self) -> Iterator[None]:
        self._set_search_path(self._search_path)
        yield
        self._set_search_path("pg_catalog, pg_temp")

    def restore_session(self) -> None:
        """Undo what handlers' SQL may have left in a session that goes on after the call."""
        if self._autonomous:
            with self.transaction():
                self.execute(_SET_SESSION, self._search_path)

    def _leave_gates_transaction(self) -> None:
        # The gate has read something in it, so that its isolation level can no longer be chosen.
        try:
            self._plpy.commit()
        except self._plpy.SPIError:
            raise InTransaction(
                "work() cannot run inside a transaction, because it commits every task",
                hint="Call it as the only statement of a command: call pgflow_worker.work(...). "
                "Inside a transaction: select pgflow_worker.work_batch(...).",
            ) from None

    @contextmanager
    def _joined_transaction(self) -> Iterator[None]:
        """A subtransaction of the caller's transaction, which keeps its own search_path."""
        with self.subtransaction():
            self._plpy.execute("set local search_path = pg_catalog, pg_temp")
            yield
            self._set_search_path(self._search_path)

    def _set_search_path(self, search_path: str) -> None:
        """Set it for this transaction, and a DateStyle that Python can parse."""
        self.execute(_SET_LOCAL, search_path)

    def _callers_plan(self, sql: str) -> Any:
        plan = self._callers_plans.get(sql)
        if plan is None:
            plan = self._plpy.prepare(sql, self.parameter_types(sql))
            self._callers_plans[sql] = plan
        return plan

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """PL/Python's SQL errors as ours."""
        try:
            yield
        except self._plpy.SPIError as error:
            raise _converted(error) from error


_SET_LOCAL = Statement(
    """select pg_catalog.set_config('search_path', $1, true),
    pg_catalog.set_config('datestyle', 'ISO', true)""",
    ("text",),
)
_SET_SESSION = Statement("select pg_catalog.set_config('search_path', $1, false)", ("text",))


def load(plpy: Any, version: str) -> None:
    """Take note of the environment and the stored modules; called as the extension's owner."""
    global _modules, _flow_modules
    with _reporting(plpy):
        if pgflow_worker.__version__ != version:
            raise MissingFiles(
                f"the extension's version is {version}, that of its Python files "
                f"{pgflow_worker.__version__}",
                hint="Run make install again.",
            )
        registry = Registry(PlpyDatabase(plpy, autonomous=False))
        environment.activate(registry.settings().get("environment"))
        stored = StoredModules(registry.sources())
        _flow_modules = registry.flows()
        if stored.digest != _modules.digest:
            _modules.forget()
            _modules = stored


def work(
    plpy: Any,
    flow_slug: str,
    batch_size: int,
    max_concurrent: int,
    mode: str,
    max_seconds: float,
) -> str:
    """The procedure work() behind its gate; the report as JSON text."""
    report = Report("completed", flow_slug, mode, batch_size, max_concurrent)
    return _work(plpy, report, autonomous=True, seconds=max_seconds, ignore_delay=False)


def work_batch(
    plpy: Any, flow_slug: str, batch_size: int, max_concurrent: int, ignore_delay: bool
) -> str:
    """The function work_batch() behind its gate; the report as JSON text."""
    report = Report("completed", flow_slug, "batch", batch_size, max_concurrent)
    return _work(plpy, report, autonomous=False, seconds=0, ignore_delay=ignore_delay)


def deploy(
    plpy: Any, module: str, source: str | None, dry_run: bool, allow_data_loss: bool
) -> list[tuple[str | None, str, list[str]]]:
    """The function deploy(): rows of flow_slug, status, changes."""
    with _reporting(plpy):
        database = PlpyDatabase(plpy, autonomous=False)
        database.execute(Statement("select pgflow_worker._check_pgflow()"))
        deployment = Deployment(database, dry_run=dry_run, allow_data_loss=allow_data_loss)
        return [
            (row.flow_slug, row.status, list(row.changes))
            for row in deployment.deploy(module, source)
        ]


def set_environment(plpy: Any, path: str | None) -> None:
    """The function set_environment()."""
    with _reporting(plpy):
        if path is not None:
            environment.check(path)
        Registry(PlpyDatabase(plpy, autonomous=False)).set_setting("environment", path)


def _work(
    plpy: Any, report: Report, *, autonomous: bool, seconds: float, ignore_delay: bool
) -> str:
    started = time.monotonic()
    with _reporting(plpy):
        database = PlpyDatabase(plpy, autonomous=autonomous)

        def record(**error: str) -> str:
            report.duration_ms = round((time.monotonic() - started) * 1000)
            text = report.json(**error)
            if error or report.did_something:
                with database.transaction():
                    Registry(database).record_invocation(report.flow_slug, text)
            return text

        try:
            flow = _flow(report.flow_slug)
            Worker(database, flow, report, seconds=seconds, ignore_delay=ignore_delay).run()
            return record()
        except BaseException as error:
            report.status = "error"
            record(error=f"{error}", sqlstate=getattr(error, "sqlstate", "XX000"))
            raise
        finally:
            database.restore_session()


def _flow(flow_slug: str) -> Flow:
    module = _flow_modules.get(flow_slug)
    if module is None:
        raise UnknownFlow(f'flow "{flow_slug}" is not deployed')
    for flow in _modules.flows(module):
        if flow.slug == flow_slug:
            return flow
    raise UnknownFlow(
        f'module "{module}" no longer defines flow "{flow_slug}"', hint="Deploy the module again."
    )


@contextmanager
def _reporting(plpy: Any) -> Iterator[None]:
    """Raise our errors as PostgreSQL's, with SQLSTATE, detail and hint."""
    try:
        yield
    except (WorkerError, DatabaseError) as error:
        fields = {"detail": error.detail, "hint": error.hint, "sqlstate": error.sqlstate}
        plpy.error(str(error), **{name: text for name, text in fields.items() if text})
    except QueryCanceled as error:
        plpy.error(str(error), sqlstate=error.sqlstate)


def _converted(error: Any) -> BaseException:
    """A plpy.SPIError as ours. Custom SQLSTATEs have no class: they are packed in `spidata`."""
    packed, detail, hint, *_ = getattr(error, "spidata", None) or (0, None, None)
    sqlstate = getattr(error, "sqlstate", None) or _unpacked(packed)
    if sqlstate == QueryCanceled.sqlstate:
        return QueryCanceled(str(error))
    return DatabaseError(str(error), sqlstate, detail, hint)


def _unpacked(packed: int) -> str:
    """MAKE_SQLSTATE of PostgreSQL's elog.h backwards: six bits a character, from "0" on."""
    return "".join(chr((packed >> (6 * place) & 0x3F) + ord("0")) for place in range(5))


def _columns(result: Any) -> list[Column]:
    """The columns of a result; a statement that returns no rows has none."""
    if len(result) == 0:
        return []
    return [
        Column(name, type_oid)
        for name, type_oid in zip(result.colnames(), result.coltypes(), strict=True)
    ]
