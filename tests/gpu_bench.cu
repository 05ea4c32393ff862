// gpu_bench.cu: how fast the CUDA back-end is on this machine, beside what the machine allows. tests/gpu.sh builds and runs it:
//
//     nvcc -O3 -Iinclude -arch=native tests/gpu_bench.cu -o gpu_bench && ./gpu_bench > table.md
//
// `gpu_bench dry` runs the same calls at toy sizes (also without a GPU: g++ -include tests/cuda_on_cpu.h -x c++): its numbers
// mean nothing, but the script that will be paid for by the minute is known to end.
//
// Weights are random and made on the card (f16, LLaVA-1.5's shapes); no model file is read. The forward pass is the one of
// llava.c, operation by operation. Times are medians of several runs between CUDA events, after warm-up.

#include "../kernels.cu"
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

typedef struct { const char *name; int n_layers, dim, hidden_dim, n_heads, vocab; } Shape;
static const Shape shape_7b = { "7B", 32, 4096, 11008, 32, 32000 }, shape_13b = { "13B", 40, 5120, 13824, 40, 32000 };
static const Shape shape_toy = { "toy", 2, 128, 160, 1, 100 };
enum { HEAD_DIM = 128, CONTEXT = 650 };
static bool dry;
static const Kernels *k;
static double bandwidth, matrix_rate;            // of this card: bytes/s copied (read + written), FLOP/s

// ----------------------------------------------------------------------------

static double median_ms(int n, const std::function<void()> &before, const std::function<void()> &run) {
    std::vector<double> ms;
    cudaEvent_t a, b;
    if (dry) n = 1;
    CHECK(cudaEventCreate(&a));
    CHECK(cudaEventCreate(&b));
    for (int i = -2; i < n; i++) {               // two runs to warm up
        float t;
        before();
        CHECK(cudaStreamSynchronize(stream));
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
static void nothing() {}

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
// a decoder of LLaVA's shape

typedef struct { Mat wqkv, wo, w13, w2; } Layer;
static struct {
    Shape c;
    std::vector<Layer> layer;
    Mat head;
    float *norm, *cos_sin, *start, *x, *xb, *qkv, *lse, *w13x, *hidden, *logits;
    Rows rows;
    KV *kv;
    int max_rows;
    size_t weight_bytes;
} m;

static void make_model(Shape c, int max_rows, int n_seqs) {
    int hd = HEAD_DIM;
    m.c = c;
    m.weight_bytes = 0;
    m.max_rows = max_rows;
    for (int l = 0; l < c.n_layers; l++)
        m.layer.push_back(Layer{ random_mat(3 * c.dim, c.dim), random_mat(c.dim, c.dim), random_mat(2 * c.hidden_dim, c.dim), random_mat(c.dim, c.hidden_dim) });
    m.head = random_mat(c.vocab, c.dim);
    m.weight_bytes = 2 * ((size_t)c.n_layers * ((size_t)4 * c.dim * c.dim + (size_t)3 * c.dim * c.hidden_dim) + (size_t)c.vocab * c.dim);
    m.norm = random_floats(c.dim, 1);
    std::vector<float> cs((size_t)4096 * hd);
    for (int p = 0; p < 4096; p++) for (int i = 0; i < hd / 2; i++) {
        double phi = p * pow(10000, -2.0 * i / hd);
        cs[((size_t)p * hd / 2 + i) * 2] = (float)cos(phi); cs[((size_t)p * hd / 2 + i) * 2 + 1] = (float)sin(phi);
    }
    m.cos_sin = (float *)k->alloc(cs.size() * sizeof(float));
    k->put(m.cos_sin, cs.data(), cs.size() * sizeof(float));
    size_t T = max_rows;
    m.start = random_floats(T * c.dim, 1);
    m.x = random_floats(T * c.dim, 1);
    m.xb = random_floats(T * c.dim, 1);
    m.qkv = random_floats(T * 3 * c.dim, 1);
    m.lse = random_floats(T * c.n_heads, 1);
    m.w13x = random_floats(T * 2 * c.hidden_dim, 1);
    m.hidden = random_floats(T * c.hidden_dim, 1);
    m.logits = random_floats((size_t)n_seqs * c.vocab, 1);
    m.rows = Rows{ 0, 0, NULL, (int *)k->alloc(T * 4), (int *)k->alloc(T * 4), (int *)k->alloc(T * 4) };
    m.kv = k->kv_new(c.n_layers, c.n_heads, hd, n_seqs, F16);
}

static void free_model() {
    for (Layer &l : m.layer) for (Mat w : { l.wqkv, l.wo, l.w13, l.w2 }) k->release((void *)w.data);
    m.layer.clear();
    k->release((void *)m.head.data);
    for (float *p : { m.norm, m.cos_sin, m.start, m.x, m.xb, m.qkv, m.lse, m.w13x, m.hidden, m.logits }) k->release(p);
    for (int *p : { m.rows.seq, m.rows.pos, m.rows.rot }) k->release(p);
    k->kv_free(m.kv);
}

static void prompt_rows(int T, int seq) {
    std::vector<int> s(T, seq), pos(T);
    for (int t = 0; t < T; t++) pos[t] = t;
    k->put(m.rows.seq, s.data(), T * 4); k->put(m.rows.pos, pos.data(), T * 4); k->put(m.rows.rot, pos.data(), T * 4);
    m.rows.T = T; m.rows.B = 1;
}
static void decode_rows(int B, int pos) {
    std::vector<int> s(B), p(B, pos);
    for (int b = 0; b < B; b++) s[b] = b;
    k->put(m.rows.seq, s.data(), B * 4); k->put(m.rows.pos, p.data(), B * 4); k->put(m.rows.rot, p.data(), B * 4);
    m.rows.T = m.rows.B = B;
}

// voters: how many of a prompt's last queries vote; vote: decode rows do
static void forward(int n_logits, int voters, bool vote) {
    const Shape &c = m.c;
    int T = m.rows.T;
    k->rows_copy(m.x, m.start, NULL, T, c.dim);
    for (int l = 0; l < c.n_layers; l++) {
        Layer &w = m.layer[l];
        k->rmsnorm(m.xb, m.x, m.norm, T, c.dim, 1e-5f);
        k->matmul(m.qkv, m.xb, w.wqkv, NULL, ACT_NONE, false, T);
        k->rope(m.qkv, m.cos_sin, NULL, &m.rows, c.n_heads, c.n_heads, HEAD_DIM);
        k->kv_append(m.kv, l, m.qkv, &m.rows, c.n_heads);
        k->kv_attend(m.xb, m.lse, m.kv, l, m.qkv, &m.rows, c.n_heads, NULL, vote);
        if (voters) k->kv_vote(m.kv, l, m.qkv, m.lse, &m.rows, c.n_heads, NULL, voters);
        k->matmul(m.x, m.xb, w.wo, NULL, ACT_NONE, true, T);
        k->rmsnorm(m.xb, m.x, m.norm, T, c.dim, 1e-5f);
        k->matmul(m.w13x, m.xb, w.w13, NULL, ACT_NONE, false, T);
        k->silu_mul(m.hidden, m.w13x, T, c.hidden_dim);
        k->matmul(m.x, m.hidden, w.w2, NULL, ACT_NONE, true, T);
    }
    k->rmsnorm(m.xb, m.x + (size_t)(T - n_logits) * c.dim, m.norm, n_logits, c.dim, 1e-5f);
    k->matmul(m.logits, m.xb, m.head, NULL, ACT_NONE, false, n_logits);
}

static void decode_step(int B, int pos, bool vote) {
    decode_rows(B, pos);
    uint64_t key = 1000 + B * 2 + vote;
    if (k->replay(key)) return;
    k->record(key);
    forward(B, 0, vote);
    k->stop();
}

static double prompt_flops(const Shape &c, int T) {          // weights, and half of the square of attention
    return 2.0 * T * c.n_layers * (4.0 * c.dim * c.dim + 3.0 * c.dim * c.hidden_dim) + 2.0 * c.n_layers * (double)T * T * c.dim;
}

// Sequence `seq` gets T slots that look like a prompt's.
static void fill(int seq, int T, int room) {
    k->kv_clear(m.kv, seq);
    k->kv_reserve(m.kv, seq, room);
    prompt_rows(T, seq);
    for (int l = 0; l < m.c.n_layers; l++) k->kv_append(m.kv, l, m.qkv, &m.rows, m.c.n_heads);
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
    double ms = median_ms(20, nothing, [&] { CHECK(cudaMemcpyAsync(a, b, n, cudaMemcpyDeviceToDevice, stream)); });
    bandwidth = 2 * n / ms * 1e3;
    CHECK(cudaFree(a));
    CHECK(cudaFree(b));
    float *out = random_floats(1, 1);
    int blocks = about.multiProcessorCount * 2, loops = dry ? 2 : 4096;
    ms = median_ms(5, nothing, [&] { LAUNCH(mma_rate_kernel, blocks, 256, 0, out, loops); });
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
            double ms = median_ms(9, nothing, [&] { for (Mat &v : w) k->matmul(y, x, v, NULL, ACT_NONE, false, T); }) / w.size();
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

static bool fits(const Shape &c, double extra) {
    size_t room, total;
    double need = 2.0 * c.n_layers * (4.0 * c.dim * c.dim + 3.0 * c.dim * c.hidden_dim) + 2.0 * c.vocab * c.dim + extra;
    CHECK(cudaMemGetInfo(&room, &total));
    if (need < room) return true;
    printf("(%s does not fit: %.0f GB needed, %.0f free)\n\n", c.name, need / 1e9, room / 1e9);
    return false;
}

static void bench_decode() {
    printf("| decode, %s, f16, context %d | tokens/s | ms a step | of copy bandwidth |\n|---|---|---|---|\n", m.c.name, CONTEXT);
    for (int B : { 1, 8, 16 }) {
        for (int s = 0; s < B; s++) fill(s, CONTEXT, CONTEXT + 60);
        int pos = CONTEXT;
        for (int i = 0; i < 3; i++) decode_step(B, pos++, false);
        double ms = median_ms(30, [&] { decode_rows(B, pos++); }, [&] { k->replay(1000 + B * 2); });
        double bytes = m.weight_bytes + (double)B * (CONTEXT + 20) * m.c.n_layers * m.c.dim * 2 * 2;
        printf("| batch %d | %.1f | %.3f | %.2f |\n", B, B / ms * 1e3, ms, bytes / ms * 1e3 / bandwidth);
        for (int s = 0; s < B; s++) k->kv_clear(m.kv, s);
    }
    printf("\n");
    fflush(stdout);
}

// What a policy does between prompt and decoding: scores to the host, a choice for each head, compaction, the smaller place.
static void keep_best(int seq, int T, double ratio, bool merge, int extra) {
    int heads = m.c.n_layers * m.c.n_heads, budget = (int)(T * (1 - ratio));
    size_t n = (size_t)heads * T;
    static std::vector<float> score, w;
    static std::vector<int> into;
    static std::vector<char> keep;
    score.resize(n);
    keep.assign(n, 0);
    k->kv_read(m.kv, seq, NULL, NULL, score.data(), NULL, NULL);
    std::vector<int> order(T);
    for (int h = 0; h < heads; h++) {
        const float *s = &score[(size_t)h * T];
        for (int i = 0; i < T; i++) order[i] = i;
        std::nth_element(order.begin(), order.begin() + budget, order.end(), [&](int a, int b) { return s[a] > s[b] || (s[a] == s[b] && a < b); });
        for (int i = 0; i < budget; i++) keep[(size_t)h * T + order[i]] = 1;
    }
    if (merge) {
        into.assign(n, -1);
        w.assign(n, 1);
        for (int l = 0; l < m.c.n_layers; l++) {
            size_t at = (size_t)l * m.c.n_heads * T;
            k->kv_nearest(&into[at], &w[at], m.kv, seq, l, (bool *)&keep[at]);
        }
    }
    k->kv_apply(m.kv, seq, (bool *)keep.data(), merge ? into.data() : NULL, merge ? w.data() : NULL, merge ? 0.5f : 0, NULL);
    k->kv_reserve(m.kv, seq, extra);
}

static void bench_prompt() {
    printf("| prompt, %s, f16 | ms | TFLOP/s | of matrix rate | scores of all queries | scores of 32 | scores, copy, choice, compaction | with merging |\n|---|---|---|---|---|---|---|---|\n", m.c.name);
    for (int T : { dry ? 20 : 620, dry ? 70 : 2048 }) {
        auto start = [&] { k->kv_clear(m.kv, 0); k->kv_reserve(m.kv, 0, T); prompt_rows(T, 0); };
        double plain = median_ms(5, start, [&] { forward(1, 0, false); }), all = median_ms(5, start, [&] { forward(1, T, false); }), window = median_ms(5, start, [&] { forward(1, 32, false); });
        double whole = median_ms(5, start, [&] { forward(1, T, false); keep_best(0, T, 0.8, false, 512); });
        double merged = median_ms(5, start, [&] { forward(1, T, false); keep_best(0, T, 0.8, true, 512); });
        double flops = prompt_flops(m.c, T);
        printf("| %d rows | %.2f | %.0f | %.2f | +%.1f %% | +%.1f %% | +%.1f %% | +%.1f %% |\n", T, plain, flops / plain / 1e9, flops / plain * 1e3 / matrix_rate,
               100 * (all / plain - 1), 100 * (window / plain - 1), 100 * (whole / plain - 1), 100 * (merged / plain - 1));
        k->kv_clear(m.kv, 0);
        fflush(stdout);
    }
    printf("\n");
}

// Batch 16, 1,024 prompt slots and 512 new tokens, 0.8 dropped. The kernels are the method's; the scores are random.
static void bench_batch() {
    const int B = 16, PROMPT = dry ? 40 : 1024, NEW = dry ? 4 : 512;
    struct { const char *name; bool cut, merge, vote, lowest, drop; } methods[] = {
        { "full", false, false, false, false, false },
        { "snapkv, prefixkv (cut once)", true, false, false, false, false },
        { "lookm (cut once, merged)", true, true, false, false, false },
        { "elastic, streaming (a drop a token)", true, false, false, false, true },
        { "h2o (votes and the lowest leaves, at every token)", true, false, true, true, false },
    };
    double full = 0;
    printf("| batch 16, %s, 1024 + 512 tokens, -r 0.8 | tokens/s | x full | ceiling by bytes | cut, ms a sequence |\n|---|---|---|---|---|\n", m.c.name);
    for (auto &a : methods) {
        double cut_ms = 0, kept = a.cut ? PROMPT * 0.2 : PROMPT;
        for (int s = 0; s < B; s++) {
            fill(s, PROMPT, PROMPT + (a.cut ? 0 : NEW + 8));
            if (!a.cut) continue;
            k->kv_vote(m.kv, 0, m.qkv, m.lse, &m.rows, m.c.n_heads, NULL, 32);
            cudaEvent_t e0, e1;
            float t;
            CHECK(cudaEventCreate(&e0)); CHECK(cudaEventCreate(&e1));
            CHECK(cudaEventRecord(e0, stream));
            keep_best(s, PROMPT, 0.8, a.merge, a.drop || a.lowest ? 8 : NEW + 8);
            CHECK(cudaEventRecord(e1, stream));
            CHECK(cudaEventSynchronize(e1));
            CHECK(cudaEventElapsedTime(&t, e0, e1));
            cut_ms += t / B;
        }
        cudaEvent_t e0, e1;
        float ms;
        CHECK(cudaEventCreate(&e0)); CHECK(cudaEventCreate(&e1));
        std::vector<int> slot(m.c.n_layers * m.c.n_heads, 4);
        for (int i = 0; i < NEW + 3; i++) {
            if (i == 3) CHECK(cudaEventRecord(e0, stream));
            decode_step(B, PROMPT + i, a.vote);
            for (int s = 0; s < B; s++) {
                if (a.lowest) k->kv_drop_lowest(m.kv, s, 0, 10);
                if (a.drop) k->kv_drop(m.kv, s, slot.data());
            }
            float one;
            k->get(&one, m.logits, sizeof one);  // what a sampler waits for
        }
        CHECK(cudaEventRecord(e1, stream));
        CHECK(cudaEventSynchronize(e1));
        CHECK(cudaEventElapsedTime(&ms, e0, e1));
        double speed = (double)B * NEW / ms * 1e3, slots = kept + (a.drop || a.lowest ? 0 : NEW / 2);
        double bytes = m.weight_bytes + B * slots * m.c.n_layers * m.c.dim * 4;
        if (!full) full = speed;
        printf("| %s | %.0f | %.2f | %.0f | %.1f |\n", a.name, speed, speed / full, B * bandwidth / bytes, cut_ms);
        fflush(stdout);
        for (int s = 0; s < B; s++) k->kv_clear(m.kv, s);
    }
    printf("\n");
}

static void bench_vision() {                     // CLIP ViT-L/14-336 without its last layer, then the projector
    const int L = dry ? 1 : 23, T = dry ? 37 : 577, N = T - 1, D = dry ? 64 : 1024, H = 4 * D, HEADS = D / 64, OUT = 4 * D;
    std::vector<Layer> w;
    for (int l = 0; l < L; l++) w.push_back(Layer{ random_mat(3 * D, D), random_mat(D, D), random_mat(H, D), random_mat(D, H) });
    Mat patch = random_mat(D, 588), p1 = random_mat(OUT, D), p2 = random_mat(OUT, OUT);
    float *norm = random_floats(D, 1), *bias = random_floats(OUT, 1), *patches = random_floats((size_t)N * 588, 1), *x = random_floats((size_t)T * D, 1), *xb = random_floats((size_t)T * D, 1);
    float *qkv = random_floats((size_t)T * 3 * D, 1), *h = random_floats((size_t)T * H, 1), *y = random_floats((size_t)T * OUT, 1);
    double ms = median_ms(9, nothing, [&] {
        k->matmul(x + D, patches, patch, NULL, ACT_NONE, false, N);
        for (Layer &v : w) {
            k->layernorm(xb, x, norm, norm, T, D, 1e-5f);
            k->matmul(qkv, xb, v.wqkv, bias, ACT_NONE, false, T);
            k->attend(xb, qkv, 3 * D, qkv + D, qkv + 2 * D, 3 * D, T, T, HEADS, D / HEADS);
            k->matmul(x, xb, v.wo, bias, ACT_NONE, true, T);
            k->layernorm(xb, x, norm, norm, T, D, 1e-5f);
            k->matmul(h, xb, v.w13, bias, ACT_QUICK_GELU, false, T);
            k->matmul(x, h, v.w2, bias, ACT_NONE, true, T);
        }
        k->matmul(h, x + D, p1, bias, ACT_GELU, false, N);
        k->matmul(y, h, p2, bias, ACT_NONE, false, N);
    });
    double flops = 2.0 * T * L * (4.0 * D * D + 2.0 * D * H) + 4.0 * L * T * T * (double)D + 2.0 * N * (588.0 * D + (double)D * OUT + (double)OUT * OUT);
    printf("| vision tower, one picture | ms | TFLOP/s | of matrix rate |\n|---|---|---|---|\n| CLIP ViT-L/14-336 + projector | %.2f | %.0f | %.2f |\n\n", ms, flops / ms / 1e9, flops / ms * 1e3 / matrix_rate);
    for (Layer &v : w) for (Mat u : { v.wqkv, v.wo, v.w13, v.w2 }) CHECK(cudaFree((void *)u.data));
    for (Mat u : { patch, p1, p2 }) CHECK(cudaFree((void *)u.data));
    for (float *p : { norm, bias, patches, x, xb, qkv, h, y }) CHECK(cudaFree(p));
    fflush(stdout);
}

int main(int argc, char **argv) {                // gpu_bench [TFLOP/s of torch.matmul, or dry]
    k = cuda();
    if (!k) return 1;
    dry = argc > 1 && !strcmp(argv[1], "dry");
    bench_machine(argc > 1 ? argv[1] : "0");
    bench_matmul();
    bench_vision();
    for (Shape c : { dry ? shape_toy : shape_7b, dry ? shape_toy : shape_13b }) {
        if (!fits(c, 16.0 * 1600 * c.n_layers * c.dim * 4 + 4e9)) continue;
        make_model(c, dry ? 700 : 2048, 16);
        bench_decode();
        bench_prompt();
        if (c.n_layers != shape_13b.n_layers) bench_batch();
        free_model();
    }
    return 0;
}
