create function pgflow_worker._doctor_pgflow()
returns table (severity text, what text, why text, cure text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    here constant text := pg_catalog.current_database();
    consequence text := 'nothing can be deployed or run';
    hint text;
begin
    -- A name in a schema that may not be used would be an error.
    if not pg_catalog.has_schema_privilege('pgmq', 'usage') then
        return query values (
            'note',
            pg_catalog.format('role "%s" may not use schema pgmq', current_user),
            'whether pgmq and the queues are in order, and what waits in them, is not known',
            pg_catalog.format('select pgflow_worker.grant_usage(%L, ''monitor'');', current_user)
        );
        return;
    end if;
    begin
        perform pgflow_worker._check_pgflow();
    exception
        when sqlstate 'PW004' then
            get stacked diagnostics hint = pg_exception_hint;
            return query values (
                'error',
                sqlerrm,
                consequence,
                case
                    when pg_catalog.to_regnamespace('pgflow') is null
                        then pg_catalog.format(
                            'PGDATABASE=''%s'' make install-pgflow', pg_catalog.replace(here, '''', '''\''''')
                        )
                    when sqlerrm like 'pgmq %' then 'alter extension pgmq update;'
                    else '-- ' || hint
                end
            );
            return;
    end;
    if not exists (
        select from pg_catalog.pg_proc as proc
        join pg_catalog.pg_namespace as namespace on namespace.oid = proc.pronamespace
        where namespace.nspname = 'realtime' and proc.proname = 'send'
            and pg_catalog.oidvectortypes(proc.proargtypes) = 'jsonb, text, text, boolean'
    )
        and exists (
            select from pg_catalog.pg_proc as proc
            where proc.pronamespace = 'pgflow'::regnamespace and proc.prosrc like '%realtime.send(%'
        )
    then
        return query values (
            'error',
            'function realtime.send(jsonb, text, text, boolean) is missing',
            'pgflow calls it when runs and steps begin and end, so that none can',
            'create schema if not exists realtime; grant usage on schema realtime to public; '
            'create function realtime.send(payload jsonb, event text, topic text, private boolean default true) '
            'returns void language sql as ''select'';'
        );
    end if;
end
$$;

comment on function pgflow_worker._doctor_pgflow() is
'The findings of doctor() about pgflow, pgmq and realtime.send: missing, or of another version.';

revoke execute on function pgflow_worker._doctor_pgflow() from public;
