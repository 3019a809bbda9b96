create function pgflow_worker._slots(flow_slug text)
returns table (slot integer, enabled boolean, worker_id uuid, lock_key bigint, pid integer)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    -- A disabled slot may still have tasks of a worker that died before it was disabled.
    select
        place.slot,
        place.slot <= flow.workers,
        pg_catalog.md5(place.name)::uuid,
        place.lock_key,
        held.pid
    from pgflow_worker.flows as flow
    cross join lateral (
        select
            n as slot,
            pg_catalog.format('pgflow_worker/%s/%s', flow.flow_slug, n) as name,
            pg_catalog.hashtextextended(
                pg_catalog.format('pgflow_worker/%s/%s', flow.flow_slug, n), 0
            ) as lock_key
        from pg_catalog.generate_series(1, 32) as n
    ) as place
    left join pg_catalog.pg_locks as held
        on held.locktype = 'advisory'
        and held.granted
        and held.objsubid = 1
        and held.classid = ((place.lock_key >> 32) & 4294967295)::oid
        and held.objid = (place.lock_key & 4294967295)::oid
        and held.database = (
            select db.oid from pg_catalog.pg_database as db
            where db.datname = pg_catalog.current_database()
        )
    where flow.flow_slug = _slots.flow_slug
    order by place.slot
$$;

comment on function pgflow_worker._slots(text) is
'The places that workers of a flow can occupy: whether a worker may take the slot now, the worker''s '
'id, the key of the session advisory lock that its holder has, and the holder''s pid, if any.';

revoke execute on function pgflow_worker._slots(text) from public;
