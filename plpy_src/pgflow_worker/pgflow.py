"""Every statement about runs, tasks and messages that is sent to pgflow and pgmq.

Written for pgflow 0.8: start_tasks(text, bigint[], uuid), input with the key "run", worker rows
that are marked with deprecated_at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Sequence
from typing import Literal, NamedTuple

from pgflow_worker.database import CONFLICTS, Database, Statement
from pgflow_worker.errors import DatabaseError

# A started task's message stays invisible a little longer than the task may run.
VISIBILITY_MARGIN = 30

# _start_map_tasks() and _complete_map_tasks() do pgflow's work in its place. They were compared,
# row by row, with these bodies (md5 of prosrc): with others pgflow's own functions are called.
TESTED_BODIES = (
    [  # pgflow 0.8.1
        ("complete_task", "65d39dea0c92c17b3c51be0889b53de8"),
        ("fail_task", "78a3bc052f5185f0a53c4426fadab149"),
        ("start_tasks", "b37f5e84517b76791021290169fcdd64"),
    ],
)

# SQLSTATE classes that tell of a task's input: data exceptions and limits.
INPUT_AT_FAULT = ("22", "54")

# started_at as a number: its text form would depend on settings that a handler may change.
_STARTED_US = "(extract(epoch from task.started_at) * 1000000)::bigint"
_SELECT_CLAIMS = f"""select task.message_id, task.run_id::text, task.step_slug, task.task_index,
        task.last_worker_id::text as worker_id, task.attempts_count, {_STARTED_US} as started_us,
        coalesce(step.opt_max_attempts, flow.opt_max_attempts) as max_attempts,
        coalesce(step.opt_timeout, flow.opt_timeout) as timeout
    from pgflow.step_tasks as task
    join pgflow.steps as step using (flow_slug, step_slug)
    join pgflow.flows as flow using (flow_slug)"""
_CLAIM = f"""task.run_id = $1 and task.step_slug = $2 and task.task_index = $3
    and task.status = 'started' and task.last_worker_id is not distinct from $4
    and task.attempts_count = $5
    and {_STARTED_US} = $6"""
_CLAIM_TYPES = ("uuid", "text", "integer", "uuid", "integer", "bigint")

_READ = Statement(
    """select message.msg_id, message.message ->> 'step_slug' as step_slug,
    extract(epoch from message.enqueued_at - pg_catalog.transaction_timestamp())
        ::double precision as seconds_ahead,
    (
        select pg_catalog.bool_or(attempt.outcome = 'crashed')
        from pgflow.step_tasks as task
        join pgflow_worker.attempts as attempt using (run_id, step_slug, task_index)
        where task.flow_slug = $1 and task.message_id = message.msg_id
            and attempt.outcome in ('died', 'suspected', 'crashed')
    ) as crashed
    from pgmq.read($1, $2, $3) as message
    order by message.msg_id""",
    ("text", "integer", "integer"),
)
_SET_VISIBILITY = Statement(
    "select from pgflow.set_vt_batch($1, $2, $3)", ("text", "bigint[]", "integer[]")
)
_UNDELAY = Statement(
    """select from pgflow.set_vt_batch($1,
        (select pg_catalog.array_agg(task.message_id) from pgflow.step_tasks as task
         where task.flow_slug = $1 and task.status = 'queued'),
        (select pg_catalog.array_agg(0) from pgflow.step_tasks as task
         where task.flow_slug = $1 and task.status = 'queued'))""",
    ("text",),
)
# Messages whose task is over or gone: pgflow will never start them.
_ARCHIVE_STALE = Statement(
    """select archived from pgmq.archive($1, array(
        select stale.msg_id from pg_catalog.unnest($2) as stale (msg_id)
        where not exists (
            select from pgflow.step_tasks as task join pgflow.runs as run using (run_id)
            where task.flow_slug = $1 and task.message_id = stale.msg_id
                and task.status in ('queued', 'started') and run.status = 'started'
        )
    )) as archived""",
    ("text", "bigint[]"),
)
_BEAT = Statement(
    """insert into pgflow.workers (worker_id, queue_name, function_name)
    values ($1, $2, 'pgflow_worker')
    on conflict (worker_id) do update
    set last_heartbeat_at = pg_catalog.clock_timestamp(), deprecated_at = null""",
    ("uuid", "text"),
)
_STOPPED = Statement(
    """update pgflow.workers
    set last_heartbeat_at = pg_catalog.clock_timestamp(), deprecated_at = pg_catalog.now()
    where worker_id = $1""",
    ("uuid",),
)
_START = Statement(
    """select started.run_id::text, started.step_slug, started.task_index,
        started.input::text as input
    from pgflow.start_tasks($1, $2, $3) as started""",
    ("text", "bigint[]", "uuid"),
)
_START_MAP = Statement(
    """select started.run_id::text, started.step_slug, started.task_index, started.input
    from pgflow_worker._start_map_tasks($1, $2, $3) as started""",
    ("text", "bigint[]", "uuid"),
)
# start_tasks also returns tasks that another session started first: what counts is the row.
_STARTED = Statement(
    f"""{_SELECT_CLAIMS}
    where task.flow_slug = $1 and task.message_id = any($2) and task.status = 'started'
        and task.last_worker_id = $3 and task.started_at = pg_catalog.now()
    order by task.message_id""",
    ("text", "bigint[]", "uuid"),
)
_RUN_INPUT = Statement("select input::text from pgflow.runs where run_id = $1", ("uuid",))
_LOCK_RUN = Statement("select status from pgflow.runs where run_id = $1 for update", ("uuid",))
_LOCK_CLAIM = Statement(
    f"select task.message_id from pgflow.step_tasks as task where {_CLAIM} for update",
    _CLAIM_TYPES,
)
_COMPLETE = Statement(
    "select pgflow_worker._complete_task($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) as answer",
    # With their schema, because a handler's transaction has the caller's search_path; the others
    # are keywords.
    (
        *("pg_catalog.text", "pg_catalog.uuid", "pg_catalog.uuid", "pg_catalog.text"),
        *("integer", "integer", "bigint"),
        *("pg_catalog.text", "double precision", "pg_catalog.text"),
    ),
)
_SEVERAL_TYPES = (
    *("text", "uuid", "uuid[]", "text[]", "integer[]", "integer[]", "bigint[]"),
    *("text[]", "double precision[]", "text[]"),
)
_COMPLETE_SEVERAL = Statement(
    """select place, answer
    from pgflow_worker._complete_tasks($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
    _SEVERAL_TYPES,
)
_COMPLETE_MAP = Statement(
    """select place, answer
    from pgflow_worker._complete_map_tasks($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
    _SEVERAL_TYPES,
)
_BODIES = Statement(
    """select proc.proname as name, pg_catalog.md5(proc.prosrc) as body
    from pg_catalog.pg_proc as proc
    where proc.pronamespace = 'pgflow'::regnamespace
        and proc.proname in ('start_tasks', 'complete_task', 'fail_task')"""
)
_FAIL = Statement(
    "select task.status from pgflow.fail_task($1, $2, $3, $4) as task",
    ("uuid", "text", "integer", "text"),
)
_TASK_OF_MESSAGE = Statement(
    """select task.run_id::text, task.step_slug, task.task_index from pgflow.step_tasks as task
    where task.flow_slug = $1 and task.message_id = $2 and task.status = 'queued'""",
    ("text", "bigint"),
)
_START_LAST_ATTEMPT = Statement(
    """update pgflow.step_tasks as task
    set status = 'started', started_at = pg_catalog.now(), last_worker_id = $4,
        attempts_count = coalesce(step.opt_max_attempts, flow.opt_max_attempts)
    from pgflow.steps as step join pgflow.flows as flow using (flow_slug)
    where task.run_id = $1 and task.step_slug = $2 and task.task_index = $3
        and task.status = 'queued' and step.step_slug = task.step_slug
        and step.flow_slug = task.flow_slug
    returning task.message_id""",
    ("uuid", "text", "integer", "uuid"),
)
_SET_ATTEMPTS = Statement(
    """update pgflow.step_tasks set attempts_count = $4
    where run_id = $1 and step_slug = $2 and task_index = $3""",
    ("uuid", "text", "integer", "integer"),
)
# The attempt was the worker's failure, not the handler's: it is not counted.
_REQUEUE = Statement(
    f"""update pgflow.step_tasks as task
    set status = 'queued', started_at = null, last_worker_id = null,
        attempts_count = task.attempts_count - 1
    where {_CLAIM}
    returning task.message_id""",
    _CLAIM_TYPES,
)
_ORPHANS = Statement(
    f"""{_SELECT_CLAIMS}
    where task.flow_slug = $1 and task.status = 'started' and task.last_worker_id = $2
    order by task.run_id, task.step_slug, task.task_index""",
    ("text", "uuid"),
)
_STALLED = Statement(
    f"""{_SELECT_CLAIMS}
    join pgflow_worker._stalled_tasks($1) as stalled using (run_id, step_slug, task_index)
    -- Mostly nothing is, and the function is not even compiled.
    where (select exists (
        select from pgflow.step_tasks as started
        where started.flow_slug = $1 and started.status = 'started'
    ))
    order by task.run_id, task.step_slug, task.task_index""",
    ("text",),
)
# No attempt has been made, so that the message is not one that waits for a retry.
_SHOW_UNSTARTED = Statement(
    """select from (
        select array(select pgflow_worker._unstarted_messages($1)) as message_ids
    ) as unstarted
    cross join lateral pgflow.set_vt_batch(
        $1, unstarted.message_ids, pg_catalog.array_fill(
            0, array[pg_catalog.cardinality(unstarted.message_ids)]
        )
    )""",
    ("text",),
)  # A table that was never analyzed counts as ten pages, as it does for the planner.
# A table that was never analyzed counts as ten pages, as it does for the planner.
_OUTGROWN = Statement(
    """select grown.name
    from (
        select named.name, named.name::regclass as oid
        from pg_catalog.unnest(array[
            'pgflow.runs', 'pgflow.step_states', 'pgflow.step_tasks',
            pg_catalog.format('pgmq.%I', pgmq.format_table_name($1, 'q'))
        ]) as named (name)
    ) as grown
    join pg_catalog.pg_class as class on class.oid = grown.oid
    -- Not of class.oid: that would be asked of every table first, and wait where one is locked.
    where pg_catalog.pg_relation_size(grown.oid)
            / pg_catalog.current_setting('block_size')::bigint
            > 2 * case when class.reltuples < 1 then 10 else class.relpages + 5 end""",
    ("text",),
)


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
        # pgmq's name for the queue's table; a slug needs no quoting but for its case.
        self._is_ready = Statement(
            "select exists (select from pgmq."
            f'"q_{flow_slug.lower()}" where vt <= pg_catalog.clock_timestamp()) as ready'
        )
        self.in_sets: frozenset[str] = frozenset()

    def allow_sets(self, steps: Collection[str]) -> None:
        """Handle these map steps' tasks in sets, if that was tested with this pgflow."""
        if steps:
            rows = self._database.execute(_BODIES)
            if sorted((row["name"], row["body"]) for row in rows) in TESTED_BODIES:
                self.in_sets = frozenset(steps)

    def is_ready(self) -> bool:
        """Whether there is a visible message; cheaper than to read none."""
        ready: bool = self._database.execute(self._is_ready)[0]["ready"]
        return ready

    def read(self, quantity: int, visibility: int) -> list[Message]:
        """Take up to `quantity` visible messages, invisible to others for `visibility` seconds."""
        rows = self._database.execute(_READ, self._flow_slug, visibility, quantity)
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

    def set_visibility(self, message_ids: Sequence[int], seconds: Sequence[int]) -> None:
        """Make messages visible after so many seconds, 0 for now."""
        if message_ids:
            self._database.execute(
                _SET_VISIBILITY, self._flow_slug, list(message_ids), list(seconds)
            )

    def undelay(self) -> None:
        """Make the messages of all queued tasks visible."""
        self._database.execute(_UNDELAY, self._flow_slug)

    def archive_stale(self, message_ids: Sequence[int]) -> int:
        """Archive those of the messages whose task is over or missing; their number."""
        rows = self._database.execute(_ARCHIVE_STALE, self._flow_slug, list(message_ids))
        return len(rows)

    def beat(self, worker_id: str) -> None:
        """Write or refresh the worker's row, which start_tasks needs."""
        self._database.execute(_BEAT, worker_id, self._flow_slug)

    def stopped(self, worker_id: str) -> None:
        """Mark the worker's row as stopped."""
        self._database.execute(_STOPPED, worker_id)

    def start(
        self,
        messages: Sequence[Message],
        worker_id: str,
        with_run_input: Container[str],
        brief: Container[str] = (),
    ) -> tuple[list[Task], int]:
        """Start the messages' tasks; those that this call really started, in message order.

        And the number of those that have failed, because their input cannot be made.
        with_run_input: the steps whose tasks need the run's input beside their own. brief: those
        whose tasks will end long before their messages can be seen again as it is.
        """
        in_sets = [m.message_id for m in messages if m.step_slug in self.in_sets]
        one_by_one = [m.message_id for m in messages if m.step_slug not in self.in_sets]
        rows = []
        if in_sets:
            try:
                rows += self._database.execute(_START_MAP, self._flow_slug, in_sets, worker_id)
            except DatabaseError as error:
                if error.sqlstate in CONFLICTS:
                    raise
                # Only this statement is undone: PL/Python runs each in a subtransaction.
                self._note(f"map tasks could not be started in sets: {error}")
                self.in_sets = frozenset()
                one_by_one += in_sets
                in_sets = []
        failed = 0
        if one_by_one:
            try:
                rows += self._database.execute(_START, self._flow_slug, one_by_one, worker_id)
            except DatabaseError as error:
                if not error.sqlstate.startswith(INPUT_AT_FAULT):
                    raise
                for message_id in one_by_one:
                    try:
                        rows += self._database.execute(
                            _START, self._flow_slug, [message_id], worker_id
                        )
                    except DatabaseError as its_error:
                        failed += self._fail_unstarted(message_id, worker_id, its_error)
        # Not by message: where a queue was dropped, old tasks share their messages with new ones.
        inputs = {
            (row["run_id"], row["step_slug"], row["task_index"]): row["input"] for row in rows
        }
        ids = in_sets + one_by_one
        claims = self._claims(_STARTED, self._flow_slug, ids, worker_id)
        # pgflow up to 0.15 means to do this in start_tasks, but its statement never runs.
        long = [claim for claim in claims if claim.step_slug not in brief]
        self.set_visibility(
            [claim.message_id for claim in long],
            [claim.timeout + VISIBILITY_MARGIN for claim in long],
        )
        tasks = [
            Task(
                claim,
                inputs[claim.key],
                self._run_input(claim.run_id) if claim.step_slug in with_run_input else None,
            )
            for claim in claims
        ]
        return tasks, failed

    def _fail_unstarted(self, message_id: int, worker_id: str, error: DatabaseError) -> int:
        """Fail a task whose input pgflow cannot put together, as it would at every start."""
        if not error.sqlstate.startswith(INPUT_AT_FAULT):
            raise error
        failed = 0
        for task in self._database.execute(_TASK_OF_MESSAGE, self._flow_slug, message_id):
            key = task["run_id"], task["step_slug"], task["task_index"]
            # pgflow fails what is started.
            if self.lock_run(key[0]) == "started" and self._database.execute(
                _START_LAST_ATTEMPT, *key, worker_id
            ):
                self._database.execute(_FAIL, *key, f"the input cannot be made: {error}")
                failed += 1
        return failed

    def complete(self, completion: Completion) -> Answer:
        """Complete a task and store its attempt. If the answer is "refused", roll back."""
        claim = completion.claim
        answer: Answer = self._database.execute(
            _COMPLETE,
            *(self._flow_slug, claim.worker_id, claim.run_id, claim.step_slug, claim.task_index),
            *(claim.attempt, claim.started_us),
            *(completion.output, completion.duration_ms, completion.log or None),
        )[0]["answer"]
        return answer

    def complete_several(self, completions: Sequence[Completion]) -> list[Answer]:
        """The same for several tasks; the answer to each."""
        return self._complete(_COMPLETE_SEVERAL, completions)

    def complete_map(self, completions: Sequence[Completion]) -> list[Answer]:
        """The same for several tasks of one map step of one run, all but the last one at once."""
        return self._complete(_COMPLETE_MAP, completions)

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
        return [row["name"] for row in self._database.execute(_OUTGROWN, self._flow_slug)]

    def lock_run(self, run_id: str) -> str | None:
        """Lock the run's row; its status, None if the run is gone.

        To be called before every fail and requeue: pgflow's functions lock in different orders,
        and deadlock with each other if nothing is locked before them. complete() does it itself.
        """
        rows = self._database.execute(_LOCK_RUN, run_id)
        return rows[0]["status"] if rows else None

    def lock_claim(self, claim: Claim) -> bool:
        """Lock the task's row if it is still our claim; the fence against a lost one."""
        return bool(self._database.execute(_LOCK_CLAIM, *claim.fence))

    def fail(
        self, claim: Claim, error: str, *, final: bool = False, after: float | None = None
    ) -> bool:
        """Fail the attempt; whether the task has failed for good.

        after: seconds until the next attempt, in place of pgflow's delay. final: without the
        attempts that are left. pgflow has no such call, so that the number of attempts is raised
        to the limit for it and set right again.
        """
        if final and claim.attempt < claim.max_attempts:
            self._database.execute(_SET_ATTEMPTS, *claim.key, claim.max_attempts)
        rows = self._database.execute(_FAIL, *claim.key, error)
        if final and claim.attempt < claim.max_attempts:
            self._database.execute(_SET_ATTEMPTS, *claim.key, claim.attempt)
        failed = [row["status"] for row in rows] != ["queued"]
        if after is not None and not failed:
            self.set_visibility([claim.message_id], [math.ceil(after)])
        return failed

    def requeue(self, claim: Claim, after: float = 0) -> bool:
        """Give the task back as if this attempt had not been; False if the claim was lost.

        after: seconds until it may be started again.
        """
        rows = self._database.execute(_REQUEUE, *claim.fence)
        self.set_visibility([row["message_id"] for row in rows], [math.ceil(after)] * len(rows))
        return bool(rows)

    def orphans(self, worker_id: str) -> list[Claim]:
        """What is started under a worker's name."""
        return self._claims(_ORPHANS, self._flow_slug, worker_id)

    def show_unstarted(self) -> None:
        """Make visible what was read and never started, perhaps by a worker that has died since.

        A living one that has read it finds that its task is started already.
        """
        self._database.execute(_SHOW_UNSTARTED, self._flow_slug)

    def stalled(self) -> list[Claim]:
        """What another kind of worker has left started."""
        return self._claims(_STALLED, self._flow_slug)

    def _run_input(self, run_id: str) -> str:
        # The tasks of a map come one after another and share it.
        if self._last_run_input[0] != run_id:
            rows = self._database.execute(_RUN_INPUT, run_id)
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
