// cuda_on_cpu.h: enough of CUDA, on the CPU, to compile kernels.cu with a C++ compiler and run it without a GPU.
//
//     #include "cuda_on_cpu.h"
//     #include "../kernels.cu"          // g++ or clang++, -std=c++17
//
// A block's threads are fibres on one CPU thread. A fibre runs until it waits (at a barrier, or for the other lanes of its
// warp); then another runs: from barrier to barrier either one taken AT RANDOM each time, so that all advance together in
// disorder, or the one that became able to run last, so that one warp runs as far ahead of the rest as barriers let it.
// So a forgotten barrier shows as a wrong number. What else is caught, each ending the program with one line:
// - a barrier that part of a block does not reach; a warp operation that part of a warp does not reach, or another one;
// - reads and writes past an allocation or past a block's dynamic shared memory: the end of each touches a page that may not
//   be read (under AddressSanitizer it is the sanitizer that finds them, static shared arrays too);
// - a 16-byte load, cp.async or ldmatrix from an address that is no multiple of 16;
// - a cp.async that was not waited for: it happens either at once or when it is waited for, again at random;
// - memory that was never written: allocations and shared memory begin as NaN.
// - a host that reads or writes device memory, a kernel that is given the host's, a copy in the wrong direction, and memory that
//   was freed: between launches and copies the device's pages are taken away, and arguments are looked at, a replayed graph's too;
// - results read before the stream was waited for, and pinned memory written again too early: what is submitted happens either at
//   once or when somebody waits, at random;
// - a grid, a block or an argument list that is too large; more than 48 KiB of shared memory that were not asked for;
// - while a graph is recorded: a copy from or to the host, waiting, freeing.
// CUDA_ON_CPU_REPORT=1 in the environment has the program end with how much was launched.
// Not here: anything about speed; clusters, textures, several streams; two blocks at the same time. Floating point is the CPU's:
// exp and friends differ in the last bits from a GPU's. An mma adds up as an A100's tensor cores do: see emu_mma.

#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H
#undef _FORTIFY_SOURCE          // its longjmp refuses to leave one stack for another
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <functional>
#include <map>
#include <type_traits>
#include <vector>
#if defined __SANITIZE_ADDRESS__
#define EMU_ASAN 1
#elif defined __has_feature
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ----------------------------------------------------------------------------
// the words of the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static          // one block runs at a time, so one copy is enough
#define __align__(n) alignas(n)
#define UNROLL
#define UNROLL_BY(n)

struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static inline float2 make_float2(float x, float y) { return { x, y }; }
static inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return { x, y, z, w }; }
static dim3 threadIdx, blockIdx, blockDim, gridDim;

// ----------------------------------------------------------------------------
// fibres

namespace emu {
enum { MAX_THREADS = 1024, STACK = 128 * 1024 };

struct Fibre { jmp_buf at; ucontext_t first; char *stack; bool entered; };
static Fibre fibre[MAX_THREADS];
static ucontext_t boot_context;
static jmp_buf launcher;                  // where the program goes on when a block has ended
static uint64_t seed = 1;
static const char *kernel_name = "none";
static void (*body)(void *);              // one thread of the kernel that runs now
static void *body_arg;
static int n_threads, n_done, current, ready[MAX_THREADS], n_ready;
static bool run_ahead;                    // which of the two orders
static int n_launches, n_graph_launches;
static struct Report {
    ~Report() { if (getenv("CUDA_ON_CPU_REPORT")) fprintf(stderr, "cuda_on_cpu: %d kernels, %d graphs were launched\n", n_launches, n_graph_launches); }
} report;

[[noreturn]] static void fail(const char *what) {
    fflush(stdout);
    fprintf(stderr, "cuda_on_cpu: %s: block (%u,%u,%u), thread %d: %s\n", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, current, what);
    abort();
}

static inline uint64_t random() { seed ^= seed >> 12; seed ^= seed << 25; seed ^= seed >> 27; return seed * 2685821657736338717ull >> 16; }

#ifdef EMU_ASAN
static const void *main_stack;
static size_t main_stack_size;
static void leaving(const void *stack, size_t size) { __sanitizer_start_switch_fiber(nullptr, stack, size); }
static void arrived(bool from_launcher) {
    const void *s; size_t n;
    __sanitizer_finish_switch_fiber(nullptr, &s, &n);
    if (from_launcher) { main_stack = s; main_stack_size = n; }
}
#else
enum { main_stack_size = 0 };
static const void *const main_stack = nullptr;
static void leaving(const void *, size_t) {}
static void arrived(bool) {}
#endif
static bool first_switch;                 // out of the launcher: the sanitizer tells us its stack there

static void back_to_launcher() { leaving(main_stack, main_stack_size); _longjmp(launcher, 1); }

// Runs another fibre, whichever; does not return here.
[[noreturn]] static void next() {
    if (!n_ready) {
        if (n_done == n_threads) { back_to_launcher(); }
        fail("waits for threads that never come (a barrier or warp operation that not all of them reach)");
    }
    int i = run_ahead ? n_ready - 1 : (int)(random() % n_ready);
    current = ready[i];
    ready[i] = ready[--n_ready];
    Fibre *f = &fibre[current];
    leaving(f->stack, STACK);
    if (f->entered) _longjmp(f->at, 1);
    f->entered = true;
    setcontext(&f->first);
    abort();
}

// All threads may run, in an order of its own from here to the next barrier.
static void release_all() {
    uint64_t r = random();
    run_ahead = r & 1;
    n_ready = n_threads;
    for (int i = 0, first = (int)((r >> 8) % n_threads); i < n_threads; i++) ready[i] = (first + (r & 2 ? i : n_threads - i)) % n_threads;
}

static void place_thread(int i) {
    threadIdx.x = i % blockDim.x;
    threadIdx.y = i / blockDim.x % blockDim.y;
    threadIdx.z = i / (blockDim.x * blockDim.y);
}

// Waits until somebody puts this fibre on the ready list.
static void park() {
    int me = current;
    if (!_setjmp(fibre[me].at)) next();
    arrived(first_switch);
    first_switch = false;
    current = me;
    place_thread(me);
}

static void fibre_main() {
    arrived(first_switch);
    first_switch = false;
    for (;;) {                            // a fibre serves block after block
        place_thread(current);
        body(body_arg);
        n_done++;
        park();
    }
}

static void make_fibre(int i) {
    Fibre *f = &fibre[i];
    if (f->stack) return;
    f->stack = (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (f->stack == MAP_FAILED) { perror("mmap"); abort(); }
    getcontext(&f->first);
    f->first.uc_stack.ss_sp = f->stack;
    f->first.uc_stack.ss_size = STACK;
    f->first.uc_link = &boot_context;
    makecontext(&f->first, fibre_main, 0);
}

// ----------------------------------------------------------------------------
// memory whose end may not be crossed

static auto &mapped = *new std::map<void *, std::pair<void *, size_t>>;     // pointer: its mapping; bytes asked for

static void *guarded(size_t n) {
    if (!n) n = 1;
#ifdef EMU_ASAN
    void *p = nullptr;
    if (posix_memalign(&p, 256, n)) return nullptr;
    mapped[p] = { nullptr, n };
#else
    size_t page = 4096, pages = (n + page - 1) / page * page;
    char *m = (char *)mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED) return nullptr;
    mprotect(m + pages, page, PROT_NONE);
    char *p = m + pages - (n + 63) / 64 * 64;                   // at most 63 bytes before the guard page
    memset(p + n, 0xA5, m + pages - p - n);
    mapped[p] = { m, n };
#endif
    memset(p, 0xFF, n);
    return p;
}

static void unguard(void *p) {
    if (!p) return;
    auto it = mapped.find(p);
    if (it == mapped.end()) fail("free of a pointer that was not allocated");
#ifdef EMU_ASAN
    free(p);
#else
    size_t n = it->second.second, page = 4096, pages = (n + page - 1) / page * page;
    for (unsigned char *c = (unsigned char *)p + n, *end = (unsigned char *)it->second.first + pages; c < end; c++)
        if (*c != 0xA5) fail("something wrote past the end of an allocation");
    munmap(it->second.first, pages + page);
#endif
    mapped.erase(it);
}

// ----------------------------------------------------------------------------
// launches

static char *dynamic_shared;              // of the block that runs
struct Copy { char *dst; const char *src; int valid, group; };
static std::vector<Copy> copies[MAX_THREADS];   // cp.async on its way
static int copy_group[MAX_THREADS];
static int at_barrier, barrier_sum, barrier_result;
struct Warp { const char *op; int arrived; alignas(16) unsigned char in[32][48], out[32][32]; };
static Warp warp[MAX_THREADS / 32];

template <class F> static void run_grid(const char *name, dim3 grid, dim3 block, size_t shared, F &thread) {
    kernel_name = name;
    n_launches++;
    gridDim = grid;
    blockDim = block;
    n_threads = block.x * block.y * block.z;
    if (n_threads < 1 || n_threads > MAX_THREADS || n_threads % 32) fail("a block of this size is not for us (whole warps, at most 1024 threads)");
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) fail("a grid of this size is not possible");
    for (int i = 0; i < n_threads; i++) make_fibre(i);
    static void *memory; static size_t memory_bytes;            // dynamic shared memory, exactly as large as asked
    if (shared != memory_bytes) { unguard(memory); memory = shared ? guarded(shared) : nullptr; memory_bytes = shared; }
    dynamic_shared = (char *)memory;
    body = [](void *p) { (*(F *)p)(); };
    body_arg = &thread;
    size_t n_blocks = (size_t)grid.x * grid.y * grid.z, first = random() % n_blocks;
    for (size_t b = 0; b < n_blocks; b++) {
        size_t i = (first + b) % n_blocks;
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        if (shared) memset(dynamic_shared, 0xFF, shared);
        n_done = at_barrier = barrier_sum = 0;
        for (int w = 0; w < n_threads / 32; w++) warp[w].arrived = 0;
        release_all();
        for (int t = 0; t < n_threads; t++) { copies[t].clear(); copy_group[t] = 0; }
        first_switch = true;
        if (!_setjmp(launcher)) next();
        arrived(false);
        for (int t = 0; t < n_threads; t++) if (!copies[t].empty()) { current = t; fail("ended with a cp.async that nobody waited for"); }
    }
    kernel_name = "none";
}

static int barrier(int value) {
    barrier_sum += value;
    if (++at_barrier < n_threads) { park(); return barrier_result; }
    barrier_result = barrier_sum;
    at_barrier = barrier_sum = 0;
    release_all();                                               // the last to come need not be the first to go
    park();
    return barrier_result;
}

// All lanes bring `in`; the last one to come computes everybody's `out`. One switch a lane.
template <class In, class Out, class F> static Out together(const char *op, const In &in, F compute) {
    static_assert(sizeof(In) <= sizeof warp[0].in[0] && sizeof(Out) <= sizeof warp[0].out[0], "");
    int w = current / 32, lane = current % 32;
    Warp *a = &warp[w];
    if (a->arrived && strcmp(a->op, op)) fail("lanes of one warp are at different warp operations");
    a->op = op;
    memcpy(a->in[lane], &in, sizeof in);
    if (++a->arrived == 32) {
        In ins[32]; Out outs[32] = {};
        for (int i = 0; i < 32; i++) memcpy(&ins[i], a->in[i], sizeof(In));
        compute(ins, outs);
        for (int i = 0; i < 32; i++) memcpy(a->out[i], &outs[i], sizeof(Out));
        a->arrived = 0;
        for (int i = 0; i < 32; i++) if (i != lane) ready[n_ready++] = 32 * w + i;
    } else park();
    Out out;
    memcpy(&out, a->out[lane], sizeof out);
    return out;
}

static void aligned(const void *p, int n, const char *what) { if ((uintptr_t)p % n) fail(what); }

// 16-bit floats, in plain integer arithmetic and a table
static float f16_value(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    float v = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24);
    return h & 0x8000 ? -v : v;
}
static const float *f16_table() {
    static float *t;
    if (!t) { t = (float *)malloc(65536 * sizeof *t); for (int i = 0; i < 65536; i++) t[i] = f16_value((uint16_t)i); }
    return t;
}
static uint16_t f16_round(float f) {     // to nearest, ties to even
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);       // rounds to 65536 or more
    if (a < 0x38800000) {                                        // below 2^-14: a multiple of 2^-24
        float v; memcpy(&v, &a, 4);
        return (uint16_t)(sign | (uint32_t)nearbyintf(v * 16777216.0f));
    }
    return (uint16_t)(sign | ((a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13));
}
static float bf16_value(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
static uint16_t bf16_round(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
}  // namespace emu

// ----------------------------------------------------------------------------
// barriers, warp operations, atomics

static inline void __syncthreads() { emu::barrier(0); }
static inline int __syncthreads_count(int p) { return emu::barrier(p != 0); }
static inline int __syncthreads_or(int p) { return emu::barrier(p != 0) > 0; }
static inline int __syncthreads_and(int p) { return emu::barrier(p != 0) == emu::n_threads; }
static inline void __threadfence() {}
template <class T> static T emu_shuffle(unsigned mask, const char *op, T v, int (*from)(int lane, int arg), int arg) {
    if (mask != 0xffffffffu) emu::fail("a warp operation of part of a warp");
    return emu::together<T, T>(op, v, [=](const T *in, T *out) { for (int i = 0; i < 32; i++) out[i] = in[from(i, arg)]; });
}
template <class T> static T __shfl_xor_sync(unsigned mask, T v, int x) { return emu_shuffle(mask, "shfl_xor", v, [](int l, int x) { return l ^ x; }, x); }
template <class T> static T __shfl_sync(unsigned mask, T v, int x) { return emu_shuffle(mask, "shfl", v, [](int, int x) { return x & 31; }, x); }
template <class T> static T __shfl_up_sync(unsigned mask, T v, int x) { return emu_shuffle(mask, "shfl_up", v, [](int l, int x) { return l < x ? l : l - x; }, x); }
static inline unsigned __ballot_sync(unsigned mask, int p) {
    if (mask != 0xffffffffu) emu::fail("a vote of part of a warp");
    return emu::together<int, unsigned>("ballot", p, [](const int *in, unsigned *out) {
        unsigned b = 0;
        for (int i = 0; i < 32; i++) b |= (unsigned)(in[i] != 0) << i;
        for (int i = 0; i < 32; i++) out[i] = b;
    });
}
static inline void __syncwarp() { emu::together<int, int>("syncwarp", 0, [](const int *, int *) {}); }
template <class T> static T atomicAdd(T *p, T v) { T old = *p; *p = old + v; return old; }
static inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
template <class T> static T min(T a, T b) { return b < a ? b : a; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }

// ----------------------------------------------------------------------------
// kernels.cu's PTX wrappers in plain meaning

static inline uint4 load16(const void *p) { emu::aligned(p, 16, "a 16-byte load from an address that is no multiple of 16"); return *(const uint4 *)p; }
static inline void store16(void *p, uint4 v) { emu::aligned(p, 16, "a 16-byte store to an address that is no multiple of 16"); *(uint4 *)p = v; }
static inline uint4 load16_once(const void *p) { return load16(p); }
static inline float f16_to_float(uint16_t h) { static const float *t = emu::f16_table(); return t[h]; }
static inline float bf16_to_float(uint16_t h) { return emu::bf16_value(h); }
static inline uint16_t float_to_f16(float f) { return emu::f16_round(f); }
static inline uint16_t float_to_bf16(float f) { return emu::bf16_round(f); }
static inline float exp2_fast(float x) { return exp2f(x); }

// 16 bytes from global to shared memory, the last 16 - valid of them as zero.
static inline void cp_async16(void *dst, const void *src, int valid) {
    emu::aligned(dst, 16, "cp.async to an address that is no multiple of 16");
    emu::aligned(src, 16, "cp.async from an address that is no multiple of 16");
    if (valid < 0 || valid > 16) emu::fail("cp.async of fewer than 0 or more than 16 bytes");
    emu::Copy c = { (char *)dst, (const char *)src, valid, emu::copy_group[emu::current] };
    if (emu::random() % 2) { memset(c.dst, 0, 16); memcpy(c.dst, c.src, c.valid); }
    else emu::copies[emu::current].push_back(c);
}
static inline void cp_async_commit() { emu::copy_group[emu::current]++; }
template <int N> static void cp_async_wait() {       // until at most the last N groups of this thread are on their way
    std::vector<emu::Copy> &q = emu::copies[emu::current], later;
    for (emu::Copy &c : q)
        if (c.group < emu::copy_group[emu::current] - N) { memset(c.dst, 0, 16); memcpy(c.dst, c.src, c.valid); }
        else later.push_back(c);
    q.swap(later);
}

struct EmuRegs { uint32_t r[4]; };
template <bool TRANS> static void emu_ldmatrix(uint32_t r[4], const void *row) {
    emu::aligned(row, 16, "ldmatrix from an address that is no multiple of 16");
    EmuRegs got = emu::together<const void *, EmuRegs>(TRANS ? "ldmatrix.trans" : "ldmatrix", row, [](const void *const *rows, EmuRegs *out) {
        for (int lane = 0; lane < 32; lane++)
            for (int m = 0; m < 4; m++) {            // matrix m: 8 rows of 8 halves, their addresses from lanes 8m … 8m+7
                int i = lane / 4, j = lane % 4 * 2;
                uint16_t lo = TRANS ? ((const uint16_t *)rows[8 * m + j])[i] : ((const uint16_t *)rows[8 * m + i])[j];
                uint16_t hi = TRANS ? ((const uint16_t *)rows[8 * m + j + 1])[i] : ((const uint16_t *)rows[8 * m + i])[j + 1];
                out[lane].r[m] = lo | (uint32_t)hi << 16;
            }
    });
    memcpy(r, got.r, 16);
}
static inline void ldmatrix(uint32_t r[4], const void *row) { emu_ldmatrix<false>(r, row); }
static inline void ldmatrix_trans(uint32_t r[4], const void *row) { emu_ldmatrix<true>(r, row); }

// c (16, 8) += a (16, 16) b (8, 16)^T, spread over a warp's registers as the PTX manual has it. 8 products and c are brought to
// the largest exponent among them, keep one bit more than a float has, are added, and the sum is cut off towards zero; then the
// next 8: an A100 (Fasi et al. 2021, doi 10.7717/peerj-cs.330). An H100 takes all 16 at once and keeps two bits more, which loses less.
struct EmuMma { uint32_t a[4], b[2]; float c[4]; };
struct EmuAcc { float c[4]; };
static inline double emu_power(int biased) { uint64_t u = (uint64_t)biased << 52; double d; memcpy(&d, &u, 8); return d; }
static inline float emu_sum(const float *a, const float *b, float c) {           // c + a[0] b[0] + … + a[7] b[7 * 8]
    double x[9], most = fabs(c), sum = 0;
    x[8] = c;
    for (int k = 0; k < 8; k++) { x[k] = (double)a[k] * b[8 * k]; most = fabs(x[k]) > most ? fabs(x[k]) : most; sum += x[k]; }
    if (most == 0 || !(most + fabs(sum) < INFINITY)) return (float)(sum + c);
    uint64_t u;
    memcpy(&u, &most, 8);
    int last = (int)(u >> 52) - 24;                          // the exponent of the last bit that is kept
    double unit = emu_power(last), per_unit = emu_power(2046 - last);
    sum = 0;
    for (int k = 0; k < 9; k++) sum += (double)(int)(x[k] * per_unit);
    sum *= unit;
    float f = (float)sum;
    return fabs((double)f) > fabs(sum) ? nextafterf(f, 0) : f;
}
template <class Convert> static void emu_mma(float c[4], const uint32_t a[4], const uint32_t b[2], const char *op, Convert value) {
    EmuMma in = { { a[0], a[1], a[2], a[3] }, { b[0], b[1] }, { c[0], c[1], c[2], c[3] } };
    EmuAcc got = emu::together<EmuMma, EmuAcc>(op, in, [=](const EmuMma *in, EmuAcc *out) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; r++)
                for (int h = 0; h < 2; h++) A[g + r % 2 * 8][t * 2 + h + r / 2 * 8] = value((uint16_t)(in[lane].a[r] >> 16 * h));
            for (int r = 0; r < 2; r++)
                for (int h = 0; h < 2; h++) B[t * 2 + h + r * 8][g] = value((uint16_t)(in[lane].b[r] >> 16 * h));
        }
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 8; n++) {
                float first = emu_sum(&A[m][0], &B[0][n], in[m % 8 * 4 + n / 2].c[m / 8 * 2 + n % 2]);
                out[m % 8 * 4 + n / 2].c[m / 8 * 2 + n % 2] = emu_sum(&A[m][8], &B[8][n], first);
            }
    });
    memcpy(c, got.c, 16);
}
static inline void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) { emu_mma(c, a, b, "mma.f16", f16_to_float); }
static inline void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) { emu_mma(c, a, b, "mma.bf16", bf16_to_float); }

// ----------------------------------------------------------------------------
// the runtime: one device, one stream; a recorded graph is a list of what to run

typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorNoKernelImageForDevice = 209, cudaErrorStreamCaptureUnsupported = 900 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaStreamNonBlocking = 1, cudaStreamCaptureModeThreadLocal = 1, cudaStreamCaptureModeRelaxed = 2, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct EmuStream *cudaStream_t;
typedef std::vector<std::function<void()>> EmuGraph;
typedef EmuGraph *cudaGraph_t, *cudaGraphExec_t;
struct cudaDeviceProp { char name[256]; int major, minor, multiProcessorCount; size_t totalGlobalMem; };

namespace emu {
static size_t free_bytes = (size_t)1 << 40, used_bytes;          // a test may lower the first
static int n_devices = 1, capability = 80;
static bool no_code;                                             // as if the program had been built for another device
static EmuGraph *recording;
static EmuGraph &under_way = *new EmuGraph;                      // submitted and not done yet
static auto &allowed = *new std::map<const void *, size_t>;      // kernel: dynamic shared memory that was asked for
static auto &pinned = *new std::map<const char *, size_t>;       // host memory that the device reads by itself
static void finish_all() {
    EmuGraph now;
    now.swap(under_way);
    for (auto &f : now) f();
}
template <class F> static void submit(F f) {
    if (recording) { recording->push_back(f); return; }
    under_way.push_back(f);
    if (random() % 2) finish_all();
}
static bool is_pinned(const void *p) {
    auto it = pinned.upper_bound((const char *)p);
    return it != pinned.begin() && (--it, (const char *)p < it->first + it->second);
}

// The host may not look at device memory, nor a kernel at the host's: outside of launches and copies the pages of every allocation are
// taken away (under AddressSanitizer: poisoned), and what a launch or a copy is given must lie where it should.
static auto &device = *new std::map<char *, size_t>;             // what cudaMalloc gave, and its bytes
static const char *last_kernel = "nothing";

static bool on_device(const void *p, size_t n) {
    auto it = device.upper_bound((char *)p);
    return it != device.begin() && (--it, (char *)p + n <= it->first + it->second);
}

static void give(char *p, size_t n, bool to_device) {
#ifdef EMU_ASAN
    if (to_device) __asan_unpoison_memory_region(p, n); else __asan_poison_memory_region(p, n);
#else
    char *begin = (char *)mapped[p].first;
    if (mprotect(begin, p + n - begin, to_device ? PROT_READ | PROT_WRITE : PROT_NONE)) { perror("mprotect"); abort(); }
#endif
}
struct OnDevice {                         // while it lives the device works
    OnDevice() { for (auto &d : device) give(d.first, d.second, true); }
    ~OnDevice() { for (auto &d : device) give(d.first, d.second, false); }
};

[[maybe_unused]] static void on_segv(int, siginfo_t *info, void *) {
    signal(SIGSEGV, SIG_DFL);             // the second time it is fatal
    if (on_device(info->si_addr, 1) && !strcmp(kernel_name, "none")) {
        fprintf(stderr, "cuda_on_cpu: the host reads or writes device memory; the last kernel was %s\n", last_kernel);
        abort();
    }
    fprintf(stderr, "cuda_on_cpu: %s: no such memory: %p\n", kernel_name, info->si_addr);
}

// Does a number look like an address of the host's memory? For structs with pointers among the arguments of a kernel. Two ints, or an
// int and padding with whatever was there before, can look so too, but a small int in the lower half hardly stands for an address.
static bool on_host(uint64_t word) {
    unsigned char there;
    if (word < 0x500000000000 || word >> 47 || (uint32_t)word < 1 << 20) return false;
    return !mincore((void *)(word & ~4095ull), 1, &there) && !on_device((void *)word, 0);
}
template <class A> static void check_argument(int i, const A &a) {
    char text[80];
    snprintf(text, sizeof text, "argument %d has a pointer that is none into device memory", i);
    if constexpr (std::is_pointer_v<A>) {
        if (a && !on_device(a, 0)) fail(text);
    } else if constexpr (sizeof a % 8 == 0 && sizeof a <= 256) {
        A copy = a;
#if defined __has_builtin
#if __has_builtin(__builtin_clear_padding)
        __builtin_clear_padding(&copy);   // what the stack held there before may look like anything
#endif
#endif
        uint64_t words[sizeof a / 8];
        memcpy(words, &copy, sizeof a);
        for (uint64_t w : words) if (on_host(w)) fail(text);
    }
}

template <class... P, class... A> static void launch(const char *name, dim3 grid, dim3 block, size_t shared, void (*kernel)(P...), A... args) {
    static_assert((sizeof(P) + ... + 0) <= 4096, "more arguments than a launch can take");
    auto asked = allowed.find((const void *)kernel);
    kernel_name = name;
    if (shared > 48 * 1024 && (asked == allowed.end() || shared > asked->second)) fail("more shared memory than cudaFuncSetAttribute has asked for");
    kernel_name = "none";
    submit([=] {                                                 // arguments are copied now, as a launch does
        int i = 0;
        kernel_name = last_kernel = name;
        (check_argument(i++, (P)args), ...);
        OnDevice now;
        auto thread = [=] { kernel(args...); };
        run_grid(name, grid, block, shared, thread);
    });
}
}
#define LAUNCH(kernel, grid, block, shared, ...) emu::launch(#kernel, grid, block, shared, kernel, __VA_ARGS__)
#define DYNAMIC_SHARED(name) char *name = emu::dynamic_shared

static inline cudaError_t cudaGetDeviceCount(int *n) { *n = emu::n_devices; return 0; }
static inline cudaError_t cudaSetDevice(int n) { return n ? cudaErrorInvalidValue : cudaSuccess; }
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "this CPU");
    p->major = emu::capability / 10; p->minor = emu::capability % 10; p->multiProcessorCount = 2; p->totalGlobalMem = emu::free_bytes;
    return 0;
}
static inline const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : e ? "error" : "no error"; }
static inline cudaError_t cudaGetLastError() { return 0; }
static inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *free = emu::free_bytes - emu::used_bytes; *total = emu::free_bytes; return 0; }
template <class T> static cudaError_t cudaMalloc(T **p, size_t n) {
    if (n > emu::free_bytes - emu::used_bytes) return cudaErrorMemoryAllocation;
#ifndef EMU_ASAN
    if (emu::device.empty()) {
        struct sigaction action = {};
        action.sa_sigaction = emu::on_segv;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGSEGV, &action, nullptr);
    }
#endif
    *p = (T *)emu::guarded(n);
    if (!*p) return cudaErrorMemoryAllocation;
    emu::used_bytes += n;
    emu::device[(char *)*p] = n ? n : 1;
    emu::give((char *)*p, emu::device[(char *)*p], false);
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {                    // waits for the device first
    if (!emu::recording) emu::finish_all();
    if (!p) return 0;
    if (!emu::device.count((char *)p)) emu::fail("cudaFree of a pointer that cudaMalloc did not give");
    if (emu::recording) emu::fail("cudaFree while a graph is recorded");
    emu::used_bytes -= emu::mapped[p].second;
    emu::give((char *)p, emu::device[(char *)p], true);
    emu::device.erase((char *)p);
    emu::unguard(p);
    return 0;
}
enum { cudaHostAllocDefault = 0 };
static inline cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) {
    *p = malloc(n);
    if (*p) emu::pinned[(const char *)*p] = n;
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
static inline cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind kind, cudaStream_t) {
    if (emu::on_device(d, n) != (kind != cudaMemcpyDeviceToHost)) emu::fail("cudaMemcpyAsync to memory of the other kind");
    if (emu::on_device(s, n) != (kind != cudaMemcpyHostToDevice)) emu::fail("cudaMemcpyAsync from memory of the other kind");
    if (emu::recording && kind != cudaMemcpyDeviceToDevice) emu::fail("a graph would copy from or to the host's memory, whatever is there by then");
    std::vector<char> staged;                                    // pageable memory is read before this returns
    bool pageable = kind == cudaMemcpyHostToDevice && !emu::is_pinned(s);
    if (pageable) staged.assign((const char *)s, (const char *)s + n);
    emu::submit([=] {
        if (!emu::on_device(kind == cudaMemcpyDeviceToHost ? s : d, n)) emu::fail("cudaMemcpyAsync of memory that was freed");
        emu::OnDevice now;
        memcpy(d, pageable ? staged.data() : s, n);
    });
    return 0;
}
static inline cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t) {
    emu::submit([=] {
        if (!emu::on_device(d, n)) emu::fail("cudaMemsetAsync of memory that is not the device's");
        emu::OnDevice now;
        memset(d, v, n);
    });
    return 0;
}
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { *s = nullptr; return 0; }
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    if (emu::recording) return cudaErrorStreamCaptureUnsupported;
    emu::finish_all();
    return cudaSuccess;
}
typedef int cudaEvent_t;
static inline cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = 0; return 0; }
static inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return 0; }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaStreamSynchronize(nullptr); }
static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { *ms = 1; return 0; }
static inline cudaError_t cudaEventDestroy(cudaEvent_t) { return 0; }
template <class F> static cudaError_t cudaFuncSetAttribute(F kernel, int, int bytes) {
    if (bytes > 227 * 1024) return cudaErrorInvalidValue;        // an H100's; an A100 has 163
    emu::allowed[(const void *)kernel] = bytes;
    return cudaSuccess;
}
struct cudaFuncAttributes { int numRegs; };
template <class F> static cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, F) { return emu::no_code ? cudaErrorNoKernelImageForDevice : cudaSuccess; }
static inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) { if (emu::recording) return 1; emu::recording = new EmuGraph; return 0; }
static inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g) { *g = emu::recording; emu::recording = nullptr; return *g ? 0 : 1; }
static inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long) { *e = new EmuGraph(*g); return 0; }
static inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return 0; }
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { delete g; return 0; }
static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t) { emu::n_graph_launches++; for (auto &f : *g) emu::submit(f); return 0; }

#endif
