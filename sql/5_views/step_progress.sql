create view pgflow_worker.step_progress as
select
    step.flow_slug,
    step.step_slug,
    step.status,
    pg_catalog.format('%s/%s', step.tasks_done, coalesce(step.tasks_total::text, '?')) as tasks,
    step.failed_attempts as failed,
    pg_catalog.date_trunc('second', step.started_at) as started,
    pg_catalog.date_trunc(
        'second', coalesce(step.ended_at, pg_catalog.clock_timestamp()) - step.started_at
    ) as age,
    pg_catalog.round(step.mean_ms::numeric, 1) as mean_ms,
    step.run_id
from pgflow_worker._progress() as step
order by step.run_started_at, step.run_id, step.step_index;

comment on view pgflow_worker.step_progress is
'The steps of the runs in run_progress, in the order in which the flow defines them.';
comment on column pgflow_worker.step_progress.status is
'created: it waits for other steps; started: its tasks wait or run; completed, failed or skipped.';
comment on column pgflow_worker.step_progress.tasks is
'Completed tasks, of all; ?: the elements of an array that is not there yet.';
comment on column pgflow_worker.step_progress.failed is
'Attempts that have failed or died so far.';
comment on column pgflow_worker.step_progress.age is
'Since the step was started, until it or its run ended.';
comment on column pgflow_worker.step_progress.mean_ms is
'How long the handler took, of up to 100 tasks that are completed.';
