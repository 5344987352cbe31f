# patchbay: `make demo` runs the main job, `make test` runs every test; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
BIN := bin/patchbay
FUZZTIME ?= 8s
TUNNELFUZZTIME ?= 60s
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
TOOL := go tool -modfile=tools/go.mod
# Rooms with goroutines that share memory: what -race is paid for.
RACE := ./switch/... ./nat/... ./stack/... ./stream/... ./tunnel/... ./ipam/... ./internal/dns/... ./internal/dhcp/... ./internal/node/... ./internal/daemon/... ./internal/capture/... ./internal/api/... ./internal/edge/... ./tap/...

.PHONY: help
help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/patchbay
	@mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -tags urfave_cli_no_docs -ldflags "-s -w -X main.version=$(VERSION)" -o $(BIN) ./cmd/patchbay

.PHONY: demo
demo: build ## two containers on one network: names, NAT, a published port, measured and shown
	@$(BIN) demo

.PHONY: deps
deps: ## install the Debian packages that the tests use (root, or sudo without a password), and make a virtual machine of one
	@script/deps test
	@script/qemu-guest

# What has to be done within a time, and so has no other package's tests beside it on the same cores.
ALONE := ^TestShortConnections$$

.PHONY: test
test: deps build ## install what the tests use and run all of them
	PATCHBAY_BIN=$(CURDIR)/$(BIN) go test -p 2 -timeout 15m -skip '$(ALONE)' ./...
	PATCHBAY_BIN=$(CURDIR)/$(BIN) go test -timeout 5m -run '$(ALONE)' ./internal/node
	script/podman-host

.PHONY: race
race: deps build ## the concurrent rooms again, under the race detector
	PATCHBAY_BIN=$(CURDIR)/$(BIN) GORACE=atexit_sleep_ms=0 CGO_ENABLED=1 go test -race -short -p 2 -timeout 15m $(RACE)

.PHONY: scale
scale: ## what 500 attachments and 200 networks cost on one node
	SCALE=full REQUIRE_NETNS=1 go test -run '^TestScale$$' -count 1 -v -timeout 30m ./internal/daemon

SOAKTIME ?= 10m
.PHONY: soak
soak: deps build ## attach, detach, publish, kill and take over at random under traffic for SOAKTIME (10m), and look for what leaks
	PATCHBAY_BIN=$(CURDIR)/$(BIN) SOAKTIME=$(SOAKTIME) REQUIRE_NETNS=1 go test -run '^TestSoak$$' -count 1 -v -timeout 2h ./cmd/patchbay

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (8s), those of the tunnels for TUNNELFUZZTIME (60s)
	@script/fuzz $(FUZZTIME) $(TUNNELFUZZTIME)

.PHONY: lint
lint: ## gofmt, go vet and golangci-lint
	@out=$$(git ls-files '*.go' | xargs gofmt -l); if [ -n "$$out" ]; then echo "gofmt would change: $$out"; exit 1; fi
	$(TOOL) golangci-lint run --timeout 10m ./...

BENCHTIME ?= 2s
.PHONY: bench
bench: build ## measure against the kernel and the peers side by side, BENCHTIME (2s) each, for an hour; writes bench/results
	@script/deps bench
	@$(BIN) bench all --time $(BENCHTIME) --report bench/results

.PHONY: profile
profile: build ## what a node does for each operation of each load: CPU, run queue, switches, system calls
	@script/profile

.PHONY: bench-compare
bench-compare: ## Go micro-benchmarks of this tree beside those of BASE=REV, with benchstat; BENCH=REGEX and COUNT=10 narrow it
	@[ -n "$(BASE)" ] || { echo "bench-compare: say with what: make bench-compare BASE=main~1" >&2; exit 2; }
	@script/bench-compare "$(BASE)"

.PHONY: clean
clean: ## remove what was built
	rm -rf bin
