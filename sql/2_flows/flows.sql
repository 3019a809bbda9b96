create table pgflow_worker.flows (
    flow_slug text primary key,
    module text not null,
    version integer not null,
    workers integer not null default 1 check (workers between 1 and 32),
    foreign key (module, version) references pgflow_worker.modules (module, version)
);

create index flows_module_idx on pgflow_worker.flows (module, version);

comment on table pgflow_worker.flows is
'Flows with a deployed module, and the version of the module they were last deployed with.';
comment on column pgflow_worker.flows.workers is
'How many workers may run the flow at a time: its number of slots.';

select pg_catalog.pg_extension_config_dump('pgflow_worker.flows', '');
