create function pgflow_worker._unstarted_messages(flow_slug text)
returns setof bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return query execute pg_catalog.format(
        'select task.message_id
        from pgflow.step_tasks as task join %s as message on message.msg_id = task.message_id
        where task.flow_slug = $1 and task.status = ''queued'' and task.attempts_count = 0
            and message.read_ct > 0 and message.vt > pg_catalog.clock_timestamp()
            and not exists (
                select from pgflow_worker.attempts as attempt
                where attempt.run_id = task.run_id and attempt.step_slug = task.step_slug
                    and attempt.task_index = task.task_index and attempt.outcome = ''snoozed''
            )',
        pgflow_worker._queue_table(flow_slug, 'q')
    ) using flow_slug;
end
$$;

comment on function pgflow_worker._unstarted_messages(text) is
'The hidden messages of a flow that were read by a worker and whose tasks no worker has started.';

revoke execute on function pgflow_worker._unstarted_messages(text) from public;
