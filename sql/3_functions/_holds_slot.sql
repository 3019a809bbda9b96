create function pgflow_worker._holds_slot(lock_key bigint)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from pg_catalog.pg_locks as held
        where held.locktype = 'advisory'
            and held.pid = pg_catalog.pg_backend_pid()
            and held.objsubid = 1
            and held.classid = ((lock_key >> 32) & 4294967295)::oid
            and held.objid = (lock_key & 4294967295)::oid
    )
$$;

comment on function pgflow_worker._holds_slot(bigint) is
'Whether this session still has a slot''s advisory lock: a handler''s SQL can release any lock.';

revoke execute on function pgflow_worker._holds_slot(bigint) from public;
