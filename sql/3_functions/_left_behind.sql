create function pgflow_worker._left_behind(lock_keys bigint [])
returns table (lost boolean, locks bigint, temporary boolean)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return query
    select
        pg_catalog.count(*) filter (where held.lock_key = any(lock_keys)) < pg_catalog.cardinality(lock_keys),
        pg_catalog.count(*) filter (where held.lock_key is null or held.lock_key <> all(lock_keys)),
        pg_catalog.pg_my_temp_schema() <> 0 and (
            exists (select from pg_catalog.pg_class where relnamespace = pg_catalog.pg_my_temp_schema())
            or exists (select from pg_catalog.pg_proc where pronamespace = pg_catalog.pg_my_temp_schema())
        )
    from (
        select case when lock.objsubid = 1 then
            (lock.classid::bigint << 32) | lock.objid::bigint
        end as lock_key
        from pg_catalog.pg_locks as lock
        where lock.locktype = 'advisory' and lock.pid = pg_catalog.pg_backend_pid() and lock.granted
    ) as held;
end
$$;

comment on function pgflow_worker._left_behind(bigint []) is
'What the SQL of handlers has left in this session: whether a lock with one of these keys was released, how '
'many other advisory locks there are, and whether there are temporary tables or functions.';

revoke execute on function pgflow_worker._left_behind(bigint []) from public;
