-- The limit: what pgflow's own SQL allows, with a constant output in the place of handlers.
create schema bench;

create procedure bench.loop(
    flow_slug text,
    commit_per_task boolean,
    analyzed_batches integer default 0,
    batch_size integer default 100
)
language plpgsql
as $$
declare
    worker_id constant uuid := pg_catalog.gen_random_uuid();
    batches integer := 0;
    messages bigint[];
    tasks pgflow.step_task_record[];
    task pgflow.step_task_record;
begin
    insert into pgflow.workers (worker_id, queue_name, function_name)
    values (worker_id, flow_slug, 'bench.loop');
    commit;
    loop
        messages := array(select msg_id from pgmq.read(flow_slug, 600, batch_size));
        commit;
        exit when messages = '{}';
        -- Not in the transaction of the read: start_tasks() wants one that began after the message was queued.
        tasks := array(select started from pgflow.start_tasks(flow_slug, messages, worker_id) as started);
        commit;
        foreach task in array tasks loop
            perform from pgflow.runs as run where run.run_id = task.run_id for update;
            perform from pgflow.complete_task(
                task.run_id,
                task.step_slug,
                task.task_index,
                -- What feeds a map gives it the run's input.
                case when task.step_slug = 'everything' then task.input -> 'run' else '1' end
            );
            if commit_per_task then
                commit;
            end if;
        end loop;
        commit;
        batches := batches + 1;
        if batches <= analyzed_batches then
            analyze pgflow.runs, pgflow.step_states, pgflow.step_tasks;
            execute pg_catalog.format('analyze pgmq.%I', pgmq.format_table_name(flow_slug, 'q'));
            commit;
        end if;
    end loop;
end
$$;

comment on procedure bench.loop(text, boolean, integer, integer) is
'Completes every ready task of the flow with the output 1, in batches, with one commit for each task or each batch, and ANALYZE after each of the first analyzed_batches.';
