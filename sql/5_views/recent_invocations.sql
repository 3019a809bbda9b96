create view pgflow_worker.recent_invocations as
with recursive flow (flow_slug) as (
    -- From one flow to the next in the index: there may be millions of calls.
    select pg_catalog.min(first_call.flow_slug) from pgflow_worker.invocations as first_call
    union all
    select (
        select pg_catalog.min(next_call.flow_slug) from pgflow_worker.invocations as next_call
        where next_call.flow_slug > flow.flow_slug
    )
    from flow
    where flow.flow_slug is not null
)

select
    pg_catalog.date_trunc('second', invocation.finished_at) as finished_at,
    invocation.flow_slug,
    invocation.pid,
    invocation.report ->> 'status' as status,
    invocation.report ->> 'mode' as mode,
    (invocation.report ->> 'completed')::integer as completed,
    (invocation.report ->> 'retried')::integer as retried,
    (invocation.report ->> 'failed')::integer as failed,
    pg_catalog.date_trunc(
        'milliseconds', pg_catalog.make_interval(secs => (invocation.report ->> 'duration_ms')::double precision / 1000)
    ) as duration,
    pg_catalog.left(
        pg_catalog.regexp_replace(
            coalesce(
                invocation.report ->> 'error',
                (
                    select pg_catalog.string_agg(note.text, '; ')
                    from pg_catalog.jsonb_array_elements_text(invocation.report -> 'notes') as note (text)
                )
            ), '\s+', ' ', 'g'
        ), 80
    ) as notes
from flow
inner join lateral (
    select *
    from pgflow_worker.invocations as latest
    -- Not "=", with which the other index, on invocation_id only, would seem to do.
    where latest.flow_slug between flow.flow_slug and flow.flow_slug
    order by latest.flow_slug desc, latest.invocation_id desc
    limit 50
) as invocation on true
order by invocation.invocation_id desc;

comment on view pgflow_worker.recent_invocations is
'The last 50 calls of every flow that did something or failed, the newest first. All of them: the table invocations.';
comment on column pgflow_worker.recent_invocations.status is
'completed; paused or skipped; error: the notes are its text.';
comment on column pgflow_worker.recent_invocations.completed is
'Tasks that were completed; retried and failed: attempts. What else is counted is in invocations.report.';
comment on column pgflow_worker.recent_invocations.notes is
'The beginning of the error, or of what the report says besides; all of it is in invocations.report.';
