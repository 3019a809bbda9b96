create unlogged table pgflow_worker.living (
    worker_id uuid primary key
);

comment on table pgflow_worker.living is
'Workers that have started tasks since the server last crashed. A crash empties an unlogged table, so that a task '
'whose worker is gone and not in here was started when the server crashed.';
