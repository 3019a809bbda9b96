"""Random flows, and random interleavings of what can happen to them, on a real database.

Handlers are held in the middle, each worker's by a lock of its own, so that every step of the
machine begins and ends with workers that wait or have ended. More of it:
make test ARGS='--hypothesis-profile=long -k state_machine'
"""

import secrets
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import connections, new_database
from tests.database.conftest import Report, Session

KINDS = ("tx", "tx", "plain", "async", "thread")
# How long a worker takes to find what there is to do, and whether it is still to do anything.
IDLE_SECONDS = 0.1
LOOK_SECONDS = 1.2
Task = tuple[str, str, int]
N = st.integers(0, 11)  # which one of those that there are, modulo their number
MODES = st.sampled_from(["batch", "drain"])
SIZES = st.sampled_from([2, 3, 1, 0])
WORKERS = st.sampled_from([2, 3, 2, 1])


@dataclass(frozen=True)
class Step:
    """A step of a random flow; `over`: the step that a map maps, None for the run's input."""

    slug: str
    kind: str
    is_map: bool
    dependencies: tuple[str, ...]
    max_attempts: int


Flow = tuple[Step, ...]


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    steps: list[Step] = []
    for n in range(draw(st.sampled_from([2, 3, 1, 4]))):
        slugs = [step.slug for step in steps]
        is_map = draw(st.integers(0, 2)) == 0
        most = min(len(slugs), 1 if is_map else 2)
        chosen = draw(st.lists(st.sampled_from(slugs), unique=True, max_size=most)) if slugs else []
        steps.append(
            Step(
                f"step{n}",
                draw(st.sampled_from(KINDS)),
                is_map,
                tuple(sorted(chosen)),
                draw(st.sampled_from([3, 2, 1])),
            )
        )
    return tuple(steps)


def feeds_map(flow: Flow, step: Step) -> bool:
    return any(other.is_map and step.slug in other.dependencies for other in flow)


def total(value: object) -> int:
    """The sum of the numbers in a list of lists."""
    return sum(map(total, value)) if isinstance(value, list) else int(str(value))


def expected(flow: Flow, flow_input: list[int]) -> dict[str, Any]:
    """What every step returns; a map, for each element. The handlers below do the same."""
    results: dict[str, Any] = {}
    for step in flow:
        inputs = [results[slug] for slug in step.dependencies]
        if step.is_map:
            results[step.slug] = [1 + element for element in (inputs or [flow_input])[0]]
        elif feeds_map(flow, step):
            results[step.slug] = list(range(total([flow_input, inputs]) % 3))
        else:
            results[step.slug] = 1 + total([flow_input, inputs])
    return results


# `home` is a directory of the test. A worker's handlers are held if there is home/hold/<pid>:
# those with `tx` by a lock, the others until the file is gone that they make in home/held.
MODULE = """
import asyncio, os, time
from pgflow_worker import Retry, Snooze

flow = Flow("f", base_delay=1)
home = {home!r}

def total(value):
    return sum(map(total, value)) if isinstance(value, list) else value

def begin(ctx, kind):
    with open(home + "/begun", "a") as file:
        file.write(ctx.idempotency_key + "\\n")
    held = f"{{home}}/held/{{os.getpid()}}-{{kind}}-{{time.monotonic_ns()}}"
    if kind != "tx" and os.path.exists(f"{{home}}/hold/{{os.getpid()}}"):
        open(held, "w").close()
    return held

def end(ctx, tx=None):
    try:
        with open(home + "/broken/" + ctx.step_slug) as file:
            how = file.read()
    except FileNotFoundError:
        return
    if how == "final":
        raise Fail("broken for good")
    if how == "retry":
        raise Retry("broken", after=60)
    if how == "snooze":
        raise Snooze("not yet", after=60)
    if how == "sql" and tx:
        tx.execute("select 1 / 0")
    raise ValueError("broken")
"""
HANDLERS = {
    "tx": """
def {slug}({parameters}, ctx: Context, tx: Transaction):
    begin(ctx, "tx")
    tx.execute(
        "insert into effects values ($1::text::uuid, $2, $3)",
        [ctx.run_id, ctx.step_slug, ctx.task_index],
    )
    tx.execute("select pg_advisory_xact_lock_shared(pg_backend_pid())")
    end(ctx, tx)
    return {result}
""",
    "plain": """
def {slug}({parameters}, ctx: Context):
    held = begin(ctx, "{kind}")
    while os.path.exists(held):
        time.sleep(0.002)
    end(ctx)
    return {result}
""",
    "async": """
async def {slug}({parameters}, ctx: Context):
    held = begin(ctx, "async")
    while os.path.exists(held):
        await asyncio.sleep(0.002)
    end(ctx)
    return {result}
""",
}
HANDLERS["thread"] = HANDLERS["plain"]


def source(flow: Flow, home: Path, version: int) -> str:
    """The text of the module that defines the flow."""
    text = MODULE.format(home=str(home)) + f"\nversion = {version}\n"
    for step in flow:
        options = f"max_attempts={step.max_attempts}"
        if step.kind == "thread":
            options += ", thread=True"
        if step.is_map:
            over = "".join(f", over={slug}" for slug in step.dependencies)
            text += f"\n@flow.map({options}{over})"
            parameters, result = "element", "1 + element"
        else:
            text += f"\n@flow.{'array' if feeds_map(flow, step) else 'step'}({options})"
            parameters = ", ".join(("flow_input", *step.dependencies))
            result = f"1 + total([{parameters}])"
            if feeds_map(flow, step):
                result = f"list(range(total([{parameters}]) % 3))"
        text += HANDLERS[step.kind].format(
            slug=step.slug, kind=step.kind, parameters=parameters, result=result
        )
    return text


class Caller:
    """A session that calls work(), and its call that has not ended."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.pid = session.connection.info.backend_pid
        self.call: Future[Report] | None = None
        self.mode = ""
        self.places = 0
        self.is_held = False
        # What it holds when it takes nothing more: it has closed, or a suspect runs alone.
        self.content: list[Path] = []


class Machine(RuleBasedStateMachine):
    """One flow with its runs, three sessions that work, and one that watches and interferes.

    Between two steps every call has ended, or waits with what it holds.
    """

    server: PostgreSQLExecutor
    template: str

    def __init__(self) -> None:
        super().__init__()
        self.flow: Flow = ()
        self.most: dict[str, int] = {}  # attempts that a step has ever had
        self.version = 0
        self.inputs: dict[str, list[int]] = {}  # of the runs
        self.taken_away: set[Task] = set()
        self.snoozed: set[str] = set()
        self.stack = ExitStack()

    # What happens

    @initialize(
        chance=st.integers(0, 99),
        flow=flows(),
        sizes=st.lists(SIZES, min_size=2, max_size=3),
        workers=WORKERS,
    )
    def deploy(self, chance: int, flow: Flow, sizes: list[int], workers: int) -> None:
        assume(chance)  # Hypothesis begins with what is simplest, every time
        self.pool = ThreadPoolExecutor()
        self.stack.callback(self.pool.shutdown)
        self.home = Path(self.stack.enter_context(TemporaryDirectory()))
        for name in ("hold", "held", "broken"):
            (self.home / name).mkdir()
        (self.home / "begun").touch()
        database = self.stack.enter_context(new_database(self.server, self.template))
        self.connect = self.stack.enter_context(connections(self.server, database))
        self.session = Session(self.connect())
        self.session.run("create table effects (run_id uuid, step_slug text, task_index int)")
        self.callers = [Caller(Session(self.connect())) for _ in range(3)]
        self.stack.callback(self._end)
        self.flow = flow
        self.most = {step.slug: step.max_attempts for step in flow}
        self._deploy()
        self._set_workers(workers)
        for size in sizes:
            self._start(size)

    @rule(size=SIZES)
    def start(self, size: int) -> None:
        self._start(size)
        self._settle()

    @rule(n=N, batch_size=st.integers(1, 5), places=st.integers(1, 3), mode=MODES)
    def work(self, n: int, batch_size: int, places: int, mode: str) -> None:
        self._work(n, batch_size, places, mode)

    @rule(n=N, batch_size=st.integers(1, 5), places=st.integers(1, 3), mode=MODES)
    def work_and_hold(self, n: int, batch_size: int, places: int, mode: str) -> None:
        """Call work(), and hold its handlers in the middle."""
        self._work(n, batch_size, places, mode, hold=True)

    @rule(n=N, all_of_them=st.booleans())
    def go_on(self, n: int, *, all_of_them: bool) -> None:
        """Let the oldest handler that a worker holds go on, or all from now on."""
        if caller := self._busy(n):
            if all_of_them:
                self._let_go(caller)
            elif held := self._held(caller):
                held[0].unlink()
            elif caller.is_held:
                # Whoever waits gets the lock, and its transaction ends before it is ours again.
                self.session.run("select pg_advisory_unlock(%s)", caller.pid)
                self.session.run("select pg_advisory_lock(%s)", caller.pid)
            self._settle()

    @rule(n=N)
    def terminate(self, n: int) -> None:
        if caller := self._busy(n):
            self.session.run("select pg_terminate_backend(%s)", caller.pid)
            # In Python it may not notice that before the handler returns.
            self._let_go(caller)
            assert isinstance(self._error(caller), psycopg.OperationalError)
            self.session.until(
                "select not exists (select from pg_stat_activity where pid = %s)", caller.pid
            )
            self.callers[self.callers.index(caller)] = Caller(Session(self.connect()))
            self._settle()

    @rule(n=N)
    def cancel(self, n: int) -> None:
        if caller := self._busy(n):
            self.session.run("select pg_cancel_backend(%s)", caller.pid)
            if self._is_on_main_thread(caller):
                self._let_go(caller)
            assert isinstance(self._error(caller), psycopg.errors.QueryCanceled)
            self._let_go(caller)  # threads go on after the call
            caller.call = None
            self._settle()

    @rule(n=N)
    def take_away(self, n: int) -> None:
        """Queue a started task again while its handler runs, as pgflow does if it has stalled."""
        self._take_away(n)

    @rule(n=N, mode=MODES)
    def take_away_and_work(self, n: int, mode: str) -> None:
        """The same, and the task runs again at once, elsewhere if there is a slot."""
        self._take_away(n)
        self._work(n, batch_size=1, places=1, mode=mode)

    @rule(n=N, how=st.sampled_from(["error", "sql", "final", "retry", "snooze", None]))
    def break_step(self, n: int, how: str | None) -> None:
        """Let a step's handlers fail, or no longer."""
        slug = self.flow[n % len(self.flow)].slug
        path = self.home / "broken" / slug
        if how == "snooze":
            self.snoozed.add(slug)
        if how is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(how)

    @rule(
        n=N,
        what=st.sampled_from(
            ["time passes", "pause", "resume", "slots", "deploy", "deploy code", "deploy options"]
        ),
    )
    def interfere(self, n: int, what: str) -> None:
        """Do what else may happen meanwhile."""
        if what == "time passes":
            self._pass_time()
        elif what == "slots":
            self._set_workers(1 + n % 3)
        elif what in ("pause", "resume"):
            self.session.run(f"select pgflow_worker.{what}('f')")
        else:
            self.version += what == "deploy code"
            if what == "deploy options":
                self._set_attempts(n % len(self.flow), 1 + n % 3)
            self._deploy()
        self._settle()

    # What must be true

    @invariant()
    def nothing_happens_twice_or_by_half(self) -> None:
        assert self._messages_of_ended_runs() == []
        steps = {step.slug: step for step in self.flow}
        results = {run: expected(self.flow, values) for run, values in self.inputs.items()}
        tasks = self.session.rows(
            """
            select task.run_id::text, task.step_slug, task.task_index, task.status,
                task.attempts_count, task.output,
                (select count(*) from effects as effect
                 where (effect.run_id, effect.step_slug, effect.task_index)
                    = (task.run_id, task.step_slug, task.task_index)),
                (select count(*) from pgflow_worker.attempts as attempt
                 where (attempt.run_id, attempt.step_slug, attempt.task_index)
                    = (task.run_id, task.step_slug, task.task_index)
                    and attempt.outcome = 'completed')
            from pgflow.step_tasks as task order by task.message_id
            """
        )
        begun = Counter((self.home / "begun").read_text().split())
        for run, slug, index, status, attempts, output, effects, completions in tasks:
            step = steps[slug]
            completed = status == "completed"
            assert completions == completed
            assert effects == (completed and step.kind == "tx")
            assert attempts <= self.most[slug]
            if completed:
                result = results[run][slug]
                assert output == (result[index] if step.is_map else result)
            times = begun[f"{run}/{slug}/{index}"]
            assert times >= completed
            again = slug in self.snoozed or (run, slug, index) in self.taken_away
            assert times <= 1 or self.most[slug] > 1 or again

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None and self.flow:
                self._bring_to_end()
        finally:
            self.stack.close()

    def _end(self) -> None:
        """Whatever still runs ends, so that its thread does."""
        self.session.run(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        for held in (self.home / "held").iterdir():
            held.unlink()

    def _messages_of_ended_runs(self) -> list[tuple[Any, ...]]:
        return self.session.rows(
            "select run.status, message.message from pgmq.q_f as message "
            "join pgflow.runs as run on run.run_id = (message.message ->> 'run_id')::uuid "
            "where run.status <> 'started'"
        )

    def _bring_to_end(self) -> None:
        """No run is lost: with nothing in the way, all end."""
        for path in (self.home / "broken").iterdir():
            if path.read_text() == "snooze":
                path.unlink()
        for caller in self.callers:
            self._let_go(caller)
        self._settle()
        self.session.run("select pgflow_worker.resume('f')")
        worker = Session(self.connect())
        for _ in range(40):
            self._pass_time()
            worker.work("f", mode="drain")
            if not self.session.value("select count(*) from pgflow.runs where status = 'started'"):
                break
        assert set(self.session.rows("select status from pgflow.runs")) <= {
            ("completed",),
            ("failed",),
        }
        assert self.session.rows("select from pgflow.step_tasks where status = 'started'") == []
        self.nothing_happens_twice_or_by_half()

    def _work(self, n: int, batch_size: int, places: int, mode: str, *, hold: bool = False) -> None:
        free = [caller for caller in self.callers if caller.call is None]
        if not free:
            return
        caller = free[n % len(free)]
        if hold:
            (self.home / "hold" / str(caller.pid)).touch()
            self.session.run("select pg_advisory_lock(%s)", caller.pid)
        caller.is_held, caller.mode, caller.places = hold, mode, places
        call = caller.call = self.pool.submit(
            caller.session.work, "f", mode=mode, batch_size=batch_size, max_concurrent=places
        )
        self._settle()
        if not call.done() or call.result()["slot"] is not None:
            assert self._orphans() == []

    def _take_away(self, n: int) -> None:
        self._busy(n)
        started = self.session.rows(
            "select run_id::text, step_slug, task_index, message_id from pgflow.step_tasks "
            "where status = 'started' order by message_id"
        )
        if started:
            run_id, step_slug, task_index, message_id = started[n % len(started)]
            self.taken_away.add((run_id, step_slug, task_index))
            # The attempt is not counted, so that the next one has the same number.
            self.session.run(
                "update pgflow.step_tasks set status = 'queued', started_at = null, "
                "last_worker_id = null, attempts_count = attempts_count - 1 "
                "where message_id = %s",
                message_id,
            )
            self.session.run(
                "update pgmq.q_f set vt = clock_timestamp() where msg_id = %s", message_id
            )
            self._settle()

    def _orphans(self) -> list[tuple[Any, ...]]:
        """What is started, and not by a worker that lives."""
        return self.session.rows(
            "select task.step_slug, task.task_index from pgflow.step_tasks as task left join "
            "pgflow_worker._slots('f') as slot on slot.worker_id = task.last_worker_id "
            "where task.status = 'started' and slot.pid is null"
        )

    def _deploy(self) -> None:
        self.session.deploy(source(self.flow, self.home, self.version))

    def _set_attempts(self, n: int, max_attempts: int) -> None:
        step = replace(self.flow[n], max_attempts=max_attempts)
        self.flow = (*self.flow[:n], step, *self.flow[n + 1 :])
        self.most[step.slug] = max(self.most[step.slug], max_attempts)

    def _start(self, size: int) -> None:
        flow_input = list(range(size))
        self.inputs[self.session.start("f", flow_input)] = flow_input

    def _set_workers(self, workers: int) -> None:
        self.session.run("update pgflow_worker.flows set workers = %s", workers)

    def _pass_time(self) -> None:
        """Show all messages: those that wait for a retry, and those that somebody has read."""
        self.session.run("update pgmq.q_f set vt = clock_timestamp()")

    def _busy(self, n: int) -> Caller | None:
        """A session whose call has not ended. One or two are made, if there are fewer."""
        for _ in range(1 + n % 2 - len(self._all_busy())):
            self._work(n, batch_size=2, places=2, mode="drain", hold=True)
        busy = self._all_busy()
        return busy[n // 2 % len(busy)] if busy else None

    def _all_busy(self) -> list[Caller]:
        return [caller for caller in self.callers if caller.call is not None]

    def _held(self, caller: Caller) -> list[Path]:
        """The files of handlers without `tx` that a worker holds, oldest first."""
        found = (self.home / "held").glob(f"{caller.pid}-*")
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def _let_go(self, caller: Caller) -> None:
        if caller.is_held:
            (self.home / "hold" / str(caller.pid)).unlink()
            self.session.run("select pg_advisory_unlock(%s)", caller.pid)
            caller.is_held = False
        for held in self._held(caller):
            held.unlink()

    def _error(self, caller: Caller) -> BaseException | None:
        assert caller.call is not None
        return caller.call.exception(timeout=20)

    def _is_on_main_thread(self, caller: Caller) -> bool:
        """Whether the handler that is held keeps the worker from everything else."""
        return any("-plain-" in held.name for held in self._held(caller)) or bool(
            self.session.value(
                "select exists (select from pg_locks "
                "where pid = %s and locktype = 'advisory' and not granted)",
                caller.pid,
            )
        )

    def _settle(self) -> None:
        """Wait until every call has ended, or waits for what is held. None may have failed."""
        deadline = time.monotonic() + 20
        seen: object = None
        since = 0.0
        while time.monotonic() < deadline:
            polling, patience = self._look()
            if polling == []:
                return
            if polling is None or polling != seen:
                seen, since = polling, time.monotonic()
            elif time.monotonic() - since > patience:
                for caller in self._all_busy():
                    caller.content = self._held(caller) if patience == LOOK_SECONDS else []
                return
            time.sleep(0.005)
        pytest.fail("a worker neither ends nor waits for what is held")

    def _look(self) -> tuple[list[object] | None, float]:
        """What workers hold that are not stopped by it, but go on looking for more.

        None if a worker is under way, else also how long to look whether that changes.
        """
        polling: list[object] = []
        patience = IDLE_SECONDS
        for caller in self.callers:
            if caller.call is None:
                continue
            if caller.call.done():
                assert caller.call.result()["status"] in ("completed", "paused", "skipped")
                self._let_go(caller)
                caller.call = None
            elif not self._is_on_main_thread(caller):
                held = self._held(caller)
                if not held or not caller.is_held:
                    return None, patience
                [(tasks, visible)] = self.session.rows(
                    "select (select array_agg(status order by message_id) from pgflow.step_tasks), "
                    "exists (select from pgmq.q_f where vt <= clock_timestamp())"
                )
                polling.append((held, tasks, visible))
                could = caller.mode == "drain" and len(held) < caller.places
                if visible and could and held != caller.content:
                    patience = LOOK_SECONDS
        return polling, patience


def examine(server: PostgreSQLExecutor, template: str, chosen: settings, number: int) -> None:
    @seed(number)
    class OnServer(Machine):
        pass

    OnServer.server, OnServer.template = server, template
    run_state_machine_as_test(
        OnServer,
        settings=settings(
            chosen, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        ),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One example for each of many seeds, since those of one seed resemble each other.

    The profile `long` has many of one.
    """
    numbers: list[Any] = list(range(20))
    if metafunc.config.getoption("--hypothesis-profile") == "long":
        numbers = [pytest.param(secrets.randbits(32), marks=pytest.mark.timeout(0))]
    metafunc.parametrize("number", numbers)


def test_no_task_is_lost_and_nothing_happens_twice(
    server: PostgreSQLExecutor, template: str, pytestconfig: pytest.Config, number: int
) -> None:
    if pytestconfig.getoption("--hypothesis-profile") == "long":
        chosen = settings.get_profile("long")
    else:
        # What fails is shown as it is: to make it smaller takes minutes.
        chosen = settings(max_examples=1, stateful_step_count=20, phases=[Phase.generate])
    examine(server, template, chosen, number)
