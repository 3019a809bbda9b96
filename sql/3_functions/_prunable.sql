create function pgflow_worker._prunable(age interval, batch_size integer)
returns table (part text, relation text, condition text, cutoff timestamptz)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if age is null or age < interval '0' then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('age must not be %s', coalesce(age::text, 'null')),
            hint = 'What ended longer ago is removed, for example ''30 days''.';
    end if;
    if batch_size is null or batch_size < 1 then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('batch_size must be at least 1, not %s', coalesce(batch_size::text, 'null')),
            hint = 'About so many rows are removed in a transaction; the default is 1000.';
    end if;
    perform pgflow_worker._check_pgflow();
    return query
    select listed.part, listed.relation, listed.condition, pg_catalog.clock_timestamp() - age
    from (
        select 1 as place, 'runs' as part, 'pgflow.runs' as relation, null as condition
        union all
        -- An active run's attempts may tell how often its tasks have cost a worker.
        select 2, 'attempts', 'pgflow_worker.attempts', 'old.finished_at < $1 and not exists (
            select from pgflow.runs as run where run.run_id = old.run_id and run.status = ''started''
        )'
        union all
        select 3, 'invocations', 'pgflow_worker.invocations', 'old.finished_at < $1'
        union all
        select 4, 'messages', queue.archive, 'old.archived_at < $1'
        from (
            select pgflow_worker._queue_table(flow.flow_slug, 'a') as archive from pgflow.flows as flow
        ) as queue
        where pg_catalog.to_regclass(queue.archive) is not null
        union all
        select 5, 'workers', 'pgflow.workers', 'old.last_heartbeat_at < $1
            and not exists (
                select from pgflow.step_tasks as task
                where task.last_worker_id = old.worker_id and task.status = ''started''
            )
            and not exists (
                select from pgflow_worker.flows as flow
                cross join lateral pgflow_worker._slots(flow.flow_slug) as slot
                where slot.worker_id = old.worker_id
            )'
        union all
        select 6, 'job_run_details', 'cron.job_run_details', 'coalesce(old.end_time, old.start_time) < $1
            and old.database = pg_catalog.current_database()
            and old.command ~* ''^\s*call\s+pgflow_worker\.'''
        where exists (
            select from pg_catalog.pg_class as class
            join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
            where namespace.nspname = 'cron'
                and class.relname = 'job_run_details'
                and pg_catalog.has_schema_privilege(namespace.oid, 'usage')
                and pg_catalog.has_table_privilege(class.oid, 'select')
                and pg_catalog.has_table_privilege(class.oid, 'delete')
        )
    ) as listed
    order by listed.place, listed.relation;
end
$$;

comment on function pgflow_worker._prunable(interval, integer) is
'What prune_data_older_than() removes, table by table, and the time before which. Raises PW002 or PW004.';

revoke execute on function pgflow_worker._prunable(interval, integer) from public;
