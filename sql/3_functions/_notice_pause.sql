create function pgflow_worker._notice_pause(flow_slug text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if pgflow_worker._pause_reason(flow_slug) is not null then
        raise notice using
            message = pg_catalog.format(
                'flow "%s" is paused (%s): no worker takes the tasks', flow_slug, pgflow_worker._pause_reason(flow_slug)
            ),
            hint = 'To resume it: ' || pgflow_worker._resume_statement(flow_slug);
    end if;
end
$$;

comment on function pgflow_worker._notice_pause(text) is
'Tells by a notice that a flow is paused, if it is.';

revoke execute on function pgflow_worker._notice_pause(text) from public;
