"""Every statement that is sent to pgflow and pgmq, and nothing else.

Written for pgflow 0.8: start_tasks(text, bigint[], uuid), input with the key "run", worker rows
that are marked with deprecated_at.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from pgflow_worker.database import Database, Statement
from pgflow_worker.flow import Flow, Options, Step

# pgflow.create_flow()'s defaults, for what a flow leaves open.
DEFAULT_OPTIONS = Options(max_attempts=3, base_delay=5, timeout=60)

# A started task's message stays invisible a little longer than the task may run.
VISIBILITY_MARGIN = 30

# started_at as a number: its text form would depend on settings that a handler may change.
_STARTED_US = "(extract(epoch from task.started_at) * 1000000)::bigint"
_CLAIM = f"""task.run_id = $1 and task.step_slug = $2 and task.task_index = $3
    and task.status = 'started' and task.last_worker_id = $4 and task.attempts_count = $5
    and {_STARTED_US} = $6"""
_CLAIM_TYPES = ("uuid", "text", "integer", "uuid", "integer", "bigint")

_READ = Statement(
    """select message.msg_id, message.message ->> 'step_slug' as step_slug,
    message.enqueued_at > pg_catalog.transaction_timestamp() as too_new
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
    """select started.msg_id, started.input::text as input
    from pgflow.start_tasks($1, $2, $3) as started""",
    ("text", "bigint[]", "uuid"),
)
# start_tasks also returns tasks that another session started first: what counts is the row.
_STARTED = Statement(
    f"""select task.message_id, task.run_id::text, task.step_slug, task.task_index,
        task.attempts_count, {_STARTED_US} as started_us,
        coalesce(step.opt_max_attempts, flow.opt_max_attempts) as max_attempts,
        coalesce(step.opt_timeout, flow.opt_timeout) as timeout
    from pgflow.step_tasks as task
    join pgflow.steps as step using (flow_slug, step_slug)
    join pgflow.flows as flow using (flow_slug)
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
    "select task.status from pgflow.complete_task($1, $2, $3, $4::jsonb) as task",
    ("uuid", "text", "integer", "text"),
)
_FAIL = Statement(
    "select task.status from pgflow.fail_task($1, $2, $3, $4) as task",
    ("uuid", "text", "integer", "text"),
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
    f"""select task.message_id, task.run_id::text, task.step_slug, task.task_index,
        task.attempts_count, {_STARTED_US} as started_us,
        coalesce(step.opt_max_attempts, flow.opt_max_attempts) as max_attempts,
        coalesce(step.opt_timeout, flow.opt_timeout) as timeout
    from pgflow.step_tasks as task
    join pgflow.steps as step using (flow_slug, step_slug)
    join pgflow.flows as flow using (flow_slug)
    where task.flow_slug = $1 and task.status = 'started' and task.last_worker_id = $2
    order by task.run_id, task.step_slug, task.task_index""",
    ("text", "uuid"),
)
_FLOW = Statement(
    """select opt_max_attempts as max_attempts, opt_base_delay as base_delay,
        opt_timeout as timeout
    from pgflow.flows where flow_slug = $1""",
    ("text",),
)
_SAME_QUEUE = Statement(
    """select flow_slug from pgflow.flows
    where pg_catalog.lower(flow_slug) = pg_catalog.lower($1) and flow_slug <> $1""",
    ("text",),
)
_STEPS = Statement(
    """select step.step_slug, step.step_type,
        array(select dep.dep_slug from pgflow.deps as dep
              where dep.flow_slug = step.flow_slug and dep.step_slug = step.step_slug
              order by dep.dep_slug) as dependencies,
        step.opt_max_attempts as max_attempts, step.opt_base_delay as base_delay,
        step.opt_timeout as timeout, step.opt_start_delay as start_delay
    from pgflow.steps as step where step.flow_slug = $1
    order by step.step_index""",
    ("text",),
)
_CREATE_FLOW = Statement(
    "select from pgflow.create_flow($1, $2, $3, $4)", ("text", "integer", "integer", "integer")
)
_ADD_STEP = Statement(
    """select from pgflow.add_step(flow_slug => $1, step_slug => $2, deps_slugs => $3,
        max_attempts => $4, base_delay => $5, timeout => $6, start_delay => $7,
        step_type => $8)""",
    ("text", "text", "text[]", "integer", "integer", "integer", "integer", "text"),
)
_SET_FLOW_OPTIONS = Statement(
    """update pgflow.flows set opt_max_attempts = $2, opt_base_delay = $3, opt_timeout = $4
    where flow_slug = $1""",
    ("text", "integer", "integer", "integer"),
)
_SET_STEP_OPTIONS = Statement(
    """update pgflow.steps set opt_max_attempts = $3, opt_base_delay = $4, opt_timeout = $5,
        opt_start_delay = $6
    where flow_slug = $1 and step_slug = $2""",
    ("text", "text", "integer", "integer", "integer", "integer"),
)
_COUNT_RUNS = Statement(
    "select pg_catalog.count(*) as runs from pgflow.runs where flow_slug = $1", ("text",)
)
_DELETE_FLOW = (
    Statement("select from pgmq.drop_queue($1)", ("text",)),
    *(
        Statement(f"delete from pgflow.{table} where flow_slug = $1", ("text",))
        for table in ("step_tasks", "step_states", "runs", "deps", "steps", "flows")
    ),
)


@dataclass(frozen=True)
class Message:
    """A message read from the queue. `too_new`: sent after this transaction began."""

    message_id: int
    step_slug: str | None
    too_new: bool


@dataclass(frozen=True)
class Claim:
    """A started task and what proves that it is still ours."""

    run_id: str
    step_slug: str
    task_index: int
    worker_id: str
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


@dataclass(frozen=True)
class Task:
    """A claim and its inputs as JSON text.

    input: as pgflow's start_tasks gives it. run_input: the run's, where `input` lacks it.
    """

    claim: Claim
    input: str
    run_input: str | None = None


@dataclass(frozen=True)
class Difference:
    """How code and database differ. `matters`: the flow cannot be run like this."""

    text: str
    matters: bool = True


class Pgflow:
    """pgflow's and pgmq's SQL for one flow. Transactions are the caller's."""

    def __init__(self, database: Database, flow_slug: str) -> None:
        self._database = database
        self._flow_slug = flow_slug
        self._last_run_input = ("", "")

    def read(self, quantity: int, visibility: int) -> list[Message]:
        """Take up to `quantity` visible messages, invisible to others for `visibility` seconds."""
        rows = self._database.execute(_READ, self._flow_slug, visibility, quantity)
        return [Message(row["msg_id"], row["step_slug"], row["too_new"]) for row in rows]

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
        self, message_ids: Sequence[int], worker_id: str, with_run_input: Container[str]
    ) -> list[Task]:
        """Start the messages' tasks; those that this call really started, in message order.

        with_run_input: the steps whose tasks need the run's input beside their own.
        """
        arguments = (self._flow_slug, list(message_ids), worker_id)
        inputs = {row["msg_id"]: row["input"] for row in self._database.execute(_START, *arguments)}
        claims = self._claims(_STARTED, worker_id, *arguments)
        # pgflow up to 0.15 means to do this in start_tasks, but its statement never runs.
        self.set_visibility(
            [claim.message_id for claim in claims],
            [claim.timeout + VISIBILITY_MARGIN for claim in claims],
        )
        return [
            Task(
                claim,
                inputs[claim.message_id],
                self._run_input(claim.run_id) if claim.step_slug in with_run_input else None,
            )
            for claim in claims
        ]

    def lock_run(self, run_id: str) -> str | None:
        """Lock the run's row; its status, None if the run is gone.

        To be called before every complete, fail and requeue: pgflow's functions lock in
        different orders, and deadlock with each other if nothing is locked before them.
        """
        rows = self._database.execute(_LOCK_RUN, run_id)
        return rows[0]["status"] if rows else None

    def lock_claim(self, claim: Claim) -> bool:
        """Lock the task's row if it is still our claim; the fence against a lost one."""
        return bool(self._database.execute(_LOCK_CLAIM, *claim.fence))

    def complete(self, claim: Claim, output: str) -> bool:
        """Complete the task; False if pgflow refused, which it does without an error."""
        rows = self._database.execute(_COMPLETE, *claim.key, output)
        return [row["status"] for row in rows] == ["completed"]

    def fail(self, claim: Claim, error: str, *, final: bool) -> bool:
        """Fail the attempt; whether the task has failed for good.

        `final`: without the attempts that are left. pgflow has no such call, so that the number
        of attempts is raised to the limit for it and set right again.
        """
        if final and claim.attempt < claim.max_attempts:
            self._database.execute(_SET_ATTEMPTS, *claim.key, claim.max_attempts)
        rows = self._database.execute(_FAIL, *claim.key, error)
        if final and claim.attempt < claim.max_attempts:
            self._database.execute(_SET_ATTEMPTS, *claim.key, claim.attempt)
        return [row["status"] for row in rows] != ["queued"]

    def requeue(self, claim: Claim) -> bool:
        """Give the task back as if this attempt had not been; False if the claim was lost."""
        rows = self._database.execute(_REQUEUE, *claim.fence)
        self.set_visibility([row["message_id"] for row in rows], [0] * len(rows))
        return bool(rows)

    def orphans(self, worker_id: str) -> list[Claim]:
        """What is started under a worker's name."""
        return self._claims(_ORPHANS, worker_id, self._flow_slug, worker_id)

    def differences(self, flow: Flow) -> list[Difference]:
        """How the structure of the flow in the code differs from the one in the database."""
        if not self.exists():
            return [Difference(f'flow "{flow.slug}" is in the code, not in the database')]
        stored = {row["step_slug"]: row for row in self._database.execute(_STEPS, flow.slug)}
        found = []
        for slug, step in flow.steps.items():
            row = stored.pop(slug, None)
            if row is None:
                found.append(Difference(f'step "{slug}" is in the code, not in the database'))
                continue
            if row["step_type"] != step.type:
                found.append(
                    Difference(
                        f'step "{slug}" is a {step.type} step in the code, '
                        f"a {row['step_type']} step in the database"
                    )
                )
            if row["dependencies"] != list(step.dependencies):
                found.append(
                    Difference(
                        f'step "{slug}" depends on {_listed(step.dependencies)} in the code, '
                        f"on {_listed(row['dependencies'])} in the database"
                    )
                )
        return found + [
            Difference(f'step "{slug}" is in the database, not in the code', matters=False)
            for slug in stored
        ]

    def exists(self) -> bool:
        """Whether pgflow knows the flow."""
        return bool(self._database.execute(_FLOW, self._flow_slug))

    def same_queue(self) -> list[str]:
        """Flows whose slug differs by case only: pgmq would give them the same queue."""
        return [row["flow_slug"] for row in self._database.execute(_SAME_QUEUE, self._flow_slug)]

    def ensure_queue(self, flow: Flow) -> None:
        """Create what is missing of the flow's row and its queue; what is there stays as it is."""
        options = with_defaults(flow.options)
        self._database.execute(
            _CREATE_FLOW, flow.slug, options.max_attempts, options.base_delay, options.timeout
        )

    def compile(self, flow: Flow) -> None:
        """Create the flow, its queue and its steps."""
        self.ensure_queue(flow)
        for step in flow.steps.values():
            self._database.execute(
                _ADD_STEP,
                flow.slug,
                step.slug,
                list(step.dependencies),
                step.options.max_attempts,
                step.options.base_delay,
                step.options.timeout,
                step.options.start_delay,
                step.type,
            )

    def changed_options(self, flow: Flow) -> list[str]:
        """Which options in the database differ from the code's."""
        row = self._database.execute(_FLOW, flow.slug)[0]
        changes = _changes("", row, with_defaults(flow.options), list(row))
        for row in self._database.execute(_STEPS, flow.slug):
            step: Step = flow.steps[row["step_slug"]]
            names = ["max_attempts", "base_delay", "timeout", "start_delay"]
            changes += _changes(f"{step.slug}.", row, step.options, names)
        return changes

    def set_options(self, flow: Flow) -> None:
        """Write the code's options, which is safe while runs are under way."""
        options = with_defaults(flow.options)
        self._database.execute(
            _SET_FLOW_OPTIONS, flow.slug, options.max_attempts, options.base_delay, options.timeout
        )
        for step in flow.steps.values():
            self._database.execute(
                _SET_STEP_OPTIONS,
                flow.slug,
                step.slug,
                step.options.max_attempts,
                step.options.base_delay,
                step.options.timeout,
                step.options.start_delay,
            )

    def count_runs(self) -> int:
        """How many runs the flow has, finished ones included."""
        count: int = self._database.execute(_COUNT_RUNS, self._flow_slug)[0]["runs"]
        return count

    def delete(self) -> None:
        """Delete the flow, its runs with all their data, and its queue with the archive."""
        for statement in _DELETE_FLOW:
            self._database.execute(statement, self._flow_slug)

    def _run_input(self, run_id: str) -> str:
        # The tasks of a map come one after another and share it.
        if self._last_run_input[0] != run_id:
            rows = self._database.execute(_RUN_INPUT, run_id)
            self._last_run_input = (run_id, rows[0]["input"])
        return self._last_run_input[1]

    def _claims(self, statement: Statement, worker_id: str, *args: object) -> list[Claim]:
        return [
            Claim(
                run_id=row["run_id"],
                step_slug=row["step_slug"],
                task_index=row["task_index"],
                worker_id=worker_id,
                attempt=row["attempts_count"],
                started_us=row["started_us"],
                message_id=row["message_id"],
                max_attempts=row["max_attempts"],
                timeout=row["timeout"],
            )
            for row in self._database.execute(statement, *args)
        ]


def with_defaults(options: Options) -> Options:
    """A flow's options with pgflow's defaults for those it leaves open."""
    return Options(
        options.max_attempts or DEFAULT_OPTIONS.max_attempts,
        options.base_delay or DEFAULT_OPTIONS.base_delay,
        options.timeout or DEFAULT_OPTIONS.timeout,
    )


def _changes(
    prefix: str, row: dict[str, object], options: Options, names: Sequence[str]
) -> list[str]:
    changes = []
    for name in names:
        old, new = row[name], getattr(options, name)
        if old != new:
            inherited = "0" if name == "start_delay" else "the flow's"
            shown = [inherited if value is None else str(value) for value in (old, new)]
            changes.append(f"{prefix}{name}: {shown[0]} -> {shown[1]}")
    return changes


def _listed(slugs: Sequence[str]) -> str:
    return f"[{', '.join(slugs)}]"
