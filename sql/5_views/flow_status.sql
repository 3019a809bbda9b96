create view pgflow_worker.flow_status as
select
    status.flow_slug,
    status.version,
    status.slots,
    status.busy,
    status.schedule,
    status.paused,
    status.waiting,
    status.oldest,
    status.later,
    status.running,
    status.failed
from pgflow_worker._flow_status() as status;

comment on view pgflow_worker.flow_status is
'Every deployed flow: who may work on it, and how much there is to do.';
comment on column pgflow_worker.flow_status.version is
'Of the module that has the flow''s code: counts the deploys of new text.';
comment on column pgflow_worker.flow_status.slots is
'How many workers the flow may have at a time: flows.workers.';
comment on column pgflow_worker.flow_status.busy is
'How many workers it has now.';
comment on column pgflow_worker.flow_status.schedule is
'When pg_cron calls the worker: the schedules of its active jobs for this flow, x2 for two such jobs; (all): a job for '
'all flows. Null: there is none, or pg_cron is not in this database, or the job is another role''s.';
comment on column pgflow_worker.flow_status.paused is
'Why the flow is paused, as far as it fits: the table pauses has all of it; null: it is not paused.';
comment on column pgflow_worker.flow_status.waiting is
'Tasks that a worker could start now.';
comment on column pgflow_worker.flow_status.oldest is
'For how long the first of them has been ready.';
comment on column pgflow_worker.flow_status.later is
'Tasks that are delayed, for another attempt or by their start delay; those that a worker has read and is about to '
'start are among them.';
comment on column pgflow_worker.flow_status.running is
'Tasks that are started.';
comment on column pgflow_worker.flow_status.failed is
'Tasks that had a failed attempt in the last hour, and have failed for good: see recent_failures.';
