create view pgflow_worker.run_progress as
select
    run.flow_slug,
    run.status,
    pg_catalog.rpad(pg_catalog.repeat('#', run.percent / 10), 10, '.') as progress,
    run.percent,
    run.steps,
    run.tasks,
    pg_catalog.date_trunc(
        'second', coalesce(run.ended_at, pg_catalog.clock_timestamp()) - run.started_at
    ) as age,
    pg_catalog.date_trunc(
        'second', pg_catalog.make_interval(secs => run.left_ms / 1000 / flow.workers)
    ) as time_left,
    run.run_id
from (
    select
        step.flow_slug,
        step.run_id,
        step.run_status as status,
        step.run_started_at as started_at,
        step.run_ended_at as ended_at,
        pg_catalog.floor(100 * pg_catalog.avg(
            case
                when step.status in ('completed', 'skipped') then 1.0
                when step.tasks_total > 0 then step.tasks_done::numeric / step.tasks_total
                else 0.0
            end
        ))::integer as percent,
        pg_catalog.format(
            '%s/%s',
            pg_catalog.count(*) filter (where step.status in ('completed', 'skipped')),
            pg_catalog.count(*)
        ) as steps,
        pg_catalog.format(
            '%s/%s%s',
            pg_catalog.sum(step.tasks_done),
            coalesce(pg_catalog.sum(step.tasks_total), 0),
            case when pg_catalog.bool_or(step.tasks_total is null) then '+' end
        ) as tasks,
        case
            when pg_catalog.count(*) = pg_catalog.count(step.left_ms) then pg_catalog.sum(step.left_ms)
        end as left_ms
    from pgflow_worker._progress() as step
    group by step.flow_slug, step.run_id, step.run_status, step.run_started_at, step.run_ended_at
) as run
left join pgflow_worker.flows as flow on flow.flow_slug = run.flow_slug
order by run.started_at, run.run_id;

comment on view pgflow_worker.run_progress is
'Runs that are not finished, the oldest first, and those that failed in the last hour.';
comment on column pgflow_worker.run_progress.percent is
'The mean of all steps'' parts that are done, each step the same; a skipped step is done.';
comment on column pgflow_worker.run_progress.steps is
'Steps that are completed or skipped, of all.';
comment on column pgflow_worker.run_progress.tasks is
'Completed tasks, of all that are known; +: and the elements of arrays that are not there yet.';
comment on column pgflow_worker.run_progress.age is
'Since the run was started; of a failed run until it failed.';
comment on column pgflow_worker.run_progress.time_left is
'Estimated: for every step the tasks that are left, times how long the step''s handler takes, all steps together '
'divided by the flow''s number of slots. How long: the mean of up to 100 completed tasks of the run, and if there are '
'none, of five former runs; from these is also how many elements an array will have that is not there yet. It takes '
'no account of other runs, of handlers that run at the same time in one worker, and of delays. Null: a step has no '
'duration yet, the run has failed, or the flow is not deployed.';
