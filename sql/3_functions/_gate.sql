create function pgflow_worker._gate(
    flow_slug text,
    batch_size integer,
    max_concurrent integer,
    mode text,
    max_duration interval
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    status text := 'completed';
    notes text[] := array[]::text[];
    queue regclass;
    following text;
    deployed boolean;
    paused boolean;
    started boolean;
    ready boolean;
begin
    if batch_size is null or batch_size < 1 then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('batch_size must be at least 1, not %s', coalesce(batch_size::text, 'null')),
            hint = 'batch_size is the number of tasks that are taken at a time; the default is 10.';
    end if;
    if max_concurrent is null or max_concurrent < 1 then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('max_concurrent must be at least 1, not %s', coalesce(max_concurrent::text, 'null')),
            hint = 'max_concurrent is the number of handlers that may run at a time; the default is 5.';
    end if;
    if mode is null or mode not in ('batch', 'drain', 'wait') then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('unknown mode %s', coalesce('"' || mode || '"', 'null')),
            hint = 'Modes: batch (one batch), drain (until nothing is ready), wait (keep waiting for tasks).';
    end if;
    if max_duration is null or max_duration <= interval '0' then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('max_duration must be more than 0, not %s', coalesce(max_duration::text, 'null')),
            hint = 'max_duration ends the modes drain and wait; the default is 55 seconds.';
    end if;

    if flow_slug is not null then
        -- Most calls find nothing to do, in a new session where every table and function that is touched costs
        -- some time: so little is looked at, and the name of pgmq's table is made here.
        queue := pg_catalog.to_regclass(
            'pgmq.' || pg_catalog.quote_ident('q_' || pg_catalog.lower(flow_slug))
        );
        if queue is null or pg_catalog.to_regclass('pgflow.step_tasks') is null then
            perform pgflow_worker._check_pgflow();
            perform pgflow_worker._check_flow(flow_slug);
            perform pgflow_worker._check_queue(flow_slug);
        end if;
        select
            exists (select from pgflow_worker.flows as flow where flow.flow_slug = _gate.flow_slug),
            exists (
                select from pgflow_worker.pauses as pause
                where pause.flow_slug = _gate.flow_slug or pause.flow_slug is null
            ),
            exists (
                select from pgflow.step_tasks as task
                where task.flow_slug = _gate.flow_slug and task.status = 'started'
            )
        into deployed, paused, started;
        if not deployed then
            perform pgflow_worker._check_flow(flow_slug);
        end if;
        execute pg_catalog.format(
            'select exists (select from %s where vt <= pg_catalog.clock_timestamp())', queue
        ) into ready;

        if pg_catalog.current_setting('transaction_read_only')::boolean then
            status := 'skipped';
            notes := array['this server or transaction is read-only'];
        elsif paused then
            status := 'paused';
            notes := array[pgflow_worker._pause_reason(flow_slug)];
        elsif ready or started or mode = 'wait' then
            perform pgflow_worker._check_pgflow();
            if not exists (
                select from pgflow_worker._slots(flow_slug) as slot where slot.enabled and slot.pid is null
            ) then
                status := 'skipped';
                select pg_catalog.array_agg(
                    pg_catalog.format(
                        'slot %s is held by %spid %s%s',
                        slot.slot,
                        case when slot.pid = pg_catalog.pg_backend_pid() then 'this session, ' else '' end,
                        slot.pid,
                        pgflow_worker._task_of(flow_slug, slot.worker_id)
                    )
                    order by slot.slot
                )
                into notes
                from pgflow_worker._slots(flow_slug) as slot
                where slot.enabled;
            elsif ready or mode = 'wait' or exists (
                select from pgflow.step_tasks as task
                join pgflow_worker._slots(_gate.flow_slug) as slot on slot.worker_id = task.last_worker_id
                where task.flow_slug = _gate.flow_slug and task.status = 'started' and slot.pid is null
            ) or exists (
                select from pgflow_worker._stalled_tasks(flow_slug)
            ) then
                return null;
            end if;
        end if;
    elsif pg_catalog.current_setting('transaction_read_only')::boolean then
        status := 'skipped';
        notes := array['this server or transaction is read-only'];
    elsif mode <> 'wait' or exists (
        select from pgflow_worker.pauses as pause where pause.flow_slug is null
    ) then
        select next.flow_slug, next.status, next.notes
        into following, status, notes
        from pgflow_worker._next_flow() as next;
        if following is not null then
            return null;
        end if;
    else
        return null;
    end if;
    return pg_catalog.jsonb_build_object(
        'status', status,
        'flow_slug', flow_slug,
        'mode', mode,
        'batch_size', batch_size,
        'max_concurrent', max_concurrent,
        'worker_id', null,
        'slot', null,
        'completed', 0, 'retried', 0, 'snoozed', 0, 'failed', 0, 'discarded', 0, 'rescued', 0, 'parked', 0,
        'duration_ms', pg_catalog.round(
            1000 * extract(epoch from pg_catalog.clock_timestamp() - pg_catalog.statement_timestamp())
        )::integer,
        'frozen_ms', 0,
        'notes', pg_catalog.to_jsonb(notes)
    ) || case when flow_slug is null then '{"flows": []}' else '{}' end::jsonb;
end
$$;

comment on function pgflow_worker._gate(text, integer, integer, text, interval) is
'Looks whether a call of work() has anything to do, for a flow or with null for any of them, without writing or '
'locking. Returns null if it has, else the report that ends the call: whether it could be done is looked at only if '
'there is. Raises PW001, PW002 or PW004 for what makes it impossible.';

revoke execute on function pgflow_worker._gate(text, integer, integer, text, interval) from public;
