create function pgflow_worker._fail_run(run_id uuid, message text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    -- pgflow 0.4: errors of steps, and events.
    has_events constant boolean := exists (
        select from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = 'pgflow.step_states'::regclass and attribute.attname = 'error_message'
    );
    topic constant text := 'pgflow:run:' || run_id;
    failed record;
begin
    for failed in
        update pgflow.step_states as state
        set status = 'failed', failed_at = greatest(pg_catalog.clock_timestamp(), state.started_at)
        where state.run_id = _fail_run.run_id and state.status = 'started'
        returning state.step_slug, state.failed_at
    loop
        continue when not has_events;
        update pgflow.step_states as state
        set error_message = message
        where state.run_id = _fail_run.run_id and state.step_slug = failed.step_slug;
        perform realtime.send(
            pg_catalog.jsonb_build_object(
                'event_type', 'step:failed',
                'run_id', run_id,
                'step_slug', failed.step_slug,
                'status', 'failed',
                'error_message', message,
                'failed_at', failed.failed_at
            ),
            pg_catalog.format('step:%s:failed', failed.step_slug), topic, false
        );
    end loop;
    update pgflow.runs as run
    set status = 'failed', failed_at = greatest(pg_catalog.clock_timestamp(), run.started_at)
    where run.run_id = _fail_run.run_id
    returning run.flow_slug, run.failed_at into failed;
    if has_events then
        perform realtime.send(
            pg_catalog.jsonb_build_object(
                'event_type', 'run:failed',
                'run_id', run_id,
                'flow_slug', failed.flow_slug,
                'status', 'failed',
                'error_message', message,
                'failed_at', failed.failed_at
            ),
            'run:failed', topic, false
        );
    end if;
end
$$;

comment on function pgflow_worker._fail_run(uuid, text) is
'Fails a run and its started steps, with the events that pgflow sends when it fails a run.';

revoke execute on function pgflow_worker._fail_run(uuid, text) from public;
