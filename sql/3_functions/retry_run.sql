create function pgflow_worker.retry_run(run_id uuid)
returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    target record;
    running record;
    hindrance text;
    later text;
    sent integer;
begin
    select run.* into target from pgflow_worker._check_run(run_id, lock => true) as run;
    perform pgflow_worker._check_retry(run_id);
    perform pgflow_worker._check_queue(target.flow_slug);
    if target.status <> 'failed' then
        raise exception using
            errcode = 'PW016',
            message = pg_catalog.format('run %s has not failed: %s', run_id, target.status),
            hint = case target.status
                when 'started' then 'It is running: its tasks are tried again as often as their steps say.'
                else pg_catalog.format('For another run: select pgflow_worker.restart_run(%L);', run_id)
            end;
    end if;
    -- A condition that was not met fails its step without a task, and would do so again.
    select state.step_slug
    into hindrance
    from pgflow.step_states as state
    where state.run_id = retry_run.run_id
        and state.status = 'failed'
        and not exists (
            select from pgflow.step_tasks as task
            where task.run_id = state.run_id and task.step_slug = state.step_slug
        );
    if found then
        raise exception using
            errcode = 'PW016',
            message = pg_catalog.format('step "%s" failed because its condition was not met', hindrance),
            hint = pg_catalog.format(
                'It would again with this input. For another run with it: select pgflow_worker.restart_run(%L);', run_id
            );
    end if;
    select slot.pid, task.step_slug
    into running
    from pgflow_worker._slots(target.flow_slug) as slot
    join pgflow.step_tasks as task on task.last_worker_id = slot.worker_id
    where task.run_id = retry_run.run_id and task.status = 'started' and slot.pid is not null
    limit 1;
    if found then
        raise exception using
            errcode = 'PW009',
            message = pg_catalog.format('a worker still runs step "%s" of this run, pid %s', running.step_slug, running.pid),
            hint = pg_catalog.format('Wait until it ends, or cancel it: select pg_cancel_backend(%s);', running.pid);
    end if;

    perform pgflow_worker._archive_messages(run_id);
    -- A step skipped while its tasks waited stays skipped.
    update pgflow.step_tasks as task
    set status = 'queued',
        attempts_count = 0,
        error_message = null,
        output = null,
        queued_at = now(),
        started_at = null,
        failed_at = null,
        last_worker_id = null
    from pgflow.step_states as state
    where task.run_id = retry_run.run_id
        and state.run_id = task.run_id
        and state.step_slug = task.step_slug
        and state.status in ('started', 'failed')
        and task.status <> 'completed';
    -- From pgflow 0.13.2 on, by how often its reaper has taken a task back.
    for later in
        select pg_catalog.format('%I = %s', attribute.attname, case when attribute.attnotnull then '0' else 'null' end)
        from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = 'pgflow.step_tasks'::regclass
            and attribute.attname in ('requeued_count', 'permanently_stalled_at')
    loop
        execute 'update pgflow.step_tasks set ' || later || ' where run_id = $1 and status = ''queued''' using run_id;
    end loop;
    update pgflow.step_tasks as task
    set message_id = numbered.message_id
    from (
        select waiting.step_slug, waiting.task_index, sent_message.message_id
        from (
            select
                queued.step_slug,
                pg_catalog.array_agg(queued.task_index order by queued.task_index) as task_indexes,
                pg_catalog.array_agg(
                    pg_catalog.jsonb_build_object(
                        'flow_slug', queued.flow_slug,
                        'run_id', queued.run_id,
                        'step_slug', queued.step_slug,
                        'task_index', queued.task_index
                    )
                    order by queued.task_index
                ) as messages
            from pgflow.step_tasks as queued
            where queued.run_id = retry_run.run_id and queued.status = 'queued'
            group by queued.step_slug
        ) as step
        cross join lateral pgmq.send_batch(target.flow_slug, step.messages)
            with ordinality as sent_message (message_id, place)
        cross join lateral (
            select step.step_slug, step.task_indexes[sent_message.place] as task_index
        ) as waiting
    ) as numbered
    where task.run_id = retry_run.run_id
        and task.step_slug = numbered.step_slug
        and task.task_index = numbered.task_index;
    get diagnostics sent = row_count;

    update pgflow.step_states as state
    set status = 'started',
        failed_at = null,
        remaining_tasks = (
            select pg_catalog.count(*) from pgflow.step_tasks as task
            where task.run_id = state.run_id and task.step_slug = state.step_slug and task.status <> 'completed'
        )
    where state.run_id = retry_run.run_id and state.status in ('started', 'failed');
    update pgflow.runs as run
    set status = 'started',
        failed_at = null,
        remaining_steps = (
            select pg_catalog.count(*) from pgflow.step_states as state
            where state.run_id = run.run_id and state.status not in ('completed', 'skipped')
        )
    where run.run_id = retry_run.run_id;
    -- For what pgflow had not done any more when the run failed.
    perform pgflow.start_ready_steps(run_id);
    perform pgflow.maybe_complete_run(run_id);
    perform pgflow_worker._notice_pause(target.flow_slug);
    return sent;
end
$$;

comment on function pgflow_worker.retry_run(uuid) is
'Lets a failed run go on: its finished steps and tasks stay, the others are queued again with all their attempts. '
'Returns the number of those tasks. Raises PW016 if the run has not failed, or if a condition failed it; PW009 while a '
'worker still runs a task of it; PW004 with versions of pgflow that this was not tested with; PW002.';

revoke execute on function pgflow_worker.retry_run(uuid) from public;
