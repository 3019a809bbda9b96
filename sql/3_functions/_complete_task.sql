create function pgflow_worker._complete_task(
    flow_slug text,
    worker_id uuid,
    run_id uuid,
    step_slug text,
    task_index integer,
    attempt integer,
    started_us bigint,
    output text,
    duration_ms double precision,
    log text
)
returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    -- In a statement of its own, before everything else: pgflow's functions lock in different orders.
    perform from pgflow.runs as run
    where run.run_id = _complete_task.run_id and run.status = 'started'
    for update;
    if not found then
        return 'lost';
    end if;
    perform from pgflow.step_tasks as task
    where task.run_id = _complete_task.run_id
        and task.step_slug = _complete_task.step_slug
        and task.task_index = _complete_task.task_index
        and task.status = 'started'
        and task.last_worker_id = _complete_task.worker_id
        and task.attempts_count = attempt
        and (extract(epoch from task.started_at) * 1000000)::bigint = started_us
    for update;
    if not found then
        return 'lost';
    end if;
    perform from pgflow.complete_task(run_id, step_slug, task_index, output::jsonb) as task
    where task.status = 'completed';
    if not found then
        return 'refused';
    end if;
    insert into pgflow_worker.attempts (
        flow_slug, run_id, step_slug, task_index, attempt, outcome, worker_id, duration_ms, log
    )
    values (
        flow_slug, run_id, step_slug, task_index, attempt, 'completed', worker_id, duration_ms, log
    );
    return 'completed';
end
$$;

comment on function pgflow_worker._complete_task(
    text, uuid, uuid, text, integer, integer, bigint, text, double precision, text
) is
'Completes a task whose claim still holds and stores its attempt. Locks the run, then the task. Returns '
'completed; lost: the claim is, or the run has ended; refused: by pgflow, and the caller is to roll back.';

revoke execute on function pgflow_worker._complete_task(
    text, uuid, uuid, text, integer, integer, bigint, text, double precision, text
) from public;
