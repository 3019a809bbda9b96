create function pgflow_worker._doctor_command(flow_slug text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $body$
    -- Where pg_cron knows minutes only, a call waits for tasks until the next.
    select case when command.text like '%$%' then pg_catalog.quote_literal(command.text) else '$$' || command.text || '$$' end
    from (
        select pg_catalog.format(
            'call pgflow_worker.work(%s, mode => ''%s'')',
            pg_catalog.quote_nullable(flow_slug),
            case when pgflow_worker._cron_has_seconds() then 'drain' else 'wait' end
        ) as text
    ) as command
$body$;

comment on function pgflow_worker._doctor_command(text) is
'The command of a job for a flow, null for all flows, as an SQL literal.';

revoke execute on function pgflow_worker._doctor_command(text) from public;
