create index attempts_failures_idx on pgflow_worker.attempts (flow_slug, finished_at)
where outcome not in ('completed', 'snoozed');

alter table pgflow_worker.settings
drop constraint settings_name_check,
drop constraint settings_check,
add constraint settings_name_check
check (name in ('environment', 'max_deaths', 'max_crashes', 'memory_mb', 'secrets')),
add constraint settings_check
check (name in ('environment', 'secrets') or value ~ '^[1-9][0-9]{0,6}$');

create table pgflow_worker.executors (
    flow_slug text not null references pgflow_worker.flows (flow_slug) on delete cascade,
    step_slug text,
    address text,
    send_secrets boolean not null,
    unique nulls not distinct (flow_slug, step_slug)
);

select pg_catalog.pg_extension_config_dump('pgflow_worker.executors', '');
