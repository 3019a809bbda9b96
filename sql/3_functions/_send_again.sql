create function pgflow_worker._send_again(
    flow_slug text, run_id uuid, step_slug text, task_index integer
)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    update pgflow.step_tasks as task
    set message_id = sent.message_id
    from pgmq.send_batch(_send_again.flow_slug, array[pg_catalog.jsonb_build_object(
        'flow_slug', _send_again.flow_slug,
        'run_id', _send_again.run_id,
        'step_slug', _send_again.step_slug,
        'task_index', _send_again.task_index
    )]) as sent (message_id)
    where task.run_id = _send_again.run_id
        and task.step_slug = _send_again.step_slug
        and task.task_index = _send_again.task_index;
end
$$;

comment on function pgflow_worker._send_again(text, uuid, text, integer) is
'Sends a new message for a task that has lost its own.';

revoke execute on function pgflow_worker._send_again(text, uuid, text, integer) from public;
