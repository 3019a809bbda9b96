"""Take work: read messages, start their tasks, give back what will not begin."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

from pgflow_worker.backlog import Backlog
from pgflow_worker.database import Database, retrying
from pgflow_worker.errors import DatabaseError
from pgflow_worker.flow import Flow
from pgflow_worker.parameters import Role
from pgflow_worker.pgflow import Message, Pgflow
from pgflow_worker.registry import LeftBehind, Registry, Slot
from pgflow_worker.report import Report
from pgflow_worker.rescue import Rescuer

if TYPE_CHECKING:
    from pgflow_worker.offload import Offload

READ_VISIBILITY = 60  # seconds a message may wait between being read and being started
PARK_SECONDS = 300
CROWDED_SECONDS = 2  # a task waits that may only run when no other of its kind does
HEARTBEAT_SECONDS = 5.0
STATISTICS_SECONDS = 1.0  # between two looks at how the tables have grown
# Between two looks at the server while handlers run: for a pause, new code, or a cancel.
LOOK_SECONDS = 1.0


class Intake:
    """Fills the backlog of the worker that has a slot. `is_open`: whether it still does.

    revision: of the modules that `flow` was loaded from. seconds: after which nothing is taken any
    more in the modes drain and wait. offload: of the steps that run on clusters.
    """

    def __init__(
        self,
        database: Database,
        flow: Flow,
        revision: str,
        report: Report,
        pgflow: Pgflow,
        registry: Registry,
        rescuer: Rescuer,
        backlog: Backlog,
        slot: Slot,
        seconds: float,
        offload: Offload | None = None,
    ) -> None:
        self._database = database
        self._flow = flow
        self._revision = revision
        self._report = report
        self._pgflow = pgflow
        self._registry = registry
        self._rescuer = rescuer
        self._backlog = backlog
        self._slot = slot
        self._offload = offload
        self._before: LeftBehind | None = None
        self._deadline = time.monotonic() + seconds
        self._may_read = True
        self._waiting_since = 0.0
        self._last_beat = float("-inf")
        self._has_started = False
        self._last_statistics = float("-inf")
        self._last_look = time.monotonic()
        self._reads_again = 0.0
        self.is_open = True

    @cached_property
    def _with_run_input(self) -> frozenset[str]:
        """The steps whose tasks do not get the run's input with their own, and want it."""
        return frozenset(
            slug
            for slug, step in self._flow.steps.items()
            if step.wants(Role.FLOW_INPUT)
            and (step.kind == "map" or not self._pgflow.dialect.input_has_run)
        )

    @property
    def may_read(self) -> bool:
        """Whether another message could be read and begin now."""
        if not self.is_open or not self._may_read:
            return False
        # Not what was just given back, while there is something else to do.
        waits = time.monotonic() < self._reads_again and not self._backlog.is_empty
        return self._backlog.has_free_place and not waits

    def take(self, *, read: bool) -> bool:
        """Start what can begin soon, and read more if that is nothing; whether there was any.

        read: whether this is the moment to read.
        """
        now = time.monotonic()
        if self._report.mode != "batch" and now >= self._deadline:
            self.is_open = False
        if self.is_open and self._backlog.claims and now - self._last_look > LOOK_SECONDS:
            self.look()
            if self._report.mode != "batch":
                self._rescuer.give_back(self._backlog.drop_late())
        if not self.is_open:
            self._give_back_unbegun()
            return False
        if not self._backlog.claims:
            self._registry.unlock_suspects()
        self._keep_invisible()
        self._let_rest()
        found = False
        chosen = self._backlog.startable()
        room = self._report.batch_size - len(self._backlog.waiting)
        if read and not chosen and room > 0 and self.may_read:
            found = self._read(room)
            chosen = self._backlog.startable()
        if chosen and self.is_open:
            self._renew_statistics()
            # The worker's row may have been deleted since it was written.
            retrying(partial(self._start, chosen), also=["23503"])
        far = self._backlog.far() if self._report.mode != "batch" else []
        if far:
            self.give_back(far)
            self._reads_again = time.monotonic() + LOOK_SECONDS
        return found or bool(chosen)

    def look(self) -> None:
        """See whether to go on while handlers run, and tell that the worker lives."""
        with self._database.transaction():
            self._may_go_on()
            self._beat()

    def look_at_session(self) -> None:
        """Before a handler's SQL: what is there already is somebody else's."""
        if self._before is None:
            with self._database.transaction():
                self._before = self._registry.left_behind()

    def check_session(self) -> None:
        """Clean up what a handler's SQL has left in the session.

        Take nothing more if it has released the slot: others may have it now.
        """
        if self._before is None:
            return
        with self._database.transaction():
            left = self._registry.left_behind()
        if left.lost:
            self._report.note("a handler released the worker's advisory lock: the call ended early")
            self.is_open = False
        if not self._database.is_autonomous:
            return
        if left.locks > self._before.locks == 0:
            with self._database.transaction():
                self._registry.release_foreign_locks()
            self._report.note("a handler left advisory locks behind: they were released")
        if left.temporary and not self._before.temporary:
            self._database.discard_temporary()
            self._report.note("a handler left temporary objects behind: they were dropped")

    def give_back(self, messages: Sequence[Message]) -> None:
        """Make visible again what was read and not started."""
        if messages and not self._is_too_late:
            retrying(partial(self._show, messages, 0))
        self._backlog.forget(messages)

    def close(self) -> None:
        """Mark the worker's row as stopped, if there is one."""
        if self._has_started:
            with self._database.transaction():
                self._pgflow.stopped(self._slot.worker_id)

    def _read(self, quantity: int) -> bool:
        """Take up to so many messages; whether there were any.

        Those without a handler are parked, those too new for this transaction left.
        """
        with self._database.transaction():
            ready = self._pgflow.is_ready()
            if not ready and time.monotonic() - self._last_look < LOOK_SECONDS:
                return False
            if not self._may_go_on():
                return False
            if self._backlog.claims:
                self._beat()
            messages = self._pgflow.read(quantity, READ_VISIBILITY) if ready else []
            too_new = [m for m in messages if m.too_new]
            old = [m for m in messages if not m.too_new]
            known = [m for m in old if m.step_slug in self._flow.steps]
            unknown = [m for m in old if m.step_slug not in self._flow.steps]
            parked = [m for m in unknown if m.step_slug is not None]
            self._archive_stale([m.message_id for m in unknown if m.step_slug is None])
            self._pgflow.set_visibility(
                [m.message_id for m in too_new],
                # Hardly ever more than a moment; but a clock can have been set back.
                [min(int(m.seconds_ahead), READ_VISIBILITY) for m in too_new],
            )
            self._set_visibility(parked, PARK_SECONDS)
        self._report.parked += len(parked)
        for message in parked:
            self._report.note(
                f'step "{message.step_slug}" has no handler: its messages are parked for '
                f"{PARK_SECONDS} s at a time, without an attempt"
            )
        if not self._backlog.waiting:
            self._waiting_since = time.monotonic()
        self._backlog.waiting += known
        self._may_read = self._report.mode != "batch"
        return bool(messages)

    def _start(self, messages: Sequence[Message]) -> None:
        """Start the messages' tasks in one transaction, which makes the attempts durable."""
        try:
            with self._database.transaction(durable=True):
                if not self._may_go_on() or self._is_crowded(messages):
                    return
                self._beat()
                if not self._has_started:
                    self._registry.set_living(self._slot.worker_id)
                tasks, failed = self._pgflow.start(
                    messages, self._slot.worker_id, self._with_run_input, self._backlog.brief_steps
                )
                started = {task.claim.message_id for task in tasks}
                self._archive_stale([m.message_id for m in messages if m.message_id not in started])
        except DatabaseError:
            self._last_beat = float("-inf")  # it was rolled back
            raise
        self._has_started = True
        for _ in range(failed):
            self._report.count("failed")
        self._backlog.add(messages, tasks)

    def _archive_stale(self, message_ids: Sequence[int]) -> None:
        if message_ids and self._pgflow.archive_stale(message_ids):
            self._report.note("messages whose task was over or gone were archived")

    def _is_crowded(self, messages: Sequence[Message]) -> bool:
        """Give a task back that may have crashed the server, while another session runs one.

        When it crashes again, the one that was running is to blame.
        """
        if not any(message.crashed for message in messages):
            self._registry.unlock_suspects()
        elif not self._registry.try_lock_suspects():
            self._set_visibility(messages, CROWDED_SECONDS)
            self._backlog.forget(messages)
            return True
        return False

    def _may_go_on(self) -> bool:
        """Whether another task may be started: not paused, no newer code."""
        self._last_look = time.monotonic()
        state = self._registry.state(self._flow.slug)
        if state.pause_reason is not None:
            self._report.status = "paused"
            self._report.note(state.pause_reason)
            self.is_open = False
        elif state.revision != self._revision:
            self._report.note("new code was deployed: the call ended for the next one to run it")
            self.is_open = False
        return self.is_open

    def _renew_statistics(self) -> None:
        """Analyze tables that have outgrown their statistics.

        The changes that a CALL makes are told to autovacuum when it ends. Until then pgflow's
        functions would go on with plans that were made for small tables.
        """
        now = time.monotonic()
        if now - self._last_statistics >= STATISTICS_SECONDS:
            self._last_statistics = now
            with self._database.transaction():
                tables = self._pgflow.outgrown()
            self._database.analyze(tables)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= HEARTBEAT_SECONDS:
            self._pgflow.beat(self._slot.worker_id)
            self._last_beat = now

    def _give_back_unbegun(self) -> None:
        """Give back what was read or started and has not begun."""
        self._rescuer.give_back(self._backlog.drop_unbegun())
        self.give_back(self._backlog.waiting)

    @property
    def _is_too_late(self) -> bool:
        """Whether others may have the messages that wait already."""
        return time.monotonic() - self._waiting_since > READ_VISIBILITY - 5

    def _keep_invisible(self) -> None:
        """Keep the messages that wait from others."""
        if not self._backlog.waiting:
            return
        if self._is_too_late:
            self._backlog.forget(self._backlog.waiting)
        elif time.monotonic() - self._waiting_since > READ_VISIBILITY / 3:
            retrying(partial(self._show, self._backlog.waiting, READ_VISIBILITY))
            self._waiting_since = time.monotonic()

    def _let_rest(self) -> None:
        """Let messages rest whose tasks cannot be sent to their cluster now."""
        if self._offload is None:
            return
        from pgflow_worker.cluster import REST_SECONDS

        waiting = self._backlog.waiting
        slugs = {message.step_slug for message in waiting if message.step_slug is not None}
        troubles = {slug: self._offload.trouble(slug) for slug in slugs}
        resting = [m for m in waiting if m.step_slug and troubles[m.step_slug] is not None]
        if not resting:
            return
        retrying(partial(self._show, resting, REST_SECONDS))
        self._backlog.forget(resting)
        self._report.parked += len(resting)
        for slug, trouble in sorted(troubles.items()):
            if trouble is not None:
                self._report.note(
                    f'step "{slug}" cannot run now, its messages rest for {REST_SECONDS} s at a '
                    f"time, without an attempt: {trouble}"
                )

    def _show(self, messages: Sequence[Message], seconds: int) -> None:
        with self._database.transaction():
            self._set_visibility(messages, seconds)

    def _set_visibility(self, messages: Sequence[Message], seconds: int) -> None:
        self._pgflow.set_visibility([m.message_id for m in messages], [seconds] * len(messages))
