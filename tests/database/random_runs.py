"""Runs of random flows that fail somewhere in the middle, and are then retried."""

import random
from pathlib import Path

from tests.database.conftest import Session

# What must hold of a run that is going on, by the rows of its steps and tasks.
WRONG = {
    "remaining steps": """
        select run.remaining_steps from pgflow.runs as run
        where run.run_id = %s and run.status = 'started' and run.failed_at is null
            and run.remaining_steps <> (
                select count(*) from pgflow.step_states as state
                where state.run_id = run.run_id and state.status <> 'completed'
            )""",
    "remaining dependencies": """
        select state.step_slug from pgflow.step_states as state
        where state.run_id = %s and state.remaining_deps <> (
            select count(*) from pgflow.deps as dep
            join pgflow.step_states as parent
                on parent.run_id = state.run_id and parent.step_slug = dep.dep_slug
            where dep.flow_slug = state.flow_slug and dep.step_slug = state.step_slug
                and parent.status <> 'completed'
        )""",
    "ready steps that were not started": """
        select state.step_slug from pgflow.step_states as state
        where state.run_id = %s and state.status = 'created' and state.remaining_deps = 0""",
    "failed steps": """
        select state.step_slug from pgflow.step_states as state
        where state.run_id = %s and (state.status = 'failed' or state.failed_at is not null)""",
    "remaining tasks": """
        select state.step_slug from pgflow.step_states as state
        where state.run_id = %s and state.status = 'started' and state.remaining_tasks <> (
            select count(*) from pgflow.step_tasks as task
            where task.run_id = state.run_id and task.step_slug = state.step_slug
                and task.status <> 'completed'
        )""",
    "initial tasks": """
        select state.step_slug from pgflow.step_states as state
        where state.run_id = %s and state.status = 'started'
            and (to_jsonb(state) ->> 'initial_tasks')::int <> (
                select count(*) from pgflow.step_tasks as task
                where task.run_id = state.run_id and task.step_slug = state.step_slug
            )""",
    "tasks of steps that are not started": """
        select task.step_slug from pgflow.step_tasks as task
        join pgflow.step_states as state using (run_id, step_slug)
        where task.run_id = %s and task.status <> 'completed'
            and (task.status <> 'queued' or state.status <> 'started')""",
    "tasks without their one message": """
        select task.step_slug from pgflow.step_tasks as task
        where task.run_id = %s and task.status = 'queued' and (
            select count(*) from pgmq.q_random as message
            where (message.message ->> 'run_id')::uuid = task.run_id
                and message.message ->> 'step_slug' = task.step_slug
                and coalesce((message.message ->> 'task_index')::int, 0) = task.task_index
                and message.msg_id = task.message_id and message.vt <= clock_timestamp()
        ) <> 1""",
    "messages without their task": """
        select message.msg_id from pgmq.q_random as message
        where message.message ->> 'run_id' = %s::text and not exists (
            select from pgflow.step_tasks as task
            where task.message_id = message.msg_id and task.status = 'queued'
        )""",
}
DONE = """
    select step_slug, task_index, completed_at from pgflow.step_tasks
    where run_id = %s and status = 'completed' order by 1, 2"""


def source_of(chance: random.Random, failing: Path, *, with_maps: bool) -> str:
    """A flow "random" of two to eight steps, of which the task fails that the file names."""
    lines = [
        "import os",
        'flow = Flow("random", max_attempts=1)',
        "def visit(ctx):",
        f"    if os.path.exists({str(failing)!r}):",
        f"        if open({str(failing)!r}).read() == f'{{ctx.step_slug}} {{ctx.task_index}}':",
        "            raise Fail('as told')",
    ]
    steps: list[str] = []
    for number in range(chance.randint(2, 8)):
        name = f"step_{number}"
        if with_maps and chance.random() < 0.4:
            over = chance.choice([None, *steps])
            lines += [
                f"@flow.map{f'(over={over})' if over else ''}",
                f"def {name}(element, ctx: Context):",
                "    visit(ctx)",
                f"    return [{number}, element]",
            ]
        else:
            # Named, so that it gets their outputs.
            parents = chance.sample(steps, min(len(steps), chance.randint(0, 2)))
            length = chance.choice([0, 1, 3])
            lines += [
                "@flow.array",
                f"def {name}({''.join(f'{parent}, ' for parent in parents)}ctx: Context):",
                "    visit(ctx)",
                f"    return [[{number}, {', '.join(parents)}]] * {length}",
            ]
        steps.append(name)
    return "\n".join(lines)


def retry(session: Session, seed: int, failing: Path, *, with_maps: bool = True) -> None:
    """Let a run of a random flow fail or be canceled, retry it, and see that nothing is wrong."""
    chance = random.Random(seed)
    session.deploy(source_of(chance, failing, with_maps=with_maps))
    untroubled = session.start("random", [1, 2])
    session.work("random", mode="drain")
    query = "select status, output from pgflow.runs where run_id = %s"
    [expected] = session.rows(query, untroubled)
    assert expected[0] == "completed"

    run = session.start("random", [1, 2])
    tasks = session.rows("select step_slug, task_index from pgflow.step_tasks order by 1, 2")
    culprit = chance.choice(tasks)
    steps = chance.randint(0, len(tasks) // 2)
    if chance.random() < 0.7:
        failing.write_text("{} {}".format(*culprit))
        steps = 1000
    while steps and session.rows(query, run)[0][0] == "started":
        session.work("random", batch_size=1)
        steps -= 1
    if session.rows(query, run)[0][0] == "started":
        session.run("select from pgflow_worker.cancel_run(%s)", run)
    failing.unlink(missing_ok=True)
    done = session.rows(DONE, run)

    queued = session.value("select pgflow_worker.retry_run(%s)", run)
    assert session.rows(DONE, run) == done
    assert {name: rows for name, check in WRONG.items() if (rows := session.rows(check, run))} == {}
    assert queued == session.value(
        "select count(*) from pgflow.step_tasks where run_id = %s and status = 'queued'", run
    )
    session.work("random", mode="drain")
    assert session.rows(query, run) == [expected]
    assert (
        session.rows(
            """select step_slug, task_index from pgflow_worker.attempts
            where run_id = %s and outcome = 'completed'
            group by 1, 2 having count(*) > 1""",
            run,
        )
        == []
    )
