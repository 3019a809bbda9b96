create function pgflow_worker.work_batch(
    flow_slug text,
    batch_size integer default 10,
    max_concurrent integer default 5,
    ignore_delay boolean default false
)
returns jsonb
language plpgsql
as $$
declare
    report pg_catalog.jsonb;
begin
    if flow_slug is null then
        perform pgflow_worker._check_flow(flow_slug);
    end if;
    if not ignore_delay then
        report := pgflow_worker._gate(flow_slug, batch_size, max_concurrent, 'batch', '55 seconds');
    else
        -- The mode only keeps the gate from ending the call because nothing is ready yet.
        report := pgflow_worker._gate(flow_slug, batch_size, max_concurrent, 'wait', '55 seconds');
    end if;
    if report is null then
        perform pgflow_worker._raise(pgflow_worker._load());
        report := pgflow_worker._work_batch(flow_slug, batch_size, max_concurrent, ignore_delay);
        perform pgflow_worker._raise(report);
    end if;
    return report;
end
$$;

comment on function pgflow_worker.work_batch(text, integer, integer, boolean) is
'Runs one batch of a flow''s tasks inside the caller''s transaction and returns the report. For tests '
'and psql, not for pg_cron: nothing is durable before the caller commits, attempts included, and '
'messages sent after the transaction began are left to a later one, and the flow''s workers wait for '
'its end. ignore_delay also takes tasks that wait for a retry or a start delay. '
'Errors: PW001, PW002, PW003, PW004, PW005, PW008, PW010, PW014.';

revoke execute on function pgflow_worker.work_batch(text, integer, integer, boolean) from public;
