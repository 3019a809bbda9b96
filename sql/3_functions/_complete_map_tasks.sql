create function pgflow_worker._complete_map_tasks(
    flow_slug text,
    worker_id uuid,
    run_ids uuid [],
    step_slugs text [],
    task_indexes integer [],
    attempts integer [],
    started_us bigint [],
    outputs text [],
    durations_ms double precision [],
    logs text []
)
returns table (place integer, answer text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    map_run constant uuid := run_ids[1];
    map_step constant text := step_slugs[1];
    held integer [] := pgflow_worker._lock_claims(
        worker_id, run_ids, step_slugs, task_indexes, attempts, started_us
    );
    remaining integer;
    last_held integer [] := array[]::integer [];
    message_ids bigint [];
    done integer [];
begin
    select state.remaining_tasks
    into remaining
    from pgflow.step_states as state
    where state.run_id = map_run
        and state.step_slug = map_step
        and state.status = 'started'
    for update;
    if not found or pg_catalog.cardinality(held) = 0 then
        return;
    end if;
    if pg_catalog.cardinality(held) >= remaining then
        last_held := held[pg_catalog.cardinality(held):];
        held := pg_catalog.trim_array(held, 1);
    end if;

    -- What complete_task() does for a task that is not its step's last, for all of them at once.
    with finished as (
        update pgflow.step_tasks as task
        set status = 'completed', completed_at = now(), output = outputs[claim.place]::jsonb
        from pg_catalog.unnest(held) as claim (place)
        where task.run_id = map_run
            and task.step_slug = map_step
            and task.task_index = task_indexes[claim.place]
            and task.status = 'started'
        returning task.message_id, claim.place
    )
    select pg_catalog.array_agg(finished.message_id), pg_catalog.array_agg(finished.place)
    into message_ids, done
    from finished;
    if done is not null then
        update pgflow.step_states as state
        set remaining_tasks = state.remaining_tasks - pg_catalog.cardinality(done)
        where state.run_id = map_run
            and state.step_slug = map_step;
        perform from pgmq.archive(flow_slug, message_ids);
        -- They find nothing to do here, but complete_task() calls them, and they mend a run that hangs.
        perform pgflow.start_ready_steps(map_run);
        perform pgflow.maybe_complete_run(map_run);
        insert into pgflow_worker.attempts (
            flow_slug, run_id, step_slug, task_index, attempt, outcome, worker_id, duration_ms, log
        )
        select
            _complete_map_tasks.flow_slug, map_run, map_step,
            task_indexes[claim.place], attempts[claim.place], 'completed', _complete_map_tasks.worker_id,
            durations_ms[claim.place], logs[claim.place]
        from pg_catalog.unnest(done) as claim (place);
        return query select claim.place, 'completed' from pg_catalog.unnest(done) as claim (place);
    end if;

    -- The step's last task brings every transition and event with it.
    foreach place in array last_held loop
        answer := pgflow_worker._complete_task(
            flow_slug, worker_id, map_run, map_step, task_indexes[place], attempts[place],
            started_us[place], outputs[place], durations_ms[place], logs[place]
        );
        return next;
    end loop;
end
$$;

comment on function pgflow_worker._complete_map_tasks(
    text, uuid, uuid [], text [], integer [], integer [], bigint [], text [], double precision [], text []
) is
'_complete_tasks() for tasks of one map step of one run, all but the step''s last in one statement. It '
'repeats what pgflow.complete_task() does for a task that is not its step''s last, and is to be used only '
'with bodies of pgflow''s that it was tested with.';

revoke execute on function pgflow_worker._complete_map_tasks(
    text, uuid, uuid [], text [], integer [], integer [], bigint [], text [], double precision [], text []
) from public;
