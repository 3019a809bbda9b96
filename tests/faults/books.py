"""What a soak did, what came of it, and what must not be."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from bench.cluster import Database

SHOWN = 3  # examples of each thing that must not be

# Each finds runs, and says of each what is wrong. Those of the missing effects: steps with `tx`.
CHECKS = {
    "lost runs: neither finished nor going to be": """
        select run_id, 'still started' from pgflow.runs where status = 'started'""",
    "doubled SQL effects": """
        select run_id, format('%s[%s] has %s effects', step_slug, task_index, count(*))
        from effects group by run_id, step_slug, task_index having count(*) > 1""",
    "missing SQL effects, of tasks that are completed": """
        select run_id, format('%s[%s] has no effect', step_slug, task_index)
        from pgflow.step_tasks as task
        where status = 'completed'
            and step_slug in ('book', 'pay', 'confirm', 'save', 'index', 'note')
            and not exists (
                select from effects
                where (effects.run_id, effects.step_slug, effects.task_index)
                    = (task.run_id, task.step_slug, task.task_index)
            )""",
    "stray SQL effects, of tasks that are not completed": """
        select run_id, format('%s[%s] is %s', step_slug, task_index, coalesce(status, 'missing'))
        from effects left join pgflow.step_tasks as task using (run_id, step_slug, task_index)
        where status is distinct from 'completed'""",
    "tasks that are still started": """
        select run_id, format('%s[%s]', step_slug, task_index)
        from pgflow.step_tasks where status = 'started'""",
    "tasks with more attempts than allowed": """
        select run_id, format('%s[%s] had %s attempts', step_slug, task_index, attempts_count)
        from pgflow.step_tasks as task
        join pgflow.steps as step using (flow_slug, step_slug)
        join pgflow.flows as flow using (flow_slug)
        where attempts_count > coalesce(step.opt_max_attempts, flow.opt_max_attempts)""",
    "completed tasks without exactly one completed attempt": """
        select task.run_id, format('%s[%s] is %s', step_slug, task_index, task.status)
        from pgflow.step_tasks as task
        where (task.status = 'completed')::int <> (
            select count(*) from pgflow_worker.attempts as attempt
            where (attempt.run_id, attempt.step_slug, attempt.task_index)
                    = (task.run_id, task.step_slug, task.task_index)
                and attempt.outcome = 'completed'
        )""",
    "tasks whose input was wrong": """
        select run_id, error_message
        from pgflow.step_tasks where error_message like 'wrong input%'""",
    "completed runs with a step or task that is not": """
        select run_id, format('%s: %s, %s of %s tasks completed', state.step_slug, state.status,
            done.tasks, state.initial_tasks)
        from pgflow.runs as run
        join pgflow.step_states as state using (run_id)
        cross join lateral (
            select count(*) filter (where task.status = 'completed') as tasks, count(*) as all_tasks
            from pgflow.step_tasks as task
            where (task.run_id, task.step_slug) = (state.run_id, state.step_slug)
        ) as done
        where run.status = 'completed' and (
            run.remaining_steps <> 0 or state.status <> 'completed' or state.remaining_tasks <> 0
            or done.tasks <> state.initial_tasks or done.tasks <> done.all_tasks
        )""",
    "failed runs without a failed step": """
        select run_id, 'nothing says why' from pgflow.runs as run
        where status = 'failed' and not exists (
            select from pgflow.step_states as state
            where state.run_id = run.run_id and state.status = 'failed'
        )""",
}


@dataclass(frozen=True)
class Counts:
    """What a soak found. Of `wrong`, which has every example by name, there may be nothing."""

    faults: Counter[str]
    calls: Counter[str]
    resumed: int
    runs: Counter[str]
    tasks: Counter[str]
    attempts: Counter[str]
    effects: int
    failed: Counter[str]
    errors: Counter[str]
    wrong: dict[str, list[str]]

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing that must not be."""
        return not any(self.wrong.values())

    def __str__(self) -> str:
        lines = [
            *_table("faults", self.faults),
            *_table("calls of work(), by how they ended", self.calls),
            *_table("runs", Counter(started=self.runs.total()) + self.runs),
            *_table("tasks", self.tasks),
            *_table("attempts", self.attempts),
            *_table("failed runs by name", self.failed),
            *_table("errors in the server's log", self.errors),
            *_table(
                "there is also",
                {
                    "SQL effects": self.effects,
                    "flows that had paused themselves and were resumed": self.resumed,
                },
            ),
            *_table("must be 0", {name: len(found) for name, found in self.wrong.items()}),
        ]
        for name, found in self.wrong.items():
            lines += [f"{name}: {example}" for example in found[:SHOWN]]
        return "\n".join(lines)


def failures(database: Database) -> Counter[str]:
    """How many runs have failed, by name."""
    errors = database.rows(
        """select string_agg(distinct error_message, '; ') from pgflow.step_states
        where status = 'failed' group by run_id"""
    )
    return Counter(name_of(error) for (error,) in errors)


def errors_in(log: Iterable[str]) -> Counter[str]:
    """What the server's log tells of errors, by name."""
    found = (re.search(r"(?:ERROR|WARNING):  (.*)", line) for line in log)
    return Counter(name_of(error[1]) for error in found if error)


def wrong(
    database: Database,
    *,
    acknowledged: Iterable[UUID],
    sent: Iterable[str],
    log: Iterable[str],
) -> dict[str, list[str]]:
    """What must not be, now that nobody works any more: every example, by name.

    acknowledged: runs whose start was committed. sent: the tasks of step "send" that have run, once
    for each time. log: the server's.
    """
    found = {
        name: [
            f"{run_id}: {what}" + (f"\n{_story(database, run_id)}" if n < SHOWN else "")
            for n, (run_id, what) in enumerate(database.rows(query))
        ]
        for name, query in CHECKS.items()
    }
    found["lost runs: started, acknowledged and not there"] = _vanished(database, acknowledged)
    found["messages of runs that have ended"] = _messages(database)
    times = Counter(sent)
    found["tasks with one attempt that ran twice"] = [key for key in times if times[key] > 1]
    found["completed tasks that never ran"] = [
        key
        for (key,) in database.rows(
            """select format('%s/%s/%s', run_id, step_slug, task_index)
            from pgflow.step_tasks where step_slug = 'send' and status = 'completed'"""
        )
        if key not in times
    ]
    found["crashes that were none of the faults"] = [
        # SIGKILL is ours.
        line
        for line in log
        if re.search(r"PANIC:|terminated by signal (?!9\b)", line)
    ]
    return found


def counted(database: Database, column: str, table: str) -> Counter[str]:
    """How many rows of the table have which value."""
    return Counter(dict(database.rows(f"select {column}, count(*) from {table} group by 1")))


def name_of(error: str) -> str:
    """An error's text without what differs from one time to the next."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "…", error)
    return re.sub(r"\d+", "N", text)


def _table(title: str, rows: dict[str, int]) -> list[str]:
    ordered = sorted(rows.items(), key=lambda row: -row[1])
    return [title, *(f"{number:9,}  {name}" for name, number in ordered)]


def _vanished(database: Database, acknowledged: Iterable[UUID]) -> list[str]:
    there = {run_id for (run_id,) in database.rows("select run_id from pgflow.runs")}
    return [str(run_id) for run_id in acknowledged if run_id not in there]


def _messages(database: Database) -> list[str]:
    found = []
    for (flow_slug,) in database.rows("select flow_slug from pgflow.flows"):
        found += database.rows(
            f"""select message.message::text from pgmq.q_{flow_slug} as message
            left join pgflow.runs as run on run.run_id = (message.message ->> 'run_id')::uuid
            where run.status is distinct from 'started'"""
        )
    return [message for (message,) in found]


def _story(database: Database, run_id: UUID) -> str:
    """All that is known of a run."""
    tables = ("pgflow.runs", "pgflow.step_states", "pgflow.step_tasks", "effects")
    attempts = "select to_jsonb(found) from pgflow_worker.attempts as found where run_id = %s"
    stories = [
        (table, f"select to_jsonb(found) from {table} as found where run_id = %s")
        for table in tables
    ]
    lines = []
    for table, query in (*stories, ("attempts", f"{attempts} order by attempt_id")):
        for (row,) in database.rows(query, run_id):
            told = {name: value for name, value in row.items() if value is not None}
            lines.append(f"    {table} {json.dumps(told)}")
    return "\n".join(lines)
