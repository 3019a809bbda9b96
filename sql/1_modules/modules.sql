create table pgflow_worker.modules (
    module text not null,
    version integer not null check (version >= 1),
    source text not null,
    current boolean not null default true,
    deployed_at timestamptz not null default now(),
    deployed_by text not null default session_user,
    primary key (module, version)
);

create unique index modules_current_key on pgflow_worker.modules (module) where current;

comment on table pgflow_worker.modules is
'Python modules that deploy() has stored, every version of them. What runs is the current version.';
comment on column pgflow_worker.modules.current is
'Whether this version runs. A module without a current version has been undeployed.';

select pg_catalog.pg_extension_config_dump('pgflow_worker.modules', '');
