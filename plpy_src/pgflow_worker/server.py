"""What the SQL functions call, with the `plpy` they were given. Answers are JSON text.

An error is an answer as well: {"raise": {"sqlstate": ..., "message": ...}}, which the SQL function
pgflow_worker._raise() raises.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pgflow_worker
from pgflow_worker import codec
from pgflow_worker.adapter import AutonomousDatabase, JoinedDatabase
from pgflow_worker.database import Database, confirmed
from pgflow_worker.errors import (
    DatabaseError,
    MissingFiles,
    QueryCanceled,
    UnknownFlow,
    UnsupportedPlatform,
    WorkerError,
)
from pgflow_worker.flow import Flow
from pgflow_worker.modules import StoredModules
from pgflow_worker.registry import Registry
from pgflow_worker.report import Report
from pgflow_worker.tracebacks import printable, text_of
from pgflow_worker.worker import Worker

if TYPE_CHECKING:
    from pgflow_worker.process import Process

# What load() has read, as the extension's owner, for the functions that run as the caller.
_modules = StoredModules({})
_flow_modules: dict[str, str] = {}
_settings: dict[str, str] = {}
_revision = ""


def load(plpy: Any, version: str, with_environment: bool) -> str:
    """Take note of the environment and the stored modules; called as the extension's owner."""
    return _answer(partial(_load, plpy, version, with_environment))


def work(
    plpy: Any,
    flow_slug: str,
    batch_size: int,
    max_concurrent: int,
    mode: str,
    max_seconds: float,
) -> str:
    """The procedure work() behind its gate; the report."""
    report = Report("completed", flow_slug, mode, batch_size, max_concurrent)
    return _answer(partial(_work, plpy, report, autonomous=True, seconds=max_seconds))


def work_batch(
    plpy: Any, flow_slug: str, batch_size: int, max_concurrent: int, ignore_delay: bool
) -> str:
    """The function work_batch() behind its gate; the report."""
    report = Report("completed", flow_slug, "batch", batch_size, max_concurrent)
    return _answer(partial(_work, plpy, report, autonomous=False, ignore_delay=ignore_delay))


def deploy(plpy: Any, module: str, source: str | None, dry_run: bool, allow_data_loss: bool) -> str:
    """The function deploy(); {"deployed": [{"flow_slug", "status", "changes"}]}."""

    from pgflow_worker.deploy import Deployment

    def deployed() -> str:
        with _process(lambda _: None) as process:
            database = JoinedDatabase(plpy, process)
            deployment = Deployment(database, dry_run=dry_run, allow_data_loss=allow_data_loss)
            action = partial(deployment.deploy, module, source)
            # So that the import of a module that hangs can be canceled.
            return codec.encode({"deployed": process.call(action, math.inf, runs_sql=False)})

    return _answer(deployed)


def set_environment(plpy: Any, path: str | None) -> str:
    """The function set_environment(); an empty object."""

    from pgflow_worker import environment

    def set_it() -> str:
        if path is not None:
            environment.check(path)
        Registry(JoinedDatabase(plpy)).set_setting("environment", path)
        return "{}"

    return _answer(set_it)


def _load(plpy: Any, version: str, with_environment: bool) -> str:
    global _modules, _flow_modules, _settings, _revision
    if pgflow_worker.__version__ != version:
        raise MissingFiles(
            f"the extension's version is {version}, that of its Python files "
            f"{pgflow_worker.__version__}",
            hint="Run make install again.",
        )
    registry = Registry(JoinedDatabase(plpy))
    _settings = registry.settings()
    if with_environment:
        _activate_environment(_settings.get("environment"))
    # First, so that a deploy in between makes it look old: the worker then ends its call.
    _revision = registry.revision()
    stored = StoredModules(registry.sources())
    _flow_modules = registry.flows()
    if stored.sources != _modules.sources:
        _forget_modules()
        _modules = stored
    return "{}"


def _activate_environment(path: str | None) -> None:
    # Imported only if there is or was one: it costs a fresh interpreter some milliseconds.
    if path is not None or "pgflow_worker.environment" in sys.modules:
        from pgflow_worker import environment

        environment.activate(path)


def _work(
    plpy: Any,
    report: Report,
    *,
    autonomous: bool,
    seconds: float = 0.0,
    ignore_delay: bool = False,
) -> str:
    started = time.monotonic()
    with _process(report.note) as process:
        database = (AutonomousDatabase if autonomous else JoinedDatabase)(plpy, process)
        try:
            # The import runs the user's code too.
            flow = process.call(partial(_flow, report.flow_slug), math.inf, runs_sql=False)
            worker = Worker(
                database,
                process,
                flow,
                _revision,
                report,
                seconds=seconds,
                ignore_delay=ignore_delay,
            )
            try:
                worker.run()
            finally:
                if worker.has_used_event_loop:
                    # What its modules keep, such as an HTTP client, is of no use in another loop.
                    _forget_modules()
            return _recorded(database, report, started)
        except QueryCanceled as error:
            canceled = confirmed(database, error)
            _record_error(database, report, started, canceled)
            raise canceled from None
        except BaseException as error:
            _record_error(database, report, started, error)
            raise
        finally:
            # What has happened before matters more.
            with suppress(DatabaseError, QueryCanceled):
                database.restore_session()


def _recorded(database: Database, report: Report, started: float, **error: str) -> str:
    """The report as JSON, which is kept if the call did something or has failed."""
    report.duration_ms = round((time.monotonic() - started) * 1000)
    text = report.json(**error)
    if error or report.did_something:
        with database.transaction():
            Registry(database).record_invocation(report.flow_slug, text)
    return text


def _record_error(database: Database, report: Report, started: float, error: BaseException) -> None:
    report.status = "error"
    sqlstate = getattr(error, "sqlstate", "XX000")
    # That it is raised matters more than its row.
    with suppress(DatabaseError):
        _recorded(database, report, started, error=text_of(error), sqlstate=sqlstate)


@contextmanager
def _process(note: Callable[[str], object]) -> Iterator[Process]:
    """This process, in a state in which it can run a user's code."""
    if sys.platform != "linux":
        raise UnsupportedPlatform(
            "pgflow_worker needs a server on Linux",
            hint="It interrupts handlers with timer_create(2), which other systems do not have.",
        )
    # ctypes costs a fresh interpreter 2 ms.
    from pgflow_worker.process import DEFAULT_MEMORY_MB, server_process

    process = server_process(note, int(_settings.get("memory_mb", DEFAULT_MEMORY_MB)))
    try:
        yield process
    finally:
        process.close()


def _forget_modules() -> None:
    global _modules
    _modules.forget()
    _modules = StoredModules({})


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


def _answer(action: Callable[[], str]) -> str:
    """The action's answer, or its error as one. Other exceptions are bugs: PL/Python tells them."""
    try:
        return action()
    except (WorkerError, DatabaseError) as error:
        fields = (error.sqlstate, str(error), error.detail, error.hint)
    except QueryCanceled as error:
        fields = (error.sqlstate, str(error), None, None)
    texts = [None if text is None else printable(text) for text in fields]
    return codec.encode(
        {"raise": dict(zip(("sqlstate", "message", "detail", "hint"), texts, strict=True))}
    )
