create function pgflow_worker.run_timeline(run_id uuid, width integer default 100)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    -- A step with more tasks than this has so many lines and one for the others.
    foldable constant integer := 20;
    shown constant integer := 10;
    run record;
begin
    run := pgflow_worker._run_summary(run_id);
    if width is null or width not between 60 and 1000 then
        raise exception using
            errcode = 'PW002',
            message = 'width is ' || coalesce(width::text, 'null'),
            hint = 'It is the number of columns, 60 to 1000; without it, 100.';
    end if;
    return (
        with span as materialized (
            select * from pgflow_worker._run_spans(run_timeline.run_id)
        ),
        clock as (
            select
                least(run.started_at, min(span.began_at)) as began_at,
                extract(
                    epoch from greatest(run.ended_at, max(span.ended_at)) - least(run.started_at, min(span.began_at))
                )::double precision as seconds
            from span
        ),
        task as (
            select
                step.step_index,
                state.step_slug,
                step.step_type = 'map' as is_map,
                known.task_index,
                known.attempts_count as attempts,
                case
                    when coalesce(known.status, state.status) not in ('created', 'queued', 'started')
                        then coalesce(known.status, state.status)
                    when state.status = 'skipped' then 'skipped'
                    when run.status <> 'started' then 'cancelled'
                    else coalesce(known.status, state.status)
                end as status,
                pg_catalog.count(known.task_index) over (partition by state.step_slug) as total,
                pg_catalog.row_number() over (
                    partition by state.step_slug
                    order by
                        known.status <> 'failed',
                        known.status <> 'started',
                        known.attempts_count < case known.status when 'queued' then 1 else 2 end,
                        known.task_index
                ) as place
            from pgflow.step_states as state
            join pgflow.steps as step
                on step.flow_slug = state.flow_slug and step.step_slug = state.step_slug
            left join pgflow.step_tasks as known
                on known.run_id = state.run_id and known.step_slug = state.step_slug
            where state.run_id = run_timeline.run_id
        ),
        -- -1: the others, and a step without tasks.
        folded as (
            select
                task.*,
                case
                    when task.total between 1 and foldable or task.task_index is not null and task.place <= shown
                        then task.task_index
                    else -1
                end as line_index
            from task
        ),
        mark as (
            select
                folded.step_index,
                folded.line_index,
                pg_catalog.array_position(array['.', '#', 'x'], span.mark) as layer,
                span.began_at,
                span.ended_at
            from folded
            join span on span.step_slug = folded.step_slug and span.task_index = folded.task_index
        ),
        ran as (
            select
                mark.step_index,
                mark.line_index,
                extract(epoch from sum(mark.ended_at - mark.began_at))::double precision as seconds
            from mark
            where mark.layer = 2
            group by mark.step_index, mark.line_index
        ),
        line as (
            select
                folded.step_index,
                folded.line_index,
                folded.step_slug,
                case
                    when folded.line_index >= 0 and folded.is_map then pg_catalog.format('[%s]', folded.line_index)
                    when folded.line_index < 0 and folded.total > 0
                        then pg_catalog.format(' +%s more', pg_catalog.count(*))
                    else ''
                end as suffix,
                case
                    when folded.line_index < 0 and folded.total > 0 then pg_catalog.concat_ws(
                        ', ',
                        nullif(pg_catalog.count(*) filter (where folded.status = 'failed'), 0) || ' failed',
                        nullif(pg_catalog.count(*) filter (where folded.status = 'started'), 0) || ' running',
                        nullif(pg_catalog.count(*) filter (where folded.status = 'queued'), 0) || ' waiting',
                        nullif(pg_catalog.count(*) filter (where folded.status = 'completed'), 0) || ' completed',
                        nullif(pg_catalog.count(*) filter (where folded.status = 'skipped'), 0) || ' skipped',
                        nullif(pg_catalog.count(*) filter (where folded.status = 'cancelled'), 0) || ' cancelled'
                    )
                    else pg_catalog.concat_ws(
                        ', ',
                        pgflow_worker._duration_text(ran.seconds),
                        case
                            when min(folded.status) = 'created' then 'not ready'
                            when min(folded.status) = 'queued' then 'waiting'
                            when min(folded.status) = 'started' then 'running'
                            when min(folded.status) <> 'completed' then min(folded.status)
                            when folded.total = 0 then 'no tasks'
                        end,
                        case
                            when max(folded.attempts) > 1
                                then pg_catalog.format('%s attempts', max(folded.attempts))
                            when min(folded.status) = 'queued' and max(folded.attempts) = 1 then '1 attempt'
                        end
                    )
                end as note
            from folded
            left join ran on ran.step_index = folded.step_index and ran.line_index = folded.line_index
            group by
                folded.step_index, folded.line_index, folded.step_slug, folded.is_map, folded.total, ran.seconds
        ),
        widths as (
            select
                least(width / 3, max(pg_catalog.length(line.step_slug || line.suffix))) as label,
                least(width / 3, max(pg_catalog.length(line.note))) as note
            from line
        ),
        layout as (
            select
                coalesce(widths.label, 0) as label,
                coalesce(widths.note, 0) as note,
                -- " |" before it, "| " behind
                width - 4 - coalesce(widths.label, 0) - coalesce(widths.note, 0) as bar
            from widths
        ),
        -- Not one for every task of a map: most of a long one's look the same.
        stretch as (
            select distinct
                mark.step_index,
                mark.line_index,
                mark.layer,
                least(layout.bar - 1, pg_catalog.floor(layout.bar * offsets.began / clock.seconds)::integer) as first,
                least(layout.bar - 1, pg_catalog.floor(layout.bar * offsets.ended / clock.seconds)::integer) as last
            from mark
            cross join layout
            cross join clock
            cross join lateral (
                select
                    extract(epoch from mark.began_at - clock.began_at)::double precision as began,
                    extract(epoch from mark.ended_at - clock.began_at)::double precision as ended
            ) as offsets
            where clock.seconds > 0
        ),
        cell as (
            select stretch.step_index, stretch.line_index, at.place, max(stretch.layer) as layer
            from stretch
            cross join lateral pg_catalog.generate_series(stretch.first, stretch.last) as at (place)
            group by stretch.step_index, stretch.line_index, at.place
        ),
        drawn as (
            select
                line.step_index,
                line.line_index,
                pg_catalog.string_agg(
                    coalesce((array['.', '#', 'x'])[cell.layer], ' '), '' order by at.place
                ) as bar
            from line
            cross join layout
            cross join lateral pg_catalog.generate_series(0, layout.bar - 1) as at (place)
            left join cell
                on cell.step_index = line.step_index
                and cell.line_index = line.line_index
                and cell.place = at.place
            group by line.step_index, line.line_index
        ),
        output (part, step_index, is_rest, line_index, content) as (
            select 1, 0, false, 0, pg_catalog.format('run %s of %s', run_id, run.flow_slug)
            union all
            select
                2, 0, false, 0,
                pg_catalog.format('%s, started %s', run.summary, pg_catalog.date_trunc('second', run.started_at))
            union all
            select
                3, 0, false, 0,
                '. waits  # runs  x failed attempt  one character: '
                || pgflow_worker._duration_text(clock.seconds / layout.bar)
            from clock
            cross join layout
            union all
            select
                4, 0, false, 0,
                pg_catalog.format(
                    '%s |0%s|',
                    pg_catalog.repeat(' ', layout.label),
                    pg_catalog.lpad(pgflow_worker._duration_text(clock.seconds), layout.bar - 1)
                )
            from clock
            cross join layout
            union all
            select
                5,
                line.step_index,
                line.line_index < 0,
                line.line_index,
                pg_catalog.format(
                    '%s |%s| %s',
                    pg_catalog.rpad(
                        case
                            when pg_catalog.length(line.step_slug || line.suffix) <= layout.label then line.step_slug
                            else pg_catalog.left(
                                line.step_slug, layout.label - pg_catalog.length(line.suffix) - 1
                            ) || '…'
                        end || line.suffix,
                        layout.label
                    ),
                    drawn.bar,
                    case
                        when pg_catalog.length(line.note) <= layout.note then line.note
                        else pg_catalog.left(line.note, layout.note - 1) || '…'
                    end
                )
            from line
            join drawn on drawn.step_index = line.step_index and drawn.line_index = line.line_index
            cross join layout
        )
        select pg_catalog.string_agg(
            pg_catalog.rtrim(pg_catalog.left(output.content, width)),
            e'\n' order by output.part, output.step_index, output.is_rest, output.line_index
        )
        from output
    );
end
$$;

comment on function pgflow_worker.run_timeline(uuid, integer) is
'When a run''s tasks waited (.) and ran (#), and where attempts failed (x), as text of at most width '
'columns: a line for each task, with how long its handler ran in all attempts. Of a step with more than 20 tasks it '
'shows 10, those first that failed, are running or were tried again, and the others in one line. A run that has not '
'ended goes up to now. Raises PW002 for an unknown run, or a width below 60 or above 1000.';

revoke execute on function pgflow_worker.run_timeline(uuid, integer) from public;
