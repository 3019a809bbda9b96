create function pgflow_worker.resume(flow_slug text default null)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if flow_slug is not null then
        perform pgflow_worker._check_flow(flow_slug);
    end if;
    delete from pgflow_worker.pauses as pause
    where pause.flow_slug is not distinct from resume.flow_slug;
    if flow_slug is not null and pgflow_worker._pause_reason(flow_slug) is not null then
        raise notice using
            message = 'every flow is still paused',
            hint = 'To resume them: select pgflow_worker.resume();';
    end if;
    if flow_slug is null and exists (select from pgflow_worker.pauses) then
        raise notice using
            message = (
                select 'still paused, each on its own: '
                    || pg_catalog.string_agg(pause.flow_slug, ', ' order by pause.flow_slug)
                from pgflow_worker.pauses as pause
            ),
            hint = 'To resume one: select pgflow_worker.resume(''its slug'');';
    end if;
end
$$;

comment on function pgflow_worker.resume(text) is
'Takes back pause() with the same argument: a flow that was paused together with all others is '
'resumed with all others. Raises PW001 for an unknown flow.';

revoke execute on function pgflow_worker.resume(text) from public;
