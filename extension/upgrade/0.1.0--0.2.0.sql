create index attempts_failures_idx on pgflow_worker.attempts (flow_slug, finished_at)
where outcome not in ('completed', 'snoozed');

alter table pgflow_worker.settings
drop constraint settings_name_check,
drop constraint settings_check,
add constraint settings_name_check
check (name in ('environment', 'max_deaths', 'max_crashes', 'memory_mb', 'secrets')),
add constraint settings_check
check (name in ('environment', 'secrets') or value ~ '^[1-9][0-9]{0,6}$');
