create function pgflow_worker._cron_jobs_of_nobody()
returns table (jobid bigint, name text, username text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if not pgflow_worker._may_see_jobs() then
        return;
    end if;
    for jobid, name, username in execute pg_catalog.format(
        'select job.jobid, pg_catalog.to_jsonb(job) ->> ''jobname'', job.username from %s as job
        where not exists (select from pg_catalog.pg_roles as role where role.rolname = job.username)
        order by job.jobid',
        'cron.job'
    ) loop
        return next;
    end loop;
end
$$;

comment on function pgflow_worker._cron_jobs_of_nobody() is
'The jobs of pg_cron in this database, whatever they do, whose role does not exist: pg_cron 1.4 fails over them.';

revoke execute on function pgflow_worker._cron_jobs_of_nobody() from public;
