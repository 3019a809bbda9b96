create function pgflow_worker._doctor_flows()
returns table (severity text, what text, why text, cure text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    here constant text := pg_catalog.current_database();
    most constant integer := 1000;
    sees_jobs constant boolean := pgflow_worker._may_see_jobs();
    flow record;
    queue regclass;
    waiting bigint;
    since interval;
    job text;
    hidden text [] := array[]::text [];
begin
    for flow in
        select
            known.flow_slug, known.module, pause.paused_at, pause.paused_by, pause.reason,
            pause.paused_at is not null as is_paused, pause.flow_slug is null as all_are
        from pgflow_worker.flows as known
        left join lateral (
            select found.* from pgflow_worker.pauses as found
            where found.flow_slug = known.flow_slug or found.flow_slug is null
            order by found.flow_slug nulls last
            limit 1
        ) as pause on true
        order by known.flow_slug
    loop
        -- to_regclass() is an error where the schema may not be used.
        queue := (
            select class.oid from pg_catalog.pg_class as class
            join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
            where namespace.nspname = 'pgmq' and class.relname = 'q_' || pg_catalog.lower(flow.flow_slug)
        );
        if queue is null then
            return query values (
                'error',
                pg_catalog.format('the queue of flow "%s" does not exist', flow.flow_slug),
                'every call fails with PW004, and no run can be started',
                pgflow_worker._doctor_deploy(flow.module)
            );
            continue;
        end if;
        if flow.reason like '%; paused by the worker' then
            return query values (
                'error',
                pg_catalog.format('flow "%s" paused itself: %s', flow.flow_slug, flow.reason),
                'it does nothing, and the step may crash the server again',
                pg_catalog.format(
                    'select * from pgflow_worker.recent_failures where flow_slug = %1$L limit 1 \gx  '
                    '-- mend it and deploy, then: select pgflow_worker.resume(%1$L);',
                    flow.flow_slug
                )
            );
            continue;
        end if;
        -- Said once, about pgmq as a whole.
        continue when not pg_catalog.has_schema_privilege('pgmq', 'usage');
        if not pg_catalog.has_table_privilege(queue, 'select') then
            hidden := hidden || flow.flow_slug;
            continue;
        end if;
        execute pg_catalog.format(
            'select pg_catalog.count(*), pg_catalog.date_trunc(''second'', pg_catalog.clock_timestamp() - pg_catalog.min(vt))
            from (
                select vt from %s where vt <= pg_catalog.clock_timestamp() - $1 order by vt limit $2
            ) as ready', queue
        ) into waiting, since using case when flow.is_paused then interval '0' else interval '2 minutes' end, most;
        continue when waiting = 0;
        if flow.is_paused then
            return query values (
                'note',
                pg_catalog.format(
                    '%s wait%s: flow "%s" was paused %s ago by %s%s',
                    case when waiting < most then waiting::text else most || ' or more' end
                    || case when waiting = 1 then ' task' else ' tasks' end,
                    case when waiting = 1 then 's' end,
                    flow.flow_slug,
                    pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - flow.paused_at),
                    flow.paused_by,
                    ': ' || flow.reason
                ),
                case when flow.all_are then 'every flow is paused' else 'no worker takes them' end,
                case
                    when flow.all_are then 'select pgflow_worker.resume();'
                    else pg_catalog.format('select pgflow_worker.resume(%L);', flow.flow_slug)
                end
            );
            continue;
        end if;
        continue when exists (
            select from pgflow_worker._slots(flow.flow_slug) as slot where slot.pid is not null
        );
        job := (
            select pg_catalog.min(known.jobid)::text
            from pgflow_worker._cron_jobs() as known
            where known.active and known.database = here
                and coalesce(known.flow_slug, flow.flow_slug) = flow.flow_slug
        );
        return query values (
            'error',
            pg_catalog.format(
                '%s of flow "%s" %s been ready for up to %s, and no worker runs',
                case when waiting < most then waiting::text else most || ' or more' end
                || case when waiting = 1 then ' task' else ' tasks' end,
                flow.flow_slug, case when waiting = 1 then 'has' else 'have' end, since
            ),
            case
                when job is not null then pg_catalog.format('job %s is to call the worker, and does not', job)
                when sees_jobs then 'no active job calls the worker'
                else 'nothing calls the worker'
            end,
            case
                when job is not null then pg_catalog.format(
                    'select start_time, status, return_message from cron.job_run_details '
                    'where jobid = %s order by runid desc limit 5;',
                    job
                )
                when sees_jobs then pgflow_worker._doctor_schedule(flow.flow_slug, here)
                else pg_catalog.format('call pgflow_worker.work(%L, mode => ''drain'');', flow.flow_slug)
            end
        );
    end loop;
    if hidden <> '{}' then
        return query values (
            'note',
            pg_catalog.format('role "%s" may not read the queues of flows: %s', current_user, pg_catalog.array_to_string(hidden, ', ')),
            'whether their tasks wait, or have lost their messages, is not known',
            pg_catalog.format('select pgflow_worker.grant_usage(%L, ''operate'');', current_user)
        );
    end if;
end
$$;

comment on function pgflow_worker._doctor_flows() is
'The findings of doctor() about deployed flows: no queue, tasks that wait, pauses.';

revoke execute on function pgflow_worker._doctor_flows() from public;
