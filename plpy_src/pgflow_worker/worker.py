"""One call of work(): occupy a slot, rescue, then read, start and run tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pgflow_worker.database import Database
from pgflow_worker.deploy import mismatch
from pgflow_worker.errors import DatabaseError
from pgflow_worker.flow import Flow, Role
from pgflow_worker.pgflow import Claim, Message, Pgflow, Task
from pgflow_worker.registry import Registry, Slot
from pgflow_worker.report import Report
from pgflow_worker.rescue import Rescuer
from pgflow_worker.runner import TaskRunner

READ_VISIBILITY = 60  # seconds a message may wait between being read and being started
PARK_SECONDS = 300
HEARTBEAT_SECONDS = 5.0
POLL_SECONDS = (0.02, 0.5)  # between two looks at the queue: just after work, and when idle


class Worker:
    """A worker for one flow, from its slot to its report.

    revision: of the modules that `flow` was loaded from. report: has the call's arguments, and
    gets what it did. seconds: ends the modes drain and wait. ignore_delay: also take tasks that
    wait for a retry or a start delay.
    """

    def __init__(
        self,
        database: Database,
        flow: Flow,
        revision: str,
        report: Report,
        *,
        seconds: float,
        ignore_delay: bool = False,
    ) -> None:
        self._database = database
        self._flow = flow
        self._revision = revision
        self._report = report
        self._ignore_delay = ignore_delay
        self._pgflow = Pgflow(database, flow.slug)
        self._registry = Registry(database)
        self._runner = TaskRunner(database, flow, self._pgflow, self._registry)
        self._rescuer = Rescuer(database, self._pgflow, self._registry, report)
        self._deadline = time.monotonic() + seconds
        self._last_beat = float("-inf")
        self._slot_at_risk = False
        self._waiting: list[Message] = []
        self._waiting_since = 0.0
        self._claims: list[Claim] = []
        # Steps whose tasks do not get the run's input with their own.
        self._with_run_input = frozenset(
            slug
            for slug, step in flow.steps.items()
            if step.kind == "map" and step.wants(Role.FLOW_INPUT)
        )

    def run(self) -> None:
        """Work until the report is complete.

        Raises FlowMismatch if code and database differ, and DatabaseError or QueryCanceled; what
        had been started is then given back.
        """
        slot = self._occupy_slot()
        if slot is None:
            return
        try:
            self._check_flow()
            self._rescuer.rescue(slot)
            try:
                self._work(slot)
            except BaseException:
                self._give_up(slot)
                raise
            self._stop(slot)
        finally:
            self._registry.unlock(slot)

    def _occupy_slot(self) -> Slot | None:
        with self._database.transaction():
            for slot in self._registry.slots(self._flow.slug):
                if slot.enabled and slot.pid is None and self._registry.try_lock(slot):
                    self._report.worker_id, self._report.slot = slot.worker_id, slot.slot
                    return slot
        self._report.status = "skipped"
        self._report.note("the last free slot was taken at the same moment")
        return None

    def _check_flow(self) -> None:
        """Refuse code that the database does not fit; steps without a handler are only parked."""
        with self._database.transaction():
            differences = self._pgflow.differences(self._flow)
            if any(difference.matters for difference in differences):
                raise mismatch(self._flow.slug, differences, self._pgflow.count_runs())

    def _work(self, slot: Slot) -> None:
        if self._ignore_delay:
            with self._database.transaction():
                self._pgflow.undelay()
        interval = POLL_SECONDS[0]
        while True:
            found = self._read()
            if not self._run_messages(slot) or self._report.mode == "batch":
                return
            if self._time_is_up() or (self._report.mode == "drain" and not found):
                return
            if self._code_is_old():
                self._report.note(
                    "new code was deployed: the call ended for the next one to run it"
                )
                return
            if found:
                interval = POLL_SECONDS[0]
            else:
                # In Python, because SQL would hold a snapshot. A cancel is seen at the next look.
                time.sleep(interval)
                interval = min(2 * interval, POLL_SECONDS[1])

    def _read(self) -> bool:
        """Take a batch of messages into `_waiting`; whether there was any.

        Those without a handler are parked, those too new for this transaction left.
        """
        self._waiting_since = time.monotonic()
        with self._database.transaction():
            messages = self._pgflow.read(self._report.batch_size, READ_VISIBILITY)
            too_new = [m for m in messages if m.too_new]
            known = [m for m in messages if not m.too_new and m.step_slug in self._flow.steps]
            parked = [m for m in messages if m not in too_new and m not in known]
            self._set_visibility(too_new, 0)
            self._set_visibility(parked, PARK_SECONDS)
        self._report.parked += len(parked)
        for message in parked:
            self._report.note(
                f'step "{message.step_slug}" has no handler: its messages are parked for '
                f"{PARK_SECONDS} s at a time, without an attempt"
            )
        self._waiting = known
        return bool(messages)

    def _run_messages(self, slot: Slot) -> bool:
        """Start and run the tasks one after another; False if the call is to end early."""
        while self._waiting:
            if not self._may_go_on(slot):
                self._give_back_messages()
                return False
            if not self._keep_invisible():
                return True
            tasks = self._start(slot, self._waiting.pop(0))
            self._claims = [task.claim for task in tasks]
            for task in tasks:
                self._report.count(self._runner.run(task))
                self._claims.remove(task.claim)
                step = self._flow.steps[task.claim.step_slug]
                self._slot_at_risk = step.wants(Role.TRANSACTION)
        return True

    def _keep_invisible(self) -> bool:
        """Keep the messages that wait from others; False if others may have them already."""
        waited = time.monotonic() - self._waiting_since
        if waited > READ_VISIBILITY - 5:
            self._waiting = []
            return False
        if waited > READ_VISIBILITY / 3:
            with self._database.transaction():
                self._set_visibility(self._waiting, READ_VISIBILITY)
            self._waiting_since = time.monotonic()
        return True

    def _may_go_on(self, slot: Slot) -> bool:
        """Whether another task may be started: not paused, in time, and the slot still ours."""
        if self._report.mode != "batch" and self._time_is_up():
            return False
        with self._database.transaction():
            reason = self._registry.pause_reason(self._flow.slug)
            if reason is not None:
                self._report.status = "paused"
                self._report.note(reason)
            lost = self._slot_at_risk and not self._registry.holds(self._flow.slug, slot)
        if lost:
            self._report.note("a handler released the worker's advisory lock: the call ended early")
        return reason is None and not lost

    def _start(self, slot: Slot, message: Message) -> list[Task]:
        """Start a message's task in a transaction of its own, which makes the attempt durable."""
        with self._database.transaction(durable=True):
            self._beat(slot)
            ids = [message.message_id]
            tasks = self._pgflow.start(ids, slot.worker_id, self._with_run_input)
            if not tasks and self._pgflow.archive_stale(ids):
                self._report.note("messages whose task was over or gone were archived")
        return tasks

    def _code_is_old(self) -> bool:
        with self._database.transaction():
            return self._registry.revision() != self._revision

    def _beat(self, slot: Slot) -> None:
        now = time.monotonic()
        if now - self._last_beat >= HEARTBEAT_SECONDS:
            self._pgflow.beat(slot.worker_id)
            self._last_beat = now

    def _stop(self, slot: Slot) -> None:
        if self._last_beat != float("-inf"):
            with self._database.transaction():
                self._pgflow.stopped(slot.worker_id)

    def _give_up(self, slot: Slot) -> None:
        """Give back what is started, after an error that is going to end the call."""
        try:
            self._rescuer.give_back(self._claims)
            self._give_back_messages()
            self._stop(slot)
        except DatabaseError as error:
            # The error that is being raised matters more, and the next call rescues what is left.
            self._report.note(f"started tasks could not be given back: {error}")

    def _give_back_messages(self) -> None:
        """Make visible again what was read and not started."""
        with self._database.transaction():
            self._set_visibility(self._waiting, 0)

    def _set_visibility(self, messages: Sequence[Message], seconds: int) -> None:
        self._pgflow.set_visibility([m.message_id for m in messages], [seconds] * len(messages))

    def _time_is_up(self) -> bool:
        return time.monotonic() >= self._deadline
