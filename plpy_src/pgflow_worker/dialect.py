"""Every statement that is sent to pgflow and pgmq, in the form that the installed versions take.

Versions are told by what the catalogue has, never by a number: pgflow leaves none in a database.
In comments and notes a number means: from this version of @pgflow/core on.
"""

from __future__ import annotations

from functools import cached_property

from pgflow_worker.database import Database, Statement

# _start_map_tasks() and _complete_map_tasks() do pgflow's work in its place. They were compared,
# row by row, with these bodies (md5 of prosrc): with others pgflow's own functions are called.
TESTED_BODIES = (
    [  # pgflow 0.8.1
        ("complete_task", "65d39dea0c92c17b3c51be0889b53de8"),
        ("fail_task", "78a3bc052f5185f0a53c4426fadab149"),
        ("start_tasks", "b37f5e84517b76791021290169fcdd64"),
    ],
)

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

# Messages

READ = Statement(
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
SET_VISIBILITY = Statement(
    "select from pgflow_worker._set_visibility($1, $2, $3)", ("text", "bigint[]", "integer[]")
)
QUEUED = Statement(
    """select task.message_id from pgflow.step_tasks as task
    where task.flow_slug = $1 and task.status = 'queued'""",
    ("text",),
)
# No attempt has been made, so that the message is not one that waits for a retry.
UNSTARTED = Statement(
    "select message_id from pgflow_worker._unstarted_messages($1) as unstarted (message_id)",
    ("text",),
)
# Messages whose task is over or gone: pgflow will never start them.
ARCHIVE_STALE = Statement(
    """select archived from pgmq.archive($1, array(
        select stale.msg_id from pg_catalog.unnest($2) as stale (msg_id)
        where not exists (
            select from pgflow.step_tasks as task
            join pgflow.step_states as state using (run_id, step_slug)
            join pgflow.runs as run using (run_id)
            where task.flow_slug = $1 and task.message_id = stale.msg_id
                and task.status in ('queued', 'started')
                and state.status = 'started' and run.status = 'started'
        )
    )) as archived""",
    ("text", "bigint[]"),
)
SEND_MISSING = Statement("select pgflow_worker._send_missing($1) as sent", ("text",))
SEND_AGAIN = Statement(
    "select from pgflow_worker._send_again($1, $2, $3, $4)", ("text", "uuid", "text", "integer")
)

# Tasks

START_MAP = Statement(
    """select started.run_id::text, started.step_slug, started.task_index, started.input,
        null as flow_input
    from pgflow_worker._start_map_tasks($1, $2, $3) as started""",
    ("text", "bigint[]", "uuid"),
)
# start_tasks also returns tasks that another session started first: what counts is the row.
STARTED = Statement(
    f"""{_SELECT_CLAIMS}
    where task.flow_slug = $1 and task.message_id = any($2) and task.status = 'started'
        and task.last_worker_id = $3 and task.started_at = pg_catalog.now()
    order by task.message_id""",
    ("text", "bigint[]", "uuid"),
)
RUN_INPUT = Statement("select input::text from pgflow.runs where run_id = $1", ("uuid",))
LOCK_RUN = Statement("select status from pgflow.runs where run_id = $1 for update", ("uuid",))
LOCK_CLAIM = Statement(
    f"""select state.status as step_status
    from pgflow.step_tasks as task join pgflow.step_states as state using (run_id, step_slug)
    where {_CLAIM} for update of task""",
    _CLAIM_TYPES,
)
COMPLETE = Statement(
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
COMPLETE_SEVERAL = Statement(
    """select place, answer
    from pgflow_worker._complete_tasks($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
    _SEVERAL_TYPES,
)
COMPLETE_MAP = Statement(
    """select place, answer
    from pgflow_worker._complete_map_tasks($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
    _SEVERAL_TYPES,
)
BODIES = Statement(
    """select proc.proname as name, pg_catalog.md5(proc.prosrc) as body
    from pg_catalog.pg_proc as proc
    where proc.pronamespace = 'pgflow'::regnamespace
        and proc.proname in ('start_tasks', 'complete_task', 'fail_task')"""
)
FAIL = Statement(
    "select task.status from pgflow.fail_task($1, $2, $3, $4) as task",
    ("uuid", "text", "integer", "text"),
)
# pgflow 0.14 leaves a task started whose step was skipped meanwhile.
END = Statement(
    f"""update pgflow.step_tasks as task
    set status = 'failed', failed_at = pg_catalog.now(), error_message = $7
    where {_CLAIM}""",
    (*_CLAIM_TYPES, "text"),
)
TASK_OF_MESSAGE = Statement(
    """select task.run_id::text, task.step_slug, task.task_index from pgflow.step_tasks as task
    where task.flow_slug = $1 and task.message_id = $2 and task.status = 'queued'""",
    ("text", "bigint"),
)
START_LAST_ATTEMPT = Statement(
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
SET_ATTEMPTS = Statement(
    """update pgflow.step_tasks set attempts_count = $4
    where run_id = $1 and step_slug = $2 and task_index = $3""",
    ("uuid", "text", "integer", "integer"),
)
# The attempt was the worker's failure, not the handler's: it is not counted. Nor is it against
# the number of times that pgflow's own reaper takes a task back.
REQUEUE = Statement(
    f"""update pgflow.step_tasks as task
    set status = 'queued', started_at = null, last_worker_id = null,
        attempts_count = task.attempts_count - 1
    where {_CLAIM}
    returning task.message_id""",
    _CLAIM_TYPES,
)
ORPHANS = Statement(
    f"""{_SELECT_CLAIMS}
    where task.flow_slug = $1 and task.status = 'started' and task.last_worker_id = $2
    order by task.run_id, task.step_slug, task.task_index""",
    ("text", "uuid"),
)
STALLED = Statement(
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
# A table that was never analyzed counts as ten pages, as it does for the planner.
OUTGROWN = Statement(
    """select grown.name
    from (
        select named.name, named.name::regclass as oid
        from pg_catalog.unnest(array[
            'pgflow.runs', 'pgflow.step_states', 'pgflow.step_tasks',
            pgflow_worker._queue_table($1, 'q')
        ]) as named (name)
    ) as grown
    join pg_catalog.pg_class as class on class.oid = grown.oid
    -- Not of class.oid: that would be asked of every table first, and wait where one is locked.
    where pg_catalog.pg_relation_size(grown.oid)
            / pg_catalog.current_setting('block_size')::bigint
            > 2 * case when class.reltuples < 1 then 10 else class.relpages + 5 end""",
    ("text",),
)

# Definitions

FLOW = Statement(
    """select opt_max_attempts as max_attempts, opt_base_delay as base_delay,
        opt_timeout as timeout
    from pgflow.flows where flow_slug = $1""",
    ("text",),
)
SAME_QUEUE = Statement(
    """select flow_slug from pgflow.flows
    where pg_catalog.lower(flow_slug) = pg_catalog.lower($1) and flow_slug <> $1""",
    ("text",),
)
CREATE_FLOW = Statement(
    "select from pgflow.create_flow($1, $2, $3, $4)", ("text", "integer", "integer", "integer")
)
ENSURE_COMPILED = Statement(
    "select pgflow.ensure_flow_compiled($1, $2::jsonb)::text as answer", ("text", "text")
)
SET_FLOW_OPTIONS = Statement(
    """update pgflow.flows set opt_max_attempts = $2, opt_base_delay = $3, opt_timeout = $4
    where flow_slug = $1""",
    ("text", "integer", "integer", "integer"),
)
COUNT_RUNS = Statement(
    "select pg_catalog.count(*) as runs from pgflow.runs where flow_slug = $1", ("text",)
)
DELETE_FLOW = (
    Statement("select from pgmq.drop_queue($1)", ("text",)),
    *(
        Statement(f"delete from pgflow.{table} where flow_slug = $1", ("text",))
        for table in ("step_tasks", "step_states", "runs", "deps", "steps", "flows")
    ),
)

_FEATURES = Statement(
    """select class.relname || '.' || attribute.attname as feature
    from pg_catalog.pg_attribute as attribute
    join pg_catalog.pg_class as class on class.oid = attribute.attrelid
    where class.relnamespace = 'pgflow'::regnamespace
        and class.relname in ('step_task_record', 'steps', 'workers')
        and attribute.attnum > 0 and not attribute.attisdropped
    union all
    select proc.proname || '/' || proc.pronargs
    from pg_catalog.pg_proc as proc
    where proc.pronamespace = 'pgflow'::regnamespace
        and proc.proname in ('start_tasks', 'ensure_flow_compiled', 'requeue_stalled_tasks')
    union all
    select 'status ' || quoted.status[1]
    from pg_catalog.pg_constraint as checked
    cross join lateral pg_catalog.regexp_matches(
        pg_catalog.pg_get_constraintdef(checked.oid), '''([a-z]+)''', 'g'
    ) as quoted (status)
    where checked.conrelid = 'pgflow.step_tasks'::regclass and checked.conname = 'valid_status'"""
)


class Dialect:
    """What the versions of pgflow differ in. Looked up once, in the caller's transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @cached_property
    def _features(self) -> frozenset[str]:
        """Columns as relation.column, functions as name/number of arguments, tasks' statuses."""
        return frozenset(row["feature"] for row in self._database.execute(_FEATURES))

    @property
    def has_start_delay(self) -> bool:
        """Whether a step can be delayed: 0.5.3."""
        return "steps.opt_start_delay" in self._features

    @property
    def has_maps(self) -> bool:
        """Whether there are map steps: 0.7."""
        return "step_task_record.task_index" in self._features

    @property
    def has_conditions(self) -> bool:
        """Whether steps can be skipped: 0.14."""
        return "steps.required_input_pattern" in self._features

    @property
    def has_queue_names(self) -> bool:
        """Whether a step knows the queue that its tasks are sent to: 0.17."""
        return "steps.queue_name" in self._features

    @property
    def has_compiler(self) -> bool:
        """Whether pgflow compiles flows by itself: 0.10."""
        return any(name.startswith("ensure_flow_compiled/") for name in self._features)

    @property
    def input_has_run(self) -> bool:
        """Whether the run's input is part of a task's: before 0.12."""
        return "step_task_record.flow_input" not in self._features

    @property
    def has_hasty_reaper(self) -> bool:
        """Whether pgflow takes back what has been started for longer than its *flow's* timeout
        and 30 s, whatever the step's: from 0.13.2 until, in 0.15.1, tasks could be cancelled."""
        features = self._features
        return "requeue_stalled_tasks/0" in features and "status cancelled" not in features

    @cached_property
    def start(self) -> Statement:
        """Starts the tasks of messages: flow, messages, worker; their keys and inputs."""
        task_index = "started.task_index" if self.has_maps else "0 as task_index"
        flow_input = "null" if self.input_has_run else "started.flow_input::text"
        queue = ", pg_catalog.lower($1)" if "start_tasks/4" in self._features else ""
        return Statement(
            f"""select started.run_id::text, started.step_slug, {task_index},
                started.input::text as input, {flow_input} as flow_input
            from pgflow.start_tasks($1, $2, $3{queue}) as started""",
            ("text", "bigint[]", "uuid"),
        )

    @property
    def _stopped_at(self) -> str:
        # 0.6 renamed stopped_at to deprecated_at; 0.10 has both.
        return "stopped_at" if "workers.stopped_at" in self._features else "deprecated_at"

    @cached_property
    def beat(self) -> Statement:
        """Writes or refreshes a worker's row: worker, flow."""
        return Statement(
            f"""insert into pgflow.workers (worker_id, queue_name, function_name)
            values ($1, $2, 'pgflow_worker')
            on conflict (worker_id) do update
            set last_heartbeat_at = pg_catalog.clock_timestamp(), {self._stopped_at} = null""",
            ("uuid", "text"),
        )

    @cached_property
    def stopped(self) -> Statement:
        """Marks a worker's row: worker."""
        return Statement(
            f"""update pgflow.workers
            set last_heartbeat_at = pg_catalog.clock_timestamp(),
                {self._stopped_at} = pg_catalog.now()
            where worker_id = $1""",
            ("uuid",),
        )

    @cached_property
    def steps(self) -> Statement:
        """The steps that the database has of a flow, with options that may be later than it."""
        later = [
            ("start_delay", "step.opt_start_delay", "null::integer", self.has_start_delay),
            ("if_", "step.required_input_pattern::text", "null::text", self.has_conditions),
            ("if_not", "step.forbidden_input_pattern::text", "null::text", self.has_conditions),
            ("when_unmet", "step.when_unmet", "'skip'", self.has_conditions),
            ("when_exhausted", "step.when_exhausted", "'fail'", self.has_conditions),
            ("queue_name", "step.queue_name", "pg_catalog.lower($1)", self.has_queue_names),
        ]
        columns = "".join(f", {new if has else old} as {name}" for name, new, old, has in later)
        return Statement(
            f"""select step.step_slug, step.step_type,
                array(select dep.dep_slug from pgflow.deps as dep
                      where dep.flow_slug = step.flow_slug and dep.step_slug = step.step_slug
                      order by dep.dep_slug collate pg_catalog."C") as dependencies,
                step.opt_max_attempts as max_attempts, step.opt_base_delay as base_delay,
                step.opt_timeout as timeout{columns}
            from pgflow.steps as step where step.flow_slug = $1
            order by step.step_index""",
            ("text",),
        )

    @cached_property
    def add_step(self) -> Statement:
        """Adds a step without conditions: flow, step, dependencies, max_attempts, base_delay,
        timeout, start_delay, type. Those that this version does not know must be its defaults."""
        start_delay = ", start_delay => $7" if self.has_start_delay else ""
        step_type = ", step_type => $8" if self.has_maps else ""
        return Statement(
            f"""select from pgflow.add_step(flow_slug => $1, step_slug => $2, deps_slugs => $3,
                max_attempts => $4, base_delay => $5, timeout => $6{start_delay}{step_type})""",
            ("text", "text", "text[]", "integer", "integer", "integer", "integer", "text"),
        )

    @cached_property
    def set_step_options(self) -> Statement:
        """Changes a step's options: flow, step, max_attempts, base_delay, timeout, start_delay,
        if_, if_not (JSON text), when_unmet, when_exhausted."""
        later = ", opt_start_delay = $6" if self.has_start_delay else ""
        if self.has_conditions:
            later += """, required_input_pattern = $7::jsonb, forbidden_input_pattern = $8::jsonb,
                when_unmet = $9, when_exhausted = $10"""
        return Statement(
            f"""update pgflow.steps
            set opt_max_attempts = $3, opt_base_delay = $4, opt_timeout = $5{later}
            where flow_slug = $1 and step_slug = $2""",
            (
                *("text", "text", "integer", "integer", "integer", "integer"),
                *("text", "text", "text", "text"),
            ),
        )


def is_ready(flow_slug: str) -> Statement:
    """Whether a flow has a visible message."""
    # pgmq's name for the queue's table; a slug needs no quoting but for its case.
    return Statement(
        "select exists (select from pgmq."
        f'"q_{flow_slug.lower()}" where vt <= pg_catalog.clock_timestamp()) as ready'
    )
