create table pgflow_worker.settings (
    name text primary key check (name in ('environment', 'max_deaths')),
    value text not null,
    check (name <> 'max_deaths' or value ~ '^[1-9][0-9]{0,3}$')
);

comment on table pgflow_worker.settings is
'Settings that differ from their defaults. environment: path of a virtual environment, written by '
'set_environment(). max_deaths (3): after so many workers have died running a task, it fails.';

select pg_catalog.pg_extension_config_dump('pgflow_worker.settings', '');
