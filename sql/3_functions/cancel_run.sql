create function pgflow_worker.cancel_run(run_id uuid, reason text default null)
returns table (tasks integer, workers integer [])
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    message constant text := 'canceled: ' || coalesce(reason, 'by ' || session_user);
    target record;
    running record;
    started_by uuid [];
    -- From pgflow 0.15.1 on it says that a task was stopped along with its run.
    cancelable constant boolean := exists (
        select from pg_catalog.pg_constraint as checked
        where checked.conrelid = pg_catalog.to_regclass('pgflow.step_tasks')
            and checked.conname = 'valid_status'
            and pg_catalog.pg_get_constraintdef(checked.oid) like '%cancelled%'
    );
begin
    tasks := 0;
    workers := '{}';
    -- The run first, as everywhere: see docs/protocol.md.
    select run.* into target from pgflow_worker._check_run(run_id, lock => true) as run;
    if target.status <> 'started' then
        raise notice using
            message = pg_catalog.format('run %s has ended already: %s', run_id, target.status);
        return next;
        return;
    end if;
    perform from pgflow.step_tasks as task
    where task.run_id = cancel_run.run_id and task.status in ('queued', 'started')
    order by task.step_slug, task.task_index
    for update;
    started_by := array(
        select distinct task.last_worker_id
        from pgflow.step_tasks as task
        where task.run_id = cancel_run.run_id and task.status = 'started' and task.last_worker_id is not null
    );

    perform pgflow_worker._archive_messages(run_id);
    -- By the clock: a task may have been started while this waited for a lock, and failed_at is not to be earlier.
    update pgflow.step_tasks as task
    set status = case when cancelable then 'cancelled' else 'failed' end,
        failed_at = case when not cancelable then greatest(pg_catalog.clock_timestamp(), task.started_at) end,
        error_message = message
    where task.run_id = cancel_run.run_id and task.status in ('queued', 'started');
    get diagnostics tasks = row_count;
    perform pgflow_worker._fail_run(run_id, message);

    -- When all is written: a worker that is stopped waits for this transaction's end, then finds the run failed.
    for running in
        select slot.pid, slot.worker_id
        from pgflow_worker._slots(target.flow_slug) as slot
        where slot.worker_id = any(started_by)
            and slot.pid <> pg_catalog.pg_backend_pid()
    loop
        if pgflow_worker._cancel_worker(running.pid, run_id, target.flow_slug, running.worker_id) then
            workers := workers || running.pid;
        end if;
    end loop;
    return next;
end
$$;

comment on function pgflow_worker.cancel_run(uuid, text) is
'Fails a run and its unfinished tasks with the error "canceled: reason", and stops the handlers that run for it: with '
'a cancel of their workers'' calls, whose pids it returns with the number of tasks. Other tasks of such a call are '
'given back, but a handler of another run that runs just then loses this attempt; a worker with another run''s task '
'in its last attempt is left alone. Commit it at once: workers wait for that. A run that has ended is left as it is, '
'with a notice. Raises PW002 if there is no such run.';

revoke execute on function pgflow_worker.cancel_run(uuid, text) from public;
