create function pgflow_worker._next_flow(besides text [] default '{}')
returns table (flow_slug text, status text, notes text [])
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    deployed text;
    queue regclass;
    since timestamptz;
    report jsonb;
    ages jsonb := pg_catalog.jsonb_build_object();
    flows integer := 0;
    paused integer := 0;
begin
    status := 'completed';
    notes := array[]::text[];
    for deployed in select flow.flow_slug from pgflow_worker.flows as flow loop
        since := null;
        queue := pg_catalog.to_regclass(pgflow_worker._queue_table(deployed, 'q'));
        if queue is not null then
            execute pg_catalog.format(
                'select min(vt) from %s where vt <= pg_catalog.clock_timestamp()', queue
            ) into since;
        end if;
        ages := ages || pg_catalog.jsonb_build_object(deployed, since);
    end loop;
    -- Those without a ready task may have one of a dead worker's.
    for deployed in
        select age.key
        from pg_catalog.jsonb_each_text(ages) as age
        where age.key <> all(besides)
        order by age.value::timestamptz nulls last, age.key
    loop
        begin
            report := pgflow_worker._gate(deployed, 1, 1, 'drain', '1 second');
        exception
            when sqlstate 'PW004' then
                -- The call is to begin with this flow, and meets its error.
                report := null;
        end;
        if report is null then
            flow_slug := deployed;
            return next;
            return;
        end if;
        flows := flows + 1;
        if report ->> 'status' <> 'completed' then
            if report ->> 'status' = 'paused' then
                paused := paused + 1;
            else
                status := report ->> 'status';
            end if;
            notes := notes || array(
                select pg_catalog.format('%s: %s', deployed, note)
                from pg_catalog.jsonb_array_elements_text(report -> 'notes') as note
            );
        end if;
    end loop;
    if paused > 0 and paused = flows then
        status := 'paused';
    elsif ages = pg_catalog.jsonb_build_object() then
        notes := array['no flow is deployed'];
    end if;
    return next;
end
$$;

comment on function pgflow_worker._next_flow(text []) is
'Of the deployed flows but some, the one that has something to do, and of several the one whose ready task is '
'oldest. Without one, flow_slug is null; status and notes then say why nothing can be done, if there is something.';

revoke execute on function pgflow_worker._next_flow(text []) from public;
