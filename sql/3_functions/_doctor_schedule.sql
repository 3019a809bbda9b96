create function pgflow_worker._doctor_schedule(flow_slug text, cron_database text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when cron_database = pg_catalog.current_database()
            then pg_catalog.format('select * from pgflow_worker.schedule_worker(%L);', flow_slug)
        -- psql's \\ ends a \connect.
        else pg_catalog.format(
            '\connect %I \\ select cron.schedule_in_database(%L, %L, %s, %L);',
            cron_database, job.name, job.schedule, job.command, pg_catalog.current_database()
        )
    end
    from (
        select
            pgflow_worker._job_prefix(flow_slug) || '1' as name,
            case when pgflow_worker._cron_has_seconds() then '5 seconds' else '* * * * *' end as schedule,
            pgflow_worker._doctor_command(flow_slug) as command
    ) as job
$$;

comment on function pgflow_worker._doctor_schedule(text, text) is
'The statement that makes a job for a flow of this database, with pg_cron in that database.';

revoke execute on function pgflow_worker._doctor_schedule(text, text) from public;
