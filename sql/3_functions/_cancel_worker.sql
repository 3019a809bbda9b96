create function pgflow_worker._cancel_worker(worker_pid integer, run_id uuid, flow_slug text, worker_id uuid)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    spared record;
begin
    select task.step_slug, task.run_id
    into spared
    from pgflow.step_tasks as task
    join pgflow.steps as step on step.flow_slug = task.flow_slug and step.step_slug = task.step_slug
    join pgflow.flows as flow on flow.flow_slug = task.flow_slug
    where task.flow_slug = _cancel_worker.flow_slug
        and task.status = 'started'
        and task.last_worker_id = _cancel_worker.worker_id
        and task.run_id <> _cancel_worker.run_id
        and task.attempts_count >= coalesce(step.opt_max_attempts, flow.opt_max_attempts)
    limit 1;
    if found then
        raise notice using
            message = pg_catalog.format('the worker with pid %s was not stopped', worker_pid),
            detail = pg_catalog.format(
                'It also runs step "%s" of run %s, in its last attempt: a cancel would fail that run.',
                spared.step_slug, spared.run_id
            ),
            hint = pg_catalog.format(
                'Results of the canceled run will be discarded. To stop it nevertheless: select pg_cancel_backend(%s);',
                worker_pid
            );
        return false;
    end if;
    return pg_catalog.pg_cancel_backend(worker_pid);
exception when insufficient_privilege then
    raise notice using
        message = pg_catalog.format('the worker with pid %s was not stopped: %s', worker_pid, sqlerrm),
        detail = 'Its handler runs to its end, and the result will be discarded.',
        hint = pg_catalog.format(
            'As a superuser: select pg_cancel_backend(%s); or give this role the role pg_signal_backend.', worker_pid
        );
    return false;
end
$$;

comment on function pgflow_worker._cancel_worker(integer, uuid, text, uuid) is
'Cancels the call of a worker that runs a task of this run. Not if a task of another run would fail with it, nor if '
'the caller may not: a notice says so. Whether the signal was sent.';

revoke execute on function pgflow_worker._cancel_worker(integer, uuid, text, uuid) from public;
