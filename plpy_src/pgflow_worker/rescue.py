"""Take back the tasks of workers that are dead."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pgflow_worker.database import Database, retrying
from pgflow_worker.pgflow import Claim, Pgflow
from pgflow_worker.registry import DEFAULT_MAX_DEATHS, Registry, Slot
from pgflow_worker.report import Outcome, Report


class Rescuer:
    """Takes back what is started under the name of a worker that is dead.

    A session advisory lock ends with its session. Whoever holds a slot's lock therefore knows that
    the slot's former worker is gone, and that its started tasks are nobody's.

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
        """Rescue the tasks of the slot that the caller holds, then those of every free slot."""
        self._rescue_slot(own)
        with self._database.transaction():
            free = [
                slot for slot in self._registry.slots(self._report.flow_slug) if slot.pid is None
            ]
            orphaned = [slot for slot in free if self._pgflow.orphans(slot.worker_id)]
        for slot in orphaned:
            with self._database.transaction():
                locked = self._registry.try_lock(slot)
            if locked:
                try:
                    self._rescue_slot(slot)
                finally:
                    self._registry.unlock(slot)

    def give_back(self, claims: Sequence[Claim]) -> None:
        """Queue the caller's own tasks again as if they had not been started: nobody died."""
        for claim in claims:
            retrying(partial(self._requeue, claim))

    def _rescue_slot(self, slot: Slot) -> None:
        # In a transaction after the lock's, so that it sees what the former worker did last.
        with self._database.transaction():
            orphans = self._pgflow.orphans(slot.worker_id)
            settings = self._registry.settings() if orphans else {}
        max_deaths = int(settings.get("max_deaths", DEFAULT_MAX_DEATHS))
        # Of several nobody can say which was the one. They are started alone from now on.
        alone = len(orphans) == 1
        for claim in orphans:
            rescue = partial(self._rescue_task, claim, max_deaths, alone=alone)
            self._report.count(retrying(rescue))

    def _rescue_task(self, claim: Claim, max_deaths: int, *, alone: bool) -> Outcome:
        """Queue the task again, or fail it if it has cost too many workers."""
        with self._database.transaction():
            run_status = self._pgflow.lock_run(claim.run_id)
            if not self._pgflow.lock_claim(claim):
                return "discarded"
            error = f"the worker died while it ran this task (attempt {claim.attempt})"
            if not alone:
                error = f"the worker died while it had this task (attempt {claim.attempt})"
            outcome = "died" if alone else "suspected"
            self._registry.record_attempt(self._report.flow_slug, claim, outcome, error=error)
            deaths = self._registry.deaths(claim)
            if run_status == "started" and claim.max_attempts > 1 and deaths < max_deaths:
                self._pgflow.requeue(claim)
                return "rescued"
            self._pgflow.fail(claim, f"{error}; deaths: {deaths}", final=True)
            return "failed"

    def _requeue(self, claim: Claim) -> None:
        with self._database.transaction():
            self._pgflow.lock_run(claim.run_id)
            self._pgflow.requeue(claim)
