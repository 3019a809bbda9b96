create table pgflow_worker.pauses (
    flow_slug text unique nulls not distinct,
    reason text,
    paused_at timestamptz not null default now(),
    paused_by text not null default session_user
);

comment on table pgflow_worker.pauses is
'Paused flows; a row without a flow pauses all of them. Written by pause() and resume().';

select pg_catalog.pg_extension_config_dump('pgflow_worker.pauses', '');
