create function pgflow_worker._lock_claims(
    worker_id uuid,
    run_ids uuid [],
    step_slugs text [],
    task_indexes integer [],
    attempts integer [],
    started_us bigint []
)
returns integer []
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    open_runs uuid [];
begin
    -- The runs in a statement of their own, before everything else: pgflow's functions lock in different
    -- orders. In one order, so that two workers with tasks of the same runs do not wait for each other.
    select pg_catalog.array_agg(locked.run_id) filter (where locked.status = 'started')
    into open_runs
    from (
        select run.run_id, run.status
        from pgflow.runs as run
        where run.run_id = any(run_ids)
        order by run.run_id
        for update
    ) as locked;
    return array(
        select claim.place
        from (
            select given.place::integer as place
            -- Not qualified, because only so it takes several arrays.
            from unnest(run_ids, step_slugs, task_indexes, attempts, started_us) with ordinality
                as given (run_id, step_slug, task_index, attempt, started_us, place)
            join pgflow.step_tasks as task
                on task.run_id = given.run_id
                and task.step_slug = given.step_slug
                and task.task_index = given.task_index
                and task.status = 'started'
                and task.last_worker_id = _lock_claims.worker_id
                and task.attempts_count = given.attempt
                and (extract(epoch from task.started_at) * 1000000)::bigint = given.started_us
            where given.run_id = any(open_runs)
            for update of task
        ) as claim
        order by claim.place
    );
end
$$;

comment on function pgflow_worker._lock_claims(uuid, uuid [], text [], integer [], integer [], bigint []) is
'Locks the runs, then the tasks, of claims that a worker has. Returns the places in the arrays (from 1) of '
'those that still hold, in runs that have not ended.';

revoke execute on function pgflow_worker._lock_claims(uuid, uuid [], text [], integer [], integer [], bigint [])
from public;
