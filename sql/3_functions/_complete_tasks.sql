create function pgflow_worker._complete_tasks(
    flow_slug text,
    worker_id uuid,
    run_ids uuid [],
    step_slugs text [],
    task_indexes integer [],
    attempts integer [],
    started_us bigint [],
    outputs text [],
    durations_ms double precision [],
    logs text []
)
returns table (place integer, answer text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    held constant integer [] := pgflow_worker._lock_claims(
        worker_id, run_ids, step_slugs, task_indexes, attempts, started_us
    );
begin
    foreach place in array held loop
        perform from pgflow.complete_task(
            run_ids[place], step_slugs[place], task_indexes[place], outputs[place]::jsonb
        ) as task
        where task.status = 'completed';
        answer := case when found then 'completed' else 'refused' end;
        return next;
    end loop;
    insert into pgflow_worker.attempts (
        flow_slug, run_id, step_slug, task_index, attempt, outcome, worker_id, duration_ms, log
    )
    select
        _complete_tasks.flow_slug, run_ids[done.place], step_slugs[done.place], task_indexes[done.place],
        attempts[done.place], 'completed', _complete_tasks.worker_id, durations_ms[done.place],
        logs[done.place]
    from pg_catalog.unnest(held) as done (place);
end
$$;

comment on function pgflow_worker._complete_tasks(
    text, uuid, uuid [], text [], integer [], integer [], bigint [], text [], double precision [], text []
) is
'Completes the tasks whose claims still hold and stores their attempts. Returns the places in the arrays '
'of those, and of each whether it is completed or pgflow has refused it; then the caller is to roll back.';

revoke execute on function pgflow_worker._complete_tasks(
    text, uuid, uuid [], text [], integer [], integer [], bigint [], text [], double precision [], text []
) from public;
