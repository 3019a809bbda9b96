create function pgflow_worker.revoke_usage(role name)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    granted record;
begin
    perform pgflow_worker._check_pgflow();
    if not exists (select from pg_catalog.pg_roles where rolname = role) then
        raise exception using
            errcode = 'PW002',
            message = coalesce('role "' || role || '" does not exist', 'role is null'),
            hint = 'Its privileges went with it.';
    end if;
    for granted in select * from pgflow_worker._grants('deploy') loop
        execute pg_catalog.format('revoke %s on %s from %I', granted.privileges, granted.object, role);
    end loop;
end
$$;

comment on function pgflow_worker.revoke_usage(name) is
'Takes back what grant_usage() can give, whatever the role''s level. Raises PW002 for an unknown role.';

revoke execute on function pgflow_worker.revoke_usage(name) from public;
