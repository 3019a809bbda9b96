create table pgflow_worker.attempts (
    attempt_id bigint generated always as identity,
    flow_slug text not null,
    run_id uuid not null,
    step_slug text not null,
    task_index integer not null,
    attempt integer not null,
    outcome text not null check (
        outcome in ('completed', 'failed', 'snoozed', 'died', 'suspected', 'crashed', 'discarded')
    ),
    worker_id uuid,
    finished_at timestamptz not null default clock_timestamp(),
    duration_ms double precision,
    error text,
    traceback text,
    log text,
    primary key (run_id, step_slug, task_index, attempt_id)
);

-- Asked for every message that is read, and almost always empty.
create index attempts_deaths_idx on pgflow_worker.attempts (run_id, step_slug, task_index)
where outcome in ('died', 'suspected', 'crashed');

-- For the views: what went wrong of late. It costs nothing where nothing does.
create index attempts_failures_idx on pgflow_worker.attempts (flow_slug, finished_at)
where outcome not in ('completed', 'snoozed');

comment on table pgflow_worker.attempts is
'Finished attempts: how long the handler took, its error with the traceback, its log lines.';
comment on column pgflow_worker.attempts.outcome is
'completed; failed: the handler failed; snoozed: it asked to be called later; died: the worker ended while it '
'ran this task alone; suspected: it ended while it ran or had started others too, or was another kind of worker; '
'crashed: the server crashed while the task was started; '
'discarded: the handler finished, but its run had failed or another worker had taken the task.';
comment on column pgflow_worker.attempts.duration_ms is
'How long the handler took, measured by the worker; pgflow''s timestamps are transaction starts.';

select pg_catalog.pg_extension_config_dump('pgflow_worker.attempts', '');
select pg_catalog.pg_extension_config_dump('pgflow_worker.attempts_attempt_id_seq', '');
