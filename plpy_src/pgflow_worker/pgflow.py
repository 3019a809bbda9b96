"""What a worker does with pgflow's tasks and pgmq's messages, and what the answers mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Sequence
from typing import Literal, NamedTuple

from pgflow_worker import dialect as sql
from pgflow_worker.database import CONFLICTS, Database, Statement
from pgflow_worker.dialect import Dialect
from pgflow_worker.errors import DatabaseError

# A started task's message stays invisible a little longer than the task may run.
VISIBILITY_MARGIN = 30

# SQLSTATE classes that tell of a task's input: data exceptions and limits.
INPUT_AT_FAULT = ("22", "54")


class Message(NamedTuple):
    """A message read from the queue.

    seconds_ahead: how long after the beginning of this transaction it was sent. suspect: workers
    have died that had its task. crashed: and with them the server.
    """

    message_id: int
    step_slug: str | None
    seconds_ahead: float = 0.0
    suspect: bool = False
    crashed: bool = False

    @property
    def too_new(self) -> bool:
        """Whether a task of it cannot be started in the transaction that has read it."""
        return self.seconds_ahead > 0


class Claim(NamedTuple):
    """A started task and what proves that it is still ours."""

    run_id: str
    step_slug: str
    task_index: int
    worker_id: str | None
    attempt: int
    started_us: int
    message_id: int
    max_attempts: int
    timeout: int

    @property
    def key(self) -> tuple[str, str, int]:
        """The task."""
        return self.run_id, self.step_slug, self.task_index

    @property
    def fence(self) -> tuple[object, ...]:
        """The arguments of every statement that must only touch our own claim."""
        return *self.key, self.worker_id, self.attempt, self.started_us


class Task(NamedTuple):
    """A claim and its inputs as JSON text.

    input: as pgflow's start_tasks gives it. run_input: the run's, where `input` lacks it.
    """

    claim: Claim
    input: str
    run_input: str | None = None


class Completion(NamedTuple):
    """A claim with its result (JSON text), and what is kept of the attempt."""

    claim: Claim
    output: str
    duration_ms: float
    log: str


# refused: by pgflow. lost: it was not asked, for the claim is lost or the run has ended.
Answer = Literal["completed", "refused", "lost"]


class Pgflow:
    """pgflow's and pgmq's SQL for one flow. Transactions are the caller's.

    in_sets: the map steps whose tasks are started and completed many in one statement. note: told
    what a user should know.
    """

    def __init__(
        self, database: Database, flow_slug: str, note: Callable[[str], object] = lambda _: None
    ) -> None:
        self._database = database
        self._flow_slug = flow_slug
        self._note = note
        self._last_run_input = ("", "")
        self._is_ready = sql.is_ready(flow_slug)
        self.dialect = Dialect(database)
        self.in_sets: frozenset[str] = frozenset()

    def allow_sets(self, steps: Collection[str]) -> None:
        """Handle these map steps' tasks in sets, if that was tested with this pgflow."""
        if steps:
            rows = self._database.execute(sql.BODIES)
            if sorted((row["name"], row["body"]) for row in rows) in sql.TESTED_BODIES:
                self.in_sets = frozenset(steps)

    def is_ready(self) -> bool:
        """Whether there is a visible message; cheaper than to read none."""
        ready: bool = self._database.execute(self._is_ready)[0]["ready"]
        return ready

    def read(self, quantity: int, visibility: int) -> list[Message]:
        """Take up to `quantity` visible messages, invisible to others for `visibility` seconds."""
        rows = self._database.execute(sql.READ, self._flow_slug, visibility, quantity)
        return [
            Message(
                row["msg_id"],
                row["step_slug"],
                row["seconds_ahead"],
                suspect=row["crashed"] is not None,
                crashed=bool(row["crashed"]),
            )
            for row in rows
        ]

    def set_visibility(self, message_ids: Sequence[int], seconds: Sequence[int]) -> int:
        """Make messages visible after so many seconds, 0 for now; how many of them there are."""
        if not message_ids:
            return 0
        rows = self._database.execute(
            sql.SET_VISIBILITY, self._flow_slug, list(message_ids), list(seconds)
        )
        return len(rows)

    def undelay(self) -> None:
        """Make the messages of all queued tasks visible."""
        self._show(sql.QUEUED)

    def archive_stale(self, message_ids: Sequence[int]) -> int:
        """Archive those of the messages whose task is over or missing; their number."""
        rows = self._database.execute(sql.ARCHIVE_STALE, self._flow_slug, list(message_ids))
        return len(rows)

    def beat(self, worker_id: str) -> None:
        """Write or refresh the worker's row, which start_tasks needs."""
        self._database.execute(self.dialect.beat, worker_id, self._flow_slug)

    def stopped(self, worker_id: str) -> None:
        """Mark the worker's row as stopped."""
        self._database.execute(self.dialect.stopped, worker_id)

    def start(
        self,
        messages: Sequence[Message],
        worker_id: str,
        with_run_input: Container[str],
        brief: Container[str] = (),
    ) -> tuple[list[Task], int]:
        """Start the messages' tasks; those that this call really started, in message order.

        And the number of those that have failed, because their input cannot be made.
        with_run_input: the steps whose tasks need the run's input, if theirs does not contain it.
        brief: those whose tasks will end long before their messages can be seen again as it is.
        """
        in_sets = [m.message_id for m in messages if m.step_slug in self.in_sets]
        one_by_one = [m.message_id for m in messages if m.step_slug not in self.in_sets]
        rows = []
        if in_sets:
            try:
                rows += self._database.execute(sql.START_MAP, self._flow_slug, in_sets, worker_id)
            except DatabaseError as error:
                if error.sqlstate in CONFLICTS:
                    raise
                # Only this statement is undone: PL/Python runs each in a subtransaction.
                self._note(f"map tasks could not be started in sets: {error}")
                self.in_sets = frozenset()
                one_by_one += in_sets
                in_sets = []
        failed = 0
        start = self.dialect.start
        if one_by_one:
            try:
                rows += self._database.execute(start, self._flow_slug, one_by_one, worker_id)
            except DatabaseError as error:
                if not error.sqlstate.startswith(INPUT_AT_FAULT):
                    raise
                for message_id in one_by_one:
                    try:
                        rows += self._database.execute(
                            start, self._flow_slug, [message_id], worker_id
                        )
                    except DatabaseError as its_error:
                        failed += self._fail_unstarted(message_id, worker_id, its_error)
        # Not by message: where a queue was dropped, old tasks share their messages with new ones.
        inputs = {(row["run_id"], row["step_slug"], row["task_index"]): row for row in rows}
        ids = in_sets + one_by_one
        claims = self._claims(sql.STARTED, self._flow_slug, ids, worker_id)
        # pgflow 0.3.1 to 0.15.0 means to do this in start_tasks, but its statement never runs.
        long = [claim for claim in claims if claim.step_slug not in brief]
        self.set_visibility(
            [claim.message_id for claim in long],
            [claim.timeout + VISIBILITY_MARGIN for claim in long],
        )
        tasks = []
        for claim in claims:
            row = inputs[claim.key]
            run_input: str | None = row["flow_input"]
            if run_input is None and claim.step_slug in with_run_input:
                run_input = self._run_input(claim.run_id)
            tasks.append(Task(claim, row["input"], run_input))
        return tasks, failed

    def _fail_unstarted(self, message_id: int, worker_id: str, error: DatabaseError) -> int:
        """Fail a task whose input pgflow cannot put together, as it would at every start."""
        if not error.sqlstate.startswith(INPUT_AT_FAULT):
            raise error
        failed = 0
        for task in self._database.execute(sql.TASK_OF_MESSAGE, self._flow_slug, message_id):
            key = task["run_id"], task["step_slug"], task["task_index"]
            # pgflow fails what is started.
            if self.lock_run(key[0]) == "started" and self._database.execute(
                sql.START_LAST_ATTEMPT, *key, worker_id
            ):
                self._database.execute(sql.FAIL, *key, f"the input cannot be made: {error}")
                failed += 1
        return failed

    def complete(self, completion: Completion) -> Answer:
        """Complete a task and store its attempt. If the answer is "refused", roll back."""
        claim = completion.claim
        answer: Answer = self._database.execute(
            sql.COMPLETE,
            *(self._flow_slug, claim.worker_id, claim.run_id, claim.step_slug, claim.task_index),
            *(claim.attempt, claim.started_us),
            *(completion.output, completion.duration_ms, completion.log or None),
        )[0]["answer"]
        return answer

    def complete_several(self, completions: Sequence[Completion]) -> list[Answer]:
        """The same for several tasks; the answer to each."""
        return self._complete(sql.COMPLETE_SEVERAL, completions)

    def complete_map(self, completions: Sequence[Completion]) -> list[Answer]:
        """The same for several tasks of one map step of one run, all but the last one at once."""
        return self._complete(sql.COMPLETE_MAP, completions)

    def _complete(self, statement: Statement, completions: Sequence[Completion]) -> list[Answer]:
        claims = [completion.claim for completion in completions]
        rows = self._database.execute(
            statement,
            self._flow_slug,
            claims[0].worker_id,
            [claim.run_id for claim in claims],
            [claim.step_slug for claim in claims],
            [claim.task_index for claim in claims],
            [claim.attempt for claim in claims],
            [claim.started_us for claim in claims],
            [completion.output for completion in completions],
            [completion.duration_ms for completion in completions],
            [completion.log or None for completion in completions],
        )
        answers: list[Answer] = ["lost"] * len(completions)
        for row in rows:
            answers[row["place"] - 1] = row["answer"]
        return answers

    def outgrown(self) -> list[str]:
        """The tables, as SQL names, that are more than twice as large as their statistics say."""
        return [row["name"] for row in self._database.execute(sql.OUTGROWN, self._flow_slug)]

    def lock_run(self, run_id: str) -> str | None:
        """Lock the run's row; its status, None if the run is gone.

        To be called before every fail and requeue: pgflow's functions lock in different orders,
        and deadlock with each other if nothing is locked before them. complete() does it itself.
        """
        rows = self._database.execute(sql.LOCK_RUN, run_id)
        return rows[0]["status"] if rows else None

    def lock_claim(self, claim: Claim) -> str | None:
        """Lock the task's row if it is still our claim; the fence against a lost one.

        The status of its step, which may have been skipped meanwhile; None if the claim is lost.
        """
        rows = self._database.execute(sql.LOCK_CLAIM, *claim.fence)
        return rows[0]["step_status"] if rows else None

    def fail(
        self, claim: Claim, error: str, *, final: bool = False, after: float | None = None
    ) -> bool:
        """Fail the attempt; whether the task has failed for good.

        after: seconds until the next attempt, in place of pgflow's delay. final: without the
        attempts that are left. pgflow has no such call, so that the number of attempts is raised
        to the limit for it and set right again.
        """
        if final and claim.attempt < claim.max_attempts:
            self._database.execute(sql.SET_ATTEMPTS, *claim.key, claim.max_attempts)
        rows = self._database.execute(sql.FAIL, *claim.key, error)
        if final and claim.attempt < claim.max_attempts:
            self._database.execute(sql.SET_ATTEMPTS, *claim.key, claim.attempt)
        statuses = [row["status"] for row in rows]
        if statuses == ["started"]:
            self._database.execute(sql.END, *claim.fence, error)
        failed = statuses != ["queued"]
        if after is not None and not failed:
            self.set_visibility([claim.message_id], [math.ceil(after)])
        return failed

    def requeue(self, claim: Claim, after: float = 0) -> bool:
        """Give the task back as if this attempt had not been; False if the claim was lost.

        after: seconds until it may be started again.
        """
        rows = self._database.execute(sql.REQUEUE, *claim.fence)
        messages = [row["message_id"] for row in rows]
        if self.set_visibility(messages, [math.ceil(after)] * len(rows)) < len(rows):
            # Purged, say, or archived by pgflow's reaper when it gave the task up.
            self._database.execute(sql.SEND_AGAIN, self._flow_slug, *claim.key)
        return bool(rows)

    def orphans(self, worker_id: str) -> list[Claim]:
        """What is started under a worker's name."""
        return self._claims(sql.ORPHANS, self._flow_slug, worker_id)

    def show_unstarted(self) -> None:
        """Make visible what was read and never started, perhaps by a worker that has died since.

        A living one that has read it finds that its task is started already.
        """
        self._show(sql.UNSTARTED)

    def stalled(self) -> list[Claim]:
        """What another kind of worker has left started."""
        return self._claims(sql.STALLED, self._flow_slug)

    def _show(self, messages: Statement) -> None:
        rows = self._database.execute(messages, self._flow_slug)
        self.set_visibility([row["message_id"] for row in rows], [0] * len(rows))

    def _run_input(self, run_id: str) -> str:
        # The tasks of a map come one after another and share it.
        if self._last_run_input[0] != run_id:
            rows = self._database.execute(sql.RUN_INPUT, run_id)
            self._last_run_input = (run_id, rows[0]["input"])
        return self._last_run_input[1]

    def _claims(self, statement: Statement, *args: object) -> list[Claim]:
        return [
            Claim(
                run_id=row["run_id"],
                step_slug=row["step_slug"],
                task_index=row["task_index"],
                worker_id=row["worker_id"],
                attempt=row["attempts_count"],
                started_us=row["started_us"],
                message_id=row["message_id"],
                max_attempts=row["max_attempts"],
                timeout=row["timeout"],
            )
            for row in self._database.execute(statement, *args)
        ]
