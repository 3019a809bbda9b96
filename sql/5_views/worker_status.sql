create view pgflow_worker.worker_status as
select
    status.flow_slug,
    status.slot,
    status.pid,
    status.state,
    status.step,
    status.task,
    status.tasks,
    status.step_age,
    status.last_beat,
    status.backend_age
from pgflow_worker._worker_status() as status;

comment on view pgflow_worker.worker_status is
'Every slot of the deployed flows, and who is in it. Disabled slots only if a worker is still there.';
comment on column pgflow_worker.worker_status.pid is
'The backend that holds the slot: select pg_cancel_backend(pid) ends its call. Null: nobody.';
comment on column pgflow_worker.worker_status.state is
'free; working; waiting: the worker has no task; blocked by: the sessions for whose locks it waits; died: the worker '
'is gone, and the next call will take its tasks back; idle, idle in transaction and the like: a session that has '
'kept the slot and does nothing. To see what other roles'' sessions wait for takes the role pg_read_all_stats.';
comment on column pgflow_worker.worker_status.step is
'What it runs; several of them if handlers run at the same time.';
comment on column pgflow_worker.worker_status.task is
'The index of its task, if the worker has started only one of the step.';
comment on column pgflow_worker.worker_status.tasks is
'How many tasks it has started: one runs, or as many as run at the same time; the others are next.';
comment on column pgflow_worker.worker_status.step_age is
'How long ago the first of the step''s tasks that are not finished was started.';
comment on column pgflow_worker.worker_status.last_beat is
'How long ago the slot''s worker last said that it lives: every 5 s while it has tasks, and between two handlers only.';
comment on column pgflow_worker.worker_status.backend_age is
'How old the backend is; null if that is another role''s and this one has not pg_read_all_stats.';
