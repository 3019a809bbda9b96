create function pgflow_worker._grant_queues()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    missing record;
begin
    -- Only what is missing: GRANT makes every session look at the table anew.
    for missing in
        select granted.privileges, granted.object, role.rolname
        from (
            values
            ('monitor', 'pgflow_worker._flow_status()'),
            ('operate', 'pgflow_worker.work(text, integer, integer, text, interval, jsonb)'),
            ('deploy', 'pgflow_worker.prune_data_older_than(interval, integer, jsonb)')
        ) as level (name, routine)
        join pg_catalog.pg_proc as proc on proc.oid = level.routine::regprocedure
        cross join lateral pgflow_worker._grants(level.name) as granted
        cross join lateral pg_catalog.aclexplode(proc.proacl) as acl
        join pg_catalog.pg_roles as role on role.oid = acl.grantee
        where granted.object like 'table pgmq.%'
            and exists (
                select from pg_catalog.string_to_table(granted.privileges, ', ') as privilege
                where not pg_catalog.has_table_privilege(
                    role.oid, pg_catalog.substr(granted.object, 7), privilege
                )
            )
    loop
        execute pg_catalog.format(
            'grant %s on %s to %I', missing.privileges, missing.object, missing.rolname
        );
    end loop;
end
$$;

comment on function pgflow_worker._grant_queues() is
'Gives roles with a level, those that may call a routine of it, the queues that flows got since.';

revoke execute on function pgflow_worker._grant_queues() from public;
