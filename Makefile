# `make` builds, `make test` sets up and tests; `make help` lists the rest.

GO      := internal/testenv/go.sh
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
CACHE   := $(or $(QMCHAIN_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qmchain)
PKG     := ./...
TIMEOUT := 60m
FUZZ    := 10m

LINT_VERSION := v2.15.0
# Built by the project's own Go: a linter of an older one can't read its code.
LINT := $(CACHE)/golangci-lint-$(LINT_VERSION)-$(shell sed -n 's/^toolchain //p' go.mod)/golangci-lint

.PHONY: build help setup demo test unit lint torture fuzz bench bench-full bench-check deb deb-test clean

build: ## build the programs into bin/, static
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags "-s -w -X qmchain/cmd/internal/cli.Version=$(VERSION)" -o bin/ ./cmd/...

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

setup: ## install what building and testing need (Debian 12 or 13), as far as missing
	@internal/testenv/setup.sh

demo: setup ## back up a running Linux guest and look into every point
	@$(MAKE) --no-print-directory build
	@$(GO) run ./internal/demo

test: setup ## everything that CI runs
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@internal/testenv/fuzz.sh 2s
	@$(MAKE) --no-print-directory demo

lint: $(LINT) ## gofmt, go vet, golangci-lint
	@bad=$$("$$($(GO) env GOROOT)/bin/gofmt" -l .) && [ -z "$$bad" ] || { echo "not formatted with gofmt: $$bad"; exit 1; }
	$(GO) vet ./...
	GOTOOLCHAIN=local PATH="$$($(GO) env GOROOT)/bin:$$PATH" $(LINT) run ./...

$(LINT):
	@echo "building golangci-lint $(LINT_VERSION)"
	@GOBIN=$(dir $@) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION)

unit: ## the tests alone, of PKG (./...)
	$(GO) test -race -timeout $(TIMEOUT) $(PKG)

torture: ## a guest's long life with faults at random moments, 1,000 runs and more
	$(GO) test -race -timeout 3h ./cmd/qmchain-backup -run TestTorture -v -torture-runs 260
	$(GO) test -timeout 3h ./backup -run 'TestOrderOfWrites|Every.*Command|AtEveryCommand' -v -order-runs 200 -every 1
	$(GO) test -timeout 3h ./backup -run TestKeepCutOff -v -keep-steps 1
	$(GO) test -timeout 3h ./cmd/qmchain-backup -run 'TestKilledBeforeEvery|TestKeepCycles' -v -every 1 -keep-cycles 100
	$(GO) test -timeout 3h ./cmd/qmchain-hook -run TestCycles -v -cycles 100

fuzz: ## fuzz each target, or those with TARGET in their name, for FUZZ (10m)
	@internal/testenv/fuzz.sh $(FUZZ) $(TARGET)

bench: ## benchmarks beside other programs: BENCHMARKS.md and its plots (as root, 10 minutes; ONLY='Mount|List' for some)
	@internal/testenv/setup.sh bench
	@$(GO) run ./internal/bench/run -form quick -only '$(ONLY)'

bench-full: ## the same with larger disks, longer chains and more rounds (an hour)
	@internal/testenv/setup.sh bench
	@$(GO) run ./internal/bench/run -form full -only '$(ONLY)'

bench-check: ## fail if ratios have fallen by more than a fifth since the last recorded `make bench`
	@internal/testenv/setup.sh bench
	@$(GO) run ./internal/bench/run -form quick -only '$(ONLY)' -check

deb: ## build the Debian packages, for amd64 and arm64, into dist/
	@packaging/build.sh dist

deb-test: ## install, use, upgrade and remove the packages on a clean Debian 12 and 13 (as root, 10 minutes)
	@packaging/test/run.sh

clean: ## remove what build and deb made
	rm -rf bin dist
