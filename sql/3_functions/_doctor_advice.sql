create function pgflow_worker._doctor_advice()
returns table (severity text, what text, why text, cure text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_catalog.to_regclass('pgflow.steps') is null then
        return;
    end if;
    -- Of each kind the latest.
    return query
    select distinct on (flow.flow_slug, advice.kind)
        'note',
        case advice.kind
            when 'frozen' then pg_catalog.format(
                'flow "%s": concurrent handlers stood still for %s', flow.flow_slug, advice.seconds
            )
            else pg_catalog.format('flow "%s": %s', flow.flow_slug, pg_catalog.split_part(called.note, ': make ', 1))
        end,
        case advice.kind
            when 'frozen' then 'they wait while the worker is in SQL'
            else 'they could run at the same time'
        end,
        case advice.kind
            when 'frozen' then pg_catalog.format(
                'update pgflow_worker.flows set workers = %s where flow_slug = %L;  -- and a job for each',
                least(flow.workers + 1, 32), flow.flow_slug
            )
            else pg_catalog.format(
                '@flow.%s(thread=True)  # or async def; then deploy',
                case step.step_type when 'map' then 'map' else 'step' end
            )
        end
    from pgflow_worker.flows as flow
    cross join lateral (
        select recent.invocation_id, note.note
        from (
            select invocation.* from pgflow_worker.invocations as invocation
            where invocation.flow_slug = flow.flow_slug
            order by invocation.invocation_id desc
            limit 20
        ) as recent
        cross join lateral pg_catalog.jsonb_path_query(recent.report, '$.notes[*]') as element (note)
        cross join lateral (select element.note #>> '{}' as note) as note
        where recent.finished_at > pg_catalog.clock_timestamp() - interval '1 day'
    ) as called
    cross join lateral (
        select
            case
                when called.note like 'concurrent handlers stood still for %' then 'frozen'
                else (pg_catalog.regexp_match(called.note, '^step "(.*)" ran \d+ tasks one after another'))[1]
            end as kind,
            (pg_catalog.regexp_match(called.note, 'stood still for ([\d.]+ s)'))[1] as seconds
    ) as advice
    left join lateral (
        select pg_catalog.to_jsonb(known) ->> 'step_type' as step_type
        from pgflow.steps as known
        where known.flow_slug = flow.flow_slug and known.step_slug = advice.kind
    ) as step on true
    where advice.kind is not null
    order by flow.flow_slug, advice.kind, called.invocation_id desc;
end
$$;

comment on function pgflow_worker._doctor_advice() is
'The findings of doctor() about what recent calls found slow, from their reports.';

revoke execute on function pgflow_worker._doctor_advice() from public;
