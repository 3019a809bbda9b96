create function pgflow_worker.grant_usage(role name, level text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    levels constant text := 'Levels: monitor (read), operate (also work, pause and start runs), '
        'deploy (also deploy: as good as a superuser).';
    granted record;
    open record;
begin
    perform pgflow_worker._check_pgflow();
    if not exists (select from pg_catalog.pg_roles where rolname = role) then
        raise exception using
            errcode = 'PW002',
            message = coalesce('role "' || role || '" does not exist', 'role is null'),
            hint = 'Create it first, with CREATE ROLE. ' || levels;
    end if;
    if level is null or level not in ('monitor', 'operate', 'deploy') then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('unknown level %s', coalesce('"' || level || '"', 'null')),
            hint = levels;
    end if;

    -- pgflow leaves them to everybody who may use its schema, and they look objects up on the caller's
    -- search_path: who could use the schema could run code of their own as pgflow's owner.
    for open in
        select proc.oid::regprocedure as routine
        from pg_catalog.pg_proc as proc
        cross join lateral pg_catalog.aclexplode(
            coalesce(proc.proacl, pg_catalog.acldefault('f', proc.proowner))
        ) as acl
        where proc.pronamespace = 'pgflow'::regnamespace
            and proc.prosecdef
            and acl.grantee = 0
    loop
        execute pg_catalog.format('revoke execute on routine %s from public', open.routine);
        raise notice using
            message = pg_catalog.format('not everybody may execute %s any more', open.routine),
            detail = 'It is SECURITY DEFINER, and callers could make it run code of theirs as its owner.',
            hint = 'Roles that need it and may be trusted with that: grant execute on it to them.';
    end loop;

    -- A deploy at the same time is to see the role, or this the queues it makes.
    lock table pgflow_worker.modules in share row exclusive mode;
    for granted in select * from pgflow_worker._grants(level) loop
        execute pg_catalog.format('grant %s on %s to %I', granted.privileges, granted.object, role);
    end loop;
end
$$;

comment on function pgflow_worker.grant_usage(name, text) is
'Lets a role use pgflow_worker; what it had before, it keeps. monitor: read pgflow''s tables, the flows'' queues, '
'our tables and views, not the stored modules; pictures, doctor(). operate: also work, schedule, pause, replay; '
'start, cancel and retry runs; for that it can write runs, their steps and tasks, workers and the flows'' queues, '
'and execute what of pgflow and pgmq these need, and realtime.send. deploy: also prune_data_older_than, and deploy, '
'undeploy, set_environment, set_secrets, which run as the extension''s owner: as good as a superuser. Queues of '
'later deploys are granted when they are made. Takes EXECUTE on pgflow''s SECURITY DEFINER functions from PUBLIC. To '
'be called again after an update of pgflow_worker or pgflow. Raises PW002, PW004.';

revoke execute on function pgflow_worker.grant_usage(name, text) from public;
