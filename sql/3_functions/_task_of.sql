create function pgflow_worker._task_of(flow_slug text, worker_id uuid)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return (
        select pg_catalog.format(
            ': step "%s" for %s s',
            task.step_slug,
            pg_catalog.round(extract(epoch from pg_catalog.clock_timestamp() - task.started_at))
        )
        from pgflow.step_tasks as task
        where task.flow_slug = _task_of.flow_slug and task.last_worker_id = _task_of.worker_id
            and task.status = 'started'
        order by task.started_at
        limit 1
    );
end
$$;

comment on function pgflow_worker._task_of(text, uuid) is
'The longest running of the tasks that a worker has, as text to be added to a note; null if there is none.';

revoke execute on function pgflow_worker._task_of(text, uuid) from public;
