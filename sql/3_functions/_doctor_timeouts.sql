create function pgflow_worker._doctor_timeouts()
returns table (severity text, what text, why text, cure text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_catalog.to_regclass('pgflow.steps') is null then
        return;
    end if;
    return query
    with known as (
        select setting.name, setting.setting,
            -- What this session itself was given says nothing about others.
            setting.source not in ('global', 'database', 'user', 'database user', 'client', 'session') as is_servers
        from pg_catalog.pg_settings as setting
        where setting.name in ('statement_timeout', 'transaction_timeout')
    ),
    given as (
        select
            job.jobid, job.name as job_name, job.username, job.flow_slug, job.mode, job.max_duration, known.name,
            coalesce(
                (
                    select pg_catalog.substr(config.entry, pg_catalog.length(known.name) + 2)
                    from pg_catalog.pg_db_role_setting as stored
                    cross join lateral pg_catalog.unnest(stored.setconfig) as config (entry)
                    where stored.setdatabase in (0, db.oid)
                        and stored.setrole in (0, role.oid)
                        and config.entry like pg_catalog.replace(known.name, '_', '\_') || '=%'
                    -- The role in the database, the role, the database, everybody.
                    order by (stored.setrole <> 0) desc, (stored.setdatabase <> 0) desc
                    limit 1
                ),
                case when known.is_servers then known.setting end
            ) as value
        from pgflow_worker._cron_jobs() as job
        join pg_catalog.pg_roles as role on role.rolname = job.username
        join pg_catalog.pg_database as db on db.datname = job.database
        cross join known
        where job.active and job.database = pg_catalog.current_database()
    ),
    limited as (
        select
            given.*,
            case when given.value ~ '^\d+$' then given.value || ' ms' else given.value end::interval as timeout
        from given
        where given.value is not null
    ),
    -- The worker commits between tasks, so that what lasts is a handler.
    needed as (
        select
            limited.*,
            case limited.name
                when 'statement_timeout' then limited.max_duration
                else (
                    select pg_catalog.make_interval(
                        secs => pg_catalog.max(coalesce(step.opt_timeout, flow.opt_timeout))
                    )
                    from pgflow.flows as flow
                    join pgflow.steps as step on step.flow_slug = flow.flow_slug
                    where flow.flow_slug = coalesce(limited.flow_slug, flow.flow_slug)
                        and exists (
                            select from pgflow_worker.flows as deployed where deployed.flow_slug = flow.flow_slug
                        )
                )
            end as needs
        from limited
    )
    select
        'warning',
        pg_catalog.format(
            '%s of role "%s", as which job %s%s runs, is %s',
            needed.name, needed.username, needed.jobid, ' "' || needed.job_name || '"', needed.value
        ),
        case needed.name
            when 'statement_timeout' then pg_catalog.format(
                'it covers the whole call, which may take %s: handlers that run then lose an attempt', needed.needs
            )
            else pg_catalog.format('a handler may take %s: it ends the worker in the middle of one', needed.needs)
        end,
        pg_catalog.format(
            'alter role %I in database %I set %s = 0;', needed.username, pg_catalog.current_database(), needed.name
        )
    from needed
    where needed.timeout > interval '0' and needed.timeout <= needed.needs
    order by needed.jobid, needed.name;
end
$$;

comment on function pgflow_worker._doctor_timeouts() is
'The findings of doctor() about timeouts that end the calls of pg_cron''s jobs.';

revoke execute on function pgflow_worker._doctor_timeouts() from public;
