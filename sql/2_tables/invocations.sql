create table pgflow_worker.invocations (
    invocation_id bigint generated always as identity primary key,
    flow_slug text not null,
    pid integer not null default pg_backend_pid(),
    finished_at timestamptz not null default clock_timestamp(),
    report jsonb not null
);

create index invocations_flow_idx on pgflow_worker.invocations (flow_slug, invocation_id);

comment on table pgflow_worker.invocations is
'Calls of work() and work_batch() that did something or failed, with their reports. '
'A failed call''s report has the status error and the error''s text.';

select pg_catalog.pg_extension_config_dump('pgflow_worker.invocations', '');
select pg_catalog.pg_extension_config_dump('pgflow_worker.invocations_invocation_id_seq', '');
