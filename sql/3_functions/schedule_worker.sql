create function pgflow_worker.schedule_worker(
    flow_slug text default null,
    mode text default 'drain',
    every interval default '5 seconds',
    workers integer default 1,
    batch_size integer default 10,
    max_concurrent integer default 5
)
returns table (job text, schedule text, status text, statement text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    period text := pgflow_worker._cron_schedule(every);
    called_mode text := mode;
begin
    -- The job's arguments are those of work(), whose gate judges them.
    perform pgflow_worker._gate(flow_slug, batch_size, max_concurrent, mode, '55 seconds');
    if workers is null or workers not between 1 and 32 then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('workers must be between 1 and 32, not %s', coalesce(workers::text, 'null')),
            hint = 'workers is the number of jobs, and of the flow''s slots; the default is 1.';
    end if;

    if period like '%seconds' and not pgflow_worker._cron_has_seconds() then
        period := '* * * * *';
        called_mode := 'wait';
        raise notice using
            message = 'this pg_cron has no schedules in seconds: the job waits for tasks, minute by minute',
            hint = 'pg_cron 1.5 and later have them.';
    end if;
    if flow_slug is not null then
        update pgflow_worker.flows as flow
        set workers = schedule_worker.workers
        where flow.flow_slug = schedule_worker.flow_slug
            and flow.workers <> schedule_worker.workers;
    end if;
    return query
    select scheduled.*
    from pgflow_worker._schedule_jobs(
        flow_slug,
        workers,
        period,
        pg_catalog.format(
            'call pgflow_worker.work(%smode => %L%s%s)',
            pg_catalog.quote_literal(flow_slug) || ', ',
            called_mode,
            case when batch_size <> 10 then ', batch_size => ' || batch_size end,
            case when max_concurrent <> 5 then ', max_concurrent => ' || max_concurrent end
        )
    ) as scheduled;
end
$$;

comment on function pgflow_worker.schedule_worker(text, text, interval, integer, integer, integer) is
'Lets pg_cron call work() for a flow, or with null one worker for all flows; says what it did. workers: how many jobs, '
'and the flow''s number of slots. Called again it changes what differs. The jobs run as the current role. Where '
'pg_cron has no seconds, a minute''s job waits for tasks. Where pg_cron is in another database, nothing is done there: '
'"statement" is to be run in it. Raises PW001, PW002, PW004, PW013.';

revoke execute on function
pgflow_worker.schedule_worker(text, text, interval, integer, integer, integer) from public;
