create function pgflow_worker._doctor_slots(idle interval default '1 minute')
returns table (severity text, what text, why text, cure text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return query
    select
        'error',
        pg_catalog.format(
            'slot %s of flow "%s" is held by pid %s of role "%s", %s for %s',
            slot.slot, flow.flow_slug, slot.pid, activity.usename, activity.state,
            pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - activity.state_change)
        ),
        'it is in no call of the worker, and keeps others from working',
        pg_catalog.format('select pg_terminate_backend(%s);', slot.pid)
    from pgflow_worker.flows as flow
    cross join lateral pgflow_worker._slots(flow.flow_slug) as slot
    join pg_catalog.pg_stat_activity as activity on activity.pid = slot.pid
    where activity.state like 'idle%'
        and activity.state_change < pg_catalog.clock_timestamp() - idle
    order by flow.flow_slug, slot.slot;

    return query
    select
        'note',
        pg_catalog.format('role "%s" may not see what pid %s does, which holds a slot', current_user, slot.pid),
        'whether it is in a call of the worker is not known',
        pg_catalog.format('grant pg_read_all_stats to %I;', current_user)
    from pgflow_worker.flows as flow
    cross join lateral pgflow_worker._slots(flow.flow_slug) as slot
    where slot.pid is not null
        and not pg_catalog.pg_has_role('pg_read_all_stats', 'usage')
        and exists (
            select from pg_catalog.pg_stat_activity as activity
            where activity.pid = slot.pid and activity.state is null
        )
    order by flow.flow_slug, slot.slot;
end
$$;

comment on function pgflow_worker._doctor_slots(interval) is
'The findings of doctor() about slots held by sessions that have done nothing for so long.';

revoke execute on function pgflow_worker._doctor_slots(interval) from public;
