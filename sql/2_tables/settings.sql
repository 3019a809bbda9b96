create table pgflow_worker.settings (
    name text primary key check (name in ('environment', 'max_deaths', 'max_crashes', 'memory_mb', 'secrets')),
    value text not null,
    check (name in ('environment', 'secrets') or value ~ '^[1-9][0-9]{0,6}$')
);

comment on table pgflow_worker.settings is
'Settings that differ from their defaults. environment: path of a virtual environment, written by '
'set_environment(). max_deaths (3): after so many workers have died running a task, it fails. max_crashes (2): '
'so many crashes of the server while it runs nothing but a task, and the task fails and its flow pauses. memory_mb '
'(512): how much memory the handlers of a call may take. secrets: path of a directory with a file per secret, written '
'by set_secrets().';

select pg_catalog.pg_extension_config_dump('pgflow_worker.settings', '');
