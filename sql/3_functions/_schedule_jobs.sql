create function pgflow_worker._schedule_jobs(flow_slug text, workers integer, period text, command text)
returns table (job text, schedule text, status text, statement text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    prefix constant text := pgflow_worker._job_prefix(_schedule_jobs.flow_slug);
    home constant text := pgflow_worker._cron_database();
    is_here constant boolean := home = pg_catalog.current_database();
    elsewhere constant text := 'not done: run the statement in database ' || pg_catalog.quote_ident(home);
    known record;
begin
    for number in 1 .. _schedule_jobs.workers loop
        job := prefix || number;
        schedule := _schedule_jobs.period;
        if not is_here then
            status := elsewhere;
            statement := pg_catalog.format(
                'select cron.schedule_in_database(%L, %L, %L, %L, %L);',
                job, schedule, _schedule_jobs.command, pg_catalog.current_database(), current_user
            );
        else
            execute 'select jobid, schedule = $2 and command = $3 and active as is_same '
            'from cron.job where jobname = $1 and username = current_user'
            into known
            using job, schedule, _schedule_jobs.command;
            statement := pg_catalog.format(
                'select cron.schedule(%L, %L, %L);', job, schedule, _schedule_jobs.command
            );
            if known.is_same then
                status := 'unchanged';
            else
                -- pg_cron would leave one that is not active as it is.
                if known.jobid is not null then
                    execute 'select cron.unschedule($1)' using known.jobid;
                end if;
                execute statement;
                status := case when known.jobid is null then 'scheduled' else 'changed' end;
            end if;
        end if;
        return next;
    end loop;

    if not is_here then
        job := prefix || case _schedule_jobs.workers when 0 then '*' else _schedule_jobs.workers + 1 || '...' end;
        schedule := null;
        status := elsewhere;
        statement := pg_catalog.format(
            'select cron.unschedule(jobid) from cron.job where starts_with(jobname, %L) '
            'and split_part(jobname, ''--'', -1)::integer > %s;',
            prefix, _schedule_jobs.workers
        );
        return next;
        return;
    end if;
    for known in
        execute 'select jobid, jobname, schedule from cron.job '
        'where pg_catalog.starts_with(jobname, $1) and username = current_user '
        'and pg_catalog.split_part(jobname, ''--'', -1)::integer > $2 order by jobid'
        using prefix, _schedule_jobs.workers
    loop
        job := known.jobname;
        schedule := known.schedule;
        status := 'unscheduled';
        statement := pg_catalog.format('select cron.unschedule(%s);', known.jobid);
        execute statement;
        return next;
    end loop;
exception
    when insufficient_privilege then
        raise exception using
            errcode = 'insufficient_privilege',
            message = pg_catalog.format('role "%s" may not use pg_cron', current_user),
            detail = sqlerrm,
            hint = pg_catalog.format('Let a superuser run: grant usage on schema cron to %I;', current_user);
end
$$;

comment on function pgflow_worker._schedule_jobs(text, integer, text, text) is
'Lets the current role have so many pg_cron jobs for a flow''s workers, or with null for workers of all flows, and no '
'others. Where pg_cron is in another database, the statements to be run there. Raises PW013 if there is no pg_cron.';

revoke execute on function pgflow_worker._schedule_jobs(text, integer, text, text) from public;
