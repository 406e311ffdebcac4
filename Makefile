# The workshop. "make" lists what there is; "make check" is all that CI runs.
# It needs Go, git and make; the tests a C compiler, for the race detector, redis-server, Chromium, Node.js with npm,
# Python, ShellCheck, HAProxy and nginx (they install all of these where they can), and a JDK with Maven, and Rust, for
# those that are left out without.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# For how long each fuzz target runs.
FUZZTIME ?= 30s
# Which packages test, bench and fuzz look at.
PKG ?= ./...
# For how long chaos runs, and from which seed; empty draws one.
CHAOSTIME ?= 10m
CHAOSSEED ?=
# For how long turnover replaces certificates.
ROTATIONTIME ?= 1m
# How many runs kills makes, and from which seed; empty draws one.
KILLRUNS ?= 1000
KILLSEED ?=

# Tools are built once per Go version and per tools/go.mod; a tool that an older Go has built may not understand the
# code of a newer one.
GO_VERSION := $(shell go env GOVERSION)
TOOLS := bin/.tools-$(GO_VERSION)
THIRD_PARTY := conformance/server/node_modules/.package-lock.json
VALIDATE_PROTO := third_party/buf/validate/validate.proto
# What calls the broker, or stands before it, in the tests of internal/mesh.
PEERS := internal/mesh/clients
NODE_PEER := $(PEERS)/node/node_modules/.package-lock.json
PYTHON_PEER := bin/python/.installed
JAVA_PEER := bin/java/.built
GRPCURL := bin/.grpcurl-1.9.4-$(GO_VERSION)
# The client libraries, built. Each takes our schema and service config along.
SCHEMA := $(wildcard proto/tokenbroker/v1/*.proto) clients/service_config.json
PYTHON_CLIENT := bin/clients-python/.built
NODE_CLIENT := clients/node/schema.json
JAVA_CLIENT := bin/clients-java/.built

.PHONY: help
help: ## Show this list.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/broker, which needs nothing of the system.
	CGO_ENABLED=0 go build -trimpath -o bin/broker ./cmd/broker

.PHONY: test
test: ## Run all tests under the race detector; PKG=./internal/... for some.
	scripts/need.sh cc redis-server chromium python3 shellcheck
	@packages=$$(go list $(PKG) | grep -v '/internal/fleet$$' || true); \
	if [ -n "$$packages" ]; then (set -x; CGO_ENABLED=1 go test -race -timeout 10m $$packages); fi
	# The fleet has bounds in time: it has the machine to itself.
	@if go list $(PKG) | grep -q '/internal/fleet$$'; then (set -x; CGO_ENABLED=1 go test -race -timeout 10m ./internal/fleet); fi

.PHONY: conformance
conformance: $(THIRD_PARTY) ## Run the broker against a third-party authorization server.
	scripts/need.sh redis-server node
	go test -tags conformance -count=1 -timeout 5m ./conformance

.PHONY: mesh
mesh: $(GRPCURL) $(PYTHON_PEER) $(NODE_PEER) $(JAVA_PEER) $(VALIDATE_PROTO) ## Run the broker with real proxies, balancers and clients of other stacks.
	scripts/need.sh haproxy nginx-stream node
	ENVOY_BIN="$$(scripts/envoy.sh)" go test -tags mesh -count=1 -timeout 5m ./internal/mesh

.PHONY: clients
clients: $(PYTHON_CLIENT) $(NODE_CLIENT) $(JAVA_CLIENT) rust-client ## Build the client libraries, and run their tests on a real broker.
	go test -tags clients -count=1 -timeout 10m ./internal/clients

.PHONY: scale
scale: ## Have 10,000 streams watch a token, and 10,000 jobs ask for theirs, and time them.
	scripts/need.sh redis-server
	go test -count=1 -p 1 -v -run 'TestTenThousand(Watchers|Jobs)$$' ./cmd/broker ./internal/fleet

.PHONY: examples
examples: ## Check the examples of deploy/batch against the types of Kubernetes.
	go -C deploy/batch/schema test ./...

.PHONY: faults
faults: ## Run the whole fault matrix on a fleet of replicas; it takes a quarter of an hour.
	scripts/need.sh redis-server
	go test -tags faults -count=1 -p 1 -timeout 60m -v ./internal/store ./internal/fleet

.PHONY: chaos
chaos: ## Break a fleet at random for CHAOSTIME; CHAOSSEED=N repeats a run.
	scripts/need.sh redis-server
	CHAOSTIME='$(CHAOSTIME)' CHAOSSEED='$(CHAOSSEED)' go test -tags chaos -count=1 -timeout 0 -v -run TestChaos ./internal/fleet

.PHONY: kills
kills: ## Kill and stop replicas at every point of a refresh, 1,000 seeded runs.
	scripts/need.sh redis-server
	KILLRUNS='$(KILLRUNS)' KILLSEED='$(KILLSEED)' go -C internal/fleet test -tags kills -count=1 -timeout 0 -run TestKills

.PHONY: hostile
hostile: ## Attack a broker with floods, slow connections and huge messages.
	go test -tags hostile -count=1 -timeout 20m -v -run 'TestHostile|TestEager' ./cmd/broker ./internal/service

.PHONY: turnover
turnover: ## Replace certificates every second under load, for ROTATIONTIME.
	ROTATIONTIME='$(ROTATIONTIME)' go test -count=1 -v -run TestCertificatesTurnOverUnderLoad ./cmd/broker

.PHONY: check
check: ## Run all that CI runs.
	$(MAKE) lint
	$(MAKE) generated-check
	$(MAKE) vuln
	$(MAKE) test
	# They wait for each other's processes for the most part.
	$(MAKE) -j 5 --output-sync=target conformance mesh clients examples build

.PHONY: lint
lint: lint-go lint-proto ## Check format, go vet, staticcheck, buf lint and buf breaking.

.PHONY: lint-go
lint-go: $(TOOLS)
	@unformatted=$$(git ls-files -co --exclude-standard -- '*.go' | while read -r f; do [ ! -e "$$f" ] || echo "$$f"; done | xargs -r gofmt -l); \
	if [ -n "$$unformatted" ]; then printf 'not formatted, run gofmt -w on:\n%s\n' "$$unformatted" >&2; exit 1; fi
	go vet ./...
	go vet -tags faults,chaos,kills,conformance,mesh,clients,hostile \
		./internal/fleet ./internal/store ./conformance ./internal/mesh ./internal/clients ./cmd/broker ./internal/service
	# Generated code is not ours to argue with.
	bin/staticcheck $$(go list ./... | grep -v '/gen/')

.PHONY: lint-proto
lint-proto: $(TOOLS) $(VALIDATE_PROTO)
	bin/buf format --diff --exit-code proto
	bin/buf lint
	scripts/breaking.sh

.PHONY: generate
generate: $(TOOLS) $(VALIDATE_PROTO) ## Generate gen/ from proto/.
	bin/buf format -w proto
	bin/buf generate
	@if scripts/toolchain.sh rust 'the code that is generated for Rust'; then (set -x; UPDATE=1 CARGO_TARGET_DIR='$(CURDIR)/bin/clients-rust' \
		cargo test --quiet --locked --manifest-path clients/rust/Cargo.toml --test generated); fi

.PHONY: generated-check
generated-check: $(TOOLS) $(VALIDATE_PROTO) ## Check that gen/ is what "make generate" makes.
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	bin/buf generate -o "$$tmp"; \
	if ! diff -ru gen "$$tmp/gen"; then \
		echo 'gen/ is not what proto/ says (see above): run "make generate", and delete what is only in gen/' >&2; exit 1; \
	fi; \
	echo 'gen/ is fresh'

.PHONY: vuln
vuln: $(TOOLS) ## Look for known vulnerabilities that the code reaches.
	scripts/vuln.sh

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME.
	scripts/fuzz.sh '$(FUZZTIME)' '$(PKG)'

.PHONY: bench
bench: ## Run the benchmarks; PKG=./internal/... for some.
	go test -run '^$$' -bench . -benchmem $(PKG)

.PHONY: tools
tools: $(TOOLS) $(VALIDATE_PROTO) ## Build the tools that tools/go.mod pins into bin/.

.PHONY: download
download: $(THIRD_PARTY) $(GRPCURL) $(PYTHON_PEER) $(NODE_PEER) $(JAVA_PEER) $(PYTHON_CLIENT) $(NODE_CLIENT) $(JAVA_CLIENT) rust-client ## Download all modules, so that the rest works without a network.
	go mod download
	go -C tools mod download
	go -C deploy/batch/schema mod download
	-scripts/envoy.sh

.PHONY: clean
clean: ## Delete what was built.
	rm -rf bin third_party conformance/server/node_modules $(PEERS)/node/node_modules
	cd clients/node && rm -rf node_modules schema.json service_config.json

$(TOOLS): tools/go.mod tools/go.sum
	mkdir -p bin
	go -C tools build -o '$(CURDIR)/bin/' tool
	@rm -f bin/.tools-*
	@touch $@

# What the lock file says, from npm's registry.
$(THIRD_PARTY): conformance/server/package-lock.json
	scripts/need.sh node npm
	cd $(<D) && npm ci --loglevel=error
	@touch $@

$(NODE_PEER): $(PEERS)/node/package-lock.json
	scripts/need.sh node npm
	cd $(<D) && npm ci --loglevel=error
	@touch $@

# What requirements.txt says, from Python's package index, with the hashes that it names.
$(PYTHON_PEER): $(PEERS)/python/requirements.txt
	scripts/need.sh python3-venv
	rm -rf $(@D)
	python3 -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r $<
	@touch $@

$(JAVA_PEER): $(PEERS)/java/pom.xml $(PEERS)/java/src/main/java/Peer.java $(wildcard proto/tokenbroker/v1/*.proto) $(VALIDATE_PROTO)
	@if scripts/toolchain.sh java 'a caller on grpc-java'; then (set -x; mvn --quiet --batch-mode --file $< package && touch $@); fi

# A package like those that users install.
$(PYTHON_CLIENT): $(wildcard clients/python/*.toml clients/python/*.py clients/python/*.txt clients/python/token_broker/*) $(SCHEMA) $(VALIDATE_PROTO)
	scripts/need.sh python3-venv
	test -x $(@D)/bin/pip || python3 -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r clients/python/requirements.txt
	cd clients/python && '$(CURDIR)/$(@D)/bin/pip' install --quiet --disable-pip-version-check --force-reinstall --no-deps --no-build-isolation --no-index .
	@touch $@

$(NODE_CLIENT): clients/node/package.json clients/node/package-lock.json clients/node/build.js clients/node/google_rpc.proto $(SCHEMA)
	scripts/need.sh node npm
	cd $(@D) && npm ci --loglevel=error && node build.js
	@touch $@

$(JAVA_CLIENT): clients/java/pom.xml $(shell find clients/java/src -type f) $(SCHEMA) $(VALIDATE_PROTO)
	@if scripts/toolchain.sh java 'the client library for Java'; then (set -x; mvn --quiet --batch-mode --file $< package && touch $@); fi

# Cargo knows itself what is to be done.
.PHONY: rust-client
rust-client: $(TOOLS) $(VALIDATE_PROTO)
	@if scripts/toolchain.sh rust 'the client library for Rust'; then (set -x; CARGO_TARGET_DIR='$(CURDIR)/bin/clients-rust' \
		cargo test --quiet --locked --no-run --manifest-path clients/rust/Cargo.toml); fi

# Not one of tools/go.mod: its versions of what we share with it are its own.
$(GRPCURL):
	GOBIN='$(CURDIR)/bin' go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4
	@rm -f bin/.grpcurl-*
	@touch $@

# The rules that our schemas import. They come out of a Go module, because buf's registry is out of reach for many.
$(VALIDATE_PROTO): tools/go.mod
	go -C tools mod download github.com/bufbuild/protovalidate
	@mkdir -p $(@D)
	install -m 0644 "$$(go -C tools list -m -f '{{.Dir}}' github.com/bufbuild/protovalidate)/proto/protovalidate/buf/validate/validate.proto" $@
