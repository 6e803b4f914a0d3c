# SPDX-License-Identifier: Apache-2.0
#
# make help tells what there is. What is built lies in bin/ and lib/, intermediate files in .cache/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all

GO ?= go
PREFIX ?= /usr/local
DESTDIR ?=
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
CFLAGS ?= -O2 -g

build := .cache/build
logs := .cache/log
tools := .cache/bin

programs := bin/fuse_tcmur bin/tcmur-host
handlers := lib/tcmu-runner/handler_ram.so lib/tcmu-runner/handler_file.so

.PHONY: all
all: $(programs) $(handlers) ## build the two programs and the handlers (the default)

# ---------------------------------------------------------------------------------------------------------------------
# What things are made of besides files: compilers, their flags, the commit. $(call remember,FILE,TEXT) writes TEXT to
# FILE unless that is in it already; what depends on FILE is rebuilt when TEXT changes, and only then. It works while
# this file is read, not in a recipe, so that an unchanged tree has nothing to do.

same = $(and $(findstring <$1>,<$2>),$(findstring <$2>,<$1>))
remember = $(if $(call same,$(file <$1),$2),,$(shell mkdir -p $(dir $1))$(file >$1,$2))

# ---------------------------------------------------------------------------------------------------------------------
# Handlers

c_flags := -std=gnu11 -Wall -Wextra -pthread $(CFLAGS)
# Only the entry point and the handler's struct are visible: two handlers in one process must not meet. Everything is
# bound when the handler is loaded, so that what a host lacks is noticed there and not in the middle of a request.
so_flags := -fPIC -fvisibility=hidden
so_link := -shared -pthread -Wl,-z,now -Wl,-z,relro $(LDFLAGS)

common := backing config fd_io pattern
ram_objects := $(patsubst %,$(build)/handlers/%.o,ram memory $(common))
file_objects := $(patsubst %,$(build)/handlers/%.o,file $(common))

$(call remember,$(build)/c-flags,$(CC) $(c_flags) $(so_flags) $(so_link))

lib/tcmu-runner/handler_ram.so: $(ram_objects)
lib/tcmu-runner/handler_file.so: $(file_objects)
$(handlers): $(build)/c-flags
	@mkdir -p $(@D)
	$(CC) $(so_link) -o $@ $(filter %.o,$^)

$(build)/handlers/%.o: plugin/handlers/%.c $(build)/c-flags
	@mkdir -p $(@D)
	$(CC) $(c_flags) $(so_flags) -MMD -MP -c -o $@ $<

-include $(wildcard $(build)/handlers/*.d)

# ---------------------------------------------------------------------------------------------------------------------
# Programs. Go alone knows what a program consists of: .ci/go-prerequisites asks it after each build and writes
# PROGRAM.mk. That stays true until one of the files in it changes, except for files that are added to the packages'
# folders: those are looked up here.

-include $(build)/fuse_tcmur.mk $(build)/tcmur-host.mk

sources = $(sort go.mod go.sum $($1.files) \
	$(filter-out %_test.go,$(foreach dir,$($1.go-dirs),$(wildcard $(dir)/*.go $(dir)/*.s))) \
	$(foreach dir,$($1.c-dirs),$(wildcard $(dir)/*.c $(dir)/*.h)))

# The commit, and not whether the tree differs from it, which alone must not lead to a build. The recipe adds that.
commit := $(shell git describe --tags --always 2>/dev/null)
go_settings := $(shell $(GO) env GOVERSION GOFLAGS GOARCH CGO_CFLAGS CGO_LDFLAGS 2>/dev/null)
$(call remember,$(build)/go-flags,$(strip $(CC) $(go_settings) $(commit)))

bin/fuse_tcmur: $(call sources,fuse_tcmur)
bin/tcmur-host: $(call sources,tcmur-host)
# No C in the front, not even libc's resolver.
bin/fuse_tcmur: cgo := 0
bin/tcmur-host: cgo := 1
$(programs): $(build)/go-flags
	@mkdir -p $(@D)
	CGO_ENABLED=$(cgo) CC='$(CC)' $(GO) build -trimpath -buildvcs=false \
		-ldflags "-X main.version=$$(git describe --tags --always --dirty 2>/dev/null || true)" \
		-o $@ ./cmd/$(@F)
	@GO='$(GO)' CC='$(CC)' CGO_ENABLED=$(cgo) .ci/go-prerequisites $(@F) ./cmd/$(@F) >$(build)/$(@F).mk
	@touch $@ # go leaves a program alone that would come out the same

# Without PROGRAM.mk nothing is known about what the program is made of: build it.
.PHONY: unknown
$(foreach name,$(notdir $(programs)),$(if $($(name).files),,$(eval bin/$(name): unknown)))

# ---------------------------------------------------------------------------------------------------------------------
# Running

.PHONY: run
run: all ## serve /tcmur in the foreground, with handler ram and device 0; RUN_FLAGS adds flags
	@.ci/packages --wanted tcmu-runner qemu-utils e2fsprogs
	@exec bin/fuse_tcmur --hints --command 'load ram' --command 'add 0 /ram/@' $(RUN_FLAGS)

# ---------------------------------------------------------------------------------------------------------------------
# Tests

# go test has no time limit for benchmarks.
go_bench = TCMUR_BIN='$(CURDIR)/bin' timeout 10m $(GO) test -run '^$$' -bench .
go_test = GO='$(GO)' TCMUR_BIN='$(CURDIR)/bin' .ci/go-test
go_dirs := cmd fusetree plugin shared

.PHONY: test
test: deps all format-check vet generated-check test-c test-go ## run all tests; installs what they need
	@echo 'make test: all passed'

.PHONY: deps
deps: # install the Debian packages that the tests need
	@.ci/packages btrfs-progs e2fsprogs fio groff-base mandoc protobuf-compiler qemu-utils sqlite3 systemd tcmu-runner xfsprogs
	@.ci/packages --wanted ceph-common ceph-mon ceph-osd

.PHONY: test-go
test-go: all ## run the Go tests only: with the race detector, on one processor, and over io_uring
	$(go_test) $(logs)/race.log -race -timeout 15m ./...
	GOMAXPROCS=1 $(go_test) $(logs)/one-processor.log -timeout 10m -skip '^TestConformance$$' \
		./shared/... ./plugin/... ./fusetree/...
	FUSETREE_TRANSPORT=uring $(go_test) $(logs)/io-uring.log -race -timeout 15m -skip '^TestE2ERbd' \
		./fusetree/... ./cmd/fuse_tcmur
	$(go_bench) -benchtime 1x ./shared/... ./plugin ./fusetree ./cmd/tcmur-host >$(logs)/bench.log 2>&1 || \
		{ cat $(logs)/bench.log >&2; exit 1; }

# The C of the host under the address sanitizer, with the front as it is.
.PHONY: test-asan
test-asan: all ## run the tests that use hosts, with a host that has the address sanitizer
	@mkdir -p $(asan)/bin
	CGO_ENABLED=1 CC='$(CC)' $(GO) build -asan -o $(asan)/bin/tcmur-host ./cmd/tcmur-host
	@cp bin/fuse_tcmur $(asan)/bin
	@# The paths that requests take. A host that is to crash does so differently with the sanitizer, and takes longer.
	GO='$(GO)' TCMUR_BIN='$(CURDIR)/$(asan)/bin' .ci/go-test $(logs)/asan.log -timeout 15m \
		-run '^Test(Commands|ReadWriteAt|Concurrency|Qcow|UnevenAccess|ReadsInPlace|RAMInPlace|FilePersists|HandlerErrors|DeviceErrors)$$' ./plugin

.PHONY: format-check
format-check:
	@files=$$(gofmt -l $(go_dirs)); \
	[ -z "$$files" ] || { echo 'not formatted (run make format):' $$files >&2; exit 1; }

.PHONY: vet
vet:
	$(GO) vet ./...

# The handlers in a host of their own: as they are shipped, and once more with sanitizers.
sanitizers := -fsanitize=address,undefined -fno-sanitize-recover=all
c_test := $(build)/handlers/handler_test
asan := $(build)/asan
c_test_asan := $(asan)/handler_test $(asan)/handler_ram.so $(asan)/handler_file.so

.PHONY: test-c
test-c: $(handlers) $(c_test) $(c_test_asan) ## run the tests of our handlers only
	@.ci/c-test $(c_test) lib/tcmu-runner
	@.ci/c-test $(asan)/handler_test $(asan)

$(c_test) $(asan)/handler_test: plugin/handlers/handler_test.c plugin/handlers/test_host.c
	@mkdir -p $(@D)
	$(CC) $(c_flags) $(if $(findstring $(asan),$@),$(sanitizers)) $(LDFLAGS) -rdynamic -o $@ $(filter %.c,$^)

$(asan)/handler_ram.so: $(ram_objects:$(build)/handlers/%.o=plugin/handlers/%.c)
$(asan)/handler_file.so: $(file_objects:$(build)/handlers/%.o=plugin/handlers/%.c)
$(asan)/handler_%.so: plugin/handlers/%.c
	@mkdir -p $(@D)
	$(CC) $(c_flags) $(so_flags) $(sanitizers) $(so_link) -o $@ $(filter %.c,$^)

$(c_test) $(c_test_asan): $(build)/c-flags $(wildcard plugin/handlers/*.h)

.PHONY: soak-deps
soak-deps: # install the Debian packages that the long tests need besides
	@.ci/packages libnbd-bin nbdkit postgresql postgresql-contrib stress-ng

.PHONY: soak
soak: deps soak-deps all ## run the tests again and again for SOAK_MINUTES (60), with those that are too long for make test
	@end=$$(($$(date +%s) + 60 * $${SOAK_MINUTES:-60})); round=0; \
	while [ $$(date +%s) -lt $$end ]; do \
		round=$$((round + 1)); echo "round $$round"; \
		$(go_test) $(logs)/soak.log -race -tags soak -timeout 120m ./...; \
		$(MAKE) --no-print-directory test-c; \
	done

.PHONY: conformance
conformance: all ## test a handler: HANDLER=path.so CFG=/subtype/...; CONFORMANCE_FLAGS='-size 1048576', -help lists them
	@[ -n '$(HANDLER)' ] && [ -n '$(CFG)' ] || \
		{ echo 'usage: make conformance HANDLER=/path/handler_x.so CFG=/x/whatever' >&2; exit 2; }
	TCMUR_BIN='$(CURDIR)/bin' $(GO) test -v -count=1 -timeout 60m -run '^TestConformance$$' ./plugin/conformance \
		-args -handler '$(abspath $(HANDLER))' -config '$(CFG)' $(CONFORMANCE_FLAGS)

.PHONY: mutation
mutation: all ## switch off what recovery consists of, one thing at a time, and see that a test notices
	$(go_test) $(logs)/mutation.log -tags mutation -timeout 30m -run '^TestMutations$$' ./plugin

.PHONY: bench
bench: all ## compare with other ways to have a device in memory; BENCH_FLAGS adds flags, such as -quick
	$(go_bench) -benchmem ./...
	$(GO) run ./cmd/fuse_tcmur/bench $(BENCH_FLAGS)

# ---------------------------------------------------------------------------------------------------------------------
# Lint

golangci := $(tools)/golangci-lint-2.12.2
c_files := $(wildcard cmd/tcmur-host/*.c plugin/handlers/*.c plugin/testdata/*.c)
h_files := $(wildcard cmd/tcmur-host/*.h plugin/handlers/*.h shared/*.h)
# gcc 12 takes a fixed address, as of a handler that crashes for a test, for an array without elements.
lint_c_flags = $(c_flags) -Werror -Wno-array-bounds -Iplugin/handlers -Ishared

# A cache per tree: golangci-lint's own holds the paths of the tree that it was filled from, and where that is gone it
# no longer recognises generated files.
.PHONY: lint
lint: format-check vet lint-cgo lint-c $(golangci) ## check style, mistakes and the direction of imports
	@for script in $(filter-out .ci/allowed-skips,$(wildcard .ci/*)); do bash -n $$script; done
	GOLANGCI_LINT_CACHE='$(CURDIR)/.cache/golangci-lint' $(golangci) run ./...

# C can crash the program it is in, so only hosts have any.
.PHONY: lint-cgo
lint-cgo:
	@cgo=$$($(GO) list -f '{{if .CgoFiles}}{{.ImportPath}}{{end}}' ./... | grep -v '/cmd/tcmur-host$$' || true); \
	[ -z "$$cgo" ] || { echo 'import "C" is for cmd/tcmur-host only, not for' $$cgo >&2; exit 1; }

# Warnings are errors here and not in the build: another compiler's new warning must keep nobody from building.
.PHONY: lint-c
lint-c:
	@.ci/packages --wanted clang-format
	@if command -v clang-format >/dev/null; then clang-format --dry-run -Werror $(c_files) $(h_files); \
	else echo 'no clang-format: the format of C files is not checked'; fi
	@for file in $(c_files); do $(CC) $(lint_c_flags) -c -o /dev/null $$file; done
	@for file in $(h_files); do $(CC) $(lint_c_flags) -x c -fsyntax-only -include $$file /dev/null; done

.PHONY: format
format: ## format all Go and C files
	gofmt -w $(go_dirs)
	clang-format -i $(c_files) $(h_files)

$(golangci):
	GOBIN='$(CURDIR)/$(tools)' $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.12.2
	@mv $(tools)/golangci-lint $@

# ---------------------------------------------------------------------------------------------------------------------
# Generated code

.PHONY: generate generated-check
generate: ## generate the code of the control protocol anew
	@.ci/packages protobuf-compiler
	GO='$(GO)' .ci/generate
generated-check:
	GO='$(GO)' .ci/generate --check

# ---------------------------------------------------------------------------------------------------------------------
# Installation. The front finds the handlers by ../lib from its own folder.

root := $(DESTDIR)$(PREFIX)
pages := $(wildcard docs/man/*)
completion_bash := share/bash-completion/completions/fuse_tcmur
completion_zsh := share/zsh/site-functions/_fuse_tcmur
completion_fish := share/fish/vendor_completions.d/fuse_tcmur.fish
unit := lib/systemd/system/fuse_tcmur.service
page_path = share/man/man$(subst .,,$(suffix $1))/$(notdir $1)
installed := $(programs) $(handlers) $(unit) $(completion_bash) $(completion_zsh) $(completion_fish) \
	$(foreach page,$(pages),$(call page_path,$(page)))
# Those that may not have been there before; with DESTDIR, none was.
installed_dirs := lib/tcmu-runner lib/systemd/system lib/systemd $(patsubst %/,%,$(sort $(dir $(completion_bash) \
	$(completion_zsh) $(completion_fish)))) share/bash-completion share/zsh share/fish
installed_dirs += $(if $(DESTDIR),$(sort $(foreach page,$(pages),$(patsubst %/,%,$(dir $(call page_path,$(page)))))) \
	share/man share bin lib)

.PHONY: install uninstall
install: all ## install to DESTDIR and PREFIX (/usr/local)
	install -d '$(root)/bin' '$(root)/lib/tcmu-runner'
	install $(programs) '$(root)/bin'
	install -m 644 $(handlers) '$(root)/lib/tcmu-runner'
	@for page in $(pages); do install -D -m 644 $$page "$(root)/share/man/man$${page##*.}/$${page##*/}"; done
	@install -d $(patsubst %,'$(root)/%',$(dir $(unit) $(completion_bash) $(completion_zsh) $(completion_fish)))
	sed 's,@BINDIR@,$(PREFIX)/bin,' cmd/fuse_tcmur/systemd/fuse_tcmur.service.in | install -m 644 /dev/stdin '$(root)/$(unit)'
	bin/fuse_tcmur completion bash | install -m 644 /dev/stdin '$(root)/$(completion_bash)'
	bin/fuse_tcmur completion zsh | install -m 644 /dev/stdin '$(root)/$(completion_zsh)'
	bin/fuse_tcmur completion fish | install -m 644 /dev/stdin '$(root)/$(completion_fish)'
uninstall: ## remove what install has installed
	rm -f $(patsubst %,'$(root)/%',$(installed))
	@for dir in $(installed_dirs); do \
		[ ! -d "$(root)/$$dir" ] || rmdir --ignore-fail-on-non-empty "$(root)/$$dir"; done
	@[ -z '$(DESTDIR)' ] || [ ! -d '$(root)' ] || rmdir --ignore-fail-on-non-empty '$(root)'

deb_root := $(build)/deb
.PHONY: deb
deb: all ## make a Debian package, fuse-tcmur.deb
	@rm -rf $(deb_root)
	@umask 022 && $(MAKE) --no-print-directory install DESTDIR='$(CURDIR)/$(deb_root)' PREFIX=/usr >/dev/null
	@umask 022 && .ci/deb $(deb_root) "$$(git describe --tags --always 2>/dev/null || echo 0)" fuse-tcmur.deb
	@rm -rf $(deb_root)

.PHONY: clean
clean: ## remove what has been built (.cache/bin, the tools, stays)
	rm -rf bin lib $(build) $(logs) fuse-tcmur.deb

.PHONY: help
help: ## show this
	@echo 'Targets:'
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r target text; do \
		printf '  %-10s %s\n' "$$target" "$$text"; done
