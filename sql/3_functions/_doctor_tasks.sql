create function pgflow_worker._doctor_tasks()
returns table (severity text, what text, why text, cure text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    most constant integer := 1000;
    flow record;
    queue regclass;
    gone uuid [];
    stalled record;
    lost bigint;
    stray bigint [];
begin
    if pg_catalog.to_regclass('pgflow.steps') is null then
        return;
    end if;
    for flow in
        select known.flow_slug, known.module from pgflow_worker.flows as known order by known.flow_slug
    loop
        -- Free slots first: a worker that takes one later first takes back what was started there. The function is not
        -- STABLE, so that the tasks are then looked at with a new snapshot.
        gone := array(
            select slot.worker_id from pgflow_worker._slots(flow.flow_slug) as slot where slot.pid is null
        );
        select pg_catalog.count(*) as number, pg_catalog.min(task.step_slug) as step_slug, pg_catalog.min(task.started_at) as since
        into stalled
        from pgflow.step_tasks as task
        where task.flow_slug = flow.flow_slug
            and task.status = 'started'
            and (
                task.last_worker_id = any(gone)
                and task.started_at < pg_catalog.clock_timestamp() - interval '1 minute'
                or (task.run_id, task.step_slug, task.task_index) in (
                    select other.run_id, other.step_slug, other.task_index
                    from pgflow_worker._stalled_tasks(flow.flow_slug) as other
                )
            );
        if stalled.number > 0 then
            return query values (
                'warning',
                pg_catalog.format(
                    '%s of flow "%s" %s left started, since %s ago, by a worker that is gone: step "%s"%s',
                    stalled.number || case when stalled.number = 1 then ' task' else ' tasks' end,
                    flow.flow_slug,
                    case when stalled.number = 1 then 'was' else 'were' end,
                    pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - stalled.since),
                    stalled.step_slug,
                    case when stalled.number > 1 then ', ...' end
                ),
                'the next call takes them back',
                pg_catalog.format('call pgflow_worker.work(%L, mode => ''drain'');', flow.flow_slug)
            );
        end if;

        -- That a queue is missing, or may not be read, is said elsewhere.
        queue := (
            select class.oid from pg_catalog.pg_class as class
            join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
            where namespace.nspname = 'pgmq' and class.relname = 'q_' || pg_catalog.lower(flow.flow_slug)
        );
        continue when queue is null
            or not pg_catalog.has_schema_privilege('pgmq', 'usage')
            or not pg_catalog.has_table_privilege(queue, 'select');
        execute pg_catalog.format(
            'select pg_catalog.count(*)
            from pgflow.step_tasks as task
            join pgflow.step_states as state using (run_id, step_slug)
            join pgflow.runs as run using (run_id)
            where task.flow_slug = $1 and task.status = ''queued''
                and state.status = ''started'' and run.status = ''started''
                and not exists (select from %s as message where message.msg_id = task.message_id)', queue
        ) into lost using flow.flow_slug;
        if lost > 0 then
            return query values (
                'error',
                pg_catalog.format(
                    '%s of flow "%s" %s no message', lost || case when lost = 1 then ' task' else ' tasks' end,
                    flow.flow_slug, case when lost = 1 then 'has' else 'have' end
                ),
                'without one a task waits for ever; deploying sends it again',
                pgflow_worker._doctor_deploy(flow.module)
            );
        end if;
        -- Of a long queue only its beginning.
        execute pg_catalog.format(
            'select pg_catalog.array_agg(message.msg_id order by message.msg_id)
            from (select msg_id from %s order by msg_id limit $2) as message
            where not exists (
                select from pgflow.step_tasks as task
                where task.flow_slug = $1 and task.message_id = message.msg_id
                    and task.status in (''queued'', ''started'')
            )', queue
        ) into stray using flow.flow_slug, most;
        if stray is not null then
            return query values (
                'note',
                pg_catalog.format(
                    '%s in the queue of flow "%s" belong%s to no unfinished task',
                    pg_catalog.cardinality(stray)
                    || case when pg_catalog.cardinality(stray) = 1 then ' message' else ' messages' end,
                    flow.flow_slug,
                    case when pg_catalog.cardinality(stray) = 1 then 's' end
                ),
                'a worker that reads one archives it',
                pg_catalog.format('select pgmq.archive(%L, %L::bigint[]);', flow.flow_slug, stray)
            );
        end if;
    end loop;
end
$$;

comment on function pgflow_worker._doctor_tasks() is
'The findings of doctor() about tasks that dead workers have left, and about tasks and messages without each other.';

revoke execute on function pgflow_worker._doctor_tasks() from public;
