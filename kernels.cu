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
static uint64_t generation = 1;      // counts what a recorded graph relies on: memory that moved, room that grew

#define CHECK(call) do { cudaError_t e_ = (call); \
        if (e_ != cudaSuccess) die("the message is the CUDA runtime's; compute-sanitizer names the kernel behind it", \
                                   "%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); } while (0)

// ----------------------------------------------------------------------------
// what C++ cannot say: a launch, and the instructions that have no C++ spelling. cuda_on_cpu.h has them in plain C++.

#ifdef __CUDACC__
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
// Two floats as a pair of f16 and a pair of what is left.
static __device__ __forceinline__ void split_pair(uint32_t *hi, uint32_t *lo, float a, float b) {
    uint16_t ah, al, bh, bl;
    split<false>(&ah, &al, a);
    split<false>(&bh, &bl, b);
    *hi = pair(ah, bh);
    *lo = pair(al, bl);
}

static __device__ __forceinline__ float4 load4(const float *p) {          // 16 bytes at once where the address allows it
    if ((uintptr_t)p % 16) return make_float4(p[0], p[1], p[2], p[3]);
    uint4 u = load16(p);
    return make_float4(__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), __uint_as_float(u.w));
}

// 16 bytes of weights or of cache -> 16, 8 or 4 floats. Q8_0: without its scale.
template <int W> struct Per16 { enum { n = W == F32 ? 4 : W == Q8_0 ? 16 : 8 }; };
template <int W> static __device__ __forceinline__ void unpack(float *w, uint4 raw) {
    uint32_t u[4] = { raw.x, raw.y, raw.z, raw.w };
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        if (W == F32) w[i] = __uint_as_float(u[i]);
        if (W == F16) { w[2 * i] = f16_to_float((uint16_t)u[i]); w[2 * i + 1] = f16_to_float((uint16_t)(u[i] >> 16)); }
        if (W == BF16) { w[2 * i] = __uint_as_float(u[i] << 16); w[2 * i + 1] = __uint_as_float(u[i] & 0xffff0000u); }
        if (W == Q8_0)       // the byte, plus 128, as the last bits of 2^23: cheaper than a conversion
            #pragma unroll
            for (int b = 0; b < 4; b++) w[4 * i + b] = __uint_as_float(0x4b000000u | ((u[i] ^ 0x80808080u) >> 8 * b & 255)) - 8388736.0f;
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
enum { MIRROR_BYTES = 1 << 20 };

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

static bool recording;
static void put(void *dst, const void *h_src, size_t bytes) {
    if (recording) die(NULL, "put: not between record and stop");
    Block *b = block_of(dst);
    if (b && b->host) memcpy(b->host + ((char *)dst - b->p), h_src, bytes);
    CHECK(cudaMemcpyAsync(dst, h_src, bytes, cudaMemcpyHostToDevice, stream));
}

static void get(void *h_dst, const void *src, size_t bytes) {
    if (recording) die(NULL, "get: not between record and stop");
    CHECK(cudaMemcpyAsync(h_dst, src, bytes, cudaMemcpyDeviceToHost, stream));
    CHECK(cudaStreamSynchronize(stream));
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
enum { S_SPLIT, S_ROW_SCALE, S_PARTS, S_LOGITS, S_PLACE, S_SUMS, S_VISIBLE, S_ORDER, S_OFFSET, S_KEEP, S_INTO, S_W, S_KEPT, S_COUNT, S_MOVE, S_LISTS, S_OUT, N_SCRATCH };
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
__global__ void silu_mul_kernel(float *y, const float *w13x, size_t n, int hidden_dim) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    size_t t = i / hidden_dim, at = t * 2 * hidden_dim + i % hidden_dim;
    float g = w13x[at];
    y[i] = g / (1.0f + expf(-g)) * w13x[at + hidden_dim];
}

static void silu_mul(float *y, const float *w13x, int T, int hidden_dim) {
    size_t n = (size_t)T * hidden_dim;
    if (n) LAUNCH(silu_mul_kernel, ceil_div(n, 256), 256, 0, y, w13x, n, hidden_dim);
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

// Few rows: a warp for R outputs, 16 bytes of each at a time and lane, U such loads under way at once. Each weight is read
// once, and meets all rows there.
template <int W, int ROWS, int R, int U> __global__ void __launch_bounds__(256) matvec_kernel(Product p) {
    constexpr int N = Per16<W>::n;
    int lane = threadIdx.x % 32, o = (blockIdx.x * 8 + threadIdx.x / 32) * R;
    if (o >= p.rows) return;
    float acc[R][ROWS];
    #pragma unroll
    for (int i = 0; i < R * ROWS; i++) acc[i / ROWS][i % ROWS] = 0.0f;
    for (int k0 = lane * N; k0 < p.cols; k0 += 32 * N * U) {
        uint4 raw[U][R];
        #pragma unroll
        for (int i = 0; i < U * R; i++) {
            int k = k0 + i / R * 32 * N;
            if (k >= p.cols) k = k0;                     // past the end: loaded, not used
            raw[i / R][i % R] = load16_once(p.w + min(o + i % R, p.rows - 1) * p.w_stride + k * (16 / N));
        }
        #pragma unroll
        for (int u = 0; u < U; u++) {
            int k = k0 + u * 32 * N;
            if (k >= p.cols) break;
            float w[R][N], scale[R];
            #pragma unroll
            for (int r = 0; r < R; r++) {
                unpack<W>(w[r], raw[u][r]);
                scale[r] = W == Q8_0 ? q8_scale(p, min(o + r, p.rows - 1), k / 32) : 1.0f;
            }
            #pragma unroll
            for (int t = 0; t < ROWS; t++) {
                float x[N];
                #pragma unroll
                for (int i = 0; i < N; i += 4) unpack<F32>(x + i, load16(p.x + (size_t)min(t, p.T - 1) * p.x_stride + k + i));
                #pragma unroll
                for (int r = 0; r < R; r++) {
                    float sum = W == Q8_0 ? 0.0f : acc[r][t];
                    #pragma unroll
                    for (int i = 0; i < N; i++) sum = fmaf(w[r][i], x[i], sum);
                    acc[r][t] = W == Q8_0 ? fmaf(scale[r], sum, acc[r][t]) : sum;
                }
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < R * ROWS; i++) {
        float sum = warp_sum(acc[i / ROWS][i % ROWS]);
        if (lane == i % 32 && o + i / ROWS < p.rows && i % ROWS < p.T) finish(p, i % ROWS, o + i / ROWS, sum);
    }
}

// Rows of x at a multiple of 16 bytes and without a broken last chunk, where the caller's are not so: copied, zeros behind.
__global__ void pad_kernel(float *to, const float *x, int cols, int padded) {
    for (int i = threadIdx.x; i < padded; i += blockDim.x) to[(size_t)blockIdx.x * padded + i] = i < cols ? x[(size_t)blockIdx.x * cols + i] : 0.0f;
}

template <int W> static void matvec(Product p) {
    if (p.cols % Per16<W>::n || (uintptr_t)p.x % 16) {
        p.x_stride = ceil_div(p.cols, 32) * 32;
        float *to = (float *)scratch(S_SPLIT, (size_t)p.T * p.x_stride * sizeof(float));
        LAUNCH(pad_kernel, p.T, 256, 0, to, p.x, p.cols, p.x_stride);
        p.x = to;
    }
    if (p.T == 1)      LAUNCH((matvec_kernel<W, 1, 1, 4>),  ceil_div(p.rows, 8), 256, 0, p);
    else if (p.T <= 4) LAUNCH((matvec_kernel<W, 4, 2, 2>),  ceil_div(p.rows, 16), 256, 0, p);
    else if (p.T <= 8) LAUNCH((matvec_kernel<W, 8, 2, 2>),  ceil_div(p.rows, 16), 256, 0, p);
    else               LAUNCH((matvec_kernel<W, 16, 4, 1>), ceil_div(p.rows, 32), 256, 0, p);
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
        #pragma unroll
        for (int k = 0; k < 16; k++)
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
// instead of 2^-8; a row's result depends on nothing but the row.
enum { TILE_N = 128, TILE_K = 32, STAGES = 3 };

__global__ void split_kernel(uint16_t *hi, uint16_t *lo, float *row_scale, const float *x, int cols, int K, bool bf16) {
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
    for (int i = threadIdx.x; i < K; i += 256) {
        float v = i < cols ? xt[i] * up : 0.0f;
        size_t at = (size_t)blockIdx.x * K + i;
        if (bf16) split<true>(&hi[at], &lo[at], v); else split<false>(&hi[at], &lo[at], v);
    }
}

// A tile row is 32 numbers = 4 chunks of 16 bytes; they are shuffled so that 8 rows of one chunk lie in 8 different banks.
static __device__ __forceinline__ int chunk_at(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }

template <int W> static __device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    if (W == BF16) mma_bf16(c, a, b); else mma_f16(c, a, b);
}

// TILE_M rows x 128 outputs a block, 8 warps as 2 x 4; the next tiles are on their way (cp.async) while one is multiplied.
template <int W, int TILE_M> __global__ void __launch_bounds__(256) tile_kernel(Product p, const uint16_t *hi, const uint16_t *lo, const float *row_scale, int K) {
    constexpr int MI = TILE_M / 32, X_BYTES = TILE_M * 64, W_BYTES = TILE_N * 64, STAGE = 2 * X_BYTES + W_BYTES + (W == Q8_0 ? TILE_N * 4 : 0);
    DYNAMIC_SHARED(shared);          // STAGES times: x hi, x lo, w, its scales
    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, t0 = blockIdx.x * TILE_M, o0 = blockIdx.y * TILE_N;
    int wm = warp / 4 * (TILE_M / 2), wn = warp % 4 * 32, n_tiles = K / TILE_K;
    float acc[MI][4][4];
    #pragma unroll
    for (int i = 0; i < MI * 16; i++) acc[i / 16][i / 4 % 4][i % 4] = 0.0f;

    uint4 raw = make_uint4(0, 0, 0, 0);          // Q8_0: 16 weights and perhaps a scale between global and shared memory
    float raw_scale = 0.0f;
    int q_row = min(o0 + tid / 2, p.rows - 1);
    auto load = [&](int tile) {
        char *s = shared + tile % STAGES * STAGE;
        for (int i = tid; i < TILE_M * 4; i += 256) {
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
        uint32_t b[2][2][4];                     // [k half][pair of n8 tiles]
        #pragma unroll
        for (int kk = 0; kk < 2; kk++)
            #pragma unroll
            for (int j = 0; j < 2; j++) ldmatrix(b[kk][j], s + 2 * X_BYTES + chunk_at(wn + 16 * j + lane / 16 * 8 + lane % 8, kk * 2 + lane / 8 % 2));
        #pragma unroll
        for (int i = 0; i < MI; i++) {
            float part[4][4];                    // Q8_0: a block of 32, before its scale
            #pragma unroll
            for (int j = 0; j < 16; j++) part[j / 4][j % 4] = 0.0f;
            #pragma unroll
            for (int kk = 0; kk < 2; kk++) {
                uint32_t a_hi[4], a_lo[4];
                int at = chunk_at(wm + 16 * i + lane % 16, kk * 2 + lane / 16);
                ldmatrix(a_hi, s + at);
                ldmatrix(a_lo, s + X_BYTES + at);
                #pragma unroll
                for (int j = 0; j < 4; j++) mma<W>(W == Q8_0 ? part[j] : acc[i][j], a_lo, b[kk][j / 2] + j % 2 * 2);
                #pragma unroll
                for (int j = 0; j < 4; j++) mma<W>(W == Q8_0 ? part[j] : acc[i][j], a_hi, b[kk][j / 2] + j % 2 * 2);
            }
            if (W == Q8_0) {
                const float *scale = (const float *)(s + 2 * X_BYTES + W_BYTES);
                #pragma unroll
                for (int j = 0; j < 16; j++) acc[i][j / 4][j % 4] = fmaf(scale[wn + j / 4 * 8 + lane % 4 * 2 + j % 2], part[j / 4][j % 4], acc[i][j / 4][j % 4]);
            }
        }
        if (W == Q8_0 && more) store_q8(tile + STAGES - 1);
    }
    cp_async_wait<0>();
    #pragma unroll
    for (int i = 0; i < MI; i++)
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            int t = t0 + wm + 16 * i + 8 * h + lane / 4;
            if (t >= p.T) continue;
            float scale = row_scale[t];
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                int o = o0 + wn + j / 2 * 8 + lane % 4 * 2 + j % 2;
                if (o < p.rows) finish(p, t, o, scale * acc[i][j / 2][2 * h + j % 2]);
            }
        }
}

// More than 48 KiB of dynamic shared memory must be asked for, once a kernel.
#define ALLOW_SHARED(kernel, bytes) do { static bool done_; \
        if (!done_) CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes))); \
        done_ = true; } while (0)

template <int W, int TILE_M> static void tiles(const Product &p, const uint16_t *hi, const uint16_t *lo, const float *row_scale, int K) {
    size_t bytes = STAGES * (2 * TILE_M * 64 + TILE_N * 64 + (W == Q8_0 ? TILE_N * 4 : 0));
    ALLOW_SHARED((tile_kernel<W, TILE_M>), bytes);
    LAUNCH((tile_kernel<W, TILE_M>), dim3(ceil_div(p.T, TILE_M), ceil_div(p.rows, TILE_N)), 256, bytes, p, hi, lo, row_scale, K);
}

static void matmul(float *y, const float *x, Mat w, const float *bias, Act act, bool add, int T) {
    Product p = { y, x, (const char *)w.data, w.scale, w.row_bytes, scale_row_bytes(w.cols), bias, act, T, w.rows, w.cols, w.cols, add };
    if (T < 1) return;
    if (T <= FEW) { FOR_TYPE(w.type, matvec<W>(p)) return; }
    if (w.type == F32) { LAUNCH(float_tile_kernel, dim3(ceil_div(T, 64), ceil_div(w.rows, 64)), 256, 0, p); return; }
    int K = ceil_div(w.cols, TILE_K) * TILE_K;
    uint16_t *hi = (uint16_t *)scratch(S_SPLIT, (size_t)T * K * 4), *lo = hi + (size_t)T * K;
    float *row_scale = (float *)scratch(S_ROW_SCALE, T * sizeof(float));
    LAUNCH(split_kernel, T, 256, 0, hi, lo, row_scale, x, w.cols, K, w.type == BF16);
    if (w.type == F16)  { if (T <= 64) tiles<F16, 64>(p, hi, lo, row_scale, K);  else tiles<F16, 128>(p, hi, lo, row_scale, K); }
    if (w.type == BF16) { if (T <= 64) tiles<BF16, 64>(p, hi, lo, row_scale, K); else tiles<BF16, 128>(p, hi, lo, row_scale, K); }
    if (w.type == Q8_0) { if (T <= 64) tiles<Q8_0, 64>(p, hi, lo, row_scale, K); else tiles<Q8_0, 128>(p, hi, lo, row_scale, K); }
}
