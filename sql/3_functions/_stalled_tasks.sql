create function pgflow_worker._stalled_tasks(flow_slug text)
returns table (run_id uuid, step_slug text, task_index integer)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return query
    select task.run_id, task.step_slug, task.task_index
    from pgflow.step_tasks as task
    join pgflow.steps as step using (flow_slug, step_slug)
    join pgflow.flows as flow using (flow_slug)
    left join pgflow.workers as worker on worker.worker_id = task.last_worker_id
    where task.flow_slug = _stalled_tasks.flow_slug
        and task.status = 'started'
        and not exists (
            select from pgflow_worker._slots(_stalled_tasks.flow_slug) as slot
            where slot.worker_id = task.last_worker_id
        )
        and task.started_at < pg_catalog.clock_timestamp()
            - pg_catalog.make_interval(secs => coalesce(step.opt_timeout, flow.opt_timeout) + 30)
        and (
            worker.last_heartbeat_at is null
            or worker.last_heartbeat_at < pg_catalog.clock_timestamp() - interval '1 minute'
        );
end
$$;

comment on function pgflow_worker._stalled_tasks(text) is
'Started tasks of a flow that another kind of worker has left behind: it is not heard of any more, and 30 s '
'have passed since the step''s timeout.';

revoke execute on function pgflow_worker._stalled_tasks(text) from public;
