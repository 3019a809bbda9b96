create function pgflow_worker.start_flow(flow_slug text, input jsonb, run_id uuid default null)
returns uuid
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    given_run constant uuid := run_id;
    map_step text;
    started uuid;
    former record;
begin
    perform pgflow_worker._check_pgflow();
    if not exists (select from pgflow.flows as flow where flow.flow_slug = start_flow.flow_slug) then
        perform pgflow_worker._check_flow(flow_slug);
        raise exception using
            errcode = 'PW004',
            message = pg_catalog.format('flow "%s" is deployed, but pgflow does not have it any more', flow_slug),
            hint = 'Deploy the flow''s module again.';
    end if;
    perform pgflow_worker._check_queue(flow_slug);
    if input is null then
        raise exception using
            errcode = 'PW002',
            message = 'input is null',
            hint = 'A flow that needs no input gets an empty object: ''{}''.';
    end if;
    select step.step_slug
    into map_step
    from pgflow.steps as step
    where step.flow_slug = start_flow.flow_slug and step.step_type = 'map' and step.deps_count = 0
    order by step.step_index
    limit 1;
    if found and pg_catalog.jsonb_typeof(input) <> 'array' then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format(
                'the input of flow "%s" must be an array, not %s', flow_slug,
                case pg_catalog.jsonb_typeof(input)
                    when 'object' then 'an object'
                    when 'null' then 'null'
                    else 'a ' || pg_catalog.jsonb_typeof(input)
                end
            ),
            hint = pg_catalog.format('Step "%s" is a map over it: give one element for each of its tasks.', map_step);
    end if;
    perform pgflow_worker._notice_pause(flow_slug);
    if given_run is null then
        select run.run_id into started from pgflow.start_flow(flow_slug, input) as run;
        return started;
    end if;
    if pg_catalog.to_regprocedure('pgflow.start_flow(text,jsonb,uuid)') is null then
        raise exception using
            errcode = 'PW004',
            message = 'this version of pgflow chooses every run_id by itself',
            hint = 'Leave it out, or apply the migrations of pgflow 0.4 or later.';
    end if;
    begin
        select run.run_id into started from pgflow.start_flow(flow_slug, input, given_run) as run;
        return started;
    exception when unique_violation then
        select run.flow_slug as slug, run.status into former from pgflow.runs as run where run.run_id = given_run;
        if not found then
            raise;
        end if;
    end;
    raise exception using
        errcode = 'PW002',
        message = pg_catalog.format('run %s exists already: flow "%s", %s', given_run, former.slug, former.status),
        hint = pg_catalog.format(
            'Leave run_id out for another run, or look at that one: select * from pgflow_worker.wait_for_run(%L);',
            given_run
        );
end
$$;

comment on function pgflow_worker.start_flow(text, jsonb, uuid) is
'Starts a run, as pgflow.start_flow() does, and returns its run_id. Errors say what was wrong: PW001 for a flow that '
'neither pgflow nor pgflow_worker has; PW002 for an input that is null, or no array though a step is a map '
'over it, and for a run_id that exists already; PW004.';

revoke execute on function pgflow_worker.start_flow(text, jsonb, uuid) from public;
