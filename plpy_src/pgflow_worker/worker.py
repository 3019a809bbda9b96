"""One call of work(): occupy a slot, rescue, then take messages and bring their tasks to an end."""

from __future__ import annotations

import math
import time
from threading import Event
from typing import TYPE_CHECKING

from pgflow_worker.attempt import Failure
from pgflow_worker.backlog import Backlog
from pgflow_worker.database import Database, confirmed
from pgflow_worker.definition import Definition
from pgflow_worker.errors import DatabaseError, QueryCanceled
from pgflow_worker.finisher import Finisher
from pgflow_worker.flow import Flow
from pgflow_worker.intake import LOOK_SECONDS, Intake
from pgflow_worker.pgflow import Pgflow, Task
from pgflow_worker.registry import Registry, Slot
from pgflow_worker.report import Report
from pgflow_worker.rescue import Rescuer
from pgflow_worker.runner import Result, Runner

if TYPE_CHECKING:
    from pgflow_worker.executors import Executors
    from pgflow_worker.offload import Offload
    from pgflow_worker.process import Process

# Between two looks at the queue: just after work, and when idle.
POLL_SECONDS = (0.005, 0.05)
LISTEN_SECONDS = 0.05  # between two looks whether PostgreSQL wants the call to end
BEGIN_SECONDS = 0.01  # how long concurrent handlers may take to begin
# Handlers without `tx` share a commit until they have taken so long together.
SHARED_COMMIT_SECONDS = 0.01
# From when on the report says that handlers had to wait for something that can be cured.
NOTEWORTHY_SECONDS = 1.0


class Worker:
    """A worker for one flow, from its slot to its report.

    process: which handlers run in. revision: of the modules that `flow` was loaded from. report:
    has the call's arguments, and gets what it did. seconds: ends the modes drain and wait.
    ignore_delay: also take tasks that wait for a retry or a start delay. offload: of the steps
    that run on clusters.
    """

    def __init__(
        self,
        database: Database,
        process: Process,
        flow: Flow,
        revision: str,
        report: Report,
        *,
        seconds: float,
        ignore_delay: bool = False,
        offload: Offload | None = None,
    ) -> None:
        self._database = database
        self._process = process
        self._flow = flow
        self._revision = revision
        self._report = report
        self._executors: Executors | None = None
        self._offload = offload
        self._ignore_delay = ignore_delay
        self._pgflow = Pgflow(database, flow.slug, report.note)
        self._registry = Registry(database)
        self._runner = Runner(flow, process, self._clock)
        self._finisher = Finisher(
            database, flow, self._pgflow, self._registry, self._runner, report
        )
        self._rescuer = Rescuer(database, self._pgflow, self._registry, report)
        self._backlog = (
            Backlog(flow, report.max_concurrent)
            if offload is None
            else Backlog(flow, report.max_concurrent, offload.is_held)
        )
        self._seconds = seconds
        self._results: list[Result] = []  # not stored yet
        # Of handlers on the main thread, by step: how many, and their seconds together.
        self._in_turn: dict[str, tuple[int, float]] = {}
        self._frozen_since: float | None = None
        self._has_abandoned = False

    def run(self) -> None:
        """Work until the report is complete.

        Raises FlowMismatch if code and database differ, and DatabaseError or QueryCanceled; what
        had been started is then given back.
        """
        slot = self._occupy_slot()
        if slot is None:
            return
        try:
            self._show()
            intake = Intake(
                self._database,
                self._flow,
                self._revision,
                self._report,
                self._pgflow,
                self._registry,
                self._rescuer,
                self._backlog,
                slot,
                self._seconds,
                self._offload,
            )
            self._check_flow()
            self._rescuer.rescue(slot)
            try:
                self._work(intake)
            except BaseException as error:
                self._give_up(intake, error)
                raise
            self._shut_down(wait=not self._has_abandoned)
            intake.close()
        finally:
            self._registry.unlock_all()
        self._advise()

    @property
    def has_used_event_loop(self) -> bool:
        """Whether a handler ran on the event loop, which ended with run()."""
        return self._executors is not None and self._executors.has_event_loop

    def _occupy_slot(self) -> Slot | None:
        with self._database.transaction():
            for slot in self._registry.slots(self._flow.slug):
                if slot.enabled and slot.pid is None and self._registry.try_lock(slot.lock_key):
                    self._report.worker_id, self._report.slot = slot.worker_id, slot.slot
                    return slot
        self._report.status = "skipped"
        self._report.note("the last free slot was taken at the same moment")
        return None

    def _check_flow(self) -> None:
        """Refuse code that the database does not fit; steps without a handler are only parked."""
        with self._database.transaction():
            definition = Definition(self._database, self._flow, self._pgflow.dialect)
            differences = definition.differences()
            if any(difference.matters for difference in differences):
                raise definition.mismatch(differences)
            self._pgflow.allow_sets(
                [
                    slug
                    for slug, step in self._flow.steps.items()
                    if step.kind == "map" and not step.is_transactional
                ]
            )

    def _work(self, intake: Intake) -> None:
        """Take, run and finish, until there is nothing left that this call is to do."""
        if self._ignore_delay:
            with self._database.transaction():
                self._pgflow.undelay()
        poll = POLL_SECONDS[0]
        while True:
            if not self._process.is_trusted:
                intake.is_open = False
            # Before results are stored, so that handlers run while the main thread is in SQL.
            taken = intake.take(read=not self._results)
            self._begin()
            ran = self._run_main(intake)
            stored = self._finish()
            if taken or ran or stored:
                poll = POLL_SECONDS[0]
                self._collect(0)
            elif self._backlog.is_empty and (self._report.mode != "wait" or not intake.is_open):
                return
            else:
                self._wait(intake, poll)
                poll = min(2 * poll, POLL_SECONDS[1])

    def _begin(self) -> None:
        """Hand tasks to the executors while places are free, and see them begin."""
        last: Event | None = None
        for task in self._backlog.next_concurrent():
            last = Event()
            if self._offload is not None and task.claim.step_slug in self._offload:
                self._backlog.running(task, self._offload.submit(task, last), math.inf)
                continue
            if self._executors is None:
                # Imported by the first flow that needs it: it costs a fresh interpreter 10 ms.
                from pgflow_worker.executors import Executors

                self._process.has_threads()
                self._executors = Executors(self._report.max_concurrent)
            if self._flow.steps[task.claim.step_slug].is_async:
                future = self._executors.event_loop.submit(self._run_async, task, last)
            else:
                future = self._executors.threads.submit(self._run_in_thread, task, last)
            self._backlog.running(task, future, self._clock())
        if last is not None:
            # While this thread is in SQL no other goes on.
            last.wait(BEGIN_SECONDS)
        if self._backlog.has_running:
            self._show()
        self._measure_standstill()

    async def _run_async(self, task: Task, begun: Event) -> Result:
        begun.set()
        return await self._runner.run_async(task)

    def _run_in_thread(self, task: Task, begun: Event) -> Result:
        begun.set()
        return self._runner.run_in_thread(task)

    def _shut_down(self, *, wait: bool) -> None:
        if self._offload is not None:
            self._offload.shutdown()
        if self._executors is not None:
            self._executors.shutdown(wait=wait)

    def _run_main(self, intake: Intake) -> bool:
        """Run handlers on this thread, about as many as may share a commit; whether there was one.

        One with `tx` commits by itself.
        """
        ran = False
        started = time.perf_counter()
        while (
            intake.is_open
            and self._backlog.main_may_run
            and time.perf_counter() - started < SHARED_COMMIT_SECONDS
        ):
            task = self._backlog.main[0]
            step = self._flow.steps[task.claim.step_slug]
            if step.is_transactional and self._results:
                break
            self._show(step.slug)
            ran = True
            self._backlog.main.popleft()
            if not step.is_transactional:
                self._run_without_transaction(task)
            else:
                intake.look_at_session()
                if self._run_transactional(task):
                    intake.check_session()
            if not self._process.is_trusted:
                intake.is_open = False
        return ran

    def _run_transactional(self, task: Task) -> bool:
        """Run a handler with `tx`; whether it has used it, and may have released any lock."""
        started = time.perf_counter()
        used = self._finisher.run_transactional(task)
        self._backlog.done([task.claim])
        self._backlog.learn(task.claim.step_slug, time.perf_counter() - started)
        return used

    def _run_without_transaction(self, task: Task) -> None:
        try:
            result = self._runner.run(task)
        except QueryCanceled as error:
            canceled = confirmed(self._database, error)
            self._results.append(Result(task.claim, Failure(f"canceled: {canceled}")))
            raise canceled from None
        self._results.append(result)
        slug, seconds = task.claim.step_slug, result.duration_ms / 1000
        self._backlog.learn(slug, seconds)
        number, total = self._in_turn.get(slug, (0, 0.0))
        self._in_turn[slug] = number + 1, total + seconds

    def _wait(self, intake: Intake, poll: float) -> None:
        """Let time pass, at most until there is a result or the queue is to be looked at again."""
        if not self._backlog.has_running:
            self._show()
            # In Python, because SQL would hold a snapshot. A cancel is seen at the next look.
            time.sleep(poll)
        elif intake.may_read:
            self._collect(poll)
        else:
            until = time.monotonic() + LOOK_SECONDS
            while not self._results and time.monotonic() < until:
                self._collect(LISTEN_SECONDS)
                self._listen()
            if not self._results:
                intake.look()

    def _listen(self) -> None:
        """Raise QueryCanceled if PostgreSQL wants the call to end; it looks only in SQL."""
        if self._process.interrupts.dying:
            # There are no threads that still run when the process ends, as far as can be.
            self._shut_down(wait=False)
        if self._process.interrupts.wanted:
            self._database.check_interrupts()

    def _collect(self, timeout: float) -> None:
        """Take the results of concurrent handlers, after at most `timeout` seconds without any."""
        results = self._backlog.collect(timeout)
        for result in results:
            self._backlog.learn(result.claim.step_slug, result.duration_ms / 1000)
        late = self._backlog.abandon(self._clock())
        if late:
            self._has_abandoned = True
            self._process.distrust("a handler whose time was up could not be stopped")
        self._results += results + late

    def _finish(self) -> bool:
        """Store the results; whether there were any."""
        if not self._results:
            return False
        claims = [result.claim for result in self._results]
        self._finisher.finish(self._results)
        self._backlog.done(claims)
        return True

    def _give_up(self, intake: Intake, error: BaseException) -> None:
        """After an error that is going to end the call, store what is done, give back the rest.

        A handler that runs has lost its attempt if the call was canceled, as one on the main
        thread has. After other errors it is given back, unless it must never run twice.
        """
        self._process.has_no_more_handlers()
        try:
            self._collect(0)
            self._shut_down(wait=False)
            for claim in self._backlog.running_claims():
                if isinstance(error, QueryCanceled):
                    self._results.append(Result(claim, Failure(f"canceled: {error}")))
                elif claim.max_attempts == 1:
                    self._results.append(Result(claim, Failure("the call ended with an error")))
            try:
                self._finisher.finish(self._results)
            except DatabaseError as another:
                # The same as before, mostly. What must not run twice cannot be given back.
                failure = Failure(f"the result could not be stored: {another}")
                self._finisher.finish(
                    [Result(r.claim, failure) for r in self._results if r.claim.max_attempts == 1]
                )
            finally:
                # Those that are finished are no longer ours, and are left alone. What has begun and
                # must not run twice is left to the next call, which fails it.
                unbegun = self._backlog.drop_unbegun()
                begun = [c for c in self._backlog.claims.values() if c.max_attempts > 1]
                self._rescuer.give_back([*unbegun, *begun])
                intake.give_back(self._backlog.waiting)
                intake.close()
                intake.check_session()
        except (DatabaseError, QueryCanceled) as another:
            # The error that is being raised matters more, and the next call rescues what is left.
            self._report.note(f"started tasks could not be given back: {another}")

    def _show(self, *steps: str) -> None:
        """Show in pg_stat_activity which steps run: the main thread's, and concurrent ones."""
        slugs = ",".join(sorted(self._backlog.running_steps.union(steps)))
        self._database.show(f"pgflow_worker {self._flow.slug}{slugs and '/'}{slugs}")

    def _clock(self) -> float:
        """Seconds, without those in which concurrent handlers stood still."""
        return time.monotonic() - self._database.seconds_in_sql

    def _measure_standstill(self) -> None:
        """Add the time in SQL since the last call of this, if handlers were running then."""
        now = self._database.seconds_in_sql
        if self._frozen_since is not None:
            self._report.frozen_ms += (now - self._frozen_since) * 1000
        self._frozen_since = now if self._backlog.has_running_here else None

    def _advise(self) -> None:
        """Say in the report what did not run, and what would have made this call faster."""
        if self._offload is not None:
            for note in self._offload.notes:
                self._report.note(note)
        if self._report.frozen_ms / 1000 > NOTEWORTHY_SECONDS:
            self._report.note(
                f"concurrent handlers stood still for {self._report.frozen_ms / 1000:.1f} s while "
                "the worker was in SQL: give the flow a second worker (update pgflow_worker.flows "
                f"set workers = 2 where flow_slug = '{self._flow.slug}') and a second job"
            )
        for slug, (number, seconds) in self._in_turn.items():
            # Where each took a moment: what is quick gains nothing from a thread.
            if number > 1 and seconds > max(NOTEWORTHY_SECONDS, 0.05 * number):
                self._report.note(
                    f'step "{slug}" ran {number} tasks one after another, '
                    f"{seconds / number:.2g} s each: make it async def or thread=True"
                )
