create function pgflow_worker.wait_for_run(run_id uuid, timeout interval default '1 minute')
returns table (status text, output jsonb, error text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    isolation constant text := pg_catalog.current_setting('transaction_isolation');
    until constant timestamptz := pg_catalog.clock_timestamp() + timeout;
    seconds double precision := 0.01;
    seen record;
    worker record;
    hint text;
begin
    if timeout is null or timeout < interval '0' then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('timeout must not be %s', coalesce(timeout::text, 'null')),
            hint = 'timeout says how long to wait; the default is 1 minute.';
    end if;
    perform from pgflow_worker._check_run(run_id);
    loop
        select run.flow_slug, run.status, run.output, run.xmin as writer
        into seen
        from pgflow.runs as run
        where run.run_id = wait_for_run.run_id;
        if not found then
            perform from pgflow_worker._check_run(run_id);
        end if;
        exit when seen.status <> 'started';
        if pgflow_worker._is_own_transaction(seen.writer) then
            raise exception using
                errcode = 'PW011',
                message = pg_catalog.format('run %s cannot end before this transaction does', run_id),
                detail = 'This transaction has started or changed it, and workers see that only after its commit.',
                hint = 'Commit first, then wait in another transaction.';
        end if;
        if isolation in ('repeatable read', 'serializable') then
            raise exception using
                errcode = 'PW011',
                message = pg_catalog.format('a transaction that is %s cannot see a run end', isolation),
                hint = 'Wait in one that is read committed.';
        end if;
        if pg_catalog.clock_timestamp() >= until then
            select slot.pid, slot.worker_id
            into worker
            from pgflow_worker._slots(seen.flow_slug) as slot
            where slot.pid is not null
            order by slot.slot
            limit 1;
            hint := case
                when not exists (select from pgflow_worker.flows as flow where flow.flow_slug = seen.flow_slug)
                    then 'The flow is not deployed here. Deploy its module.'
                when pgflow_worker._pause_reason(seen.flow_slug) is not null then pg_catalog.format(
                    'The flow is paused (%s). To resume it: %s',
                    pgflow_worker._pause_reason(seen.flow_slug), pgflow_worker._resume_statement(seen.flow_slug)
                )
                when worker.pid is not null then pg_catalog.format(
                    'A worker of the flow is running, pid %s%s. To wait on: '
                    'select * from pgflow_worker.wait_for_run(%L, ''10 minutes''); to end it: '
                    'select * from pgflow_worker.cancel_run(%L);',
                    worker.pid, pgflow_worker._task_of(seen.flow_slug, worker.worker_id), run_id, run_id
                )
                else pg_catalog.format(
                    'No worker of the flow is running. To start one: '
                    'call pgflow_worker.work(%L, mode => ''drain''); '
                    'if pg_cron should: select * from pgflow_worker.doctor() \gx', seen.flow_slug
                )
            end;
            raise exception using
                errcode = 'PW015',
                message = pg_catalog.format('run %s of flow "%s" has not ended after %s', run_id, seen.flow_slug, timeout),
                detail = coalesce(pgflow_worker._progress_of(run_id), 'No step is left.'),
                hint = hint;
        end if;
        perform pg_catalog.pg_sleep(
            least(seconds, extract(epoch from until - pg_catalog.clock_timestamp()))
        );
        seconds := least(2 * seconds, 0.25);
    end loop;
    status := seen.status;
    output := seen.output;
    if seen.status = 'completed' then
        return next;
        return;
    end if;
    select pg_catalog.format('step "%s": %s', task.step_slug, task.error_message)
    into error
    from pgflow.step_tasks as task
    where task.run_id = wait_for_run.run_id
        and task.status in ('failed', 'cancelled')
        and task.error_message is not null
    order by task.status desc, task.failed_at, task.step_slug, task.task_index
    limit 1;
    if not found then
        -- A condition that was not met has failed it.
        select pg_catalog.format('step "%s": %s', state.step_slug, pg_catalog.to_jsonb(state) ->> 'error_message')
        into error
        from pgflow.step_states as state
        where state.run_id = wait_for_run.run_id and state.status = 'failed'
        order by state.failed_at
        limit 1;
    end if;
    return next;
end
$$;

comment on function pgflow_worker.wait_for_run(uuid, interval) is
'Waits until a run has ended; its status, its output, and if it has failed the first error. Raises PW015, with what '
'the run is waiting for, when the time is up; at once PW011 where the wait could have no end: if this transaction '
'has started the run itself, or is repeatable read or serializable; PW002 if there is no such run. Like '
'every long statement it keeps VACUUM from removing what was deleted meanwhile.';

revoke execute on function pgflow_worker.wait_for_run(uuid, interval) from public;
