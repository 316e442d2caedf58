# One command builds, one tests: see `make help`, and CONTRIBUTING.md for the why.
#
# Tools are Go programs pinned in tools/go.mod; `go tool` builds them on first use and
# keeps them in Go's build cache, so that nothing is installed and nothing goes stale.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

COMMANDS := $(notdir $(wildcard cmd/*))
VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
TOOL     := go tool -modfile=tools/go.mod
PROTO    := $(wildcard api/proto internal/storepb)

# The version comes from VERSION; without this, Go asks git too, and fails in a clone
# that somebody else owns.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

# Phases of `make test`: FIRST one after another, then two of BESIDE at a time. e2e begins first, because it takes
# longest and mostly waits for what it started; the others compute.
FIRST  := deps build lint check-generated
BESIDE := e2e unit store fuzz-short
STORE  := $(addsuffix /...,$(wildcard ./internal/etcd*))

# command:package. What the test hosts need, internal/testhost installs by itself.
NEEDS := git:git gcc:gcc gcc:libc6-dev ip:iproute2 iptables:iptables mkfs.ext4:e2fsprogs

.PHONY: help build test demo deps lint generate check-generated unit store fuzz-short fuzz e2e kill-matrix faults rollback mutants bench bench-deps bench-hooks clean
.PHONY: $(COMMANDS)

help: ## print this list
	@echo "usage: make TARGET"
	sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

build: $(COMMANDS) ## build the static binaries into bin/

$(COMMANDS):
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS) -X main.version=$(VERSION)' -o bin/$@ ./cmd/$@

# CRIU starts the hook for every stage of every dump: small means fast.
nsalloc-hook: LDFLAGS := -s -w

test: ## the one test command: install what is missing, lint, and run every test
	@results=$$(mktemp -d)
	trap 'rm -rf "$$results"' EXIT
	export RESULTS=$$results
	begun= stop=
	for phase in $(FIRST); do
		begun+=" $$phase"
		$(MAKE) phase-$$phase || case $$phase in deps|build) stop=1; break;; esac # the rest needs them
	done
	if test -z "$$stop"; then
		begun+=" $(BESIDE)"
		echo "=== $(BESIDE): two at a time; the output of each comes when it is over"
		# -O: the lines of one phase stay together.
		$(MAKE) --jobs=2 --keep-going --output-sync=recurse $(addprefix phase-,$(BESIDE)) || true
	fi
	printf '\n=== durations\n'
	failed=
	for phase in $$begun; do
		# Only the word ok is ok: a phase that was ended from outside, or could not write its line, says nothing.
		line=$$(cat "$$results/$$phase" 2>/dev/null || true)
		case $$line in *" ok") ;; *) failed+=" $$phase" line=$${line:-$$(printf '%-16s %5s  it did not say how it went  FAILED' $$phase -)};; esac
		echo "$$line"
	done
	test -z "$$failed" || { echo "FAILED:$$failed"; exit 1; }

# One phase of `make test`, and a line in RESULTS on how it went: wall time, and processor time of it.
phase-%:
	@echo "=== $*"
	start=$$SECONDS result=ok
	$(MAKE) $* || result=FAILED
	cpu=0
	times >"$$RESULTS/$*.times" && # in a pipe it would know of no children
		cpu=$$(awk -F'[ms ]' 'NR == 2 { print int($$1*60 + $$2 + $$4*60 + $$5) }' "$$RESULTS/$*.times") || cpu=0
	printf '%-16s %5d s  %5d s of CPU  %s\n' $* $$((SECONDS - start)) $$cpu $$result >"$$RESULTS/$*"
	test $$result = ok

# Not deps: the demo needs no compiler, and installs debootstrap itself when it has to make its hosts' Debian.
demo: build ## build, then move a container between two hosts and watch its serials (as root)
	bin/nsalloc demo

# With CI=true whatever cannot be had is a failure; else what needs it is skipped by name.
deps: ## install missing Debian packages (as root)
	@missing=
	PATH=$$PATH:/usr/sbin:/sbin
	for need in $(NEEDS); do
		command -v "$${need%%:*}" >/dev/null || missing+=" $${need##*:}"
	done
	test -n "$$missing" || { echo "deps: nothing missing"; exit 0; }
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		export DEBIAN_FRONTEND=noninteractive
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing && exit 0
		echo "deps: apt-get could not install:$$missing"
	else
		echo "deps: missing, and only root on Debian can install them here:$$missing"
	fi
	test "$${CI:-}" != true

lint: ## buf lint and golangci-lint
	@$(TOOL) buf lint
	$(TOOL) golangci-lint run --allow-parallel-runners ./...
	$(TOOL) golangci-lint run --allow-parallel-runners --build-tags killpoints ./internal/killpoint/...

generate: ## write the Go of every .proto beside it
	@for dir in $(PROTO); do
		$(TOOL) buf generate $$dir --output $$dir
	done

check-generated: ## fail when generated Go is not what its .proto gives
	@tmp=$$(mktemp -d)
	trap 'rm -rf "$$tmp"' EXIT
	for dir in $(PROTO); do
		mkdir -p "$$tmp/have/$$dir" "$$tmp/want/$$dir"
		(cd $$dir && find . -name '*.pb.go' -exec cp --parents -t "$$tmp/have/$$dir" {} +)
		$(TOOL) buf generate $$dir --output "$$tmp/want/$$dir"
	done
	cd "$$tmp"
	diff -ru have want || { echo "generated code is stale: run make generate and commit"; exit 1; }

# The race detector needs a C compiler; without one the tests still say something.
RACE := $(shell command -v gcc >/dev/null && echo -race)
GOTEST = $(if $(RACE),,echo "no gcc: without the race detector";) go test $(RACE) -timeout 15m

unit: ## tests of the packages; some make hosts of their own (as root)
	@$(GOTEST) $$(go list ./... | grep -v -e '/internal/etcd' -e '/e2e')

store: ## tests against a real etcd, which runs inside the test
	@$(GOTEST) $(STORE)

# What fuzz finds out goes on in the next run (in Go's cache); fuzz-short begins with what is committed
# each time, so that it takes the same time for everybody. FUZZ names a target. Go before 1.27 may take the
# end of the time for a failure, "context deadline exceeded" and nothing else (go.dev/issue/75804).
FUZZTIME := 5m
FUZZJOBS := 1
fuzz: ## every fuzz target for FUZZTIME (5m) each
fuzz-short: ## every fuzz target, a thousand inputs each
fuzz-short fuzz:
	@tmp=$$(mktemp -d)
	trap 'rm -rf "$$tmp"' EXIT
	time=1000x cache=$$tmp/corpus failed= report=
	if [ $@ = fuzz ]; then time=$(FUZZTIME) cache=$$(go env GOCACHE)/fuzz-nsalloc; fi
	for pkg in $$(grep -rlE --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do
		# Once a package, with the instructions that tell the fuzzer what an input reached.
		go test -c -fuzz=Fuzz -o "$$tmp/test" $$pkg
		targets=$$(cd $$pkg && "$$tmp/test" -test.list '^$(or $(FUZZ),Fuzz.*)$$' | { grep ^Fuzz || true; })
		for target in $$targets; do
			result=ok
			# Without a limit most of the time goes into making what is new small.
			(cd $$pkg && "$$tmp/test" -test.run '^$$' -test.fuzz "^$$target\$$" -test.fuzztime $$time \
				-test.fuzzminimizetime 20x -test.parallel $(FUZZJOBS) -test.fuzzcachedir "$$cache/$$pkg") >"$$tmp/log" 2>&1 ||
				{ grep -A1 '^--- FAIL' "$$tmp/log" | grep -qx '    context deadline exceeded' ||
				{ result=FAILED failed+=" $$target"; cat "$$tmp/log"; }; }
			report+=$$(awk -v p=$$pkg -v t=$$target -v r=$$result '
				/execs: / { split($$0, e, /execs: | \(/); match($$0, /interesting: [0-9]+/); n = substr($$0, RSTART+13, RLENGTH-13) }
				/Failing input written to/ { sub(/.*\//, "", $$NF); r = r ": " p "/testdata/fuzz/" t "/" $$NF "; again: go test " p " -run " t "/" $$NF }
				END { printf "%-28s %-16s %10d %8d  %s", p, t, e[2], n, r }' "$$tmp/log")$$'\n'
		done
	done
	printf '\n%-28s %-16s %10s %8s  %s\n%s' PACKAGE TARGET EXECS NEW RESULT "$$report"
	test -n "$$report" || { echo "no fuzz target is called $(FUZZ)"; exit 1; }
	test -z "$$failed" || { echo "FAILED:$$failed"; exit 1; }

e2e: build ## real binaries, real CRIU, hosts of their own (as root)
	@if [ "$$(id -u)" != 0 ]; then
		echo "SKIP e2e: namespaces, mounts and CRIU need root; run as root to test them"
		test "$${CI:-}" != true
		exit 0
	fi
	export NSALLOC_BIN=$(CURDIR)/bin
	$(GOTEST) -count=1 -v ./e2e/...

# `make test` runs a fixed selection of these cells. NSALLOC_KILL_CELLS selects others, by their names.
kill-matrix: ## kill server, agents and hook at every point, 394 cells (as root)
	@if [ "$$(id -u)" != 0 ]; then
		echo "SKIP kill-matrix: namespaces, mounts and CRIU need root; run as root"
		test "$${CI:-}" != true
		exit 0
	fi
	NSALLOC_KILL_CELLS=$${NSALLOC_KILL_CELLS:-.} NSALLOC_BIN=$(CURDIR)/bin go test -count=1 -v -timeout 60m -run TestKillMatrix ./e2e

# `make test` has ten seconds of it.
faults: build ## 1,000 callers while servers and members of an etcd are killed, for a minute
	@NSALLOC_FAULTS=$${NSALLOC_FAULTS:-60s} NSALLOC_BIN=$(CURDIR)/bin go test -count=1 -v -timeout 15m -run TestServersAndMembersKilled ./e2e

# `make test` has one of the ways, with 20 sandboxes. NSALLOC_ROLLBACK is a regular expression that selects others.
rollback: build ## put a pool's etcd back to a snapshot, in all ways, with 500 sandboxes (as root)
	@NSALLOC_ROLLBACK=$${NSALLOC_ROLLBACK:-.} NSALLOC_BIN=$(CURDIR)/bin go test -count=1 -v -timeout 60m -run TestRollback ./e2e

# BENCH is flags: `make bench BENCH='-rows ^nsalloc -rounds 2'`; with -out '' the page stays as it is.
bench: nsalloc-server ## speed beside etcd, gRPC, Redis and PostgreSQL in the same run, into docs/bench
	@go run ./internal/bench $(BENCH)

# The bench runs instances of its own; what Debian would start by itself stays off.
bench-deps: ## install Redis and PostgreSQL from Debian, for bench (as root)
	@missing=
	command -v redis-server >/dev/null || missing+=" redis-server"
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing+=" postgresql"
	test -n "$$missing" || { echo "bench-deps: nothing missing"; exit 0; }
	if [[ $$missing = *postgresql* && ! -e /etc/postgresql-common ]]; then
		mkdir -p /etc/postgresql-common
		echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing
	if [[ $$missing = *redis* && -d /run/systemd/system ]]; then systemctl disable --now redis-server; fi

bench-hooks: build ## what the hook adds to a migration, beside no script and /bin/true (as root)
	@export NSALLOC_BIN=$(CURDIR)/bin
	go test ./e2e -run '^$$' -bench Hooks -benchtime 10x -timeout 15m

mutants: ## break the code on purpose, a line at a time, and count what the tests catch (as root)
	@go run ./internal/mutants

clean: ## remove what a build leaves in the tree
	rm -rf bin
