create function pgflow_worker._cron_has_seconds()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        pg_catalog.regexp_match(
            coalesce(
                (select extension.extversion from pg_catalog.pg_extension as extension where extension.extname = 'pg_cron'),
                (
                    select available.default_version
                    from pg_catalog.pg_available_extensions as available
                    where available.name = 'pg_cron'
                )
            ),
            '^(\d+)\.(\d+)'
        )::integer [] >= array[1, 5],
        false
    )
$$;

comment on function pgflow_worker._cron_has_seconds() is
'Whether pg_cron knows schedules such as "5 seconds", as 1.5 and later do. Earlier ones take six fields for five.';

revoke execute on function pgflow_worker._cron_has_seconds() from public;
