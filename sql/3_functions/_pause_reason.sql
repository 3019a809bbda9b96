create function pgflow_worker._pause_reason(flow_slug text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        case when pause.flow_slug is null then 'every flow is paused: ' else '' end
        || coalesce(pause.reason, 'paused by ' || pause.paused_by)
    from pgflow_worker.pauses as pause
    where pause.flow_slug = _pause_reason.flow_slug or pause.flow_slug is null
    order by pause.flow_slug nulls last
    limit 1
$$;

comment on function pgflow_worker._pause_reason(text) is
'Why a flow is paused; null if it is not.';

revoke execute on function pgflow_worker._pause_reason(text) from public;
