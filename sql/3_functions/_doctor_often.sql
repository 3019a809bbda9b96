create function pgflow_worker._doctor_often(jobid bigint, flow_slug text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when pgflow_worker._cron_has_seconds()
            then pg_catalog.format('select cron.alter_job(%s, schedule => ''5 seconds'');', jobid)
        else pg_catalog.format(
            'select cron.alter_job(%s, schedule => ''* * * * *'', command => %s);',
            jobid, pgflow_worker._doctor_command(flow_slug)
        )
    end
$$;

comment on function pgflow_worker._doctor_often(bigint, text) is
'The statement that lets a job of pg_cron see new tasks within seconds.';

revoke execute on function pgflow_worker._doctor_often(bigint, text) from public;
