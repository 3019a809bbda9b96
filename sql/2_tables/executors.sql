create table pgflow_worker.executors (
    flow_slug text not null references pgflow_worker.flows (flow_slug) on delete cascade,
    step_slug text,
    address text,
    send_secrets boolean not null,
    unique nulls not distinct (flow_slug, step_slug)
);

comment on table pgflow_worker.executors is
'Where a flow''s handlers run that are async or have thread=True, if not in this server: on a Dask cluster. '
'A row without a step is for all of the flow''s. Written by set_executor().';
comment on column pgflow_worker.executors.address is
'The Dask scheduler''s, such as tcp://10.0.0.7:8786; null for a step that stays in this server.';
comment on column pgflow_worker.executors.send_secrets is
'Whether the flow''s secrets may be sent there.';

select pg_catalog.pg_extension_config_dump('pgflow_worker.executors', '');
