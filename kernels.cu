// kernels.cu: the CUDA back-end. Every operation of include/kernels.h, in its order and under its headings: the maths is
// there, the kernel and then the function that launches it are here. kernels.c is the same list for the CPU.
//
// Needs compute capability 8.0 and the CUDA runtime, nothing else:    nvcc -O3 -Iinclude -arch=sm_80 -c kernels.cu
// tests/cuda_on_cpu.h lets g++ compile this same file and run it without a GPU, block by block.
//
// The order of every sum is fixed and no kernel adds floats atomically: the same input gives the same bits, on every run and
// beside any other rows. (One seam: up to FEW rows are multiplied by matvec_kernel, more by tiles. Within each kind a row's
// bits do not depend on the others; between the two they differ in the last bits.)

#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "error.h"
extern "C" {
#include "kernels.h"
}

static cudaStream_t stream;          // everything happens on one stream, in order
static int n_multiprocessors = 1;
static uint64_t generation = 1;      // counts what a recorded graph relies on: memory that moved, room that grew

#define CHECK(call) do { cudaError_t e_ = (call); \
        if (e_ != cudaSuccess) die("the message is the CUDA runtime's; compute-sanitizer names the kernel behind it", \
                                   "%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); } while (0)

// ----------------------------------------------------------------------------
// what C++ cannot say: a launch, and the instructions that have no C++ spelling. cuda_on_cpu.h has them in plain C++.

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#define TEXT_OF(...) #__VA_ARGS__
#define UNROLL_BY(n) _Pragma(TEXT_OF(unroll (n)))
#define LAUNCH(kernel, grid, block, shared, ...) do { (kernel)<<<grid, block, shared, stream>>>(__VA_ARGS__); CHECK(cudaGetLastError()); } while (0)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

static __device__ __forceinline__ uint4 load16(const void *p) { return *(const uint4 *)p; }
static __device__ __forceinline__ void store16(void *p, uint4 v) { *(uint4 *)p = v; }
static __device__ __forceinline__ uint4 load16_once(const void *p) {      // read once: no place in L1
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
static __device__ __forceinline__ float f16_to_float(uint16_t h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
static __device__ __forceinline__ float bf16_to_float(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
static __device__ __forceinline__ uint16_t float_to_f16(float f) { uint16_t h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
static __device__ __forceinline__ uint16_t float_to_bf16(float f) { uint16_t h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
static __device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
static __device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
// 16 bytes from global to shared memory, the last 16 - valid of them as zero; done when waited for.
static __device__ __forceinline__ void cp_async16(void *dst, const void *src, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(dst)), "l"(src), "r"(valid) : "memory");
}
static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
// Four 8x8 matrices of 16-bit numbers; lane i brings the address of row i % 8 of matrix i / 8.
static __device__ __forceinline__ void ldmatrix(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
static __device__ __forceinline__ void ldmatrix_trans(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// c (16, 8) += a (16, 16) b (8, 16)^T on the tensor cores, products of 16-bit numbers added up in float
static __device__ __forceinline__ void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// ----------------------------------------------------------------------------
// what many kernels use

#define ALL_LANES 0xffffffffu
#define LOG2E 1.4426950408889634f        // exp(x) = 2^(x LOG2E)

static inline int ceil_div(size_t a, size_t b) { return (int)((a + b - 1) / b); }

static __device__ __forceinline__ float warp_sum(float v) {
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(ALL_LANES, v, i);
    return v;
}
static __device__ __forceinline__ float warp_max(float v) {
    for (int i = 16; i; i /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, i));
    return v;
}

// A float as two 16-bit numbers whose sum it nearly is: f16 keeps 22 bits of 24, bf16 16.
template <bool BF16> static __device__ __forceinline__ void split(uint16_t *hi, uint16_t *lo, float v) {
    if (BF16) { *hi = float_to_bf16(v); *lo = float_to_bf16(v - bf16_to_float(*hi)); }
    else      { *hi = float_to_f16(v);  *lo = float_to_f16(v - f16_to_float(*hi)); }
}
static __device__ __forceinline__ uint32_t pair(uint16_t a, uint16_t b) { return a | (uint32_t)b << 16; }
// Two floats as a pair of 16-bit numbers and a pair of what is left.
template <bool BF16> static __device__ __forceinline__ void split_pair(uint32_t *hi, uint32_t *lo, float a, float b) {
    uint16_t ah, al, bh, bl;
    split<BF16>(&ah, &al, a);
    split<BF16>(&bh, &bl, b);
    *hi = pair(ah, bh);
    *lo = pair(al, bl);
}

// 16 bytes of weights or of cache -> 16, 8 or 4 floats. Q8_0: without its scale.
template <int W> struct Per16 { enum { n = W == F32 ? 4 : W == Q8_0 ? 16 : 8 }; };
template <int W> static __device__ __forceinline__ void unpack(float *w, uint4 raw) {
    uint32_t u[4] = { raw.x, raw.y, raw.z, raw.w };
    UNROLL for (int i = 0; i < 4; i++) {
        if (W == F32) w[i] = __uint_as_float(u[i]);
        if (W == F16) { w[2 * i] = f16_to_float((uint16_t)u[i]); w[2 * i + 1] = f16_to_float((uint16_t)(u[i] >> 16)); }
        if (W == BF16) { w[2 * i] = __uint_as_float(u[i] << 16); w[2 * i + 1] = __uint_as_float(u[i] & 0xffff0000u); }
        if (W == Q8_0)       // the byte, plus 128, as the last bits of 2^23: cheaper than a conversion
            UNROLL for (int b = 0; b < 4; b++) w[4 * i + b] = __uint_as_float(0x4b000000u | ((u[i] ^ 0x80808080u) >> 8 * b & 255)) - 8388736.0f;
    }
}

// ----------------------------------------------------------------------------
// memory

static void *device_alloc(size_t bytes) {
    void *p = NULL;
    size_t room = 0, total = 0;
    if (!bytes) bytes = 1;
    if (cudaMalloc(&p, bytes) == cudaSuccess) return p;
    cudaGetLastError();
    CHECK(cudaMemGetInfo(&room, &total));
    die("a smaller or quantised model (q8_0), a shorter --ctx, fewer sequences at once, -r closer to 1; or -b cpu",
        "out of device memory: %.1f MiB needed, %.1f of %.1f MiB free", bytes / 1048576.0, room / 1048576.0, total / 1048576.0);
}

// Lengths of the cache are counted on the host, so the host must know whose rows a pass holds. What is put into a small
// allocation stays readable here; the arrays of Rows are such.
typedef struct { char *p, *host; size_t bytes; } Block;
static Block *blocks;
static int n_blocks, max_blocks;
enum { MIRROR_BYTES = 4 << 20 };

static Block *block_of(const void *p) {
    for (int i = 0; i < n_blocks; i++)
        if ((char *)p >= blocks[i].p && (char *)p < blocks[i].p + blocks[i].bytes) return &blocks[i];
    return NULL;
}

static const int *on_host(const int *p, const char *what) {
    Block *b = block_of(p);
    if (!b || !b->host) die(NULL, "%s must come from alloc, at most %d bytes of it, and be filled by put", what, MIRROR_BYTES);
    return (const int *)(b->host + ((char *)p - b->p));
}

static void *alloc(size_t bytes) {
    char *p = (char *)device_alloc(bytes);
    CHECK(cudaMemsetAsync(p, 0, bytes ? bytes : 1, stream));
    if (n_blocks == max_blocks) {
        max_blocks = 2 * max_blocks + 64;
        Block *more = (Block *)need(max_blocks, sizeof *more);
        if (n_blocks) memcpy(more, blocks, n_blocks * sizeof *more);
        free(blocks);
        blocks = more;
    }
    blocks[n_blocks++] = Block{ p, bytes <= MIRROR_BYTES ? (char *)need(bytes, 1) : NULL, bytes ? bytes : 1 };
    return p;
}

static void release(void *p) {
    if (!p) return;
    Block *b = block_of(p);
    if (b && b->p == p) {
        free(b->host);
        *b = blocks[--n_blocks];
    }
    generation++;                    // a graph may have read it
    CHECK(cudaFree(p));
}

// Through memory that the device reads by itself: the copy is under way when put returns, h_src is not needed any more, and a
// small one (a token's rows) waits for nothing. When the staging memory is used up, it is used again from its start.
static bool recording;
static void put(void *dst, const void *h_src, size_t bytes) {
    const size_t STAGING = 16 << 20, PIECE = STAGING / 4;
    static char *staging;
    static size_t used;
    if (recording) die(NULL, "put: not between record and stop");
    if (!staging) CHECK(cudaHostAlloc((void **)&staging, STAGING, cudaHostAllocDefault));
    Block *b = block_of(dst);
    if (b && b->host) memcpy(b->host + ((char *)dst - b->p), h_src, bytes);
    for (size_t at = 0, n; at < bytes; at += n, used += pad64(n)) {
        if (used == STAGING) { CHECK(cudaStreamSynchronize(stream)); used = 0; }
        n = STAGING - used < PIECE ? STAGING - used : PIECE;
        if (n > bytes - at) n = bytes - at;
        memcpy(staging + used, (const char *)h_src + at, n);
        CHECK(cudaMemcpyAsync((char *)dst + at, staging + used, n, cudaMemcpyHostToDevice, stream));
    }
}

static void get(void *h_dst, const void *src, size_t bytes) {      // through such memory too: the device writes it faster
    const size_t PIECE = 4 << 20;
    static char *landing;
    if (recording) die(NULL, "get: not between record and stop");
    if (!landing) CHECK(cudaHostAlloc((void **)&landing, PIECE, cudaHostAllocDefault));
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < PIECE ? bytes - at : PIECE;
        CHECK(cudaMemcpyAsync(landing, (const char *)src + at, n, cudaMemcpyDeviceToHost, stream));
        CHECK(cudaStreamSynchronize(stream));
        memcpy((char *)h_dst + at, landing, n);
    }
}

static Mat weight(Type type, int rows, int cols, const void *mapped, const void *scale) {
    Mat m = { type, rows, cols, row_bytes(type, cols), NULL, NULL };
    size_t bytes = rows * m.row_bytes, scale_bytes = type == Q8_0 ? rows * scale_row_bytes(cols) : 0;
    char *p = (char *)device_alloc(bytes + scale_bytes);          // the scales stand behind the numbers
    put(p, mapped, bytes);
    if (scale_bytes) put(p + bytes, scale, scale_bytes);
    m.data = p;
    m.scale = scale_bytes ? (const uint16_t *)(p + bytes) : NULL;
    return m;
}

// Memory that an operation needs while it runs: one piece a purpose, kept, grown when it is too small. A piece that is
// outgrown stays allocated, because a graph that is being recorded may hold it; it at least doubles, so that adds up to little.
enum { S_SPLIT, S_ROW_SCALE, S_PARTS, S_LOGITS, S_PLACE, S_SUMS, S_VISIBLE, S_ORDER, S_OFFSET, S_KEEP, S_INTO, S_W, S_KEPT, S_COUNT,
       S_MOVE, S_LISTS, S_OUT, N_SCRATCH };
static void *scratch(int purpose, size_t bytes) {
    static struct { void *p; size_t bytes; } piece[N_SCRATCH];
    if (bytes > piece[purpose].bytes) {
        size_t twice = 2 * piece[purpose].bytes;
        piece[purpose].bytes = bytes > twice ? bytes : twice;
        piece[purpose].p = device_alloc(piece[purpose].bytes);
        generation++;
    }
    return piece[purpose].p;
}
static void *upload(int purpose, const void *h_src, size_t bytes) {
    void *p = scratch(purpose, bytes);
    put(p, h_src, bytes);
    return p;
}

// ----------------------------------------------------------------------------
// embed

template <int W> __global__ void embed_kernel(float *y, const char *table, size_t stride, const uint16_t *scale, size_t scale_stride, const int *id, int dim) {
    int row = id[blockIdx.x];
    if (row < 0) return;
    const char *w = table + row * stride;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        float v = W == F32 ? ((const float *)w)[i] : W == F16 ? f16_to_float(((const uint16_t *)w)[i]) : W == BF16 ? bf16_to_float(((const uint16_t *)w)[i])
                : ((const int8_t *)w)[i] * f16_to_float(*((const uint16_t *)((const char *)scale + row * scale_stride) + i / 32));
        y[(size_t)blockIdx.x * dim + i] = v;
    }
}

// One kernel for each type of weights: name it with W in place of the type.
#define FOR_TYPE(type, statement) switch (type) { \
    case F32:  { constexpr int W = F32;  statement; break; } \
    case F16:  { constexpr int W = F16;  statement; break; } \
    case BF16: { constexpr int W = BF16; statement; break; } \
    default:   { constexpr int W = Q8_0; statement; break; } }

static void embed(float *y, Mat table, const int *id, int T) {
    if (T < 1) return;
    FOR_TYPE(table.type, LAUNCH(embed_kernel<W>, T, 256, 0, y, (const char *)table.data, table.row_bytes, table.scale, scale_row_bytes(table.cols), id, table.cols))
}

// rows_copy. The row numbers travel as the kernel's argument: nothing to upload, and a graph keeps them.
typedef struct { int at[256]; } Numbers;
__global__ void rows_copy_kernel(float *y, const float *x, Numbers row, int dim) {
    const float *from = x + (size_t)row.at[blockIdx.x] * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) y[(size_t)blockIdx.x * dim + i] = from[i];
}

static void rows_copy(float *y, const float *x, const int *h_row, int n, int dim) {
    if (!h_row) {
        if (y != x && n > 0) CHECK(cudaMemcpyAsync(y, x, (size_t)n * dim * sizeof(float), cudaMemcpyDeviceToDevice, stream));
        return;
    }
    for (int at = 0; at < n; at += 256) {
        Numbers some;
        int m = n - at < 256 ? n - at : 256;
        memcpy(some.at, h_row + at, m * sizeof(int));
        LAUNCH(rows_copy_kernel, m, 256, 0, y + (size_t)at * dim, x, some, dim);
    }
}

// ----------------------------------------------------------------------------
// rmsnorm, layernorm: a block a row

// The sum over a block of 256 threads, the same in all of them: warps in order.
static __device__ float block_sum(float v) {
    __shared__ float part[8];
    v = warp_sum(v);
    __syncthreads();                 // the last use of part is over
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < 8; i++) sum += part[i];
    return sum;
}

__global__ void rmsnorm_kernel(float *y, const float *x, const float *w, int dim, float eps) {
    const float *xt = x + (size_t)blockIdx.x * dim;
    float ss = 0.0f;
    for (int i = threadIdx.x; i < dim; i += 256) ss += xt[i] * xt[i];
    float scale = 1.0f / sqrtf(block_sum(ss) / dim + eps);
    for (int i = threadIdx.x; i < dim; i += 256) y[(size_t)blockIdx.x * dim + i] = w[i] * xt[i] * scale;
}

static void rmsnorm(float *y, const float *x, const float *w, int T, int dim, float eps) {
    if (T > 0) LAUNCH(rmsnorm_kernel, T, 256, 0, y, x, w, dim, eps);
}

__global__ void layernorm_kernel(float *y, const float *x, const float *w, const float *b, int dim, float eps) {
    const float *xt = x + (size_t)blockIdx.x * dim;
    float sum = 0.0f, ss = 0.0f;
    for (int i = threadIdx.x; i < dim; i += 256) sum += xt[i];
    float mean = block_sum(sum) / dim;
    for (int i = threadIdx.x; i < dim; i += 256) ss += (xt[i] - mean) * (xt[i] - mean);
    float scale = 1.0f / sqrtf(block_sum(ss) / dim + eps);
    for (int i = threadIdx.x; i < dim; i += 256) y[(size_t)blockIdx.x * dim + i] = w[i] * (xt[i] - mean) * scale + b[i];
}

static void layernorm(float *y, const float *x, const float *w, const float *b, int T, int dim, float eps) {
    if (T > 0) LAUNCH(layernorm_kernel, T, 256, 0, y, x, w, b, dim, eps);
}

// silu_mul
__global__ void silu_mul_kernel(float *y, const float *w13x, int hidden_dim) {
    int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= hidden_dim) return;
    const float *w = w13x + (size_t)blockIdx.x * 2 * hidden_dim;
    float g = w[i];
    y[(size_t)blockIdx.x * hidden_dim + i] = g / (1.0f + expf(-g)) * w[hidden_dim + i];
}

static void silu_mul(float *y, const float *w13x, int T, int hidden_dim) {
    if (T > 0) LAUNCH(silu_mul_kernel, dim3(T, ceil_div(hidden_dim, 256)), 256, 0, y, w13x, hidden_dim);
}

// ----------------------------------------------------------------------------
// matmul

enum { FEW = 16 };                   // rows that still go through matvec_kernel

static __device__ __forceinline__ float activate(float u, int act) {
    if (act == ACT_GELU) return 0.5f * u * (1.0f + erff(u * 0.70710678f));
    if (act == ACT_QUICK_GELU) return u / (1.0f + expf(-1.702f * u));
    return u;
}

// What every product kernel needs to know of y = act(x w^T + bias).
typedef struct {
    float *y;                        // (T, rows)
    const float *x;                  // (T, cols), x_stride floats a row
    const char *w;                   // (rows, cols), w_stride bytes a row
    const uint16_t *scale;           // Q8_0: (rows, cols / 32), scale_stride bytes a row
    size_t w_stride, scale_stride;
    const float *bias;
    int act, T, rows, cols, x_stride;
    bool add;
} Product;

static __device__ __forceinline__ void finish(const Product &p, int t, int o, float v) {
    v = activate(p.bias ? v + p.bias[o] : v, p.act);
    float *y = p.y + (size_t)t * p.rows + o;
    *y = p.add ? *y + v : v;
}

static __device__ __forceinline__ float q8_scale(const Product &p, int o, int block) {
    return f16_to_float(*((const uint16_t *)((const char *)p.scale + o * p.scale_stride) + block));
}

// Where column c of x stands when a warp shall read it without bank conflicts: a lane multiplies N neighbouring columns, 4 at a
// time, and the first 4 of all 32 lanes come first, then the second. Worth a copy of x from 5 rows on: each weight meets all rows,
// so reading x takes most of the time.
template <int W, int ROWS> struct Order {
    enum { N = Per16<W>::n, GROUP = 32 * N, SPREAD = ROWS > 4 && N > 4 };
    static __device__ __forceinline__ int column(int at) { return SPREAD ? at / GROUP * GROUP + at % 128 / 4 * N + at % GROUP / 128 * 4 + at % 4 : at; }
    static __device__ __forceinline__ int at(int k, int lane, int i) { return SPREAD ? k - lane * N + i * 32 + lane * 4 : k + i; }      // of column k + i
};

// Few rows: a warp for R outputs, 16 bytes of each at a time and lane, U such loads under way at once. Each weight is read
// once, and meets all rows there.
template <int W, int ROWS, int R, int U> __global__ void __launch_bounds__(256) matvec_kernel(Product p) {
    constexpr int N = Per16<W>::n;
    int lane = threadIdx.x % 32, o = (blockIdx.x * 8 + threadIdx.x / 32) * R;
    if (o >= p.rows) return;
    float acc[R][ROWS];
    UNROLL for (int i = 0; i < R * ROWS; i++) acc[i / ROWS][i % ROWS] = 0.0f;
    for (int k0 = lane * N; k0 < p.cols; k0 += 32 * N * U) {
        uint4 raw[U][R];
        UNROLL for (int i = 0; i < U * R; i++) {
            int k = k0 + i / R * 32 * N;
            if (k >= p.cols) k = k0;                     // past the end: loaded, not used
            raw[i / R][i % R] = load16_once(p.w + min(o + i % R, p.rows - 1) * p.w_stride + k * (16 / N));
        }
        UNROLL for (int u = 0; u < U; u++) {
            int k = k0 + u * 32 * N;
            if (k >= p.cols) break;
            float w[R][N], scale[R];
            UNROLL for (int r = 0; r < R; r++) {
                unpack<W>(w[r], raw[u][r]);
                scale[r] = W == Q8_0 ? q8_scale(p, min(o + r, p.rows - 1), k / 32) : 1.0f;
            }
            UNROLL for (int t = 0; t < ROWS; t++) {
                float x[N];
                UNROLL for (int i = 0; i < N; i += 4) unpack<F32>(x + i, load16(p.x + (size_t)min(t, p.T - 1) * p.x_stride + Order<W, ROWS>::at(k, lane, i)));
                UNROLL for (int r = 0; r < R; r++) {
                    float sum = W == Q8_0 ? 0.0f : acc[r][t];
                    UNROLL for (int i = 0; i < N; i++) sum = fmaf(w[r][i], x[i], sum);
                    acc[r][t] = W == Q8_0 ? fmaf(scale[r], sum, acc[r][t]) : sum;
                }
            }
        }
    }
    UNROLL for (int i = 0; i < R * ROWS; i++) {
        float sum = warp_sum(acc[i / ROWS][i % ROWS]);
        if (lane == i % 32 && o + i / ROWS < p.rows && i % ROWS < p.T) finish(p, i % ROWS, o + i / ROWS, sum);
    }
}

// Rows of x in that order, at a multiple of 16 bytes, zeros behind.
template <int W, int ROWS> __global__ void arrange_kernel(float *to, const float *x, int cols, int padded) {
    int at = blockIdx.y * blockDim.x + threadIdx.x, c = Order<W, ROWS>::column(at);
    if (at < padded) to[(size_t)blockIdx.x * padded + at] = c < cols ? x[(size_t)blockIdx.x * cols + c] : 0.0f;
}

template <int W, int ROWS, int R, int U> static void matvec(Product p) {
    if (Order<W, ROWS>::SPREAD || p.cols % Per16<W>::n || (uintptr_t)p.x % 16) {
        p.x_stride = ceil_div(p.cols, Order<W, ROWS>::GROUP) * Order<W, ROWS>::GROUP;
        float *to = (float *)scratch(S_SPLIT, (size_t)p.T * p.x_stride * sizeof(float));
        LAUNCH((arrange_kernel<W, ROWS>), dim3(p.T, ceil_div(p.x_stride, 256)), 256, 0, to, p.x, p.cols, p.x_stride);
        p.x = to;
    }
    LAUNCH((matvec_kernel<W, ROWS, R, U>), ceil_div(p.rows, 8 * R), 256, 0, p);
}

template <int W> static void few_rows(const Product &p) {
    if (p.T == 1)      matvec<W, 1, 1, 4>(p);
    else if (p.T <= 4) matvec<W, 4, 2, 2>(p);
    else if (p.T <= 8) matvec<W, 8, 2, W == Q8_0 ? 1 : 2>(p);
    else               matvec<W, 16, 4, 1>(p);
}

// Many rows and float weights: tiles of 64 x 64, 4 x 4 of them a thread, 16 of the inner dimension at a time.
__global__ void __launch_bounds__(256) float_tile_kernel(Product p) {
    __shared__ float xs[16][68], ws[16][68];
    int t0 = blockIdx.x * 64, o0 = blockIdx.y * 64, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < p.cols; k0 += 16) {
        __syncthreads();
        for (int i = threadIdx.x; i < 64 * 16; i += 256) {
            int r = i / 16, k = k0 + i % 16;
            xs[i % 16][r] = t0 + r < p.T && k < p.cols ? p.x[(size_t)(t0 + r) * p.cols + k] : 0.0f;
            ws[i % 16][r] = o0 + r < p.rows && k < p.cols ? ((const float *)(p.w + (o0 + r) * p.w_stride))[k] : 0.0f;
        }
        __syncthreads();
        UNROLL for (int k = 0; k < 16; k++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(xs[k][ty * 4 + i], ws[k][tx * 4 + j], acc[i][j]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            if (t0 + ty * 4 + i < p.T && o0 + tx * 4 + j < p.rows) finish(p, t0 + ty * 4 + i, o0 + tx * 4 + j, acc[i][j]);
}

// Many rows on the tensor cores, which multiply 16-bit numbers. The weights are 16-bit already (q8_0: its integers are, the
// scale comes after each block of 32, as it should). The activations are not, and LLaMA's reach thousands where f16 ends at
// 65504: so a row is scaled by a power of two that puts its largest number into [2^14, 2^15), and goes as hi + lo, two
// numbers of the weights' type. Twice the tensor work, and f16 loses 2^-22 of a number instead of 2^-11, bf16 2^-17
// instead of 2^-8; a row's result depends on nothing but the row. Tensor cores cut off, towards zero, what a sum cannot hold
// (Fasi et al. 2021, doi 10.7717/peerj-cs.330): 4,096 products added up there are off by up to 3e-5, as cuda_on_cpu.h computes
// it. So they add up 32 at a time, and these sums are added as floats.
enum { TILE_K = 32, STAGES = 3 };

__global__ void split_kernel(uint32_t *hi, uint32_t *lo, float *row_scale, const float *x, int cols, int K, bool bf16) {
    __shared__ float part[8];
    const float *xt = x + (size_t)blockIdx.x * cols;
    float most = 0.0f;
    for (int i = threadIdx.x; i < cols; i += 256) most = fmaxf(most, fabsf(xt[i]));
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < 8; i++) most = fmaxf(most, part[i]);
    int e = max((int)(__float_as_uint(most) >> 23), 28) - 127 - 14;              // most is in [2^(e+14), 2^(e+15))
    float up = __uint_as_float((uint32_t)(127 - e) << 23);                        // 2^-e
    if (threadIdx.x == 0) row_scale[blockIdx.x] = __uint_as_float((uint32_t)(127 + e) << 23);
    for (int i = threadIdx.x * 2; i < K; i += 512) {
        float a = i < cols ? xt[i] * up : 0.0f, b = i + 1 < cols ? xt[i + 1] * up : 0.0f;
        size_t at = ((size_t)blockIdx.x * K + i) / 2;
        if (bf16) split_pair<true>(&hi[at], &lo[at], a, b); else split_pair<false>(&hi[at], &lo[at], a, b);
    }
}

// A tile row is 32 numbers = 4 chunks of 16 bytes; they are shuffled so that 8 rows of one chunk lie in 8 different banks.
static __device__ __forceinline__ int chunk_at(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }

template <int W> static __device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    if (W == BF16) mma_bf16(c, a, b); else mma_f16(c, a, b);
}

// TILE_M rows x TILE_N outputs a block, 8 warps as 2 x 4; the next tiles are on their way (cp.async) while one is multiplied.
// The larger a tile, the less it reads from L2 and each warp from shared memory; the sums of 128 x 256 just fit into registers.
template <int W, int TILE_M, int TILE_N> struct Tile {
    enum { X_BYTES = TILE_M * 64, W_BYTES = TILE_N * 64, STAGE = 2 * X_BYTES + W_BYTES + (W == Q8_0 ? TILE_N * 4 : 0) };
};
template <int W, int TILE_M, int TILE_N> __global__ void __launch_bounds__(256) tile_kernel(Product p, const uint16_t *hi, const uint16_t *lo,
        const float *row_scale, int K) {
    using S = Tile<W, TILE_M, TILE_N>;
    constexpr int MI = TILE_M / 32, NJ = TILE_N / 32, X_BYTES = S::X_BYTES, W_BYTES = S::W_BYTES, STAGE = S::STAGE;
    static_assert(W != Q8_0 || TILE_N == 128, "a thread loads half a row of q8_0");
    DYNAMIC_SHARED(shared);          // STAGES times: x hi, x lo, w, its scales
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, t0 = blockIdx.x * TILE_M, o0 = blockIdx.y * TILE_N;
    int wm = warp / 4 * (TILE_M / 2), wn = warp % 4 * (TILE_N / 4), n_tiles = K / TILE_K;
    float acc[MI][NJ][4];
    UNROLL for (int i = 0; i < MI * NJ * 4; i++) acc[i / 4 / NJ][i / 4 % NJ][i % 4] = 0.0f;

    uint4 raw = make_uint4(0, 0, 0, 0);          // Q8_0: 16 weights and perhaps a scale between global and shared memory
    float raw_scale = 0.0f;
    int q_row = min(o0 + tid / 2, p.rows - 1);
    auto load = [&](int tile) {
        char *s = shared + tile % STAGES * STAGE;
        UNROLL_BY(TILE_M % 64 ? 1 : 4) for (int i = tid; i < TILE_M * 4; i += 256) {      // 96 rows: the odd half turn, unrolled, costs registers
            int r = i / 4, c = i % 4, valid = t0 + r < p.T ? 16 : 0;
            size_t from = (size_t)min(t0 + r, p.T - 1) * K + tile * TILE_K + c * 8;
            cp_async16(s + chunk_at(r, c), hi + from, valid);
            cp_async16(s + X_BYTES + chunk_at(r, c), lo + from, valid);
        }
        if (W != Q8_0)
            for (int i = tid; i < TILE_N * 4; i += 256) {
                int r = i / 4, c = i % 4;
                cp_async16(s + 2 * X_BYTES + chunk_at(r, c), p.w + min(o0 + r, p.rows - 1) * p.w_stride + (tile * TILE_K + c * 8) * 2, o0 + r < p.rows ? 16 : 0);
            }
        else {
            raw = load16(p.w + q_row * p.w_stride + tile * TILE_K + tid % 2 * 16);
            if (tid % 2) raw_scale = q8_scale(p, q_row, tile);
        }
    };
    auto store_q8 = [&](int tile) {              // integers up to 127 are exact in f16
        char *s = shared + tile % STAGES * STAGE + 2 * X_BYTES;
        float v[16];
        unpack<Q8_0>(v, raw);
        for (int c = 0; c < 2; c++) {
            const float *f = v + 8 * c;
            store16(s + chunk_at(tid / 2, tid % 2 * 2 + c), make_uint4(pair(float_to_f16(f[0]), float_to_f16(f[1])), pair(float_to_f16(f[2]), float_to_f16(f[3])),
                                                                      pair(float_to_f16(f[4]), float_to_f16(f[5])), pair(float_to_f16(f[6]), float_to_f16(f[7]))));
        }
        if (tid % 2) ((float *)(s + W_BYTES))[tid / 2] = raw_scale;
    };
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < n_tiles) { load(i); if (W == Q8_0) store_q8(i); }
        cp_async_commit();
    }
    for (int tile = 0; tile < n_tiles; tile++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();                         // this tile is here, for all; and all are done with the one before it
        bool more = tile + STAGES - 1 < n_tiles;
        if (more) load(tile + STAGES - 1);
        cp_async_commit();
        const char *s = shared + tile % STAGES * STAGE;
        const float *scale = (const float *)(s + 2 * X_BYTES + W_BYTES);
        uint32_t b[2][NJ / 2][4];                // [k half][pair of n8 tiles]
        UNROLL for (int kk = 0; kk < 2; kk++)
            UNROLL for (int j = 0; j < NJ / 2; j++)
                ldmatrix(b[kk][j], s + 2 * X_BYTES + chunk_at(wn + 16 * j + lane / 16 * 8 + lane % 8, kk * 2 + lane / 8 % 2));
        UNROLL for (int i = 0; i < MI; i++) {
            float part[NJ][4];                   // the sums of these 32 products
            UNROLL for (int j = 0; j < NJ * 4; j++) part[j / 4][j % 4] = 0.0f;
            UNROLL for (int kk = 0; kk < 2; kk++) {
                uint32_t a_hi[4], a_lo[4];
                int at = chunk_at(wm + 16 * i + lane % 16, kk * 2 + lane / 16);
                ldmatrix(a_hi, s + at);
                ldmatrix(a_lo, s + X_BYTES + at);
                UNROLL for (int j = 0; j < NJ; j++) mma<W>(part[j], a_lo, b[kk][j / 2] + j % 2 * 2);
                UNROLL for (int j = 0; j < NJ; j++) mma<W>(part[j], a_hi, b[kk][j / 2] + j % 2 * 2);
            }
            UNROLL for (int j = 0; j < NJ * 4; j++) {
                float *sum = &acc[i][j / 4][j % 4];
                float v = part[j / 4][j % 4];
                *sum = W == Q8_0 ? fmaf(scale[wn + j / 4 * 8 + lane % 4 * 2 + j % 2], v, *sum) : *sum + v;
            }
        }
        if (W == Q8_0 && more) store_q8(tile + STAGES - 1);
    }
    cp_async_wait<0>();
    UNROLL for (int i = 0; i < MI; i++)
        UNROLL for (int h = 0; h < 2; h++) {
            int t = t0 + wm + 16 * i + 8 * h + lane / 4;
            if (t >= p.T) continue;
            float scale = row_scale[t];
            UNROLL for (int j = 0; j < NJ * 2; j++) {
                int o = o0 + wn + j / 2 * 8 + lane % 4 * 2 + j % 2;
                if (o < p.rows) finish(p, t, o, scale * acc[i][j / 2][2 * h + j % 2]);
            }
        }
}

// More than 48 KiB of dynamic shared memory must be asked for, once a kernel.
#define ALLOW_SHARED(kernel, bytes) do { static bool done_; \
        if (!done_) CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes))); \
        done_ = true; } while (0)

template <int W, int TILE_M, int TILE_N> static void tiles(const Product &p, const uint16_t *hi, const uint16_t *lo, const float *row_scale, int K) {
    int bytes = STAGES * Tile<W, TILE_M, TILE_N>::STAGE;
    ALLOW_SHARED((tile_kernel<W, TILE_M, TILE_N>), bytes);
    LAUNCH((tile_kernel<W, TILE_M, TILE_N>), dim3(ceil_div(p.T, TILE_M), ceil_div(p.rows, TILE_N)), 256, bytes, p, hi, lo, row_scale, K);
}

// A multiprocessor holds one block of the large tiles, so a grid runs in rounds of n_multiprocessors blocks, and the last round is
// seldom full. Lower tiles are taken where their rounds are shorter in all: 620 rows, 4,096 outputs, 132 multiprocessors:
// 80 tiles of 128 rows are one round, and so are 112 tiles of 96.
template <int W> static void many_rows(const Product &p, const uint16_t *hi, const uint16_t *lo, const float *row_scale, int K) {
    auto height = [&](int tile_m) { return tile_m * ceil_div(ceil_div(p.T, tile_m) * ceil_div(p.rows, 256), n_multiprocessors); };
    if (p.T <= 64)                       tiles<W, 64, 128>(p, hi, lo, row_scale, K);
    else if constexpr (W == Q8_0)        tiles<W, 128, 128>(p, hi, lo, row_scale, K);
    else if (height(96) < height(128))   tiles<W, 96, 256>(p, hi, lo, row_scale, K);
    else                                 tiles<W, 128, 256>(p, hi, lo, row_scale, K);
}

static void matmul(float *y, const float *x, Mat w, const float *bias, Act act, bool add, int T) {
    Product p = { y, x, (const char *)w.data, w.scale, w.row_bytes, scale_row_bytes(w.cols), bias, act, T, w.rows, w.cols, w.cols, add };
    if (T < 1) return;
    if (T <= FEW) { FOR_TYPE(w.type, few_rows<W>(p)) return; }
    if (w.type == F32) { LAUNCH(float_tile_kernel, dim3(ceil_div(T, 64), ceil_div(w.rows, 64)), 256, 0, p); return; }
    int K = ceil_div(w.cols, TILE_K) * TILE_K;
    uint16_t *hi = (uint16_t *)scratch(S_SPLIT, (size_t)T * K * 4), *lo = hi + (size_t)T * K;
    float *row_scale = (float *)scratch(S_ROW_SCALE, T * sizeof(float));
    LAUNCH(split_kernel, T, 256, 0, (uint32_t *)hi, (uint32_t *)lo, row_scale, x, w.cols, K, w.type == BF16);
    if (w.type == F16)  many_rows<F16>(p, hi, lo, row_scale, K);
    if (w.type == BF16) many_rows<BF16>(p, hi, lo, row_scale, K);
    if (w.type == Q8_0) many_rows<Q8_0>(p, hi, lo, row_scale, K);
}

// ----------------------------------------------------------------------------
// rope

__global__ void rope_kernel(float *qkv, const float *cos_sin, const float *q_scale, const int *pos, const int *rot, int n_heads, int n_kv_heads, int head_dim) {
    int half = head_dim / 2, t = blockIdx.x;
    float *row = qkv + (size_t)t * (n_heads + 2 * n_kv_heads) * head_dim;
    float scale = q_scale ? q_scale[pos[t]] : 1.0f;
    for (int i = threadIdx.x; i < (n_heads + n_kv_heads) * half; i += blockDim.x) {
        int head = i / half, j = i % half;
        float *u = row + head * head_dim + j, s = head < n_heads ? scale : 1.0f;
        const float *cs = cos_sin + ((size_t)rot[t] * half + j) * 2;
        float a = u[0], b = u[half];
        u[0] = (a * cs[0] - b * cs[1]) * s;
        u[half] = (b * cs[0] + a * cs[1]) * s;
    }
}

static void rope(float *qkv, const float *cos_sin, const float *q_scale, const Rows *rows, int n_heads, int n_kv_heads, int head_dim) {
    if (rows->T > 0) LAUNCH(rope_kernel, rows->T, 256, 0, qkv, cos_sin, q_scale, rows->pos, rows->rot, n_heads, n_kv_heads, head_dim);
}

// ----------------------------------------------------------------------------
// attend, and what attention over rows shares with the cache: the pieces of flash attention (Dao 2023, arXiv:2307.08691)
//
// 64 queries a block, 16 a warp. Keys and values pass through shared memory, TILE of them at a time; products on the tensor
// cores. Queries and probabilities are split into hi + lo (see matmul), so are keys and values that come as float (F32):
// q k = q_hi k_hi + q_lo k_hi [+ q_hi k_lo], which loses 2^-21 of a product or less. A cache in f16 needs no lo.

// One KV head of one layer of one sequence, in device memory.
typedef struct {
    char *k, *v;                     // (room, head_dim) f16 or float
    int *pos, *rot;                  // (room,) pos -1 or less: a hole, and the next one is place -2 - pos; the last says -1
    float *score;                    // (room,)
    int room, used, len, hole;       // places; places ever filled, from 0 on; slots = used - holes; the first hole or -1
} List;

typedef struct {                     // the keys and values that a block walks over
    const char *k, *v;
    size_t stride;                   // bytes from one to the next
    const int *pos;                  // NULL: no mask
    int n;
} Keys;

template <int D, bool F32KV> struct Flash {
    enum { DP = (D + 15) / 16 * 16, ROW = 2 * DP + 16,          // bytes of a row in shared memory: an odd number of 16s, so 8 rows lie in 8 banks
           QUERIES = 64, TILE = F32KV ? 32 : 64, PARTS = F32KV ? 2 : 1,
           Q_BYTES = 2 * QUERIES * ROW, KV_BYTES = PARTS * TILE * ROW };
};

// Float rows -> hi and, below them, lo. Rows at n and past it are zero; so are columns from D on. Four loads are under way at once.
template <int D, int N_ROWS, int ROW> static __device__ void load_split(char *to, const char *from, size_t stride, int n) {
    constexpr int C = (D + 15) / 16 * 4;                         // chunks of 4 floats
    for (int i0 = threadIdx.x; i0 < N_ROWS * C; i0 += 4 * 128) {
        uint4 v[4];
        UNROLL for (int u = 0; u < 4; u++) {
            int r = (i0 + 128 * u) / C, c = (i0 + 128 * u) % C;
            v[u] = r < min(n, N_ROWS) && c * 4 < D ? load16(from + r * stride + c * 16) : make_uint4(0, 0, 0, 0);
        }
        UNROLL for (int u = 0; u < 4; u++) {
            int r = (i0 + 128 * u) / C, c = (i0 + 128 * u) % C;
            if (r >= N_ROWS) break;
            uint32_t *hi = (uint32_t *)(to + r * ROW + c * 8), *lo = (uint32_t *)(to + (N_ROWS + r) * ROW + c * 8);
            split_pair<false>(hi, lo, __uint_as_float(v[u].x), __uint_as_float(v[u].y));
            split_pair<false>(hi + 1, lo + 1, __uint_as_float(v[u].z), __uint_as_float(v[u].w));
        }
    }
}

template <int D, bool F32KV> static __device__ void load_keys(char *to, const char *from, size_t stride, int n) {
    using F = Flash<D, F32KV>;
    if (F32KV) { load_split<D, F::TILE, F::ROW>(to, from, stride, n); return; }
    constexpr int C = F::DP / 8;
    for (int i = threadIdx.x; i < F::TILE * C; i += 128) {
        int r = i / C, c = i % C;
        bool there = r < n && c * 8 < D;
        cp_async16(to + r * F::ROW + c * 16, there ? from + r * stride + c * 16 : from, there ? 16 : 0);
    }
}

// s (16 queries, TILE keys) = q k^T, for the 16 queries of this warp at `q`
template <int D, bool F32KV> static __device__ __forceinline__ void query_key(float s[][4], const char *q, const char *k) {
    using F = Flash<D, F32KV>;
    int lane = threadIdx.x % 32;
    UNROLL for (int i = 0; i < F::TILE / 8; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
    UNROLL for (int kk = 0; kk < F::DP / 16; kk++) {
        uint32_t hi[4], lo[4];
        const char *at = q + lane % 16 * F::ROW + (kk * 2 + lane / 16) * 16;
        ldmatrix(hi, at);
        ldmatrix(lo, at + F::QUERIES * F::ROW);
        UNROLL for (int j = 0; j < F::TILE / 16; j++) {
            uint32_t b[4];
            const char *key = k + (16 * j + lane / 16 * 8 + lane % 8) * F::ROW + (kk * 2 + lane / 8 % 2) * 16;
            ldmatrix(b, key);
            mma_f16(s[2 * j], lo, b);
            mma_f16(s[2 * j + 1], lo, b + 2);
            mma_f16(s[2 * j], hi, b);
            mma_f16(s[2 * j + 1], hi, b + 2);
            if (F32KV) {
                ldmatrix(b, key + F::TILE * F::ROW);
                mma_f16(s[2 * j], hi, b);
                mma_f16(s[2 * j + 1], hi, b + 2);
            }
        }
    }
}

// The first place from j on, in steps of TILE, of a tile where some key is seen by some query up to `last`; `seen` gets each
// key's position, INT_MAX if none of our queries sees it. All threads of the block come here together.
template <int TILE> static __device__ int next_tile(int *seen, const Keys &keys, int j, int last, const uint8_t *visible) {
    for (; j < keys.n; j += TILE) {
        int i = threadIdx.x, pos = INT_MAX;
        __syncthreads();             // the last use of seen is over
        if (i < TILE) {
            if (j + i < keys.n) pos = keys.pos ? keys.pos[j + i] : 0;
            if (pos < 0 || pos > last || (visible && !visible[pos])) pos = INT_MAX;
            seen[i] = pos;
        }
        if (__syncthreads_or(pos != INT_MAX)) break;
    }
    return j;
}

template <int D, bool F32KV> __global__ void __launch_bounds__(128) flash_kernel(float *o, float *lse, const float *q, int q_stride,
        Keys keys, const List *lists, int group, const int *q_pos, const uint8_t *visible, int T, int n_heads) {
    using F = Flash<D, F32KV>;
    DYNAMIC_SHARED(shared);          // queries, keys, values
    __shared__ int seen[F::TILE];
    char *sq = shared, *sk = sq + F::Q_BYTES, *sv = sk + F::KV_BYTES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y;
    int t0 = (gridDim.x - 1 - blockIdx.x) * F::QUERIES, t = t0 + warp * 16 + lane / 4;      // this thread's queries: t and t + 8
    if (lists) {
        const List *c = lists + head / group;
        keys = Keys{ c->k, c->v, (size_t)D * (F32KV ? 4 : 2), c->pos, c->used };
    } else {
        keys.k += (size_t)head * D * sizeof(float);
        keys.v += (size_t)head * D * sizeof(float);
    }
    int last = q_pos ? q_pos[min(t0 + F::QUERIES, T) - 1] : 0, my_pos[2];
    for (int h = 0; h < 2; h++) my_pos[h] = q_pos ? q_pos[min(t + 8 * h, T - 1)] : 0;
    load_split<D, F::QUERIES, F::ROW>(sq, (const char *)(q + (size_t)t0 * q_stride + head * D), q_stride * sizeof(float), T - t0);

    const float c = LOG2E / sqrtf(D);                            // exp(q k / sqrt(D)) = 2^(c q k)
    float acc[F::DP / 8][4], most[2] = { -INFINITY, -INFINITY }, sum[2] = { 0.0f, 0.0f };
    UNROLL for (int i = 0; i < F::DP / 8 * 4; i++) acc[i / 4][i % 4] = 0.0f;
    int j0 = next_tile<F::TILE>(seen, keys, 0, last, visible);
    if (j0 < keys.n) load_keys<D, F32KV>(sk, keys.k + j0 * keys.stride, keys.stride, keys.n - j0);
    cp_async_commit();
    while (j0 < keys.n) {
        load_keys<D, F32KV>(sv, keys.v + j0 * keys.stride, keys.stride, keys.n - j0);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();             // the keys are here
        float s[F::TILE / 8][4], top[2] = { most[0], most[1] };
        query_key<D, F32KV>(s, sq + warp * 16 * F::ROW, sk);
        UNROLL for (int i = 0; i < F::TILE / 8 * 4; i++) {
            float *e = &s[i / 4][i % 4];
            if (seen[i / 4 * 8 + lane % 4 * 2 + i % 2] > my_pos[i % 4 / 2]) *e = -INFINITY;
            *e *= c;
            top[i % 4 / 2] = fmaxf(top[i % 4 / 2], *e);
        }
        int next = next_tile<F::TILE>(seen, keys, j0 + F::TILE, last, visible);     // its barriers: all are done with the keys
        if (next < keys.n) load_keys<D, F32KV>(sk, keys.k + next * keys.stride, keys.stride, keys.n - next);
        cp_async_commit();
        UNROLL for (int h = 0; h < 2; h++) {
            for (int i = 1; i < 4; i *= 2) top[h] = fmaxf(top[h], __shfl_xor_sync(ALL_LANES, top[h], i));
            float shrink = top[h] == -INFINITY ? 1.0f : exp2_fast(most[h] - top[h]);
            most[h] = top[h];
            sum[h] *= shrink;
            UNROLL for (int i = 0; i < F::DP / 8; i++) { acc[i][2 * h] *= shrink; acc[i][2 * h + 1] *= shrink; }
            float base = top[h] == -INFINITY ? 0.0f : top[h];
            UNROLL for (int i = 0; i < F::TILE / 8 * 2; i++) sum[h] += s[i / 2][2 * h + i % 2] = exp2_fast(s[i / 2][2 * h + i % 2] - base);
        }
        cp_async_wait<1>();
        __syncthreads();             // the values are here
        UNROLL for (int kk = 0; kk < F::TILE / 16; kk++) {
            uint32_t hi[4], lo[4];
            UNROLL for (int i = 0; i < 4; i++) split_pair<false>(&hi[i], &lo[i], s[2 * kk + i / 2][i % 2 * 2], s[2 * kk + i / 2][i % 2 * 2 + 1]);
            UNROLL for (int j = 0; j < F::DP / 16; j++) {
                uint32_t b[4];
                const char *value = sv + (kk * 16 + lane % 16) * F::ROW + (2 * j + lane / 16) * 16;
                ldmatrix_trans(b, value);
                mma_f16(acc[2 * j], lo, b);
                mma_f16(acc[2 * j + 1], lo, b + 2);
                mma_f16(acc[2 * j], hi, b);
                mma_f16(acc[2 * j + 1], hi, b + 2);
                if (F32KV) {
                    ldmatrix_trans(b, value + F::TILE * F::ROW);
                    mma_f16(acc[2 * j], hi, b);
                    mma_f16(acc[2 * j + 1], hi, b + 2);
                }
            }
        }
        __syncthreads();             // all are done with the values
        j0 = next;
    }
    cp_async_wait<0>();
    for (int h = 0; h < 2; h++) {
        for (int i = 1; i < 4; i *= 2) sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], i);
        if (t + 8 * h >= T) continue;
        float scale = sum[h] > 0.0f ? 1.0f / sum[h] : 0.0f;
        UNROLL for (int i = 0; i < D / 8; i++)
            *(float2 *)(o + ((size_t)(t + 8 * h) * n_heads + head) * D + i * 8 + lane % 4 * 2) = make_float2(acc[i][2 * h] * scale, acc[i][2 * h + 1] * scale);
        if (lse && lane % 4 == 0) lse[(size_t)(t + 8 * h) * n_heads + head] = (most[h] + log2f(sum[h])) / LOG2E;
    }
}

// The head sizes that exist, each a kernel of its own: name it with D in place of the number.
#define FOR_HEAD_DIM(head_dim, statement) switch (head_dim) { \
    case 16:  { constexpr int D = 16;  statement; break; } \
    case 32:  { constexpr int D = 32;  statement; break; } \
    case 64:  { constexpr int D = 64;  statement; break; } \
    case 104: { constexpr int D = 104; statement; break; } \
    case 128: { constexpr int D = 128; statement; break; } \
    default: die("-b cpu takes any", "the CUDA back-end has heads of 16, 32, 64, 104 and 128 numbers, not of %d", head_dim); }

template <int D, bool F32KV> static void flash(float *o, float *lse, const float *q, int q_stride, Keys keys, const List *lists, int group,
                                             const int *q_pos, const uint8_t *visible, int T, int n_heads) {
    using F = Flash<D, F32KV>;
    int bytes = F::Q_BYTES + 2 * F::KV_BYTES;
    if (((uintptr_t)q | (uintptr_t)keys.k | (uintptr_t)keys.v | q_stride * sizeof(float) | keys.stride) % 16)
        die(NULL, "attention reads rows that begin at a multiple of 16 bytes");
    ALLOW_SHARED((flash_kernel<D, F32KV>), bytes);
    LAUNCH((flash_kernel<D, F32KV>), dim3(ceil_div(T, F::QUERIES), n_heads), 128, bytes, o, lse, q, q_stride, keys, lists, group, q_pos, visible, T, n_heads);
}

static void attend(float *o, const float *q, int q_stride, const float *k, const float *v, int kv_stride, int Tq, int Tk, int n_heads, int head_dim) {
    Keys keys = { (const char *)k, (const char *)v, kv_stride * sizeof(float), NULL, Tk };
    if (Tq > 0) FOR_HEAD_DIM(head_dim, (flash<D, true>(o, NULL, q, q_stride, keys, NULL, 1, NULL, NULL, Tq, n_heads)))
}

// ----------------------------------------------------------------------------
// the cache
//
// A sequence has one allocation, in which every (layer, kv head) owns a run of places. Where these runs begin and how far they
// are filled stands in device memory, so a graph stays valid when a cache grows, shrinks or moves. Append, drop and apply
// change lengths in a way that the host can foretell: it counts along and never asks.

struct KV {
    int n_layers, n_kv_heads, head_dim, n_seqs;
    Type type;
    List *lists;                     // device: (n_layers, n_seqs, n_kv_heads)
    List *h_lists;                   // the same on the host: pointers and room are right, counts are not
    int *len, *used;                 // (n_seqs, n_layers, n_kv_heads), counted on the host
    char **memory;                   // (n_seqs,) the allocations
    size_t *places;                  // (n_seqs,) slots that fit into them
    int max_room;                    // of any head, ever
};

static size_t kv_size(const KV *kv) { return (size_t)kv->head_dim * (kv->type == F16 ? 2 : 4); }     // bytes of a key
static List *lists_of(const KV *kv, int layer, int seq) { return kv->lists + ((size_t)layer * kv->n_seqs + seq) * kv->n_kv_heads; }
static int *lens_of(const KV *kv, int *what, int seq, int layer) { return what + ((size_t)seq * kv->n_layers + layer) * kv->n_kv_heads; }
static int n_heads_of(const KV *kv) { return kv->n_layers * kv->n_kv_heads; }                          // heads of all layers: the blocks below

// The head of block i when a grid covers all layers and heads of one sequence.
static __device__ __forceinline__ List *head_list(List *lists, int i, int n_seqs, int n_kv_heads) {
    return lists + (size_t)(i / n_kv_heads) * n_seqs * n_kv_heads + i % n_kv_heads;
}

static KV *kv_new(int n_layers, int n_kv_heads, int head_dim, int n_seqs, Type type) {
    if (type != F32 && type != F16) die(NULL, "the cache holds f32 or f16");
    if (head_dim % 8) die("-b cpu takes any", "the CUDA back-end needs heads of a multiple of 8 numbers, not of %d", head_dim);
    KV *kv = (KV *)need(1, sizeof *kv);
    size_t n = (size_t)n_layers * n_seqs * n_kv_heads;
    kv->n_layers = n_layers; kv->n_kv_heads = n_kv_heads; kv->head_dim = head_dim; kv->n_seqs = n_seqs; kv->type = type;
    kv->lists = (List *)alloc(n * sizeof(List));
    kv->h_lists = (List *)need(n, sizeof(List));
    for (size_t i = 0; i < n; i++) kv->h_lists[i].hole = -1;
    put(kv->lists, kv->h_lists, n * sizeof(List));
    kv->len = (int *)need(n, sizeof(int));
    kv->used = (int *)need(n, sizeof(int));
    kv->memory = (char **)need(n_seqs, sizeof(char *));
    kv->places = (size_t *)need(n_seqs, sizeof(size_t));
    generation++;                    // it may lie where another lay
    return kv;
}

static void free_memory(KV *kv, int seq) {
    if (kv->memory[seq]) CHECK(cudaFree(kv->memory[seq]));
    kv->memory[seq] = NULL;
    kv->places[seq] = 0;
}

static void kv_free(KV *kv) {
    if (!kv) return;
    for (int s = 0; s < kv->n_seqs; s++) free_memory(kv, s);
    release(kv->lists);
    free(kv->h_lists); free(kv->len); free(kv->used); free(kv->memory); free(kv->places);
    free(kv);
}

// The slots of each head in token order: order[offset[head] + rank] = place. A block a head. One look shows that places are
// in order already, as they are after a prompt and after kv_apply; else each slot counts those before it.
__global__ void order_kernel(int *order, const int *offset, List *lists, int n_seqs, int n_kv_heads) {
    const List *c = head_list(lists, blockIdx.x, n_seqs, n_kv_heads);
    int *to = order + offset[blockIdx.x], unsorted = 0;
    for (int i = threadIdx.x; i < c->used; i += blockDim.x) unsorted |= c->pos[i] < 0 || (i && c->pos[i - 1] >= c->pos[i]);
    unsorted = __syncthreads_or(unsorted);
    for (int i = threadIdx.x; i < c->used; i += blockDim.x) {
        int rank = 0, pos = c->pos[i];
        if (pos < 0) continue;
        if (unsorted) for (int j = 0; j < c->used; j++) rank += c->pos[j] >= 0 && c->pos[j] < pos;
        to[unsorted ? rank : i] = i;
    }
}

// Where each head's slots begin in a packed array, on the host and (as the return value) on the device.
static int *offsets(const KV *kv, int seq, size_t *total, int *longest) {
    int n = n_heads_of(kv), *h = (int *)need(n, sizeof(int)), *len = lens_of(kv, kv->len, seq, 0);
    *total = 0;
    *longest = 0;
    for (int i = 0; i < n; i++) {
        if (*total > INT_MAX - (size_t)len[i]) die(NULL, "a sequence of more than 2^31 slots");
        h[i] = (int)*total;
        *total += len[i];
        if (len[i] > *longest) *longest = len[i];
    }
    int *d = (int *)upload(S_OFFSET, h, n * sizeof(int));
    free(h);
    return d;
}

static int *token_order(const KV *kv, int seq, const int *offset, size_t total) {
    int *order = (int *)scratch(S_ORDER, total * sizeof(int));
    LAUNCH(order_kernel, n_heads_of(kv), 256, 0, order, offset, lists_of(kv, 0, seq), kv->n_seqs, kv->n_kv_heads);
    return order;
}

// Slots in token order from one set of lists to another; a block a head and 32 slots, a warp a slot.
__global__ void move_kernel(List *to, List *lists, const int *order, const int *offset, size_t bytes, int n_seqs, int n_kv_heads) {
    const List *c = head_list(lists, blockIdx.x, n_seqs, n_kv_heads);
    List *d = to + blockIdx.x;
    for (int i = blockIdx.y * 32 + threadIdx.x / 32; i < min(c->len, (int)blockIdx.y * 32 + 32); i += blockDim.x / 32) {
        int place = order[offset[blockIdx.x] + i];
        for (int b = threadIdx.x % 32 * 16; b < (int)bytes; b += 32 * 16) {
            store16(d->k + i * bytes + b, load16(c->k + place * bytes + b));
            store16(d->v + i * bytes + b, load16(c->v + place * bytes + b));
        }
        if (threadIdx.x % 32 == 0) { d->pos[i] = c->pos[place]; d->rot[i] = c->rot[place]; d->score[i] = c->score[place]; }
    }
}

// Gives sequence `seq` an allocation with room[head] places a head and points its lists there; lengths as the host counts them.
static void new_places(KV *kv, int seq, const int *room) {
    int n = n_heads_of(kv), *len = lens_of(kv, kv->len, seq, 0), *used = lens_of(kv, kv->used, seq, 0);
    size_t places = 0, size = kv_size(kv), at = 0;
    for (int i = 0; i < n; i++) places += room[i];
    char *p = (char *)device_alloc(places * (2 * size + 2 * sizeof(int) + sizeof(float)));
    for (int i = 0; i < n; i++) {
        List *l = &kv->h_lists[((size_t)(i / kv->n_kv_heads) * kv->n_seqs + seq) * kv->n_kv_heads + i % kv->n_kv_heads];
        char *numbers = p + 2 * places * size;
        *l = List{ p + at * size, p + (places + at) * size, (int *)numbers + at, (int *)numbers + places + at, (float *)numbers + 2 * places + at,
                   room[i], len[i], len[i], -1 };
        used[i] = len[i];
        at += room[i];
        if (room[i] > kv->max_room) { kv->max_room = room[i]; generation++; }
    }
    kv->memory[seq] = p;
    kv->places[seq] = places;
}

static void put_lists(KV *kv, int seq) {     // the host's lists of one sequence to the device
    for (int l = 0; l < kv->n_layers; l++)
        put(lists_of(kv, l, seq), kv->h_lists + ((size_t)l * kv->n_seqs + seq) * kv->n_kv_heads, kv->n_kv_heads * sizeof(List));
}

static void kv_reserve(KV *kv, int seq, int extra) {
    int n = n_heads_of(kv), longest, *room = (int *)need(n, sizeof(int)), *len = lens_of(kv, kv->len, seq, 0);
    size_t total;
    char *old = kv->memory[seq];
    for (int i = 0; i < n; i++) room[i] = len[i] + extra;
    int *offset = offsets(kv, seq, &total, &longest), *order = total ? token_order(kv, seq, offset, total) : NULL;
    new_places(kv, seq, room);
    if (total) {
        List *to = (List *)need(n, sizeof(List));
        for (int l = 0; l < kv->n_layers; l++)
            memcpy(to + l * kv->n_kv_heads, kv->h_lists + ((size_t)l * kv->n_seqs + seq) * kv->n_kv_heads, kv->n_kv_heads * sizeof(List));
        List *d_to = (List *)upload(S_LISTS, to, n * sizeof(List));
        LAUNCH(move_kernel, dim3(n, ceil_div(longest, 32)), 256, 0, d_to, lists_of(kv, 0, seq), order, offset, kv_size(kv), kv->n_seqs, kv->n_kv_heads);
        free(to);
    }
    put_lists(kv, seq);
    if (old) CHECK(cudaFree(old));
    free(room);
}

static void kv_clear(KV *kv, int seq) {
    free_memory(kv, seq);
    for (int l = 0; l < kv->n_layers; l++)
        for (int g = 0; g < kv->n_kv_heads; g++) {
            List *c = &kv->h_lists[((size_t)l * kv->n_seqs + seq) * kv->n_kv_heads + g];
            memset(c, 0, sizeof *c);
            c->hole = -1;
            lens_of(kv, kv->len, seq, l)[g] = lens_of(kv, kv->used, seq, l)[g] = 0;
        }
    put_lists(kv, seq);
}

static void kv_copy(KV *kv, int to, int from) {
    int n = n_heads_of(kv), longest, *room = (int *)need(n, sizeof(int));
    size_t total;
    if (to == from) { free(room); return; }
    if (!kv->memory[from]) { kv_clear(kv, to); free(room); return; }
    free_memory(kv, to);
    for (int i = 0; i < n; i++) room[i] = kv->h_lists[((size_t)(i / kv->n_kv_heads) * kv->n_seqs + from) * kv->n_kv_heads + i % kv->n_kv_heads].room;
    memcpy(lens_of(kv, kv->len, to, 0), lens_of(kv, kv->len, from, 0), n * sizeof(int));
    new_places(kv, to, room);
    put_lists(kv, to);
    int *offset = offsets(kv, from, &total, &longest);
    if (total) {
        int *order = token_order(kv, from, offset, total);
        List *d_to = (List *)scratch(S_LISTS, n * sizeof(List));
        for (int l = 0; l < kv->n_layers; l++)
            CHECK(cudaMemcpyAsync(d_to + l * kv->n_kv_heads, lists_of(kv, l, to), kv->n_kv_heads * sizeof(List), cudaMemcpyDeviceToDevice, stream));
        LAUNCH(move_kernel, dim3(n, ceil_div(longest, 32)), 256, 0, d_to, lists_of(kv, 0, from), order, offset, kv_size(kv), kv->n_seqs, kv->n_kv_heads);
    }
    free(room);
}

static size_t kv_bytes(const KV *kv) {
    size_t sum = 0;
    for (int s = 0; s < kv->n_seqs; s++) sum += kv->places[s] * 2 * kv_size(kv);
    return sum;
}

static void kv_lens(const KV *kv, int seq, int *h_len) { memcpy(h_len, lens_of(kv, kv->len, seq, 0), n_heads_of(kv) * sizeof(int)); }

// kv_read
static __device__ __forceinline__ float kv_number(const char *p, int i, bool f16) { return f16 ? f16_to_float(((const uint16_t *)p)[i]) : ((const float *)p)[i]; }

__global__ void read_kernel(int *pos, int *rot, float *score, float *k, float *v, List *lists, const int *order, const int *offset,
                            int head_dim, bool f16, int n_seqs, int n_kv_heads) {
    const List *c = head_list(lists, blockIdx.x, n_seqs, n_kv_heads);
    size_t size = (size_t)head_dim * (f16 ? 2 : 4);
    for (int i = threadIdx.x / 32; i < c->len; i += blockDim.x / 32) {
        size_t at = offset[blockIdx.x] + i;
        int place = order[at];
        pos[at] = c->pos[place]; rot[at] = c->rot[place]; score[at] = c->score[place];
        if (k) for (int e = threadIdx.x % 32; e < head_dim; e += 32) {
            k[at * head_dim + e] = kv_number(c->k + place * size, e, f16);
            v[at * head_dim + e] = kv_number(c->v + place * size, e, f16);
        }
    }
}

static void kv_read(const KV *kv, int seq, int *h_pos, int *h_rot, float *h_score, float *h_k, float *h_v) {
    size_t n, d = kv->head_dim;
    int longest, *offset = offsets(kv, seq, &n, &longest);
    if (!n) return;
    int *order = token_order(kv, seq, offset, n);
    bool rows = h_k || h_v;
    int *pos = (int *)scratch(S_OUT, n * (12 + (rows ? 2 * d * sizeof(float) : 0))), *rot = pos + n;
    float *score = (float *)rot + n, *k = rows ? score + n : NULL, *v = rows ? k + n * d : NULL;
    LAUNCH(read_kernel, n_heads_of(kv), 256, 0, pos, rot, score, k, v, lists_of(kv, 0, seq), order, offset, kv->head_dim, kv->type == F16, kv->n_seqs, kv->n_kv_heads);
    if (h_pos) get(h_pos, pos, n * sizeof(int));
    if (h_rot) get(h_rot, rot, n * sizeof(int));
    if (h_score) get(h_score, score, n * sizeof(float));
    if (h_k) get(h_k, k, n * d * sizeof(float));
    if (h_v) get(h_v, v, n * d * sizeof(float));
}

// ----------------------------------------------------------------------------
// kv_append

// One more slot of a head, by one thread: a hole if there is one.
static __device__ int take_place(List *c) {
    int place = c->hole;
    if (place >= 0) c->hole = -2 - c->pos[place]; else place = c->used++;
    c->len++;
    return place;
}

static __device__ void store_row(char *to, const float *from, int head_dim, bool f16) {
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x)
        if (f16) ((uint16_t *)to)[i] = float_to_f16(from[i]); else ((float *)to)[i] = from[i];
}

// A decode step: a block for (kv head, row); every row has a sequence of its own.
__global__ void append_kernel(List *lists, const float *qkv, const int *seq, const int *pos, const int *rot, int n_heads, int n_kv_heads, int head_dim, bool f16) {
    __shared__ int shared_place;
    int g = blockIdx.x, t = blockIdx.y;
    List *c = lists + seq[t] * n_kv_heads + g;
    if (threadIdx.x == 0) {
        int p = shared_place = take_place(c);
        c->pos[p] = pos[t]; c->rot[p] = rot[t]; c->score[p] = 0.0f;
    }
    __syncthreads();
    size_t at = shared_place * (size_t)head_dim * (f16 ? 2 : 4);
    const float *k = qkv + ((size_t)t * (n_heads + 2 * n_kv_heads) + n_heads + g) * head_dim;
    store_row(c->k + at, k, head_dim, f16);
    store_row(c->v + at, k + (size_t)n_kv_heads * head_dim, head_dim, f16);
}

// A prompt: first every row gets its place, a block a head; then the rows are copied.
__global__ void places_kernel(int *place, List *lists, const int *pos, const int *rot, int T) {
    __shared__ int n_holes, first;
    List *c = lists + blockIdx.x;
    place += (size_t)blockIdx.x * T;
    if (threadIdx.x == 0) {
        for (n_holes = 0; n_holes < T && c->hole >= 0; n_holes++) place[n_holes] = take_place(c);
        first = c->used;
        c->used += T - n_holes;
        c->len += T - n_holes;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < T; t += blockDim.x) {
        int p = t < n_holes ? place[t] : first + t - n_holes;
        place[t] = p;
        c->pos[p] = pos[t]; c->rot[p] = rot[t]; c->score[p] = 0.0f;
    }
}
__global__ void append_rows_kernel(List *lists, const int *place, const float *qkv, int T, int n_heads, int n_kv_heads, int head_dim, bool f16) {
    int g = blockIdx.y, t = blockIdx.x;
    const List *c = lists + g;
    size_t at = place[(size_t)g * T + t] * (size_t)head_dim * (f16 ? 2 : 4);
    const float *k = qkv + ((size_t)t * (n_heads + 2 * n_kv_heads) + n_heads + g) * head_dim;
    store_row(c->k + at, k, head_dim, f16);
    store_row(c->v + at, k + (size_t)n_kv_heads * head_dim, head_dim, f16);
}

static void record_append(KV *kv, int layer, const int *seq, int T);   // for replay, which appends too

// What the device is about to do to the lengths, done on the host.
static void count_append(KV *kv, int layer, const int *seq, int T) {
    for (int t = 0; t < T; t++) {
        if (seq[t] < 0 || seq[t] >= kv->n_seqs) die(NULL, "kv_append: there is no sequence %d", seq[t]);
        int *len = lens_of(kv, kv->len, seq[t], layer), *used = lens_of(kv, kv->used, seq[t], layer);
        const List *c = kv->h_lists + ((size_t)layer * kv->n_seqs + seq[t]) * kv->n_kv_heads;
        for (int g = 0; g < kv->n_kv_heads; g++) {
            if (len[g] == c[g].room) die("call kv_reserve first", "kv_append: layer %d, sequence %d, head %d: no place beyond its %d", layer, seq[t], g, len[g]);
            if (len[g]++ == used[g]) used[g]++;
        }
    }
}

static void kv_append(KV *kv, int layer, const float *qkv, const Rows *rows, int n_heads) {
    int T = rows->T, threads = kv->head_dim > 64 ? 128 : kv->head_dim > 32 ? 64 : 32;
    bool f16 = kv->type == F16;
    if (T < 1) return;
    const int *seq = on_host(rows->seq, "Rows.seq");
    count_append(kv, layer, seq, T);
    record_append(kv, layer, rows->seq, T);
    if (T == rows->B) {
        LAUNCH(append_kernel, dim3(kv->n_kv_heads, T), threads, 0, lists_of(kv, layer, 0), qkv, rows->seq, rows->pos, rows->rot,
               n_heads, kv->n_kv_heads, kv->head_dim, f16);
        return;
    }
    int *place = (int *)scratch(S_PLACE, (size_t)T * kv->n_kv_heads * sizeof(int));
    LAUNCH(places_kernel, kv->n_kv_heads, 256, 0, place, lists_of(kv, layer, seq[0]), rows->pos, rows->rot, T);
    LAUNCH(append_rows_kernel, dim3(T, kv->n_kv_heads), threads, 0, lists_of(kv, layer, seq[0]), place, qkv, T, n_heads, kv->n_kv_heads, kv->head_dim, f16);
}

// ----------------------------------------------------------------------------
// kv_attend: a prompt goes through flash_kernel; a decode step has one query a sequence and splits the keys over blocks

enum { SPLITS = 16 };                // blocks that share a head's places, whatever their number: so a row's bits stay the same

// A block for (split, head, row). W neighbouring lanes take a key together, 16 bytes each, and 4 keys at a time; each such
// group keeps a running maximum, sum and weighted value (Milakov & Gimelshein 2018, arXiv:1805.02867), joined at the end.
template <int D, bool F32KV> __global__ void __launch_bounds__(128) decode_kernel(float *part, float *logits, const float *q, const List *lists,
        const int *seq, const int *pos, const uint8_t *visible, int visible_stride, int n_heads, int n_kv_heads, int max_room) {
    constexpr int N = F32KV ? 4 : 8, C = D / N, W = C > 16 ? 32 : C > 8 ? 16 : C > 4 ? 8 : C > 2 ? 4 : C, GROUPS = 128 / W;
    __shared__ float group_acc[GROUPS][D + 2];                   // acc, maximum, sum
    int split = blockIdx.x, head = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % W, mine = threadIdx.x / W;
    const List *c = lists + seq[b] * n_kv_heads + head / (n_heads / n_kv_heads);
    int n = c->used, each = (n + SPLITS - 1) / SPLITS, begin = split * each, end = min(begin + each, n);
    size_t size = D * (F32KV ? 4 : 2);
    float x[N], acc[N], most = -INFINITY, sum = 0.0f;
    UNROLL for (int i = 0; i < N; i++) {
        acc[i] = 0.0f;
        x[i] = lane < C ? q[((size_t)b * (n_heads + 2 * n_kv_heads) + head) * D + lane * N + i] * (LOG2E / sqrtf(D)) : 0.0f;
    }
    for (int j0 = begin; j0 < end; j0 += 4 * GROUPS) {
        uint4 k[4], v[4];
        float s[4], top = most;
        UNROLL for (int u = 0; u < 4; u++) {
            int j = j0 + u * GROUPS + mine;
            bool there = j < end && lane < C;
            k[u] = there ? load16(c->k + j * size + lane * 16) : make_uint4(0, 0, 0, 0);
            v[u] = there ? load16(c->v + j * size + lane * 16) : make_uint4(0, 0, 0, 0);
        }
        UNROLL for (int u = 0; u < 4; u++) {
            int j = j0 + u * GROUPS + mine, p = j < end ? c->pos[j] : -1;
            float kk[N];
            unpack<F32KV ? F32 : F16>(kk, k[u]);
            s[u] = 0.0f;
            UNROLL for (int i = 0; i < N; i++) s[u] = fmaf(x[i], kk[i], s[u]);
            UNROLL for (int i = W / 2; i; i /= 2) s[u] += __shfl_xor_sync(ALL_LANES, s[u], i);
            if (p < 0 || p > pos[b] || (visible && !visible[(size_t)b * visible_stride + p])) s[u] = -INFINITY;
            if (logits && lane == 0 && j < end) logits[((size_t)b * n_heads + head) * max_room + j] = s[u];
            top = fmaxf(top, s[u]);
        }
        if (top == -INFINITY) continue;
        float shrink = exp2_fast(most - top);
        most = top;
        sum *= shrink;
        UNROLL for (int i = 0; i < N; i++) acc[i] *= shrink;
        UNROLL for (int u = 0; u < 4; u++) {
            float p = exp2_fast(s[u] - most), vv[N];
            unpack<F32KV ? F32 : F16>(vv, v[u]);
            sum += p;
            UNROLL for (int i = 0; i < N; i++) acc[i] = fmaf(p, vv[i], acc[i]);
        }
    }
    if (lane < C) for (int i = 0; i < N; i++) group_acc[mine][lane * N + i] = acc[i];
    if (lane == 0) { group_acc[mine][D] = most; group_acc[mine][D + 1] = sum; }
    __syncthreads();
    float top = -INFINITY;
    for (int i = 0; i < GROUPS; i++) top = fmaxf(top, group_acc[i][D]);
    float *to = part + (((size_t)b * n_heads + head) * SPLITS + split) * (D + 2);
    for (int d = threadIdx.x; d < D + 2; d += 128) {
        float v = 0.0f;
        if (top != -INFINITY) for (int i = 0; i < GROUPS; i++) v = fmaf(group_acc[i][d], exp2_fast(group_acc[i][D] - top), v);
        to[d] = d == D ? top : v;
    }
}

// A block for (kv head, row): joins the splits of its query heads, then lets them vote.
__global__ void join_kernel(float *o, float *lse, const float *part, const float *logits, const List *lists, const int *seq,
                            int n_heads, int n_kv_heads, int D, int max_room) {
    int g = blockIdx.x, b = blockIdx.y, group = n_heads / n_kv_heads;
    for (int h = g * group; h < (g + 1) * group; h++) {
        const float *p = part + ((size_t)b * n_heads + h) * SPLITS * (D + 2);
        float top = -INFINITY, sum = 0.0f;
        for (int s = 0; s < SPLITS; s++) top = fmaxf(top, p[s * (D + 2) + D]);
        float base = top == -INFINITY ? 0.0f : top;
        for (int s = 0; s < SPLITS; s++) sum = fmaf(p[s * (D + 2) + D + 1], exp2_fast(p[s * (D + 2) + D] - base), sum);
        for (int d = threadIdx.x; d < D; d += blockDim.x) {
            float v = 0.0f;
            for (int s = 0; s < SPLITS; s++) v = fmaf(p[s * (D + 2) + d], exp2_fast(p[s * (D + 2) + D] - base), v);
            o[((size_t)b * n_heads + h) * D + d] = sum > 0.0f ? v / sum : 0.0f;
        }
        if (threadIdx.x == 0) lse[(size_t)b * n_heads + h] = (top + log2f(sum)) / LOG2E;
    }
    if (!logits) return;
    __syncthreads();                 // lse is written
    const List *c = lists + seq[b] * n_kv_heads + g;
    for (int j = threadIdx.x; j < c->used; j += blockDim.x) {
        float sum = 0.0f;
        for (int h = g * group; h < (g + 1) * group; h++) {
            float l = lse[(size_t)b * n_heads + h] * LOG2E;
            if (l != -INFINITY) sum += exp2_fast(logits[((size_t)b * n_heads + h) * max_room + j] - l);
        }
        c->score[j] += sum / group;
    }
}

// The lists of what may be seen, on the device: one a row of a decode step, one for all rows of a prompt; NULL: all.
static uint8_t *visible_lists(const Rows *rows, const uint8_t *const *h_visible, int *stride) {
    bool any = false;
    *stride = 0;
    if (!h_visible) return NULL;
    const int *seq = on_host(rows->seq, "Rows.seq"), *pos = on_host(rows->pos, "Rows.pos");
    for (int t = 0; t < rows->T; t++) {
        if (h_visible[seq[t]]) any = true;
        if (pos[t] >= *stride) *stride = pos[t] + 1;             // keys behind the last query are not looked up
    }
    if (!any) return NULL;
    uint8_t *h = (uint8_t *)need(rows->B, *stride);
    for (int b = 0; b < rows->B; b++) {
        int n = rows->T == rows->B ? pos[b] + 1 : *stride;
        if (h_visible[seq[b]]) memcpy(h + (size_t)b * *stride, h_visible[seq[b]], n); else memset(h + (size_t)b * *stride, 1, n);
    }
    uint8_t *d = (uint8_t *)upload(S_VISIBLE, h, (size_t)rows->B * *stride);
    free(h);
    return d;
}

template <int D, bool F32KV> static void decode(float *part, float *logits, const float *q, const KV *kv, int layer, const Rows *rows, int n_heads,
                                                const uint8_t *visible, int stride) {
    LAUNCH((decode_kernel<D, F32KV>), dim3(SPLITS, n_heads, rows->T), 128, 0, part, logits, q, lists_of(kv, layer, 0), rows->seq, rows->pos,
           visible, stride, n_heads, kv->n_kv_heads, kv->max_room);
}

static void kv_attend(float *o, float *lse, KV *kv, int layer, const float *qkv, const Rows *rows, int n_heads, const uint8_t *const *h_visible, bool vote) {
    int T = rows->T, stride, q_stride = (n_heads + 2 * kv->n_kv_heads) * kv->head_dim, group = n_heads / kv->n_kv_heads;
    if (T < 1) return;
    uint8_t *visible = visible_lists(rows, h_visible, &stride);
    if (T != rows->B) {
        const List *lists = lists_of(kv, layer, on_host(rows->seq, "Rows.seq")[0]);
        Keys keys = {};
        if (kv->type == F16) FOR_HEAD_DIM(kv->head_dim, (flash<D, false>(o, lse, qkv, q_stride, keys, lists, group, rows->pos, visible, T, n_heads)))
        else                 FOR_HEAD_DIM(kv->head_dim, (flash<D, true>(o, lse, qkv, q_stride, keys, lists, group, rows->pos, visible, T, n_heads)))
        return;
    }
    float *part = (float *)scratch(S_PARTS, (size_t)T * n_heads * SPLITS * (kv->head_dim + 2) * sizeof(float));
    float *logits = vote ? (float *)scratch(S_LOGITS, (size_t)T * n_heads * kv->max_room * sizeof(float)) : NULL;
    if (kv->type == F16) FOR_HEAD_DIM(kv->head_dim, (decode<D, false>(part, logits, qkv, kv, layer, rows, n_heads, visible, stride)))
    else                 FOR_HEAD_DIM(kv->head_dim, (decode<D, true>(part, logits, qkv, kv, layer, rows, n_heads, visible, stride)))
    LAUNCH(join_kernel, dim3(kv->n_kv_heads, T), 128, 0, o, lse, part, logits, lists_of(kv, layer, 0), rows->seq, n_heads, kv->n_kv_heads, kv->head_dim, kv->max_room);
}

// ----------------------------------------------------------------------------
// kv_vote, kv_column_sums, kv_map: what the keys of a prompt received

// A block for (TILE keys, query head): the keys stay in shared memory, the queries from `from` on pass by, 64 at a time.
// Each thread adds up its two columns in the order of the queries; lanes and warps are joined in a fixed order at the end.
template <int D, bool F32KV> __global__ void __launch_bounds__(128, 4) column_kernel(float *sums, const float *q, int q_stride, const List *lists,
        const float *lse, const int *q_pos, const uint8_t *visible, int from, int T, int n_heads, int group, int max_used) {
    using F = Flash<D, F32KV>;
    DYNAMIC_SHARED(shared);
    __shared__ int seen[F::TILE];
    __shared__ float column[4][F::TILE];
    char *sq = shared, *sk = sq + F::Q_BYTES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, j0 = blockIdx.x * F::TILE;
    const List *c = lists + head / group;
    size_t size = D * (F32KV ? 4 : 2);
    Keys keys = { c->k, c->v, size, c->pos, min(c->used, j0 + F::TILE) };
    float sum[F::TILE / 8][2];
    UNROLL for (int i = 0; i < F::TILE / 8; i++) sum[i][0] = sum[i][1] = 0.0f;
    if (next_tile<F::TILE>(seen, keys, j0, q_pos[T - 1], visible) < keys.n) {
        int earliest = INT_MAX;
        for (int i = 0; i < F::TILE; i++) earliest = min(earliest, seen[i]);
        load_keys<D, F32KV>(sk, c->k + j0 * size, size, c->used - j0);
        cp_async_commit();
        cp_async_wait<0>();
        for (int t0 = from; t0 < T; t0 += F::QUERIES) {
            if (q_pos[min(t0 + F::QUERIES, T) - 1] < earliest) continue;         // none of these sees any of the keys
            __syncthreads();         // all are done with the queries before
            load_split<D, F::QUERIES, F::ROW>(sq, (const char *)(q + (size_t)t0 * q_stride + head * D), q_stride * sizeof(float), T - t0);
            __syncthreads();
            float s[F::TILE / 8][4];
            query_key<D, F32KV>(s, sq + warp * 16 * F::ROW, sk);
            UNROLL for (int h = 0; h < 2; h++) {
                int t = t0 + warp * 16 + lane / 4 + 8 * h, my_pos = t < T ? q_pos[t] : -1;
                float l = t < T ? lse[(size_t)t * n_heads + head] * LOG2E : -INFINITY;
                if (l == -INFINITY) my_pos = -1;
                UNROLL for (int i = 0; i < F::TILE / 8 * 2; i++)
                    if (seen[i / 2 * 8 + lane % 4 * 2 + i % 2] <= my_pos) sum[i / 2][i % 2] += exp2_fast(fmaf(s[i / 2][2 * h + i % 2], LOG2E / sqrtf(D), -l));
            }
        }
    }
    UNROLL for (int i = 0; i < F::TILE / 8 * 2; i++) {
        float v = sum[i / 2][i % 2];
        for (int x = 4; x < 32; x *= 2) v += __shfl_xor_sync(ALL_LANES, v, x);
        if (lane < 4) column[warp][i / 2 * 8 + lane * 2 + i % 2] = v;
    }
    __syncthreads();
    int i = threadIdx.x;
    if (i < F::TILE && j0 + i < max_used) sums[(size_t)head * max_used + j0 + i] = column[0][i] + column[1][i] + column[2][i] + column[3][i];
}

template <int D, bool F32KV> static void columns(float *sums, const float *qkv, const KV *kv, const List *lists, const float *lse, const Rows *rows,
                                                 int n_heads, const uint8_t *visible, int n, int max_used) {
    using F = Flash<D, F32KV>;
    int bytes = F::Q_BYTES + F::KV_BYTES;
    ALLOW_SHARED((column_kernel<D, F32KV>), bytes);
    LAUNCH((column_kernel<D, F32KV>), dim3(ceil_div(max_used, F::TILE), n_heads), 128, bytes, sums, qkv, (n_heads + 2 * kv->n_kv_heads) * D, lists,
           lse, rows->pos, visible, rows->T - n, rows->T, n_heads, n_heads / kv->n_kv_heads, max_used);
}

// sums (n_heads, *max_used): what each place received from the last n queries of each head
static float *column_sums(const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                          const uint8_t *const *h_visible, int n, int *max_used) {
    int stride, seq = on_host(rows->seq, "Rows.seq")[0];
    const int *used = lens_of(kv, kv->used, seq, layer);
    const List *lists = lists_of(kv, layer, seq);
    if (n > rows->T) n = rows->T;
    *max_used = 0;
    for (int g = 0; g < kv->n_kv_heads; g++) if (used[g] > *max_used) *max_used = used[g];
    if (!*max_used || n < 1) return NULL;
    uint8_t *visible = visible_lists(rows, h_visible, &stride);
    float *sums = (float *)scratch(S_SUMS, (size_t)n_heads * *max_used * sizeof(float));
    if (kv->type == F16) FOR_HEAD_DIM(kv->head_dim, (columns<D, false>(sums, qkv, kv, lists, lse, rows, n_heads, visible, n, *max_used)))
    else                 FOR_HEAD_DIM(kv->head_dim, (columns<D, true>(sums, qkv, kv, lists, lse, rows, n_heads, visible, n, *max_used)))
    return sums;
}

__global__ void vote_kernel(List *lists, const float *sums, int group, int max_used) {
    const List *c = lists + blockIdx.y;
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= c->used || c->pos[j] < 0) return;
    float sum = 0.0f;
    for (int h = 0; h < group; h++) sum += sums[(size_t)(blockIdx.y * group + h) * max_used + j];
    c->score[j] += sum / group;
}

static void kv_vote(KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads, const uint8_t *const *h_visible, int n) {
    int max_used;
    if (rows->T < 1) return;
    float *sums = column_sums(kv, layer, qkv, lse, rows, n_heads, h_visible, n, &max_used);
    if (!sums) return;
    List *lists = lists_of(kv, layer, on_host(rows->seq, "Rows.seq")[0]);
    LAUNCH(vote_kernel, dim3(ceil_div(max_used, 128), kv->n_kv_heads), 128, 0, lists, sums, n_heads / kv->n_kv_heads, max_used);
}

// The place of the token at `pos` in a head, -1: it is not there. Most often it is where head 0 has it.
static __device__ int find_place(const List *c, int pos, int guess) {
    if (guess < c->used && c->pos[guess] == pos) return guess;
    for (int i = 0; i < c->used; i++) if (c->pos[i] == pos) return i;
    return -1;
}

__global__ void column_mean_kernel(float *out, const float *sums, const List *lists, const int *order, int n_heads, int group, int max_used) {
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= lists->len) return;
    float sum = 0.0f;
    for (int h = 0; h < n_heads; h++) {
        int place = find_place(lists + h / group, lists->pos[order[j]], order[j]);
        if (place >= 0) sum += sums[(size_t)h * max_used + place];
    }
    out[j] = sum / n_heads;
}

// The order of one layer's head 0: all heads of that layer are ordered, offsets `stride` apart.
static int *layer_order(const KV *kv, int seq, int layer, int *stride) {
    int *h = (int *)need(kv->n_kv_heads, sizeof(int)), *len = lens_of(kv, kv->len, seq, layer);
    *stride = 1;
    for (int g = 0; g < kv->n_kv_heads; g++) if (len[g] > *stride) *stride = len[g];
    for (int g = 0; g < kv->n_kv_heads; g++) h[g] = g * *stride;
    int *offset = (int *)upload(S_OFFSET, h, kv->n_kv_heads * sizeof(int)), *order = (int *)scratch(S_ORDER, (size_t)kv->n_kv_heads * *stride * sizeof(int));
    LAUNCH(order_kernel, kv->n_kv_heads, 256, 0, order, offset, lists_of(kv, layer, seq), kv->n_seqs, kv->n_kv_heads);
    free(h);
    return order;
}

static void kv_column_sums(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads,
                           const uint8_t *const *h_visible, int n) {
    int max_used, stride, seq = on_host(rows->seq, "Rows.seq")[0], len = lens_of(kv, kv->len, seq, layer)[0];
    if (len < 1) return;
    memset(h_out, 0, len * sizeof(float));
    float *sums = rows->T > 0 ? column_sums(kv, layer, qkv, lse, rows, n_heads, h_visible, n, &max_used) : NULL;
    if (!sums) return;
    int *order = layer_order(kv, seq, layer, &stride);
    float *out = (float *)scratch(S_OUT, len * sizeof(float));
    LAUNCH(column_mean_kernel, ceil_div(len, 128), 128, 0, out, sums, lists_of(kv, layer, seq), order, n_heads, n_heads / kv->n_kv_heads, max_used);
    get(h_out, out, len * sizeof(float));
}

// For pictures alone, so plain: a thread for (slot, query), all heads, all of head_dim.
__global__ void map_kernel(float *out, const float *qkv, const List *lists, const int *order, const float *lse, const int *q_pos, const uint8_t *visible,
                           int n_heads, int n_kv_heads, int head_dim, bool f16) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y;
    if (j >= lists->len) return;
    int pos = lists->pos[order[j]];
    float sum = 0.0f;
    if (pos <= q_pos[t] && (!visible || visible[pos]))
        for (int h = 0; h < n_heads; h++) {
            const List *c = lists + h / (n_heads / n_kv_heads);
            const float *q = qkv + ((size_t)t * (n_heads + 2 * n_kv_heads) + h) * head_dim;
            int place = find_place(c, pos, order[j]);
            float s = 0.0f;
            if (place < 0) continue;
            for (int i = 0; i < head_dim; i++) s = fmaf(q[i], kv_number(c->k + (size_t)place * head_dim * (f16 ? 2 : 4), i, f16), s);
            sum += expf(s / sqrtf(head_dim) - lse[(size_t)t * n_heads + h]);
        }
    out[(size_t)t * lists->len + j] = sum / n_heads;
}

static void kv_map(float *h_out, const KV *kv, int layer, const float *qkv, const float *lse, const Rows *rows, int n_heads, const uint8_t *const *h_visible) {
    int stride, v_stride, seq = on_host(rows->seq, "Rows.seq")[0], len = lens_of(kv, kv->len, seq, layer)[0];
    if (len < 1 || rows->T < 1) return;
    uint8_t *visible = visible_lists(rows, h_visible, &v_stride);
    int *order = layer_order(kv, seq, layer, &stride);
    float *out = (float *)scratch(S_OUT, (size_t)rows->T * len * sizeof(float));
    LAUNCH(map_kernel, dim3(ceil_div(len, 128), rows->T), 128, 0, out, qkv, lists_of(kv, layer, seq), order, lse, rows->pos, visible,
           n_heads, kv->n_kv_heads, kv->head_dim, kv->type == F16);
    get(h_out, out, (size_t)rows->T * len * sizeof(float));
}

// kv_scores_clear
__global__ void scores_clear_kernel(List *lists, int n_seqs, int n_kv_heads) {
    const List *c = head_list(lists, blockIdx.x, n_seqs, n_kv_heads);
    for (int i = threadIdx.x; i < c->used; i += blockDim.x) c->score[i] = 0.0f;
}

static void kv_scores_clear(KV *kv, int seq) {
    LAUNCH(scores_clear_kernel, n_heads_of(kv), 256, 0, lists_of(kv, 0, seq), kv->n_seqs, kv->n_kv_heads);
}

// ----------------------------------------------------------------------------
// kv_nearest

// A plan as lists, a block a head: kept[offset + i] = the i-th slot that stays, from the front; those that leave follow them in
// order. count[head]: how many stay. Slots are numbered in token order.
__global__ void plan_kernel(int *kept, int *count, const uint8_t *keep, const int *offset, List *lists, int n_seqs, int n_kv_heads) {
    __shared__ int warp_count[8];
    int n = head_list(lists, blockIdx.x, n_seqs, n_kv_heads)->len, stay = 0, at = 0, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    keep += offset[blockIdx.x];
    kept += offset[blockIdx.x];
    for (int i0 = 0; i0 < n; i0 += 256) stay += __syncthreads_count(i0 + (int)threadIdx.x < n && keep[i0 + threadIdx.x]);
    for (int i0 = 0; i0 < n; i0 += 256) {
        int i = i0 + threadIdx.x;
        bool mine = i < n && keep[i];
        unsigned of_warp = __ballot_sync(ALL_LANES, mine);
        if (lane == 0) warp_count[warp] = __popc(of_warp);
        __syncthreads();
        int before = at + __popc(of_warp & ((1u << lane) - 1));
        for (int w = 0; w < 8; w++) { if (w < warp) before += warp_count[w]; at += warp_count[w]; }
        if (i < n) kept[mine ? before : stay + i - before] = i;
        __syncthreads();             // all are done with warp_count
    }
    if (threadIdx.x == 0) count[blockIdx.x] = stay;
}

// 1 / |k| of every slot, packed in token order; a warp a slot
__global__ void inverse_norm_kernel(float *inverse, List *lists, const int *order, int stride, int head_dim, bool f16) {
    const List *c = lists + blockIdx.y;
    int i = blockIdx.x * 8 + threadIdx.x / 32;
    float ss = 0.0f;
    if (i >= c->len) return;
    const char *k = c->k + order[(size_t)blockIdx.y * stride + i] * (size_t)head_dim * (f16 ? 2 : 4);
    for (int e = threadIdx.x % 32; e < head_dim; e += 32) { float v = kv_number(k, e, f16); ss += v * v; }
    inverse[(size_t)blockIdx.y * stride + i] = 1.0f / fmaxf(sqrtf(warp_sum(ss)), 1e-12f);
}

// A block for (64 leaving slots, head): their keys against all kept ones, 64 at a time, as a product of tiles in float.
__global__ void __launch_bounds__(256) nearest_kernel(int *into, float *w, List *lists, const int *order, const float *inverse, const int *kept,
                                                      const int *count, int stride, int head_dim, bool f16) {
    __shared__ float as[16][68], bs[16][68];
    __shared__ float best_value[64][17];
    __shared__ int best_slot[64][17];
    const List *c = lists + blockIdx.y;
    size_t base = (size_t)blockIdx.y * stride, size = (size_t)head_dim * (f16 ? 2 : 4);
    int stay = count[blockIdx.y], gone = c->len - stay, i0 = blockIdx.x * 64, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    if (i0 >= gone || !stay) return;
    float value[4] = { -INFINITY, -INFINITY, -INFINITY, -INFINITY };
    int slot[4] = { INT_MAX, INT_MAX, INT_MAX, INT_MAX };
    for (int j0 = 0; j0 < stay; j0 += 64) {
        float acc[4][4] = {};
        for (int e0 = 0; e0 < head_dim; e0 += 16) {
            __syncthreads();
            for (int x = threadIdx.x; x < 64 * 16; x += 256) {
                int r = x / 16, e = e0 + x % 16, a = kept[base + stay + min(i0 + r, gone - 1)], b = kept[base + min(j0 + r, stay - 1)];
                as[x % 16][r] = e < head_dim ? kv_number(c->k + order[base + a] * size, e, f16) * inverse[base + a] : 0.0f;
                bs[x % 16][r] = e < head_dim ? kv_number(c->k + order[base + b] * size, e, f16) * inverse[base + b] : 0.0f;
            }
            __syncthreads();
            UNROLL for (int e = 0; e < 16; e++)
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) acc[i][j] = fmaf(as[e][ty * 4 + i], bs[e][tx * 4 + j], acc[i][j]);
        }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++)
                if (j0 + tx * 4 + j < stay && acc[i][j] > value[i]) { value[i] = acc[i][j]; slot[i] = kept[base + j0 + tx * 4 + j]; }
    }
    for (int i = 0; i < 4; i++) { best_value[ty * 4 + i][tx] = value[i]; best_slot[ty * 4 + i][tx] = slot[i]; }
    __syncthreads();
    int r = threadIdx.x;
    if (r >= 64 || i0 + r >= gone) return;
    int best = 0;                    // the first maximum: of equal values the lower slot
    for (int x = 1; x < 16; x++)
        if (best_value[r][x] > best_value[r][best] || (best_value[r][x] == best_value[r][best] && best_slot[r][x] < best_slot[r][best])) best = x;
    into[base + kept[base + stay + i0 + r]] = best_slot[r][best];
    w[base + kept[base + stay + i0 + r]] = best_value[r][best];
}

static void kv_nearest(int *h_into, float *h_w, const KV *kv, int seq, int layer, const bool *h_keep) {
    int n = kv->n_kv_heads, stride, *len = lens_of(kv, kv->len, seq, layer), at = 0;
    int *order = layer_order(kv, seq, layer, &stride);
    size_t total = (size_t)n * stride;
    const int *offset = (const int *)scratch(S_OFFSET, n * sizeof(int));
    uint8_t *keep = (uint8_t *)need(total, 1);
    int *to = (int *)need(total, sizeof(int));
    float *tw = (float *)need(total, sizeof(float));
    for (int g = 0; g < n; at += len[g++]) memcpy(keep + (size_t)g * stride, h_keep + at, len[g]);
    uint8_t *d_keep = (uint8_t *)upload(S_KEEP, keep, total);
    int *kept = (int *)scratch(S_KEPT, total * sizeof(int)), *count = (int *)scratch(S_COUNT, n * sizeof(int)), *into = (int *)scratch(S_INTO, total * sizeof(int));
    float *w = (float *)scratch(S_W, total * sizeof(float)), *inverse = (float *)scratch(S_SUMS, total * sizeof(float));
    List *lists = lists_of(kv, layer, seq);
    bool f16 = kv->type == F16;
    LAUNCH(plan_kernel, n, 256, 0, kept, count, d_keep, offset, lists, kv->n_seqs, n);
    LAUNCH(inverse_norm_kernel, dim3(ceil_div(stride, 8), n), 256, 0, inverse, lists, order, stride, kv->head_dim, f16);
    LAUNCH(nearest_kernel, dim3(ceil_div(stride, 64), n), 256, 0, into, w, lists, order, inverse, kept, count, stride, kv->head_dim, f16);
    get(to, into, total * sizeof(int));
    get(tw, w, total * sizeof(float));
    at = 0;
    for (int g = 0; g < n; at += len[g++]) {
        bool any = false;
        for (int i = 0; i < len[g]; i++) any |= h_keep[at + i];
        for (int i = 0; any && i < len[g]; i++) if (!h_keep[at + i]) { h_into[at + i] = to[(size_t)g * stride + i]; h_w[at + i] = tw[(size_t)g * stride + i]; }
    }
    free(keep); free(to); free(tw);
}

// ----------------------------------------------------------------------------
// kv_apply: into scratch memory, merged and in token order, then back; as many layers at a time as fit into move_bytes, one at least

static size_t move_bytes = 64 << 20;     // a test takes less
typedef struct { char *k, *v; int *pos, *rot; float *score; int stride; } Moved;     // (heads of these layers, stride) slots

// A warp for each slot that stays. Its sources are looked for 32 slots at a time and added in ascending order.
__global__ void merge_kernel(Moved to, List *lists, const int *order, const int *offset, const int *kept, const int *count, const int *into, const float *w,
                             float self, const float *cos_sin, int head_dim, bool f16, int n_seqs, int n_kv_heads) {
    int g = blockIdx.y, lane = threadIdx.x % 32, dest = blockIdx.x * 8 + threadIdx.x / 32;
    const List *list = head_list(lists, g, n_seqs, n_kv_heads);
    if (dest >= count[g]) return;
    order += offset[g]; kept += offset[g];
    if (into) { into += offset[g]; w += offset[g]; }
    int slot = kept[dest], place = order[slot], n = 0;
    size_t size = (size_t)head_dim * (f16 ? 2 : 4), at = (size_t)g * to.stride + dest;
    float k[4], v[4], own_k[4], own_v[4];        // this lane's numbers: head_dim is at most 128
    for (int i = 0; i < 4; i++) {
        int e = lane + 32 * i;
        k[i] = own_k[i] = e < head_dim ? kv_number(list->k + place * size, e, f16) : 0.0f;
        v[i] = own_v[i] = e < head_dim ? kv_number(list->v + place * size, e, f16) : 0.0f;
    }
    for (int i0 = 0; into && i0 < list->len; i0 += 32) {
        unsigned hits = __ballot_sync(ALL_LANES, i0 + lane < list->len && into[i0 + lane] == slot);
        for (; hits; hits &= hits - 1, n++) {
            int from = i0 + __ffs(hits) - 1, p = order[from];
            for (int i = 0; i < 4; i++) {
                int e = lane + 32 * i;
                if (e >= head_dim) break;
                k[i] += w[from] * kv_number(list->k + p * size, e, f16) + self * own_k[i];
                v[i] += w[from] * kv_number(list->v + p * size, e, f16) + self * own_v[i];
            }
        }
    }
    int rot = list->rot[place], half = head_dim / 2;
    for (int i = 0; i < 4; i++) {
        int e = lane + 32 * i;
        k[i] /= 1 + n;
        v[i] /= 1 + n;
        if (e >= head_dim) continue;
        if (f16) ((uint16_t *)(to.v + at * size))[e] = float_to_f16(v[i]); else ((float *)(to.v + at * size))[e] = v[i];
        if (cos_sin) continue;       // the key's other half is another lane's: below
        if (f16) ((uint16_t *)(to.k + at * size))[e] = float_to_f16(k[i]); else ((float *)(to.k + at * size))[e] = k[i];
    }
    if (cos_sin) {                   // from the position it is turned to now to `dest`
        __shared__ float row[8][128];
        float *u = row[threadIdx.x / 32], sign = dest < rot ? -1.0f : 1.0f;
        for (int i = 0; i < 4; i++) if (lane + 32 * i < head_dim) u[lane + 32 * i] = k[i];
        __syncwarp();
        for (int e = lane; e < half; e += 32) {
            const float *cs = cos_sin + ((size_t)abs(dest - rot) * half + e) * 2;
            float c = dest == rot ? 1.0f : cs[0], s = dest == rot ? 0.0f : sign * cs[1];
            float x = u[e] * c - u[e + half] * s, y = u[e + half] * c + u[e] * s;
            if (f16) { ((uint16_t *)(to.k + at * size))[e] = float_to_f16(x); ((uint16_t *)(to.k + at * size))[e + half] = float_to_f16(y); }
            else     { ((float *)(to.k + at * size))[e] = x; ((float *)(to.k + at * size))[e + half] = y; }
        }
        rot = dest;
    }
    if (lane == 0) { to.pos[at] = list->pos[place]; to.rot[at] = rot; to.score[at] = list->score[place]; }
}

__global__ void move_back_kernel(List *lists, Moved from, const int *count, size_t size, int n_seqs, int n_kv_heads) {
    List *c = head_list(lists, blockIdx.y, n_seqs, n_kv_heads);
    int g = blockIdx.y, i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, n = count[g];
    size_t at = (size_t)g * from.stride + i;
    if (i < n) {
        for (int b = lane * 16; b < (int)size; b += 32 * 16) {
            store16(c->k + i * size + b, load16(from.k + at * size + b));
            store16(c->v + i * size + b, load16(from.v + at * size + b));
        }
        if (lane == 0) { c->pos[i] = from.pos[at]; c->rot[i] = from.rot[at]; c->score[i] = from.score[at]; }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) { c->used = c->len = n; c->hole = -1; }
}

static int count_true(const bool *p, int n) {        // eight at a time: this happens at every token
    int sum = 0, i = 0;
    for (uint64_t u; i + 8 <= n; i += 8) { memcpy(&u, p + i, 8); sum += (int)(u * 0x0101010101010101 >> 56); }
    for (; i < n; i++) sum += p[i];
    return sum;
}

static void kv_apply(KV *kv, int seq, const bool *h_keep, const int *h_into, const float *h_w, float self, const float *cos_sin) {
    int n = n_heads_of(kv), longest, *len = lens_of(kv, kv->len, seq, 0), *used = lens_of(kv, kv->used, seq, 0);
    size_t total, size = kv_size(kv);
    int *offset = offsets(kv, seq, &total, &longest);
    if (!total) return;
    if (kv->head_dim > 128) die("-b cpu takes any", "the CUDA back-end has heads of up to 128 numbers, not of %d", kv->head_dim);
    int *order = token_order(kv, seq, offset, total);
    const uint8_t *keep = (const uint8_t *)upload(S_KEEP, h_keep, total);
    const int *into = h_into ? (const int *)upload(S_INTO, h_into, total * sizeof(int)) : NULL;
    const float *w = h_into ? (const float *)upload(S_W, h_w, total * sizeof(float)) : NULL;
    int *kept = (int *)scratch(S_KEPT, total * sizeof(int)), *count = (int *)scratch(S_COUNT, n * sizeof(int));
    LAUNCH(plan_kernel, n, 256, 0, kept, count, keep, offset, lists_of(kv, 0, seq), kv->n_seqs, kv->n_kv_heads);
    size_t layer_places = (size_t)kv->n_kv_heads * longest, fit = move_bytes / (layer_places * (2 * size + 12));
    int layers = fit < 1 ? 1 : fit < (size_t)kv->n_layers ? (int)fit : kv->n_layers;
    size_t places = layers * layer_places;
    char *k = (char *)scratch(S_MOVE, places * (2 * size + 12));
    int *pos = (int *)(k + 2 * places * size);
    Moved to = { k, k + places * size, pos, pos + places, (float *)pos + 2 * places, longest };
    for (int l = 0; l < kv->n_layers; l += layers) {
        int heads = min(layers, kv->n_layers - l) * kv->n_kv_heads, first = l * kv->n_kv_heads;
        dim3 grid(ceil_div(longest, 8), heads);
        LAUNCH(merge_kernel, grid, 256, 0, to, lists_of(kv, l, seq), order, offset + first, kept, count + first, into, w, self, cos_sin,
               kv->head_dim, kv->type == F16, kv->n_seqs, kv->n_kv_heads);
        LAUNCH(move_back_kernel, grid, 256, 0, lists_of(kv, l, seq), to, count + first, size, kv->n_seqs, kv->n_kv_heads);
    }
    for (int i = 0; i < n; i++) {
        used[i] = count_true(h_keep, len[i]);
        h_keep += len[i];
        len[i] = used[i];
    }
}

// ----------------------------------------------------------------------------
// kv_drop, kv_drop_lowest: a block a head; what leaves becomes a hole

// The position of the slot that is number `rank` in token order: the smallest p with rank + 1 slots up to p. Bit by bit.
static __device__ int pos_of_rank(const List *c, int rank) {
    int p = 0;
    for (int bit = 1 << 30; bit; bit /= 2) {
        int n = 0, below = p + bit;
        for (int i0 = 0; i0 < c->used; i0 += blockDim.x) {
            int i = i0 + threadIdx.x;
            n += __syncthreads_count(i < c->used && c->pos[i] >= 0 && c->pos[i] < below);
        }
        if (n <= rank) p = below;
    }
    return p;
}

static __device__ void make_hole(List *c, int place) {
    c->pos[place] = -2 - c->hole;
    c->hole = place;
    c->len--;
}

__global__ void drop_kernel(List *lists, const int *slot, int n_seqs, int n_kv_heads) {
    List *c = head_list(lists, blockIdx.x, n_seqs, n_kv_heads);
    if (slot[blockIdx.x] < 0) return;
    int pos = pos_of_rank(c, slot[blockIdx.x]), used = c->used;
    __syncthreads();
    for (int i = threadIdx.x; i < used; i += blockDim.x) if (c->pos[i] == pos) make_hole(c, i);
}

static void kv_drop(KV *kv, int seq, const int *h_slot) {
    int n = n_heads_of(kv), *len = lens_of(kv, kv->len, seq, 0);
    for (int i = 0; i < n; i++) {
        if (h_slot[i] >= len[i]) die(NULL, "kv_drop: slot %d of a head that holds %d", h_slot[i], len[i]);
        if (h_slot[i] >= 0) len[i]--;
    }
    LAUNCH(drop_kernel, n, 256, 0, lists_of(kv, 0, seq), (const int *)upload(S_KEEP, h_slot, n * sizeof(int)), kv->n_seqs, kv->n_kv_heads);
}

__global__ void drop_lowest_kernel(List *lists, int lo, int from_end, int n_seqs, int n_kv_heads) {
    __shared__ unsigned long long warp_least[8];
    List *c = head_list(lists, blockIdx.x, n_seqs, n_kv_heads);
    int n = c->len, used = c->used;
    if (lo >= n - from_end) return;
    int first = pos_of_rank(c, lo), last = pos_of_rank(c, n - from_end - 1);
    unsigned long long least = ~0ull, mine = ~0ull;  // score and position as one number: of equal scores the first leaves
    int place = -1;
    for (int i = threadIdx.x; i < used; i += 256) {
        if (c->pos[i] < first || c->pos[i] > last) continue;
        unsigned u = __float_as_uint(c->score[i]);
        u = u & 0x80000000u ? ~u : u | 0x80000000u;              // orders like the float
        unsigned long long key = (unsigned long long)u << 32 | (unsigned)c->pos[i];
        if (key < mine) { mine = key; place = i; }
    }
    least = mine;
    for (int i = 16; i; i /= 2) least = min(least, __shfl_xor_sync(ALL_LANES, least, i));
    if (threadIdx.x % 32 == 0) warp_least[threadIdx.x / 32] = least;
    __syncthreads();
    for (int i = 0; i < 8; i++) least = min(least, warp_least[i]);
    if (place >= 0 && mine == least) make_hole(c, place);
}

static void kv_drop_lowest(KV *kv, int seq, int lo, int from_end) {
    int n = n_heads_of(kv), *len = lens_of(kv, kv->len, seq, 0);
    if (lo < 0) lo = 0;
    if (from_end < 0) from_end = 0;
    LAUNCH(drop_lowest_kernel, n, 256, 0, lists_of(kv, 0, seq), lo, from_end, kv->n_seqs, kv->n_kv_heads);
    for (int i = 0; i < n; i++) if (lo < len[i] - from_end) len[i]--;
}

// ----------------------------------------------------------------------------
// cosine: a warp for each pair

__global__ void cosine_kernel(float *out, const float *a, int n, const float *b, int m, int dim) {
    int lane = threadIdx.x % 32;
    size_t i = (size_t)blockIdx.x * 8 + threadIdx.x / 32;
    if (i >= (size_t)n * m) return;
    const float *x = a + i / m * dim, *y = b + i % m * dim;
    float xy = 0.0f, xx = 0.0f, yy = 0.0f;
    for (int e = lane; e < dim; e += 32) { xy += x[e] * y[e]; xx += x[e] * x[e]; yy += y[e] * y[e]; }
    xy = warp_sum(xy); xx = warp_sum(xx); yy = warp_sum(yy);
    if (lane == 0) out[i] = xy / (fmaxf(sqrtf(xx), 1e-12f) * fmaxf(sqrtf(yy), 1e-12f));
}

static void cosine(float *h_out, const float *a, int n, const float *b, int m, int dim) {
    size_t pairs = (size_t)n * m;
    if (!pairs) return;
    float *out = (float *)scratch(S_OUT, pairs * sizeof(float));
    LAUNCH(cosine_kernel, ceil_div(pairs, 8), 256, 0, out, a, n, b, m, dim);
    get(h_out, out, pairs * sizeof(float));
}

// ----------------------------------------------------------------------------
// replay, record, stop: a pass as one CUDA graph
//
// The first pass under a key runs as it is, and makes whatever scratch memory it needs; the second is recorded (and run);
// from then on it is replayed, until something that it relies on has moved (`generation`).

typedef struct { KV *kv; int layer, T; const int *seq; } Append;
typedef struct { uint64_t key, generation; cudaGraphExec_t exec; Append *append; int n_append, max_append; } Graph;
static Graph graphs[32], *open_graph;
static int next_graph;

static void record_append(KV *kv, int layer, const int *seq, int T) {
    Graph *g = open_graph;
    if (!recording) return;
    if (g->n_append == g->max_append) {
        g->max_append = 2 * g->max_append + 64;
        g->append = (Append *)realloc(g->append, g->max_append * sizeof *g->append);
        if (!g->append) die(NULL, "%s:%d: out of memory", __FILE__, __LINE__);
    }
    g->append[g->n_append++] = Append{ kv, layer, T, seq };
}

static bool replay(uint64_t key) {
    for (Graph &g : graphs) {
        if (g.key != key || !g.exec || g.generation != generation) continue;
        for (int i = 0; i < g.n_append; i++) count_append(g.append[i].kv, g.append[i].layer, on_host(g.append[i].seq, "Rows.seq"), g.append[i].T);
        CHECK(cudaGraphLaunch(g.exec, stream));
        return true;
    }
    return false;
}

static void record(uint64_t key) {
    if (open_graph) die(NULL, "record: the pass before was not stopped");
    for (Graph &g : graphs) if (g.key == key) open_graph = &g;
    if (!open_graph) { open_graph = &graphs[next_graph]; next_graph = (next_graph + 1) % 32; }
    Graph *g = open_graph;
    bool known = g->key == key && g->generation == generation;
    if (g->exec) CHECK(cudaGraphExecDestroy(g->exec));
    g->exec = NULL;
    g->key = key;
    g->n_append = 0;
    if (!known) return;              // the first time: not recorded
    recording = true;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
}

static void stop(void) {
    Graph *g = open_graph;
    if (!g) die(NULL, "stop: nothing was recorded");
    open_graph = NULL;
    g->generation = generation;
    if (!recording) return;
    cudaGraph_t graph;
    recording = false;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiateWithFlags(&g->exec, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaGraphLaunch(g->exec, stream));
}

// ----------------------------------------------------------------------------

static const Kernels table = {
    .name = "cuda",
    .alloc = alloc, .release = release, .weight = weight, .put = put, .get = get,
    .embed = embed, .rows_copy = rows_copy,
    .rmsnorm = rmsnorm, .layernorm = layernorm, .silu_mul = silu_mul,
    .matmul = matmul, .rope = rope, .attend = attend,
    .kv_new = kv_new, .kv_free = kv_free, .kv_reserve = kv_reserve, .kv_clear = kv_clear, .kv_copy = kv_copy,
    .kv_bytes = kv_bytes, .kv_lens = kv_lens, .kv_read = kv_read,
    .kv_append = kv_append, .kv_attend = kv_attend, .kv_vote = kv_vote, .kv_column_sums = kv_column_sums, .kv_map = kv_map,
    .kv_scores_clear = kv_scores_clear, .kv_nearest = kv_nearest, .kv_apply = kv_apply, .kv_drop = kv_drop, .kv_drop_lowest = kv_drop_lowest,
    .cosine = cosine,
    .replay = replay, .record = record, .stop = stop,
};

// Which GPU: --device (it comes as VLM_DEVICE), else this process's number among those that the launcher started on this machine.
static int which_device(int n_devices) {
    static const char *const ranks[] = { "LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK" };
    const char *s = getenv("VLM_DEVICE");
    if (s && atoi(s) >= n_devices) die("nvidia-smi -L lists them; CUDA_VISIBLE_DEVICES hides some", "--device %s: there are %d", s, n_devices);
    if (s) return atoi(s);
    for (const char *name : ranks) if ((s = getenv(name))) return atoi(s) % n_devices;
    return 0;
}

// NULL and one line on standard error where there is no device that can run this.
extern "C" const Kernels *cuda(void) {
    static bool ready;
    int n = 0;
    if (ready) return &table;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n < 1) {
        fprintf(stderr, "cuda: no device: %s\n", e != cudaSuccess ? cudaGetErrorString(e) : "none was found");
        return NULL;
    }
    cudaDeviceProp about;
    int device = which_device(n);
    CHECK(cudaGetDeviceProperties(&about, device));
    if (about.major < 8) {
        fprintf(stderr, "cuda: %s has compute capability %d.%d, 8.0 is needed\n", about.name, about.major, about.minor);
        return NULL;
    }
    cudaFuncAttributes built;                // fails where this program holds no code for the device
    e = cudaSetDevice(device);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&built, rope_kernel);
    if (e == cudaSuccess) e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (e != cudaSuccess) {
        fprintf(stderr, "cuda: %s (compute capability %d.%d): %s\n", about.name, about.major, about.minor, cudaGetErrorString(e));
        return NULL;
    }
    n_multiprocessors = about.multiProcessorCount;
    ready = true;
    return &table;
}
