create procedure pgflow_worker.work(
    flow_slug text default null,
    batch_size integer default 10,
    max_concurrent integer default 5,
    mode text default 'batch',
    max_duration interval default '55 seconds',
    inout result jsonb default null
)
language plpgsql
as $$
begin
    result := pgflow_worker._gate(flow_slug, batch_size, max_concurrent, mode, max_duration);
    if result is null then
        perform pgflow_worker._raise(pgflow_worker._load());
        call pgflow_worker._work(
            flow_slug,
            batch_size,
            max_concurrent,
            mode,
            pg_catalog.date_part('epoch', max_duration),
            result
        );
        perform pgflow_worker._raise(result);
    end if;
end
$$;

comment on procedure pgflow_worker.work(text, integer, integer, text, interval, jsonb) is
'Runs a flow''s ready tasks and returns a report. Without a flow, those of all flows, one flow after another: '
'each time of the one whose ready task is oldest. mode: batch (one batch, then end), drain (until '
'nothing is ready), wait (also wait for new tasks); max_duration ends the last two after the handlers '
'that are running. Commits by itself: it must be the only statement of its command, outside a '
'transaction. Status: completed, paused, or skipped if there is work but no free slot. '
'Errors: PW001, PW002, PW003, PW004, PW005, PW008, PW010, PW011, PW014.';

revoke execute on procedure
pgflow_worker.work(text, integer, integer, text, interval, jsonb) from public;
