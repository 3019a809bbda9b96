create function pgflow_worker._doctor_job_runs()
returns table (severity text, what text, why text, cure text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $body$
begin
    if not pgflow_worker._may_see_jobs() or pg_catalog.to_regclass('cron.job_run_details') is null then
        return;
    end if;
    -- The table has no index but its key: the last runs of all jobs, which are the last days, or hours.
    for severity, what, why, cure in execute pg_catalog.format(
        $query$
        select
            'error',
            pg_catalog.format(
                'job %%s%%s failed at %%s: %%s',
                job.jobid, ' "' || job.name || '"', pg_catalog.date_trunc('second', run.end_time),
                -- Without the hint and the context.
                pg_catalog.left(
                    pg_catalog.btrim(pg_catalog.regexp_replace(run.return_message, '^ERROR:\s+|\n.*', '', 'g')), 120
                )
            ),
            'its last run did no work',
            case
                when run.return_message like '%%connection failed%%'
                    then 'alter system set cron.use_background_workers = on;  -- and restart the server'
                -- Never the job's command: it may be another role's.
                else pg_catalog.format(
                    'select return_message from cron.job_run_details where jobid = %%s order by runid desc limit 1;',
                    job.jobid
                )
            end
        from pgflow_worker._cron_jobs() as job
        join (
            select distinct on (recent.jobid)
                recent.jobid, recent.status, recent.return_message,
                coalesce(recent.end_time, recent.start_time) as end_time
            from (
                select * from %s as details order by details.runid desc limit 5000
            ) as recent
            where recent.status in ('succeeded', 'failed')
            order by recent.jobid, recent.runid desc
        ) as run on run.jobid = job.jobid
        where run.status = 'failed' and job.active
        order by job.jobid
        $query$, 'cron.job_run_details'
    ) loop
        return next;
    end loop;
end
$body$;

comment on function pgflow_worker._doctor_job_runs() is
'The findings of doctor() about the last runs of pg_cron''s jobs that call the worker.';

revoke execute on function pgflow_worker._doctor_job_runs() from public;
