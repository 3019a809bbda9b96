"""The extension's objects as a whole."""

from tests.database.conftest import Session

MEMBERS = """
    select classid, objid, pg_describe_object(classid, objid, 0) as name
    from pg_depend
    where refclassid = 'pg_extension'::regclass and deptype = 'e'
        and refobjid = (select oid from pg_extension where extname = 'pgflow_worker')
"""
# They commit, or run handlers' SQL.
NO_SEARCH_PATH = (
    *("_commit", "_replay_task", "_work", "_work_batch", "prune_data_older_than"),
    *("replay_task", "work", "work_batch"),
)


def test_every_member_has_a_comment(session: Session) -> None:
    assert (
        session.rows(f"""
            select name from ({MEMBERS}) as member
            where obj_description(objid, classid::regclass::name) is null
                and not exists (  -- the sequence of an identity column is its column's
                    select from pg_depend as owned
                    where owned.classid = member.classid and owned.objid = member.objid
                        and owned.deptype = 'i'
                )
                and classid <> 'pg_type'::regclass  -- row types are their tables'
        """)
        == []
    )


def test_nobody_else_may_execute_anything(session: Session) -> None:
    assert (
        session.rows(f"""
            select name from ({MEMBERS}) as member
            join pg_proc on pg_proc.oid = objid and classid = 'pg_proc'::regclass
            cross join lateral aclexplode(coalesce(proacl, acldefault('f', proowner))) as acl
            where acl.grantee = 0
        """)
        == []
    )


def test_nobody_else_may_read_or_write_a_table(session: Session) -> None:
    assert (
        session.rows(f"""
            select name from ({MEMBERS}) as member
            join pg_class on pg_class.oid = objid and classid = 'pg_class'::regclass
            cross join lateral aclexplode(relacl) as acl
            where acl.grantee <> relowner
        """)
        == []
    )


def test_every_function_has_a_search_path_but_those_that_commit_or_run_handlers(
    session: Session,
) -> None:
    assert session.rows(f"""
        select proname from ({MEMBERS}) as member
        join pg_proc on pg_proc.oid = objid and classid = 'pg_proc'::regclass
        where proconfig is null or not exists (
            select from unnest(proconfig) as setting where setting like 'search_path=%%'
        )
        order by 1
    """) == [(name,) for name in NO_SEARCH_PATH]


def test_plpgsql_check_finds_nothing(session: Session) -> None:
    session.run("create extension plpgsql_check")
    assert (
        session.rows(f"""
            select name, checked.lineno, checked.message from ({MEMBERS}) as member
            join pg_proc on pg_proc.oid = objid and classid = 'pg_proc'::regclass
            join pg_language on pg_language.oid = prolang and lanname = 'plpgsql'
            cross join lateral plpgsql_check_function_tb(objid::regprocedure) as checked
            -- STABLE for its one snapshot and no writes; such a function may read the clock.
            where checked.message <> 'routine is marked as STABLE, but expression is VOLATILE'
                -- pg_cron is in another database.
                and checked.message not like 'relation "cron.%%" does not exist'
        """)
        == []
    )
