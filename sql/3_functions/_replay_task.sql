create function pgflow_worker._replay_task(run_id uuid, step_slug text, task_index integer)
returns jsonb
language plpython3u
as $$
    from pgflow_worker import server

    return server.replay_task(plpy, run_id, step_slug, task_index)
$$;

comment on function pgflow_worker._replay_task(uuid, text, integer) is
'The part of replay_task() after _load(); its answer is for _raise(). '
'It has no search_path of its own, because handlers get the caller''s; its statements set one.';

revoke execute on function pgflow_worker._replay_task(uuid, text, integer) from public;
