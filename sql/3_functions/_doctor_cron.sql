create function pgflow_worker._doctor_cron()
returns table (severity text, what text, why text, cure text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    here constant text := pg_catalog.current_database();
    may_see constant boolean := pg_catalog.pg_has_role('pg_read_all_settings', 'usage');
    version constant text := pg_catalog.current_setting('server_version_num')::integer / 10000;
    launcher record;
    libraries text;
    directory text;
    cluster text [];
    cron_database text;
    is_loaded boolean;
begin
    cron_database := (
        select setting.setting from pg_catalog.pg_settings as setting where setting.name = 'cron.database_name'
    );
    -- After an error it is started again in a second.
    for look in 1..3 loop
        -- Everybody sees a session's name and database, but what kind it is only who may read statistics.
        select activity.pid, activity.datname::text as datname
        into launcher
        from pg_catalog.pg_stat_activity as activity
        where activity.application_name = 'pg_cron scheduler'
            and activity.backend_type is distinct from 'client backend'
        limit 1;
        exit when found or look = 3 or not exists (
            select from pg_catalog.pg_database as db where db.datname = cron_database
        );
        perform pg_catalog.pg_sleep(1);
        perform pg_catalog.pg_stat_clear_snapshot();
    end loop;
    cron_database := coalesce(launcher.datname, cron_database);
    is_loaded := launcher.pid is not null or cron_database is not null;

    if not is_loaded and not may_see then
        return query values (
            'note',
            pg_catalog.format('role "%s" cannot see whether pg_cron is loaded', current_user),
            'it may not read all settings',
            pg_catalog.format('grant pg_read_all_settings to %I;', current_user)
        );
        return;
    end if;
    if not is_loaded and not exists (
        select from pg_catalog.pg_available_extensions as available where available.name = 'pg_cron'
    ) then
        return query values (
            'warning',
            'pg_cron is not installed on this server',
            'no job can call the worker; something else has to',
            pg_catalog.format('apt-get install postgresql-%s-cron', version)
        );
        return;
    end if;
    if not is_loaded then
        -- Each name on its own: quoted together they would be one name, and the server would not start.
        select pg_catalog.string_agg(pg_catalog.quote_literal(pg_catalog.btrim(library, ' "')) || ', ', '')
        into libraries
        from pg_catalog.string_to_table(pg_catalog.current_setting('shared_preload_libraries'), ',') as library
        where pg_catalog.btrim(library) <> '';
        return query values (
            'warning',
            'pg_cron is not loaded: shared_preload_libraries does not name it',
            'no job can call the worker; something else has to',
            pg_catalog.format(
                'alter system set shared_preload_libraries = %s''pg_cron'';  -- and restart the server', libraries
            )
        );
        return;
    end if;
    if cron_database is not null and not exists (
        select from pg_catalog.pg_database as db where db.datname = cron_database
    ) then
        return query values (
            'error',
            pg_catalog.format('pg_cron''s database "%s" does not exist', cron_database),
            'pg_cron cannot start, and no job runs',
            pg_catalog.format('alter system set cron.database_name = %L;  -- and restart the server', here)
        );
        return;
    end if;
    if launcher.pid is null and not exists (select from pgflow_worker._cron_jobs_of_nobody()) then
        -- Debian keeps the settings elsewhere, and has a program of its own.
        directory := pg_catalog.current_setting('data_directory');
        cluster := pg_catalog.regexp_match(
            pg_catalog.current_setting('config_file'), '^/etc/postgresql/([^/]+)/([^/]+)/postgresql.conf$'
        );
        return query values (
            'error',
            'pg_cron''s launcher is not running',
            'no job runs until the server is restarted',
            case
                when cluster is null then 'pg_ctl restart -D ''' || pg_catalog.replace(directory, '''', '''\''''') || ''''
                else pg_catalog.format('pg_ctlcluster %s %s restart', cluster[1], cluster[2])
            end
        );
    end if;
    if cron_database = here then
        if not exists (
            select from pg_catalog.pg_extension as extension where extension.extname = 'pg_cron'
        ) then
            return query values (
                'warning',
                'pg_cron is loaded for this database, but its extension is missing',
                'no job can call the worker; something else has to',
                'create extension pg_cron;'
            );
        end if;
    elsif cron_database is not null then
        return query values (
            'note',
            pg_catalog.format('pg_cron keeps its jobs in database "%s"', cron_database),
            'jobs that call the worker cannot be seen from here',
            coalesce(
                (
                    select pgflow_worker._doctor_schedule(flow.flow_slug, cron_database)
                    from pgflow_worker.flows as flow
                    order by flow.flow_slug
                    limit 1
                ),
                pg_catalog.format('\connect %I', cron_database)
            )
        );
    end if;
end
$$;

comment on function pgflow_worker._doctor_cron() is
'The findings of doctor() about pg_cron itself.';

revoke execute on function pgflow_worker._doctor_cron() from public;
