# What a server needs: make, make install, make uninstall, make installcheck. They use PGXS and no network.
# What a developer needs is in scripts/dev: make dev-deps, test, soak, lint, bench, install-pgflow,
# demo, demo-stop; and make test-matrix, make reference.

EXTENSION = extension/pgflow_worker
# PGXS has a VERSION of its own: PostgreSQL's
EXTVERSION := $(shell sed -n "s/^default_version = '\(.*\)'/\1/p" $(EXTENSION).control)
SQL := $(sort $(wildcard sql/*/*.sql))

# From every released version straight to this one: what tables change, written by hand, and everything else anew.
CHANGES := $(shell ls extension/upgrade | sort -V)
UPGRADES := $(foreach change,$(CHANGES),$(EXTENSION)--$(firstword $(subst --, ,$(change)))--$(EXTVERSION).sql)
DATA_built = $(EXTENSION)--$(EXTVERSION).sql $(UPGRADES)
REGRESS = $(sort $(basename $(notdir $(wildcard tests/regress/sql/*.sql))))
REGRESS_OPTS = --inputdir=tests/regress --outputdir=tests/regress
EXTRA_CLEAN = $(addprefix tests/regress/,results regression.diffs regression.out)

ifndef PG_CONFIG
PG_CONFIG := $(shell scripts/dev pg-config)
endif
PGXS := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)

all:
.PHONY: bench check-version demo demo-stop dev-deps install-pgflow install-python lint reference soak test test-matrix uninstall-python

ifneq ($(wildcard $(PGXS)),)
include $(PGXS)
else
all install uninstall installcheck clean:
	@echo 'PostgreSQL is not here: set PG_CONFIG to the pg_config of the server' >&2; exit 1
endif

# The search_path is for the scripts themselves: whoever could create objects in another schema cannot take part.
# A folder is newer than the script when a file in it was renamed or removed.
SOURCES := $(SQL) $(sort $(dir $(SQL))) $(EXTENSION).control Makefile
define head
printf '%s\n' '\echo Use "$(1)" to load this file. \quit' 'set local search_path = pg_catalog, pg_temp;'
endef

$(EXTENSION)--$(EXTVERSION).sql: $(SOURCES)
	{ $(call head,create extension pgflow_worker cascade); awk 'FNR == 1 { print "" } 1' $(SQL); } > $@.new
	mv $@.new $@

$(UPGRADES): $(EXTENSION)--%--$(EXTVERSION).sql: $(SOURCES) $(addprefix extension/upgrade/,$(CHANGES))
	{ $(call head,alter extension pgflow_worker update); \
	  cd extension/upgrade && awk 'FNR == 1 { found = found || index(FILENAME, "$*--") == 1; print "" } found' $(CHANGES); \
	  cd ../.. && sed -E 's/^create (function|procedure|view) /create or replace \1 /' \
	    $(filter sql/3_% sql/4_% sql/5_%,$(SQL)) && \
	  awk '/^comment on /,/;$$/' $(filter sql/0_% sql/1_% sql/2_%,$(SQL)); } > $@.new
	mv $@.new $@

# Python goes to a directory of its version, so that installing a new one does not break running workers before
# "alter extension ... update". It is compiled because every pg_cron firing is a new interpreter; nobody checks these
# files' time stamps, so the directory is always made anew.
python_home = $(datadir)/pgflow_worker
python_dir = $(python_home)/$(EXTVERSION)

install: install-python
install-python: all
	rm -rf '$(DESTDIR)$(python_dir).new'
	umask 022 && cd plpy_src && find pgflow_worker -name '*.py' -o -name py.typed | while read -r file; do \
	  $(MKDIR_P) "$(DESTDIR)$(python_dir).new/$$(dirname "$$file")" && \
	  $(INSTALL_DATA) "$$file" "$(DESTDIR)$(python_dir).new/$$file" || exit; done
	umask 022; if test -x '$(PYTHON)'; then \
	  '$(PYTHON)' -m compileall -q --invalidation-mode unchecked-hash \
	  -s '$(DESTDIR)$(python_dir).new' -p '$(python_dir)' '$(DESTDIR)$(python_dir).new'; fi
	rm -rf '$(DESTDIR)$(python_dir)'
	mv '$(DESTDIR)$(python_dir).new' '$(DESTDIR)$(python_dir)'

uninstall: uninstall-python
uninstall-python:
	rm -rf '$(DESTDIR)$(python_dir)'
	test ! -d '$(DESTDIR)$(python_home)' || rmdir --ignore-fail-on-non-empty '$(DESTDIR)$(python_home)'

dev-deps demo demo-stop install-pgflow lint:
	@scripts/dev $@

bench soak test:
	@scripts/dev $@ $(ARGS)

test-matrix:
	@scripts/test-matrix $(ARGS)

check-version:
	@scripts/check-version

reference:
	@python3 scripts/reference.py
