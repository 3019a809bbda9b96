create function pgflow_worker.pause(flow_slug text default null, reason text default null)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if flow_slug is not null then
        perform pgflow_worker._check_flow(flow_slug);
    end if;
    insert into pgflow_worker.pauses (flow_slug, reason)
    values (pause.flow_slug, pause.reason)
    on conflict on constraint pauses_flow_slug_key do update set reason = excluded.reason;
end
$$;

comment on function pgflow_worker.pause(text, text) is
'Pauses a flow, or with null every flow: its workers stop before their next task, and later calls '
'end at once with the status paused. Raises PW001 for an unknown flow.';

revoke execute on function pgflow_worker.pause(text, text) from public;
