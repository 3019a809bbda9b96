create function pgflow_worker._release_locks(lock_keys bigint [])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set client_min_messages = error
as $$
declare
    held record;
    released boolean;
begin
    for held in
        select lock.classid::bigint as class, lock.objid::bigint as object,
            lock.objsubid = 1 as has_one_key, lock.mode = 'ShareLock' as is_shared
        from pg_catalog.pg_locks as lock
        where lock.locktype = 'advisory' and lock.pid = pg_catalog.pg_backend_pid() and lock.granted
            and (lock.objsubid <> 1 or ((lock.classid::bigint << 32) | lock.objid::bigint) <> all(lock_keys))
    loop
        -- A session may have taken a lock several times. Once too often is a WARNING, and no harm.
        loop
            released := case
                when held.has_one_key and held.is_shared
                    then pg_catalog.pg_advisory_unlock_shared((held.class << 32) | held.object)
                when held.has_one_key
                    then pg_catalog.pg_advisory_unlock((held.class << 32) | held.object)
                when held.is_shared
                    then pg_catalog.pg_advisory_unlock_shared(
                        held.class::bit(32)::integer, held.object::bit(32)::integer
                    )
                else pg_catalog.pg_advisory_unlock(
                    held.class::bit(32)::integer, held.object::bit(32)::integer
                )
            end;
            exit when not released;
        end loop;
    end loop;
end
$$;

comment on function pgflow_worker._release_locks(bigint []) is
'Releases the advisory locks of this session, but not those with one of these keys.';

revoke execute on function pgflow_worker._release_locks(bigint []) from public;
