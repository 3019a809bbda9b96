create function pgflow_worker._flowchart(flow_slug text, title text, notes jsonb)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return (
        with step as (
            select
                known.step_index,
                -- Some versions of Mermaid take a slug such as __init__ for emphasis.
                case
                    when known.step_slug like '\_%\_' then pg_catalog.replace(known.step_slug, '_', '#95;')
                    else known.step_slug
                end as label,
                known.step_type = 'map' as is_map,
                notes #>> array[known.step_slug, 'status'] as status,
                notes #>> array[known.step_slug, 'text'] as note
            from pgflow.steps as known
            where known.flow_slug = _flowchart.flow_slug
        ),
        -- Filled, with a colour of their own for the text: they look the same on a light and on a dark page.
        style (status, css) as (
            values
            ('created', 'fill:#eaeef2,stroke:#6e7781,color:#24292f'),
            ('queued', 'fill:#fff3c4,stroke:#9a6700,color:#4d3800'),
            ('started', 'fill:#d6e8ff,stroke:#0969da,color:#0a2f5c'),
            ('completed', 'fill:#d3f2da,stroke:#1a7f37,color:#0b3d1a'),
            ('failed', 'fill:#ffdcd7,stroke:#cf222e,color:#6e0b14'),
            ('skipped', 'fill:#eaeef2,stroke:#6e7781,color:#57606a,stroke-dasharray:4'),
            ('cancelled', 'fill:#f3e8ff,stroke:#8250df,color:#3e1f79,stroke-dasharray:4')
        )
        select pg_catalog.concat_ws(
            e'\n',
            pg_catalog.format(e'---\ntitle: "%s"\n---\nflowchart TD', title),
            (
                -- No slug is an id here: Mermaid would read "end" or "graph" as its own.
                select pg_catalog.string_agg(
                    pg_catalog.format(
                        case when step.is_map then '    s%s[["%s"]]%s' else '    s%s["%s"]%s' end,
                        step.step_index,
                        pg_catalog.concat_ws('<br>', step.label, step.note),
                        ':::' || step.status
                    ),
                    e'\n' order by step.step_index
                )
                from step
            ),
            (
                select pg_catalog.string_agg(
                    pg_catalog.format('    s%s --> s%s', parent.step_index, child.step_index),
                    e'\n' order by parent.step_index, child.step_index
                )
                from pgflow.deps as dep
                join pgflow.steps as parent
                    on parent.flow_slug = dep.flow_slug and parent.step_slug = dep.dep_slug
                join pgflow.steps as child
                    on child.flow_slug = dep.flow_slug and child.step_slug = dep.step_slug
                where dep.flow_slug = _flowchart.flow_slug
            ),
            (
                select pg_catalog.string_agg(
                    pg_catalog.format('    classDef %s %s', style.status, style.css),
                    e'\n' order by style.status
                )
                from style
                where style.status in (select step.status from step)
            )
        )
    );
end
$$;

comment on function pgflow_worker._flowchart(text, text, jsonb) is
'A flow''s steps and dependencies as a Mermaid flowchart: boxes, for maps with double sides. notes: by step''s slug '
'its "status", which colours it, and "text", further lines of its label.';

revoke execute on function pgflow_worker._flowchart(text, text, jsonb) from public;
