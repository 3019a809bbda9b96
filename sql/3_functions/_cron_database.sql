create function pgflow_worker._cron_database()
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    home text;
    is_here constant boolean := exists (
        select from pg_catalog.pg_extension as extension where extension.extname = 'pg_cron'
    );
begin
    -- Not current_setting(), which also tells what is set and means nothing.
    home := (
        select setting.setting
        from pg_catalog.pg_settings as setting
        where setting.name = 'cron.database_name'
    );
    if home is null and not pg_catalog.pg_has_role('pg_read_all_settings', 'usage') then
        if is_here then
            return pg_catalog.current_database();
        end if;
        raise exception using
            errcode = 'PW013',
            message = 'pg_cron is not in this database',
            hint = 'A superuser can find out where it is: show cron.database_name;';
    elsif home is null then
        raise exception using
            errcode = 'PW013',
            message = 'pg_cron is not loaded',
            hint = pg_catalog.format(
                'Set shared_preload_libraries = ''pg_cron'' and cron.database_name = ''%s'' in postgresql.conf, '
                'restart the server, then: create extension if not exists pg_cron;',
                pg_catalog.current_database()
            );
    elsif home = pg_catalog.current_database() and not is_here then
        raise exception using
            errcode = 'PW013',
            message = 'the extension pg_cron does not exist in this database',
            hint = 'create extension pg_cron;';
    end if;
    return home;
end
$$;

comment on function pgflow_worker._cron_database() is
'The one database in which pg_cron keeps its jobs. Raises PW013 if there is none, or it is unknown to this role.';

revoke execute on function pgflow_worker._cron_database() from public;
