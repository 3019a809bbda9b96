create function pgflow_worker._worker_status()
returns table (
    flow_slug text,
    slot integer,
    pid integer,
    state text,
    step text,
    task integer,
    tasks bigint,
    step_age interval,
    last_beat interval,
    backend_age interval
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgflow_worker._check_pgflow();
    return query
    select
        flow.flow_slug,
        slot.slot,
        slot.pid,
        case
            when slot.pid is null then case when coalesce(work.tasks, 0) > 0 then 'died' else 'free' end
            when activity.state <> 'active' then activity.state
            when activity.wait_event_type = 'Lock' then
                'blocked by ' || pg_catalog.array_to_string(pg_catalog.pg_blocking_pids(slot.pid), ', ')
            when work.tasks > 0 then 'working'
            else 'waiting'
        end || case when slot.enabled then '' else ', disabled' end,
        coalesce(shown.steps, work.steps),
        case when pg_catalog.cardinality(work.tasks_of_steps) = 1 then work.tasks_of_steps[1] end,
        work.tasks,
        pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - work.started_at),
        pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - worker.last_heartbeat_at),
        pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - activity.backend_start)
    from pgflow_worker.flows as flow
    cross join lateral pgflow_worker._slots(flow.flow_slug) as slot
    left join pg_catalog.pg_stat_activity as activity on activity.pid = slot.pid
    left join pgflow.workers as worker on worker.worker_id = slot.worker_id
    cross join lateral (
        -- With 63 bytes it may have been cut.
        select case
            when pg_catalog.octet_length(activity.application_name) < 63 then
                pg_catalog.substring(activity.application_name, '^pgflow_worker [^/]+/(.+)$')
        end as steps
    ) as shown
    left join lateral (
        select
            nullif(pg_catalog.count(*), 0) as tasks,
            pg_catalog.string_agg(distinct task.step_slug, ',') as steps,
            pg_catalog.min(task.started_at) filter (where task.is_shown) as started_at,
            pg_catalog.array_agg(task.task_index) filter (where task.is_shown) as tasks_of_steps
        from (
            select
                started.step_slug,
                started.task_index,
                started.started_at,
                shown.steps is null
                or started.step_slug = any(pg_catalog.string_to_array(shown.steps, ',')) as is_shown
            from pgflow.step_tasks as started
            where started.status = 'started' and started.last_worker_id = slot.worker_id
        ) as task
    ) as work on true
    where slot.enabled or slot.pid is not null or work.tasks > 0
    order by flow.flow_slug, slot.slot;
end
$$;

comment on function pgflow_worker._worker_status() is
'The rows of the view worker_status. Raises PW004 without pgflow.';

revoke execute on function pgflow_worker._worker_status() from public;
