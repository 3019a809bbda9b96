create function pgflow_worker.replay_task(run_id uuid, step_slug text, task_index integer default 0)
returns table (
    outcome text,
    output jsonb,
    error text,
    traceback text,
    log text,
    rows_written jsonb,
    duration_ms double precision,
    attempt integer,
    notes text [],
    input jsonb
)
language plpgsql
as $$
declare
    answer pg_catalog.jsonb;
begin
    perform pgflow_worker._check_pgflow();
    perform pgflow_worker._raise(pgflow_worker._load());
    answer := pgflow_worker._replay_task(run_id, step_slug, task_index);
    perform pgflow_worker._raise(answer);
    return query
    select
        replayed.outcome,
        -- A result may be JSON's null.
        pg_catalog.jsonb_extract_path(answer, 'output'),
        replayed.error,
        replayed.traceback,
        replayed.log,
        replayed.rows_written,
        replayed.duration_ms,
        replayed.attempt,
        replayed.notes,
        pg_catalog.jsonb_extract_path(answer, 'input')
    from pg_catalog.jsonb_to_record(answer) as replayed (
        outcome pg_catalog.text,
        error pg_catalog.text,
        traceback pg_catalog.text,
        log pg_catalog.text,
        rows_written pg_catalog.jsonb,
        duration_ms double precision,
        attempt integer,
        notes pg_catalog.text []
    );
end
$$;

comment on function pgflow_worker.replay_task(uuid, text, integer) is
'NOT UNDONE: what the handler does outside this database (HTTP requests, mail, files, other databases) and the '
'values it takes from sequences. All else is: rows, settings, locks, NOTIFY. '
'Runs the deployed handler of a task, whatever its state, on the inputs that are recorded: the run''s, the '
'dependencies'' outputs, the element of a map. It does not touch the task, its run, queue and attempts. '
'outcome: completed, failed or snoozed. rows_written: by table, how many rows it inserted, updated and deleted, '
'those of statements that failed included; rewritten: by TRUNCATE or the like, which counts no rows; null if the '
'handler failed. attempt: the task''s last, which the handler finds in ctx. input: as pgflow gives it. '
'The handler runs as the caller, in the caller''s session. Errors: PW001, PW002, PW004, PW005, PW008, PW010.';

revoke execute on function pgflow_worker.replay_task(uuid, text, integer) from public;
