create function pgflow_worker.doctor()
returns table (severity text, what text, why text, cure text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    subjects text [] := array['pgflow', 'owners', 'slots', 'cron', 'jobs', 'job_runs'];
begin
    if pg_catalog.pg_is_in_recovery() then
        return query values (
            'note',
            'this server is a standby',
            'no worker runs here; what is wrong shows on the primary',
            'select sender_host, sender_port from pg_stat_wal_receiver;'
        );
        return;
    end if;
    if pgflow_worker._doctor_may_read() then
        subjects := array[
            'pgflow', 'owners', 'code', 'flows', 'tasks', 'slots', 'cron', 'jobs', 'job_runs', 'runs', 'timeouts',
            'advice'
        ];
    end if;
    return query
    select found.severity, found.what, found.why, found.cure
    from pg_catalog.unnest(subjects) with ordinality as subject (name, place)
    cross join lateral pgflow_worker._doctor_check(subject.name) with ordinality as found
    order by
        pg_catalog.array_position(array['error', 'warning', 'note'], found.severity),
        subject.place,
        found.ordinality;
    if not found then
        return query values ('ok', 'nothing to report', '', '');
    end if;
end
$$;

comment on function pgflow_worker.doctor() is
'Looks for everything that is known to keep flows from running or to slow them down, and changes nothing. A row per '
'finding, most severe first: error (something does not run), warning (something will not), note. what: the fact; '
'why: its consequence; cure: a statement for psql, or a line for the shell or postgresql.conf. What the caller''s '
'role may not look at is a note. One row with the severity ok: nothing was found. For roles that may deploy it '
'also imports the deployed modules, which runs their top-level code.';

revoke execute on function pgflow_worker.doctor() from public;
