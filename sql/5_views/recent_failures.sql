create view pgflow_worker.recent_failures as
select
    pg_catalog.date_trunc('second', failure.failed_at) as failed_at,
    failure.flow_slug,
    failure.step_slug,
    failure.task,
    failure.attempt,
    pg_catalog.left(pg_catalog.regexp_replace(failure.error, '\s+', ' ', 'g'), 40) as error,
    failure.task_is,
    pg_catalog.date_trunc('second', failure.retried_at) as retried_at,
    failure.outcome,
    failure.run_id,
    failure.error as full_error,
    failure.traceback,
    failure.log
from pgflow_worker._recent_failures() as failure;

comment on view pgflow_worker.recent_failures is
'Attempts that failed in the last day, the newest first: the last 50 of every flow. The last columns are long: use \x.';
comment on column pgflow_worker.recent_failures.task is
'The task''s index; 0 in a step that is no map.';
comment on column pgflow_worker.recent_failures.attempt is
'Which attempt it was, of how many the step has. Deaths of workers count for themselves.';
comment on column pgflow_worker.recent_failures.error is
'The beginning of full_error.';
comment on column pgflow_worker.recent_failures.task_is is
'The task''s status now: failed (for good), queued (there will be another attempt), started (it runs), completed.';
comment on column pgflow_worker.recent_failures.retried_at is
'From when on it can be tried again; null: it is not queued.';
comment on column pgflow_worker.recent_failures.outcome is
'See attempts.outcome. discarded and suspected are no failures of the task''s.';
