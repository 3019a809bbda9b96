"""Take back the tasks of workers that are dead."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pgflow_worker.database import Database, retrying
from pgflow_worker.errors import DatabaseError
from pgflow_worker.pgflow import Claim, Pgflow
from pgflow_worker.registry import DEFAULT_MAX_CRASHES, DEFAULT_MAX_DEATHS, Registry, Slot
from pgflow_worker.report import Outcome, Report

# died: the worker had no other task. suspected: it had, or nobody knows. crashed: the server did.
Death = Literal["died", "suspected", "crashed"]


class Rescuer:
    """Takes back what is started under the name of a worker that is dead.

    A session advisory lock ends with its session. Whoever holds a slot's lock therefore knows that
    the slot's former worker is gone, and that its started tasks are nobody's. Other kinds of
    workers have no slot: theirs are taken back when their time is up and nobody hears of them.

    Tasks that were queued again, or failed for having cost too many workers, go into the report.
    """

    def __init__(
        self, database: Database, pgflow: Pgflow, registry: Registry, report: Report
    ) -> None:
        self._database = database
        self._pgflow = pgflow
        self._registry = registry
        self._report = report

    def rescue(self, own: Slot) -> None:
        """Rescue the tasks of the slot that the caller holds, of free slots, and of strangers."""
        self._rescue_slot(own)
        with self._database.transaction():
            free = [
                slot for slot in self._registry.slots(self._report.flow_slug) if slot.pid is None
            ]
            orphaned = [slot for slot in free if self._pgflow.orphans(slot.worker_id)]
        for slot in orphaned:
            with self._database.transaction():
                locked = self._registry.try_lock(slot.lock_key)
            if locked:
                try:
                    self._rescue_slot(slot)
                finally:
                    self._registry.unlock(slot.lock_key)
        with self._database.transaction():
            stalled = self._pgflow.stalled()
        for claim in stalled:
            error = f"another worker left this task started (attempt {claim.attempt})"
            self._take_back(claim, "suspected", error)

    def give_back(self, claims: Sequence[Claim]) -> None:
        """Queue the caller's own tasks again as if they had not been started: nobody died."""
        for claim in claims:
            retrying(partial(self._requeue, claim))

    def _rescue_slot(self, slot: Slot) -> None:
        # In a transaction after the lock's, so that it sees what the former worker did last.
        with self._database.transaction():
            orphans = self._pgflow.orphans(slot.worker_id)
            crashed = bool(orphans) and not self._registry.is_living(slot.worker_id)
        for claim in orphans:
            # Of several nobody can say which was the one. They are started alone from now on.
            verb = "ran" if len(orphans) == 1 else "had"
            error = f"the worker died while it {verb} this task (attempt {claim.attempt})"
            outcome: Death = "died" if len(orphans) == 1 else "suspected"
            if crashed:
                error = f"the server crashed while this task was started (attempt {claim.attempt})"
                outcome = "crashed"
            self._take_back(claim, outcome, error)
        if orphans:
            with self._database.transaction():
                self._pgflow.show_unstarted()

    def _take_back(self, claim: Claim, outcome: Death, error: str) -> None:
        try:
            self._report.count(retrying(partial(self._rescue_task, claim, outcome, error)))
        except DatabaseError as failure:
            # It stays as it is. The flow's other tasks are not to wait for it.
            self._report.note(f"a task could not be taken back from a dead worker: {failure}")

    def _rescue_task(self, claim: Claim, outcome: Death, error: str) -> Outcome:
        """Queue the task again, or fail it if it has cost too many workers."""
        with self._database.transaction():
            run_status = self._pgflow.lock_run(claim.run_id)
            step_status = self._pgflow.lock_claim(claim)
            if step_status is None:
                return "discarded"
            self._registry.record_attempt(self._report.flow_slug, claim, outcome, error=error)
            verdict = self._verdict(claim, outcome, error)
            goes_on = run_status == step_status == "started"
            if goes_on and claim.max_attempts > 1 and verdict is None:
                self._pgflow.requeue(claim)
                return "rescued"
            self._pgflow.fail(claim, verdict or error, final=True)
            return "failed"

    def _verdict(self, claim: Claim, outcome: Death, error: str) -> str | None:
        """Why the task is not to be tried again, if it is not.

        Who is only suspected is not to blame, nor after the first crash: it was not alone.
        """
        if outcome == "suspected":
            return None
        deaths = self._registry.count_attempts(claim, outcome)
        settings = self._registry.settings()
        if outcome == "died":
            if deaths < int(settings.get("max_deaths", DEFAULT_MAX_DEATHS)):
                return None
            return f"{error}; deaths: {deaths}"
        if deaths < int(settings.get("max_crashes", DEFAULT_MAX_CRASHES)):
            return None
        reason = (
            f'the server crashed {deaths} times while step "{claim.step_slug}" ran '
            f"(run {claim.run_id}); paused by the worker"
        )
        self._registry.pause(self._report.flow_slug, reason)
        self._report.note(reason)
        return f"{error}; crashes: {deaths}"

    def _requeue(self, claim: Claim) -> None:
        with self._database.transaction():
            self._pgflow.lock_run(claim.run_id)
            self._pgflow.requeue(claim)
