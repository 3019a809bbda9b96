create function pgflow_worker._archive_messages(run_id uuid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgmq.archive(task.queue_name, task.message_ids)
    from (
        -- From pgflow 0.17 on a task knows its queue.
        select
            coalesce(pg_catalog.to_jsonb(unfinished) ->> 'queue_name', unfinished.flow_slug) as queue_name,
            pg_catalog.array_agg(unfinished.message_id) as message_ids
        from pgflow.step_tasks as unfinished
        where unfinished.run_id = _archive_messages.run_id
            and unfinished.status in ('queued', 'started')
            and unfinished.message_id is not null
        group by 1
    ) as task
    where pg_catalog.to_regclass(pgflow_worker._queue_table(task.queue_name, 'q')) is not null;
end
$$;

comment on function pgflow_worker._archive_messages(uuid) is
'Archives the messages of a run''s unfinished tasks, as pgflow does when a run fails.';

revoke execute on function pgflow_worker._archive_messages(uuid) from public;
