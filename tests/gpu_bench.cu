// gpu_bench.cu: what this card gives, copying and multiplying, and what the matrix product of kernels.cu makes of it at LLaVA-7B's
// shapes. tests/gpu.sh builds and runs it; the whole model's speed is gpu_model.c's.
//
//     nvcc -O3 -Iinclude -arch=native tests/gpu_bench.cu -o gpu_bench && ./gpu_bench RATES [TFLOP/s of torch.matmul]
//
// RATES: a file to which it writes the two numbers that gpu_model takes, GB/s copied and TFLOP/s of the matrix rate.
// `gpu_bench RATES dry` runs the same calls at toy sizes, also in the emulator (g++ -include tests/cuda_on_cpu.h -x c++).
//
// Weights are random and made on the card (f16). Times are medians of several runs between CUDA events, after warm-up.

#include "../kernels.cu"
#include <algorithm>
#include <cerrno>
#include <functional>
#include <string>
#include <vector>

static bool dry;
static const Kernels *k;
static double bandwidth, matrix_rate;            // of this card: bytes/s copied (read + written), FLOP/s

// ----------------------------------------------------------------------------

static double median_ms(int n, const std::function<void()> &run) {
    std::vector<double> ms;
    cudaEvent_t a, b;
    if (dry) n = 1;
    CHECK(cudaEventCreate(&a));
    CHECK(cudaEventCreate(&b));
    for (int i = -2; i < n; i++) {               // two runs to warm up
        float t;
        CHECK(cudaEventRecord(a, stream));
        run();
        CHECK(cudaEventRecord(b, stream));
        CHECK(cudaEventSynchronize(b));
        CHECK(cudaEventElapsedTime(&t, a, b));
        if (i >= 0) ms.push_back(t);
    }
    CHECK(cudaEventDestroy(a));
    CHECK(cudaEventDestroy(b));
    std::sort(ms.begin(), ms.end());
    return ms[ms.size() / 2];
}

__global__ void random_kernel(uint16_t *p, size_t n, float size, uint32_t seed, int as_float) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        uint32_t h = (uint32_t)i * 2654435761u ^ (uint32_t)(i >> 32) ^ seed;
        h ^= h >> 16; h *= 0x85ebca6bu; h ^= h >> 13; h *= 0xc2b2ae35u; h ^= h >> 16;
        float v = (h / 2147483648.0f - 1.0f) * 1.73f * size;
        if (as_float) ((float *)p)[i] = v; else p[i] = float_to_f16(v);
    }
}
static uint32_t next_seed;
static Mat random_mat(int rows, int cols) {
    Mat m = { F16, rows, cols, row_bytes(F16, cols), NULL, NULL };
    uint16_t *p = (uint16_t *)device_alloc(rows * m.row_bytes);
    LAUNCH(random_kernel, 1024, 256, 0, p, (size_t)rows * cols, 1 / sqrtf((float)cols), ++next_seed, 0);
    m.data = p;
    return m;
}
static float *random_floats(size_t n, float size) {
    float *p = (float *)device_alloc(n * sizeof(float));
    LAUNCH(random_kernel, 1024, 256, 0, (uint16_t *)p, n, size, ++next_seed, 1);
    return p;
}

// ----------------------------------------------------------------------------

__global__ void mma_rate_kernel(float *out, int n) {         // tensor cores and nothing else: what mma.sync can give
    float c[8][4] = {};
    uint32_t a[4] = { threadIdx.x, 1, 2, 3 }, b[2] = { 4, 5 };
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 8; j++) mma_f16(c[j], a, b);
    float sum = 0;
    for (int j = 0; j < 32; j++) sum += c[j / 4][j % 4];
    if (sum == 1.25f) *out = sum;
}

static void bench_machine(const char *torch_rate) {
    cudaDeviceProp about;
    CHECK(cudaGetDeviceProperties(&about, 0));
    size_t n = (size_t)1 << (dry ? 20 : 30);
    char *a = (char *)device_alloc(n), *b = (char *)device_alloc(n);
    double ms = median_ms(20, [&] { CHECK(cudaMemcpyAsync(a, b, n, cudaMemcpyDeviceToDevice, stream)); });
    bandwidth = 2 * n / ms * 1e3;
    CHECK(cudaFree(a));
    CHECK(cudaFree(b));
    float *out = random_floats(1, 1);
    int blocks = about.multiProcessorCount * 2, loops = dry ? 2 : 4096;
    ms = median_ms(5, [&] { LAUNCH(mma_rate_kernel, blocks, 256, 0, out, loops); });
    double mma_rate = (double)blocks * 8 * loops * 8 * 4096 / ms * 1e3;
    CHECK(cudaFree(out));
    matrix_rate = atof(torch_rate) > 0 ? atof(torch_rate) * 1e12 : mma_rate;
    printf("- %s, %d multiprocessors, compute capability %d.%d, %.0f GiB\n", about.name, about.multiProcessorCount, about.major, about.minor, about.totalGlobalMem / 1073741824.0);
    printf("- copy bandwidth %.0f GB/s (1 GiB, read + written)\n", bandwidth / 1e9);
    printf("- matrix rate: mma.sync alone %.0f TFLOP/s; torch.matmul bf16 %s; the fractions below are of the %s\n\n", mma_rate / 1e12,
           atof(torch_rate) > 0 ? (std::string(torch_rate) + " TFLOP/s").c_str() : "not measured (no PyTorch)", atof(torch_rate) > 0 ? "latter" : "former");
    fflush(stdout);
}

static void bench_matmul() {                     // one matrix of the 7B model at a time
    printf("| y = x w^T, f16 | rows of x | ms | GB/s of weights | of copy | TFLOP/s | of matrix rate |\n|---|---|---|---|---|---|---|\n");
    int shapes[][2] = { { 12288, 4096 }, { 4096, 4096 }, { 22016, 4096 }, { 4096, 11008 } };
    for (auto &s : shapes) {
        if (dry) s[0] = s[1] = 96;
        std::vector<Mat> w;                      // enough of them that no cache holds them
        for (int i = 0; i < 8; i++) w.push_back(random_mat(s[0], s[1]));
        float *x = random_floats((size_t)2048 * s[1], 1), *y = random_floats((size_t)2048 * s[0], 1);
        for (int T : { 1, 4, 8, 16, 64, 620, 2048 }) {
            if (dry && T > 64) break;
            double ms = median_ms(9, [&] { for (Mat &v : w) k->matmul(y, x, v, NULL, ACT_NONE, false, T); }) / w.size();
            double bytes = 2.0 * s[0] * s[1], flops = 2.0 * T * s[0] * s[1];
            printf("| %d x %d | %d | %.3f | %.0f | %.2f | %.1f | %.2f |\n", s[0], s[1], T, ms, bytes / ms / 1e6, bytes / ms * 1e3 / bandwidth, flops / ms / 1e9, flops / ms * 1e3 / matrix_rate);
        }
        for (Mat &v : w) CHECK(cudaFree((void *)v.data));
        CHECK(cudaFree(x));
        CHECK(cudaFree(y));
    }
    printf("\n");
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc < 2) die(NULL, "usage: gpu_bench RATES [TFLOP/s of torch.matmul, or dry]");
    k = cuda();
    if (!k) return 1;
    dry = argc > 2 && !strcmp(argv[2], "dry");
    bench_machine(argc > 2 ? argv[2] : "0");
    FILE *f = fopen(argv[1], "w");
    if (!f || fprintf(f, "%.1f %.4f\n", bandwidth / 1e9, matrix_rate / 1e12) < 0 || fclose(f)) die(NULL, "%s: %s", argv[1], strerror(errno));
    bench_matmul();
    return 0;
}
