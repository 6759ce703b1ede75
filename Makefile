# tpshard and tpengine: build, tests and checks. `make help` lists the targets.
#
# New files plug in by their place and name; this file need not change:
#   formats/*.c kernels/*.c kernels/scalar/*.c kernels/cpu/*.c   both programs (suffix _avx2, _avx512, _avx512vbmi, _avx512bf16, _amx: see "Sources")
#   shard/*.c, engine/*.c, engine/serve/*.c                       one program each, with its main in main.c
#   tests/test_*.c, tests/test_*.sh, tests/test_*.py              run by `make test`; other tests/*.c are helpers of all tests
#   tests/fuzz/fuzz_<name>.c with tests/fuzz/corpus/<name>/       replayed by `make test`, explored by `make fuzz`
#   bench/bench_*.c, bench/bench_*.sh                             run by `make bench`
#   kernels/cuda/*.cu                                             the CUDA backend, built when nvcc is there
#   engine/mpi/*.c                                                ranks over MPI, built when Open MPI's headers are there
#
# Variables for the command line: CC, CFLAGS, LDFLAGS (added to the house's own), BUILD (output folder), PREFIX, DESTDIR,
# V=1 (show commands), ONLY (make test: name patterns), WERROR= (let newer compilers warn), SANITIZE.

VERSION = 0.1.0

ifeq ($(origin CC),default)
CC = gcc
endif
BUILD ?= build
PREFIX ?= /usr/local
PKG_CONFIG ?= pkg-config
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
CLANG_FORMAT ?= $(firstword $(notdir $(shell command -v clang-format-14)) clang-format)
CLANG_TIDY ?= $(firstword $(notdir $(shell command -v clang-tidy-14)) clang-tidy)

OPTIMIZE ?= -O3 -g1
WERROR ?= -Werror
SANITIZE ?=
WARNINGS = -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla $(WERROR)
# Sanitizers replace the hardening: fortified calls would hide from them.
ifeq ($(SANITIZE),)
HARDENING = -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -fstack-protector-strong
HARDENING_LD = -Wl,-z,relro,-z,now
else
HARDENING = -DKERNELS_SANITIZED
endif
# What the programs need under clang's AddressSanitizer.
SANITIZER_OBJ := $(if $(findstring address,$(SANITIZE)),$(if $(findstring clang,$(CC)),$(BUILD)/obj/tests/sanitizer/fork.o))

# One call for all libraries: where pkg-config or one of its files is missing, the plain names are used for all of them. libcurl is loaded at
# run time: only its headers are needed here.
LIBRARIES_CFLAGS := $(shell $(PKG_CONFIG) --cflags jansson libpcre2-8 libutf8proc libevent_core libzstd libcrypto libcurl 2>/dev/null)
LIBRARIES := $(shell $(PKG_CONFIG) --libs jansson libpcre2-8 libutf8proc libevent_core libzstd libcrypto 2>/dev/null \
                     || echo -ljansson -lpcre2-8 -lutf8proc -levent_core -lzstd -lcrypto)
TEST_LIBRARIES := $(shell $(PKG_CONFIG) --libs cmocka 2>/dev/null || echo -lcmocka)

# Never -ffast-math, never -march=native: results and files must not depend on the machine that compiled.
HOUSE_CFLAGS = -std=gnu11 -D_GNU_SOURCE -I. -I$(BUILD) $(OPTIMIZE) -ffp-contract=off -fno-math-errno -fPIE \
               $(WARNINGS) $(HARDENING) $(SANITIZE) $(LIBRARIES_CFLAGS)
HOUSE_LDFLAGS = -pie $(HARDENING_LD) $(SANITIZE) -Wl,--as-needed
LDLIBS = $(LIBRARIES) -lpthread -ldl -lm

# ---- Sources -------------------------------------------------------------------------------------------------------

ISA_avx2 = -mavx2 -mfma -mf16c
ISA_avx512 = -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni $(ISA_avx2)
ISA_avx512vbmi = -mavx512vbmi $(ISA_avx512)
# Compilers that lack one of these compile its file to a table that no machine supports.
BF16 = -mavx512bf16 -mavx512vbmi
ISA_avx512bf16 := $(shell $(CC) $(BF16) -E -x c /dev/null >/dev/null 2>&1 && echo $(BF16)) $(ISA_avx512)
AMX = -mamx-tile -mamx-int8 -mamx-bf16
ISA_amx := $(shell $(CC) $(AMX) -E -x c /dev/null >/dev/null 2>&1 && echo $(AMX)) $(ISA_avx512)
ISA_NAMES = avx2 avx512 avx512vbmi avx512bf16 amx
ISA_FILES = $(foreach isa,$(ISA_NAMES),%_$(isa).c)

FORMATS_SRC := $(wildcard formats/*.c)
KERNELS_SRC := $(wildcard kernels/*.c kernels/scalar/*.c kernels/cpu/*.c)
SHARD_SRC := $(filter-out shard/main.c,$(wildcard shard/*.c))
ENGINE_SRC := $(filter-out engine/main.c,$(wildcard engine/*.c engine/serve/*.c))
CUDA_SRC := $(wildcard kernels/cuda/*.cu)
CUDA_HOST_SRC := $(wildcard kernels/cuda/*.c)
TEST_SRC := $(wildcard tests/test_*.c)
IO_SHIM_SRC := $(wildcard tests/io_shim*.c)
TEST_HELPER_SRC := $(filter-out $(TEST_SRC) $(IO_SHIM_SRC),$(wildcard tests/*.c))
EMULATED_TEST_SRC := $(wildcard tests/test_*.cc)
EMULATOR_SRC := $(wildcard tests/emulator/*.cc tests/emulator/*.c)
FUZZ_SRC := $(wildcard tests/fuzz/fuzz_*.c)
BENCH_SRC := $(wildcard bench/bench_*.c)
BENCH_HELPER_SRC := $(filter-out $(BENCH_SRC),$(wildcard bench/*.c))

ifeq ($(filter x86_64%,$(shell $(CC) -dumpmachine 2>/dev/null)),)
FORMATS_SRC := $(filter-out $(ISA_FILES),$(FORMATS_SRC))
KERNELS_SRC := $(filter-out $(ISA_FILES),$(KERNELS_SRC))
TEST_HELPER_SRC := $(filter-out $(ISA_FILES),$(TEST_HELPER_SRC))
endif

objects = $(patsubst %.c,$(BUILD)/obj/%.o,$(1))
LIB_OBJ := $(call objects,$(FORMATS_SRC) $(KERNELS_SRC))
ALL_OBJ := $(LIB_OBJ) $(call objects,$(SHARD_SRC) $(ENGINE_SRC))

# What tests and benchmarks link: all but the mains, each taking from it what it uses.
ALL_LIB := $(BUILD)/obj/all.a

# A program is built as soon as its main exists.
PROGRAMS := $(if $(wildcard shard/main.c),$(BUILD)/tpshard) $(if $(wildcard engine/main.c),$(BUILD)/tpengine)
TEST_PROGRAMS := $(TEST_SRC:%.c=$(BUILD)/%)
EMULATED_TESTS := $(EMULATED_TEST_SRC:%.cc=$(BUILD)/%)
EMULATED_BENCH := $(BUILD)/tests/emulated_gpu_exchange # what a device benchmark checks beside its times
EMULATED_BACKEND := $(BUILD)/tests/libtpengine_cuda_emulated.so
NCCL_STAND_IN := $(BUILD)/tests/libnccl_stand_in.so
IO_SHIM := $(if $(SANITIZE),,$(BUILD)/tests/libio_shim.so) # sanitizers have functions of these names of their own
TEST_SCRIPTS := $(filter-out $(LEAVE_OUT:%=tests/%),$(wildcard tests/test_*.sh tests/test_*.py))
FUZZ_PROGRAMS := $(FUZZ_SRC:tests/fuzz/%.c=$(BUILD)/tests/%)
BENCH_PROGRAMS := $(BENCH_SRC:%.c=$(BUILD)/%)
# Ranks over MPI, where Open MPI is found by its own name. MPI= leaves it out, and sanitizers, which would find what is not ours.
MPI ?= $(shell $(PKG_CONFIG) --exists ompi-c 2>/dev/null && echo ompi-c)
MPI_SRC := $(wildcard engine/mpi/*.c)
MPI_LIBRARY := $(if $(SANITIZE),,$(if $(MPI),$(BUILD)/libtpengine_mpi.so))
CUDA_BACKEND := $(if $(and $(NVCC),$(CUDA_SRC)),$(BUILD)/libtpengine_cuda.so)

ifeq ($(V),)
say = @printf '  %-5s %s\n' "$(1)" "$(2)";
else
say =
endif

.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: FORCE all programs tests host-tests demo test check bench gpu-check install uninstall fuzz check-fresh format clean man help

all: programs ## build the programs, and the CUDA backend where nvcc is there (the default)
programs: $(PROGRAMS) $(CUDA_BACKEND) $(MPI_LIBRARY) $(ALL_OBJ)
tests: host-tests $(EMULATED_TESTS) $(EMULATED_BENCH) $(EMULATED_BACKEND) $(NCCL_STAND_IN)
host-tests: programs $(TEST_PROGRAMS) $(FUZZ_PROGRAMS) $(IO_SHIM)

# ---- Compiling and linking -----------------------------------------------------------------------------------------

# These files change only when their text does, so that nothing is rebuilt without need: a new commit touches what
# includes version.h, another compiler or flag everything, a removed source the archive.
write_if_changed = @mkdir -p $(@D); printf '%b' '$(1)' > $@.new; \
	if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
COMMIT = $(shell git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)

$(BUILD)/version.h: FORCE
	$(call write_if_changed,#define TPSHARD_VERSION "$(VERSION)"\n#define TPSHARD_COMMIT "$(COMMIT)"\n)
$(BUILD)/flags: FORCE
	$(call write_if_changed,$(CC) $(HOUSE_CFLAGS) $(CFLAGS) $(HOUSE_LDFLAGS) $(LDFLAGS) $(LDLIBS)\n)
$(BUILD)/sources: FORCE
	$(call write_if_changed,$(ALL_OBJ)\n)
FORCE:

# By the file's name: its instruction set; and the entry of a fuzz target is declared by the fuzzer.
file_flags = $(foreach isa,$(ISA_NAMES),$(if $(filter %_$(isa).c,$(1)),$(ISA_$(isa)))) \
             $(if $(filter tests/fuzz/%,$(1)),-Wno-missing-prototypes)
$(BUILD)/obj/%.o: %.c $(BUILD)/flags | $(BUILD)/version.h
	$(call say,CC,$<) mkdir -p $(@D) && $(CC) $(HOUSE_CFLAGS) $(call file_flags,$<) $(CFLAGS) -MMD -MP -c -o $@ $<

link = $(call say,LINK,$@) mkdir -p $(@D) && $(CC) $(HOUSE_LDFLAGS) $(1) $(LDFLAGS) -o $@ $(filter %.o %.a,$^) $(2) $(LDLIBS)

$(BUILD)/tpshard: $(BUILD)/obj/shard/main.o $(call objects,$(SHARD_SRC)) $(LIB_OBJ)
	$(call link)
# The CUDA backend is loaded at run time and finds error.c and its like in the program: -rdynamic.
$(BUILD)/tpengine: $(BUILD)/obj/engine/main.o $(call objects,$(ENGINE_SRC)) $(LIB_OBJ) $(SANITIZER_OBJ)
	$(call link,-rdynamic)
$(ALL_LIB): $(ALL_OBJ) $(BUILD)/sources
	$(call say,AR,$@) rm -f $@ && $(AR) rcs $@ $(filter %.o,$^)
# Each test takes the helpers that it uses: one may have functions of its own in place of those that another helper brings in.
TEST_HELPERS := $(BUILD)/obj/tests/helpers.a
$(TEST_HELPERS): $(call objects,$(TEST_HELPER_SRC) $(BENCH_HELPER_SRC)) $(BUILD)/sources
	$(call say,AR,$@) rm -f $@ && $(AR) rcs $@ $(filter %.o,$^)
$(TEST_PROGRAMS): $(BUILD)/%: $(BUILD)/obj/%.o $(TEST_HELPERS) $(ALL_LIB)
	$(call link,-rdynamic,$(TEST_LIBRARIES))
$(BUILD)/tests/libio_shim.so: $(IO_SHIM_SRC) tests/io_shim.h $(BUILD)/flags
	$(call say,LINK,$@) mkdir -p $(@D) && $(CC) $(filter-out -fPIE,$(HOUSE_CFLAGS)) -fPIC $(CFLAGS) -shared -o $@ $(IO_SHIM_SRC) -ldl -lpthread
$(FUZZ_PROGRAMS): $(BUILD)/tests/%: $(BUILD)/obj/tests/fuzz/%.o $(BUILD)/obj/tests/fuzz/replay_main.o $(ALL_LIB)
	$(call link)
$(BENCH_PROGRAMS): $(BUILD)/%: $(BUILD)/obj/%.o $(call objects,$(BENCH_HELPER_SRC)) $(ALL_LIB)
	$(call link,-rdynamic)

# Loaded at run time, when ranks are to talk over MPI. Its headers are the system's: their warnings are not ours.
MPI_CFLAGS = $(filter-out -fPIE,$(HOUSE_CFLAGS)) -fPIC -fvisibility=hidden \
             $(patsubst -I%,-isystem %,$(shell $(PKG_CONFIG) --cflags $(MPI)))
$(BUILD)/obj/engine/mpi/%.o: engine/mpi/%.c $(BUILD)/flags | $(BUILD)/version.h
	$(call say,CC,$<) mkdir -p $(@D) && $(CC) $(MPI_CFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/libtpengine_mpi.so: $(call objects,$(MPI_SRC))
	$(call say,LINK,$@) mkdir -p $(@D) && $(CC) -shared $(SANITIZE) $(LDFLAGS) -o $@ $^ $(shell $(PKG_CONFIG) --libs $(MPI))

# The page is embedded by the assembler, which writes no dependencies.
$(BUILD)/obj/engine/serve/page.o: engine/serve/page.html

-include $(shell find $(BUILD)/obj $(BUILD)/warned -name '*.d' 2>/dev/null)

# ---- CUDA ----------------------------------------------------------------------------------------------------------

# Every architecture of the list that this nvcc knows.
CUDA_ARCHS ?= $(filter 80 86 89 90 120,$(patsubst compute_%,%,$(shell $(NVCC) --list-gpu-arch 2>/dev/null)))
# Instructions that one chip alone has are compiled for it by its own name; such code runs beside that of the plain name.
archs_of = $(if $(filter %/linear_fp4.cu,$(1)),$(or $(patsubst 120,120a,$(filter 120,$(CUDA_ARCHS))),$(lastword $(CUDA_ARCHS))),$(CUDA_ARCHS))
# What the sources ask of __CUDA_ARCH__ is whether it has e4m3 instructions (89). The compiler's front half, its slower one, runs once for two
# architectures where that costs nothing; made for 89, some kernels of 120 spill.
virtual_arch = $(patsubst 86,80,$(patsubst 90,89,$(1)))
NVCC_FLAGS = -std=c++17 -O3 --fmad=false -I. -I$(BUILD) -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra \
             --Werror all-warnings
CUDA_HOME = $(abspath $(dir $(realpath $(NVCC)))/..)
# The host's part sees the toolkit's headers as it sees the system's: their warnings are not ours.
CUDA_HOST_CFLAGS = $(filter-out -fPIE,$(HOUSE_CFLAGS)) -fPIC -fvisibility=hidden -isystem $(CUDA_HOME)/include

$(BUILD)/obj/%.cu.o: %.cu $(BUILD)/flags | $(BUILD)/version.h
	$(call say,NVCC,$<) mkdir -p $(@D) && $(NVCC) $(NVCC_FLAGS) \
	    $(foreach arch,$(call archs_of,$<),-gencode arch=compute_$(call virtual_arch,$(arch)),code=sm_$(arch)) -MMD -MP -c -o $@ $<
$(BUILD)/obj/kernels/cuda/%.o: kernels/cuda/%.c $(BUILD)/flags | $(BUILD)/version.h
	$(call say,CC,$<) mkdir -p $(@D) && $(CC) $(CUDA_HOST_CFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
CUDA_OBJ := $(CUDA_SRC:%=$(BUILD)/obj/%.o) $(CUDA_HOST_SRC:%.c=$(BUILD)/obj/%.o)
# cuBLASLt is not linked: gemm_cublaslt.c loads it when a product needs it. What the backend shares with the program (error.c and its like) is
# the program's.
$(BUILD)/libtpengine_cuda.so: $(CUDA_OBJ)
	$(call say,LINK,$@) $(NVCC) -shared -cudart static -o $@ $^

# ---- The emulated device -------------------------------------------------------------------------------------------

# The same sources without nvcc, for tests. gemm_cublaslt.c alone has another in its place.
EMULATED_FLAGS = -DCUDA_EMULATOR -DSLAB_BYTES=65536ull -Itests/emulator/include
CXX_OF_gcc = g++
CXX_OF_clang = clang++
EMULATED_CXX = $(or $(CXX_OF_$(notdir $(CC))),$(CXX))
comma := ,
# Sanitizers need minutes for what the kernels' pragmas unroll; and their C++ checks want a run-time part that a C program lacks.
EMULATED_OPTIMIZE = $(if $(SANITIZE),-O1 $(if $(findstring clang,$(CC)),-mllvm -pragma-unroll-threshold=64),-O2)
EMULATED_DEBUG = -g1 # lines are all that is needed of what the compiler works longest on
EMULATED_CXXFLAGS = -std=gnu++17 -D_GNU_SOURCE $(EMULATED_FLAGS) -I. -I$(BUILD) $(EMULATED_OPTIMIZE) $(EMULATED_DEBUG) -ffp-contract=off -fno-math-errno \
                    -fPIC -ftls-model=initial-exec -Wall -Wextra -Wno-unknown-pragmas -Wno-pass-failed $(WERROR) $(SANITIZE) \
                    $(if $(SANITIZE),$(if $(findstring clang,$(CC)),-fno-sanitize=function$(comma)vptr))
EMULATED_CFLAGS = $(filter-out -fPIE,$(HOUSE_CFLAGS)) -fPIC $(EMULATED_FLAGS)
emulated = $(patsubst %,$(BUILD)/obj/emulated/%.o,$(1))
EMULATED_OBJ := $(call emulated,$(CUDA_SRC) $(filter-out %/gemm_cublaslt.c,$(CUDA_HOST_SRC)) $(EMULATOR_SRC))

# What every kernel's test runs most of.
$(BUILD)/obj/emulated/tests/emulator/%.o: EMULATED_OPTIMIZE = $(if $(SANITIZE),-O2,-O3)
$(BUILD)/obj/emulated/%.cu.o: %.cu $(BUILD)/flags
	$(call say,CXX,$<) mkdir -p $(@D) && $(EMULATED_CXX) -x c++ $(EMULATED_CXXFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/obj/emulated/%.cc.o: %.cc $(BUILD)/flags
	$(call say,CXX,$<) mkdir -p $(@D) && $(EMULATED_CXX) $(EMULATED_CXXFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/obj/emulated/%.c.o: %.c $(BUILD)/flags | $(BUILD)/version.h
	$(call say,CC,$<) mkdir -p $(@D) && $(CC) $(EMULATED_CFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
EMULATED_LIB := $(BUILD)/obj/emulated/all.a
$(EMULATED_LIB): $(EMULATED_OBJ) $(BUILD)/sources
	$(call say,AR,$@) rm -f $@ && $(AR) rcs $@ $(filter %.o,$^)
$(EMULATED_TESTS): $(BUILD)/%: $(BUILD)/obj/emulated/%.cc.o $(EMULATED_LIB) $(ALL_LIB)
	$(call say,LINK,$@) mkdir -p $(@D) && $(EMULATED_CXX) $(HOUSE_LDFLAGS) -rdynamic $(LDFLAGS) -o $@ $(filter %.o %.a,$^) \
	    $(TEST_LIBRARIES) $(LDLIBS)
$(EMULATED_BENCH): $(call emulated,bench/gpu/gpu_exchange.c bench/gpu/gpu_timing.c) $(EMULATED_LIB) $(ALL_LIB)
	$(call say,LINK,$@) mkdir -p $(@D) && $(EMULATED_CXX) $(HOUSE_LDFLAGS) -rdynamic $(LDFLAGS) -o $@ $(filter %.o %.a,$^) $(LDLIBS)
$(EMULATED_BACKEND): $(EMULATED_OBJ)
	$(call say,LINK,$@) mkdir -p $(@D) && $(EMULATED_CXX) -shared $(SANITIZE) -o $@ $^
# A library in NCCL's place; it finds the emulator in the program that loads it, or in the backend beside it.
$(NCCL_STAND_IN): tests/nccl/stand_in.c tests/nccl/stand_in.h kernels/cuda/nccl_library.h $(BUILD)/flags
	$(call say,LINK,$@) mkdir -p $(@D) && $(CC) $(EMULATED_CFLAGS) -fvisibility=hidden $(CFLAGS) -shared $(SANITIZE) -o $@ $< -ldl -lrt

# ---- On a device ---------------------------------------------------------------------------------------------------

# What `make gpu-check` runs: the kernels' tests, which run in the emulator, on the real thing, and benchmarks. Tests look into device
# memory, so there they get memory that both sides see. test_cuda_backend stays with the emulator: it makes calls fail.
DEVICE_TESTS := $(patsubst %,$(BUILD)/device/test_cuda_%,attention dealt exchange experts fp4 linear link_kernels rows sample shares slab together)
CUDA_LIBRARIES = -L$(CUDA_HOME)/lib64 -lcudart_static -lrt -lstdc++
DEVICE_CXXFLAGS = $(filter-out $(EMULATED_FLAGS),$(EMULATED_CXXFLAGS)) -isystem $(CUDA_HOME)/include

GPU_BENCHES := $(patsubst %,$(BUILD)/bench/gpu_%,exchange kernels nccl)

.PHONY: gpu-programs
gpu-programs: programs $(DEVICE_TESTS) $(GPU_BENCHES) $(BUILD)/bench/synthetic_shards
# Each program takes from it the kernels that it uses.
CUDA_LIB := $(BUILD)/obj/cuda.a
$(CUDA_LIB): $(CUDA_OBJ) $(BUILD)/sources
	$(call say,AR,$@) rm -f $@ && $(AR) rcs $@ $(filter %.o,$^)
$(BUILD)/obj/device/%.cc.o: %.cc $(BUILD)/flags
	$(call say,CXX,$<) mkdir -p $(@D) && $(EMULATED_CXX) $(DEVICE_CXXFLAGS) -include tests/device/device.h -MMD -MP -c -o $@ $<
$(BUILD)/obj/tests/device/%.o: tests/device/%.c $(BUILD)/flags | $(BUILD)/version.h
	$(call say,CC,$<) mkdir -p $(@D) && $(CC) $(CUDA_HOST_CFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
$(DEVICE_TESTS): $(BUILD)/device/%: $(BUILD)/obj/device/tests/%.cc.o $(BUILD)/obj/tests/device/device.o $(CUDA_LIB) $(ALL_LIB)
	$(call say,LINK,$@) mkdir -p $(@D) && $(EMULATED_CXX) $(HOUSE_LDFLAGS) $(LDFLAGS) -o $@ $(filter %.o %.a,$^) \
	    $(TEST_LIBRARIES) $(LDLIBS) $(CUDA_LIBRARIES)
$(BUILD)/obj/bench/gpu/gpu_%.o: bench/gpu/gpu_%.c $(BUILD)/flags | $(BUILD)/version.h
	$(call say,CC,$<) mkdir -p $(@D) && $(CC) $(CUDA_HOST_CFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
$(GPU_BENCHES): $(BUILD)/bench/gpu_%: $(BUILD)/obj/bench/gpu/gpu_%.o $(BUILD)/obj/bench/gpu/gpu_timing.o $(CUDA_LIB) $(ALL_LIB)
	$(call say,LINK,$@) mkdir -p $(@D) && $(CC) $(HOUSE_LDFLAGS) $(LDFLAGS) -o $@ $(filter %.o %.a,$^) $(LDLIBS) $(CUDA_LIBRARIES)
$(BUILD)/bench/synthetic_shards: $(BUILD)/obj/bench/gpu/synthetic_shards.o $(ALL_LIB)
	$(call link)

# The header that both backends share must mean the same to nvcc.
.PHONY: cuda cuda-headers
cuda: $(CUDA_BACKEND)
	@:
cuda-headers:
	@if [ -z "$(NVCC)" ]; then echo 'SKIP: no nvcc here'; \
	elif [ ! -e formats/number_formats.h ]; then echo 'SKIP: no formats/number_formats.h here'; \
	else mkdir -p $(BUILD)/cuda && echo '#include "formats/number_formats.h"' > $(BUILD)/cuda/headers.cu && \
	    $(NVCC) $(NVCC_FLAGS) -arch=sm_90 -c -o $(BUILD)/cuda/headers.o $(BUILD)/cuda/headers.cu && \
	    echo 'nvcc: formats/number_formats.h compiles as CUDA'; fi

gpu-check: ## on a machine with a GPU: build, tests on the device, benchmarks, a JSON report
	@MAKE="$(MAKE)" NVCC="$(NVCC)" scripts/gpu_check

# ---- Static analysis -----------------------------------------------------------------------------------------------

CPPCHECK ?= cppcheck
LINT_SRC = $(FORMATS_SRC) $(KERNELS_SRC) $(wildcard shard/*.c engine/*.c engine/serve/*.c tests/*.c tests/fuzz/*.c bench/*.c)

# One mark per file that the compiler has no warning for. No code is made: what links and runs is compiled elsewhere.
.PHONY: warnings unsanitized tidy cppcheck
unsanitized: $(IO_SHIM) $(MPI_LIBRARY)
# The CUDA backend's host side is read as the emulator sees it; gemm_cublaslt.c needs the toolkit.
EMULATED_LINT_SRC := $(filter-out %/gemm_cublaslt.c,$(CUDA_HOST_SRC))
ALL_LINT_SRC := $(LINT_SRC) $(EMULATED_LINT_SRC)
lint_flags = $(if $(filter engine/mpi/%,$(1)),$(MPI_CFLAGS),$(HOUSE_CFLAGS)) $(if $(filter kernels/cuda/%,$(1)),$(EMULATED_FLAGS)) $(call file_flags,$(1))
warnings: $(patsubst %.c,$(BUILD)/warned/%.ok,$(ALL_LINT_SRC) $(if $(MPI),$(MPI_SRC)))
$(BUILD)/warned/%.ok: %.c $(BUILD)/flags | $(BUILD)/version.h
	$(call say,CC,$<) mkdir -p $(@D) && $(CC) $(call lint_flags,$<) $(CFLAGS) -fsyntax-only -MMD -MP -MT $@ -MF $(@:.ok=.d) $< && touch $@

# Likewise, newer than the mark above: a changed header brings the file back. Sizes of tests and benchmarks are
# small and known: there a product of two ints may widen afterwards.
TIDY_FLAGS = --quiet $(if $(filter tests/% bench/%,$<),--checks=-bugprone-implicit-widening-of-multiplication-result)
tidy: $(ALL_LINT_SRC:%.c=$(BUILD)/tidy/%.ok)
$(BUILD)/tidy/%.ok: %.c $(BUILD)/warned/%.ok .clang-tidy
	$(call say,TIDY,$<) mkdir -p $(@D) && \
	    if $(CLANG_TIDY) $(TIDY_FLAGS) $< -- $(call lint_flags,$<) > $@.log 2>&1; \
	    then mv $@.log $@; else cat $@.log; exit 1; fi

# It is quick to claim log(0), and readdir has been safe for long.
CPPCHECK_QUIET = missingIncludeSystem normalCheckLevelMaxBranches invalidFunctionArg readdirCalled
cppcheck:
	@mkdir -p $(BUILD)/cppcheck
	@$(CPPCHECK) --quiet --error-exitcode=1 --enable=warning,performance,portability --inline-suppr --std=c11 \
	    --library=posix,gnu --cppcheck-build-dir=$(BUILD)/cppcheck -I. -I$(BUILD) -D__x86_64__=1 -D__linux__=1 \
	    $(EMULATED_FLAGS) $(CPPCHECK_QUIET:%=--suppress=%) -j $(shell nproc) $(LINT_SRC) $(EMULATED_LINT_SRC)

# ---- Running -------------------------------------------------------------------------------------------------------

# The CUDA backend takes minutes to compile: a machine that has no GPU sees text before that.
demo: $(PROGRAMS) $(if $(wildcard /dev/nvidia[0-9]*),$(CUDA_BACKEND)) ## shard the bundled model for two ranks and generate text with it
	$(BUILD)/tpshard --force --tp 2 --quant int4 tests/model $(BUILD)/demo
	$(BUILD)/tpengine generate $(BUILD)/demo --prompt "$(PROMPT)" --max-tokens 90 --temperature 0.7 --top-p 0.9 --seed 5
PROMPT = And the LORD said unto Moses,

test: tests ## run every test that this machine can run (ONLY='test_json*' selects)
	@BUILD="$(BUILD)" tests/run_tests $(if $(ONLY),--only '$(ONLY)') $(filter-out $(LEAVE_OUT:%=$(BUILD)/tests/%),$(TEST_PROGRAMS) $(EMULATED_TESTS)) \
	    $(FUZZ_PROGRAMS) $(TEST_SCRIPTS)

# What ThreadSanitizer runs.
.PHONY: test-threads benchmarks
THREAD_TESTS := $(foreach test,$(TEST_PROGRAMS),$(if $(strip $(foreach word,thread comm api http loader store decoder_load sequence,$(findstring $(word),$(test)))),$(test)))
test-threads: $(THREAD_TESTS) $(BUILD)/tpshard
	@BUILD="$(BUILD)" tests/run_tests --if-any $(THREAD_TESTS)
benchmarks: programs $(BENCH_PROGRAMS) $(BUILD)/bench/synthetic_shards

check: ## formatting, include direction, static analysis, clang, sanitizers
	@MAKE="$(MAKE)" scripts/check

check-fresh: ## the README's two commands in a bare Debian root (needs root and debootstrap)
	@scripts/check_fresh

bench: benchmarks ## run the benchmarks, one result line per run
	@set -e; for program in $(BENCH_PROGRAMS) $(wildcard bench/bench_*.sh); do BUILD="$(BUILD)" $$program; done

.PHONY: bench-rivals
bench-rivals: programs $(BUILD)/bench/bench_bandwidth $(BUILD)/bench/bench_peak ## beside llama.cpp and others, installed with pip (ARGS='--help' tells more)
	@BUILD="$(BUILD)" python3 bench/bench_rivals.py $(ARGS)

SECONDS ?= 60
fuzz: ## explore one fuzz target: make fuzz NAME=json SECONDS=60 (needs clang)
	@test -e "tests/fuzz/fuzz_$(NAME).c" || { echo 'usage: make fuzz NAME=<name> SECONDS=60, where NAME is one of:' \
	    $(FUZZ_SRC:tests/fuzz/fuzz_%.c=%) >&2; exit 2; }
	@$(MAKE) CC=clang BUILD=build/libfuzzer OPTIMIZE='-O1 -g' \
	    SANITIZE='-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all' build/libfuzzer/explore_$(NAME)
	@mkdir -p build/libfuzzer/corpus/$(NAME) tests/fuzz/corpus/$(NAME)
	build/libfuzzer/explore_$(NAME) -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=2048 \
	    -artifact_prefix=build/libfuzzer/$(NAME)- build/libfuzzer/corpus/$(NAME) tests/fuzz/corpus/$(NAME)
$(BUILD)/explore_%: $(BUILD)/obj/tests/fuzz/fuzz_%.o $(ALL_LIB)
	$(call link,-fsanitize=fuzzer)

format: ## apply clang-format to every source
	$(CLANG_FORMAT) -i $$(find $(wildcard formats kernels shard engine tests bench) -regex '.*\.\(c\|h\|cc\|cu\|cuh\)')

# ---- Installing ----------------------------------------------------------------------------------------------------

# Man pages and completions come from the programs' own option tables.
PROGRAM_NAMES := $(notdir $(PROGRAMS))
MAN_PAGES := $(PROGRAM_NAMES:%=$(BUILD)/man/%.1)
COMPLETIONS := $(PROGRAM_NAMES:%=$(BUILD)/completions/%)
man: $(MAN_PAGES) $(COMPLETIONS) ## man pages and bash completions into build/man and build/completions
$(BUILD)/man/%.1: $(BUILD)/%
	$(call say,MAN,$@) mkdir -p $(@D) && $< --help-man > $@
$(BUILD)/completions/%: $(BUILD)/%
	$(call say,COMPL,$@) mkdir -p $(@D) && $< --help-completion-bash > $@

bindir = $(DESTDIR)$(PREFIX)/bin
libdir = $(DESTDIR)$(PREFIX)/lib
mandir = $(DESTDIR)$(PREFIX)/share/man/man1
completiondir = $(DESTDIR)$(PREFIX)/share/bash-completion/completions
install: all man ## install programs, man pages and completions under PREFIX
	install -d $(bindir) $(mandir) $(completiondir) $(if $(CUDA_BACKEND)$(MPI_LIBRARY),$(libdir))
	install -m 755 $(PROGRAMS) $(bindir)
	install -m 644 $(MAN_PAGES) $(mandir)
	install -m 644 $(COMPLETIONS) $(completiondir)
	$(if $(CUDA_BACKEND)$(MPI_LIBRARY),install -m 755 $(CUDA_BACKEND) $(MPI_LIBRARY) $(libdir))
uninstall: ## remove what install put under PREFIX
	rm -f $(PROGRAM_NAMES:%=$(bindir)/%) $(PROGRAM_NAMES:%=$(mandir)/%.1) $(PROGRAM_NAMES:%=$(completiondir)/%) \
	    $(libdir)/libtpengine_cuda.so $(libdir)/libtpengine_mpi.so

clean: ## remove everything that was built
	rm -rf $(BUILD)

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | sort | \
	    awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'
