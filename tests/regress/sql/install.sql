\set VERBOSITY terse
set client_min_messages = warning;
create extension pgflow_worker cascade;

-- Every member explains itself, apart from the sequences of identity columns.
with members as (
    select * from pg_depend
    where refclassid = 'pg_extension'::regclass and deptype = 'e'
        and refobjid = (select oid from pg_extension where extname = 'pgflow_worker')
)
select pg_describe_object(classid, objid, 0) as without_comment
from members
where classid not in ('pg_type'::regclass, 'pg_depend'::regclass)
    and not exists (
        select from pg_depend as owned
        where owned.classid = members.classid and owned.objid = members.objid and owned.deptype = 'i'
    )
    and obj_description(objid, (select relname from pg_class where oid = classid)) is null
order by 1;

-- Nothing is for everybody.
with members as (
    select * from pg_depend
    where refclassid = 'pg_extension'::regclass and deptype = 'e'
        and refobjid = (select oid from pg_extension where extname = 'pgflow_worker')
)
select pg_describe_object(classid, objid, 0) as executable_by_public
from members
join pg_proc on classid = 'pg_proc'::regclass and pg_proc.oid = objid
cross join aclexplode(coalesce(proacl, acldefault('f', proowner))) as granted
where granted.grantee = 0
order by 1;

drop extension pgflow_worker;
