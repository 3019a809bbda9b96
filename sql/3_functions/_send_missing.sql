create function pgflow_worker._send_missing(flow_slug text)
returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    queue constant text := pgflow_worker._queue_table(flow_slug, 'q');
    numbers constant text := pg_catalog.pg_get_serial_sequence(queue, 'msg_id');
    newest constant bigint := (
        select pg_catalog.max(task.message_id)
        from pgflow.step_tasks as task where task.flow_slug = _send_missing.flow_slug
    );
    lost_run uuid;
    lost_step text;
    lost_index integer;
    sent integer := 0;
begin
    -- A queue that was made anew counts from 1 again, and pgflow knows a task's message by its number alone.
    execute pg_catalog.format(
        'select pg_catalog.setval(%L, $1) from %s where $1 > last_value or not is_called', numbers, numbers
    ) using newest;
    -- The runs first, as everywhere.
    for lost_run, lost_step, lost_index in execute pg_catalog.format(
        'select task.run_id, task.step_slug, task.task_index
        from pgflow.runs as run
        join pgflow.step_tasks as task on task.run_id = run.run_id
        join pgflow.step_states as state on state.run_id = task.run_id and state.step_slug = task.step_slug
        where run.flow_slug = $1 and run.status = ''started'' and state.status = ''started''
            and task.status in (''queued'', ''started'')
            and not exists (
                select from %s as message
                where message.msg_id = task.message_id
                    and message.message ->> ''run_id'' = task.run_id::text
                    and message.message ->> ''step_slug'' = task.step_slug
                    and coalesce(message.message ->> ''task_index'', ''0'') = task.task_index::text
            )
        order by run.run_id
        for update of run', queue
    ) using flow_slug
    loop
        perform pgflow_worker._send_again(flow_slug, lost_run, lost_step, lost_index);
        sent := sent + 1;
    end loop;
    return sent;
end
$$;

comment on function pgflow_worker._send_missing(text) is
'Sends the messages again that unfinished tasks of the flow have lost, because its queue was dropped, purged '
'or made anew: without a message a task waits for ever. Returns their number.';

revoke execute on function pgflow_worker._send_missing(text) from public;
