"""What the SQL functions call, with the `plpy` they were given. Answers are JSON text.

An error is an answer as well: {"raise": {"sqlstate": ..., "message": ...}}, which the SQL function
pgflow_worker._raise() raises.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pgflow_worker
from pgflow_worker import codec
from pgflow_worker.adapter import AutonomousDatabase, JoinedDatabase
from pgflow_worker.database import Database, confirmed
from pgflow_worker.errors import (
    DatabaseError,
    InvalidArgument,
    MissingFiles,
    QueryCanceled,
    UnknownFlow,
    UnsupportedPlatform,
    WorkerError,
)
from pgflow_worker.flow import Flow
from pgflow_worker.modules import StoredModules
from pgflow_worker.registry import Placement, Registry
from pgflow_worker.report import Report, TotalReport
from pgflow_worker.tracebacks import hiding, printable, text_of
from pgflow_worker.worker import POLL_SECONDS, Worker

if TYPE_CHECKING:
    from pgflow_worker.offload import Offload
    from pgflow_worker.process import Process

# How long a flow may keep a worker of all flows from the others, besides its running handlers.
TURN_SECONDS = 5.0

# What load() has read, as the extension's owner, for the functions that run as the caller.
_modules = StoredModules({})
_flow_modules: dict[str, str] = {}
_settings: dict[str, str] = {}
_placements: dict[str, dict[str | None, Placement | None]] = {}
_revision = ""


@dataclass
class _Secrets:
    """A flow's, to be read by load_secrets()."""

    flow: Flow
    values: dict[str, str] = field(default_factory=dict)


# Nothing but what a call waits for is ever read, whoever calls load_secrets().
_awaited: _Secrets | None = None


def load(plpy: Any, version: str, with_environment: bool) -> str:
    """Take note of the environment and the stored modules; called as the extension's owner."""
    return _answer(partial(_load, plpy, version, with_environment))


def load_secrets(plpy: Any) -> str:
    """Read the secrets that a call waits for; called as the extension's owner.

    The values stay in this process. The answer, which SQL sees, has none.
    """
    return _answer(partial(_load_secrets, plpy))


def work(
    plpy: Any,
    flow_slug: str | None,
    batch_size: int,
    max_concurrent: int,
    mode: str,
    max_seconds: float,
) -> str:
    """The procedure work() behind its gate; the report. None: for all flows."""
    if flow_slug is None:
        total = TotalReport("completed", "", mode, batch_size, max_concurrent)
        return _answer(partial(_work_for_all, plpy, total, max_seconds))
    report = Report("completed", flow_slug, mode, batch_size, max_concurrent)
    return _answer(partial(_work, plpy, report, autonomous=True, seconds=max_seconds))


def work_batch(
    plpy: Any, flow_slug: str, batch_size: int, max_concurrent: int, ignore_delay: bool
) -> str:
    """The function work_batch() behind its gate; the report."""
    report = Report("completed", flow_slug, "batch", batch_size, max_concurrent)
    return _answer(partial(_work, plpy, report, autonomous=False, ignore_delay=ignore_delay))


def replay_task(plpy: Any, run_id: str, step_slug: str, task_index: int) -> str:
    """The function replay_task() after _load(); its row as an object."""

    def replayed() -> str:
        notes: list[str] = []
        with _process(notes.append) as process:
            from pgflow_worker.replay import Replay

            replay = Replay(JoinedDatabase(plpy, process), process, run_id, step_slug, task_index)
            try:
                flow = process.call(partial(_flow, replay.flow_slug), math.inf, runs_sql=False)
                with _secrets_of(flow, replay.database):
                    replay.run(flow)
            except QueryCanceled as error:
                raise confirmed(replay.database, error) from None
            finally:
                if replay.has_used_event_loop:
                    _forget_modules()
            return replay.json(notes)

    return _answer(replayed)


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


def set_secrets(plpy: Any, path: str | None) -> str:
    """The function set_secrets(); an empty object."""
    from pgflow_worker import secrets

    def set_it() -> str:
        database = JoinedDatabase(plpy)
        directory = None if path is None else secrets.directory_to_set(database, path)
        Registry(database).set_setting("secrets", directory)
        return "{}"

    return _answer(set_it)


def set_executor(
    plpy: Any, flow_slug: str | None, address: str | None, step_slug: str | None, send_secrets: bool
) -> str:
    """The function set_executor() after _load(); an empty object."""

    def set_it() -> str:
        with _process(lambda _: None) as process:
            database = JoinedDatabase(plpy, process)
            if flow_slug is None:
                raise InvalidArgument("flow_slug is null", hint="Name one flow.")
            if flow_slug not in _flow_modules:
                hint = "Deploy its module first: select pgflow_worker.deploy(...)."
                raise UnknownFlow(f'flow "{flow_slug}" is not deployed', hint=hint)
            placement = None if address is None else Placement(address, send_secrets)
            # A row that has become useless can always be taken back.
            if placement is not None or step_slug not in _placements.get(flow_slug, {None: None}):
                from pgflow_worker.offload import check

                # So that the import of a module that hangs can be canceled.
                flow = process.call(partial(_flow, flow_slug), math.inf, runs_sql=False)
                check(flow, step_slug, address)
            with database.transaction():
                Registry(database).set_placement(flow_slug, step_slug, placement)
        return "{}"

    return _answer(set_it)


def doctor(plpy: Any) -> str:
    """The function _doctor_code() behind _load(); {"findings": [{"severity", "what", ...}]}."""

    from pgflow_worker.doctor import Examination

    def examined() -> str:
        with _process(lambda _: None) as process:
            database = JoinedDatabase(plpy, process)

            def read_secrets(flow: Flow) -> None:
                with _secrets_of(flow, database):
                    pass

            path = _settings.get("environment")
            examination = Examination(
                database, _modules.sources, _flow_modules, path, read_secrets, _placements
            )
            # So that the import of a module that hangs can be canceled.
            found = process.call(examination.findings, math.inf, runs_sql=False)
            rows = [
                {name: printable(v) if isinstance(v, str) else v for name, v in vars(f).items()}
                for f in found
            ]
            return codec.encode({"findings": rows})

    return _answer(examined)


def _load(plpy: Any, version: str, with_environment: bool) -> str:
    global _modules, _flow_modules, _settings, _placements, _revision
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
    _placements = registry.placements()
    if stored.sources != _modules.sources:
        _forget_modules()
        _modules = stored
    return "{}"


def _load_secrets(plpy: Any) -> str:
    if _awaited is not None:
        from pgflow_worker import secrets

        flow = _awaited.flow
        _awaited.values = secrets.read(JoinedDatabase(plpy), flow.slug, flow.secrets)
    return "{}"


@contextmanager
def _secrets_of(flow: Flow, database: Database) -> Iterator[dict[str, str]]:
    """The time in which a flow's handlers find its secrets; their values."""
    global _awaited
    # One without secrets must not find those of the flow that ran before.
    if not flow.secrets and "pgflow_worker.secrets" not in sys.modules:
        yield {}
        return
    from pgflow_worker import secrets

    found = _Secrets(flow)
    if flow.secrets:
        _awaited = found
        try:
            with database.transaction():
                Registry(database).load_secrets()
        finally:
            _awaited = None
    with secrets.given(flow.slug, found.values):
        yield found.values


def _activate_environment(path: str | None) -> None:
    # Imported only if there is or was one: it costs a fresh interpreter some milliseconds.
    if path is not None or "pgflow_worker.environment" in sys.modules:
        from pgflow_worker import environment

        environment.activate(path)


def _work_for_all(plpy: Any, total: TotalReport, seconds: float) -> str:
    """Work for one flow after another. Those that cannot work keep none of the others waiting:

    their first error is raised in the end.
    """
    started = time.monotonic()
    database = AutonomousDatabase(plpy)
    registry = Registry(database)
    errors: dict[str, WorkerError | DatabaseError] = {}
    try:
        for flow_slug, turn in _turns(database, total, errors, started + seconds):
            mode = "batch" if total.mode == "batch" else "drain"
            report = Report("completed", flow_slug, mode, total.batch_size, total.max_concurrent)
            is_trusted = True
            try:
                with database.transaction():
                    registry.check(flow_slug)
                    registry.load()
                is_trusted = _run(plpy, report, autonomous=True, seconds=turn)
            except (WorkerError, DatabaseError) as error:
                if not error.sqlstate.startswith("PW"):
                    raise
                errors[flow_slug] = error
            total.add(report)
            if not is_trusted:
                break
            if not report.did_something:
                # Somebody else was faster.
                time.sleep(POLL_SECONDS[1])
    finally:
        with suppress(DatabaseError, QueryCanceled):
            database.restore_session()
    if errors:
        raise next(iter(errors.values()))
    total.duration_ms = round((time.monotonic() - started) * 1000)
    return total.json()


def _turns(
    database: Database, total: TotalReport, besides: Collection[str], deadline: float
) -> Iterator[tuple[str, float]]:
    """Each time the flow whose ready task is oldest, and its seconds, until the call is to end."""
    while True:
        looked = time.monotonic()
        with database.transaction():
            following = Registry(database).next_flow(besides)
        now = time.monotonic()
        if following.flow_slug is not None:
            yield following.flow_slug, min(TURN_SECONDS, max(deadline - now, 0))
            if total.mode == "batch":
                if following.flow_slug not in besides:
                    return
            elif time.monotonic() > deadline:
                return
        elif total.mode == "wait" and now < deadline:
            # A look at many flows takes longer, and is to be a small part of the time.
            time.sleep(max(POLL_SECONDS[1], 10 * (now - looked)))
        else:
            if not total.flows:
                total.status = following.status
            for note in following.notes:
                total.note(note)
            return


def _work(plpy: Any, report: Report, **options: Any) -> str:
    _run(plpy, report, **options)
    return report.json()


def _run(
    plpy: Any,
    report: Report,
    *,
    autonomous: bool,
    seconds: float = 0.0,
    ignore_delay: bool = False,
) -> bool:
    """Work for a flow and record it; whether this process may go on to work for another."""
    started = time.monotonic()
    with _process(report.note) as process:
        database = (AutonomousDatabase if autonomous else JoinedDatabase)(plpy, process)
        try:
            # The import runs the user's code too.
            flow = process.call(partial(_flow, report.flow_slug), math.inf, runs_sql=False)
            with _secrets_of(flow, database) as values:
                worker = Worker(
                    database,
                    process,
                    flow,
                    _revision,
                    report,
                    seconds=seconds,
                    ignore_delay=ignore_delay,
                    offload=_offload(flow, process, values),
                )
                try:
                    worker.run()
                finally:
                    if worker.has_used_event_loop:
                        # What its modules keep, such as an HTTP client, is of no use in another
                        # loop.
                        _forget_modules()
            _record(database, report, started)
            return process.is_trusted
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


def _record(database: Database, report: Report, started: float, **error: str) -> None:
    """Keep the report of a call that did something or has failed."""
    report.duration_ms = round((time.monotonic() - started) * 1000)
    if error or report.did_something:
        with database.transaction():
            Registry(database).record_invocation(report.flow_slug, report.json(**error))


def _record_error(database: Database, report: Report, started: float, error: BaseException) -> None:
    report.status = "error"
    sqlstate = getattr(error, "sqlstate", "XX000")
    # That it is raised matters more than its row.
    with suppress(DatabaseError):
        _record(database, report, started, error=text_of(error), sqlstate=sqlstate)


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


def _offload(flow: Flow, process: Process, secrets: dict[str, str]) -> Offload | None:
    """The steps that run on clusters, if there are any."""
    if flow.slug not in _placements:
        return None
    # Imports asyncio, which costs a fresh interpreter 25 ms.
    from pgflow_worker.offload import Code, Offload, placed

    found = placed(flow, _placements[flow.slug])
    if not found:
        return None
    code = Code(flow.slug, _flow_modules[flow.slug], _modules.sources)
    # The text of a result is there several times while it is received and stored.
    max_bytes = (process.memory_mb << 20) // 8
    return Offload(flow, code, found, secrets, max_bytes, process.has_threads)


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
    with hiding():
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
