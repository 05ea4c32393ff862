// test_cuda.cpp: every operation of kernels.cu against its naive double-precision version. Built two ways:
//
//     g++ -std=gnu++17 -O2 -Iinclude tests/test_cuda.cpp           kernels.cu on the CPU, through cuda_on_cpu.h
//     nvcc -O3 -Iinclude -arch=native -x cu tests/test_cuda.cpp    on a GPU
//
// Sizes: 1, one more than a warp, one more than a tile, and real inner dimensions. `test_cuda quick` leaves the large ones out
// (for sanitizers). Tolerances are said where they stand; E(n) prints the worst error met, so that a reader sees the distance.

#ifndef __CUDACC__
#include "cuda_on_cpu.h"
#endif
#include "../kernels.cu"
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <algorithm>
#include <vector>
#include "test.h"
#include "reference.h"

typedef std::vector<float> Floats;
typedef std::vector<double> Doubles;
typedef std::vector<int> Ints;

const Kernels *K;
static bool quick;
static uint64_t rng = 12345;

// The worst error of a kind of test, on the scale of its tolerance.
static struct { char name[40]; double worst, tol; } errors[64];
static int n_errors;
static bool close_to(const char *kind, const float *got, const double *want, size_t n, double tol, const char *what) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) { double e = fabs(got[i] - want[i]) / (1 + fabs(want[i])); if (!(e <= worst)) worst = e; }
    int i = 0;
    while (i < n_errors && strcmp(errors[i].name, kind)) i++;
    if (i == n_errors) { snprintf(errors[i].name, sizeof errors[i].name, "%s", kind); errors[i].tol = tol; n_errors++; }
    if (!(worst <= errors[i].worst)) errors[i].worst = worst;
    return check_close_at(__FILE__, __LINE__, what, got, want, n, tol);
}

static Floats normal(size_t n, double scale = 1) {
    Floats v(n);
    for (float &x : v) x = (float)(scale * rnd_normal(&rng));
    return v;
}
template <class T> struct Device {           // memory of the back-end that goes with its scope
    T *p; size_t n;
    Device(size_t n) : p((T *)K->alloc(n * sizeof(T))), n(n) {}
    Device(const std::vector<T> &v) : Device(v.size()) { K->put(p, v.data(), n * sizeof(T)); }
    Device(const Device &) = delete;
    ~Device() { K->release(p); }
    std::vector<T> host() const { std::vector<T> v(n); K->get(v.data(), p, n * sizeof(T)); return v; }
    operator T *() const { return p; }
};
static const char *NAME(const char *format, ...) {               // one of the last 8 is still there
    static char text[8][200];
    static int next;
    va_list args;
    va_start(args, format);
    vsnprintf(text[next = (next + 1) % 8], sizeof text[0], format, args);
    va_end(args);
    return text[next];
}

// ----------------------------------------------------------------------------
// random weights of each type: the host's, which the naive versions read, and the back-end's

struct Weights {
    std::vector<char> data, scale;
    Mat host, mat;
    Weights(Type type, int rows, int cols, double size) : data(rows * row_bytes(type, cols)), scale(type == Q8_0 ? rows * scale_row_bytes(cols) : 0) {
        host = Mat{ type, rows, cols, row_bytes(type, cols), data.data(), (const uint16_t *)scale.data() };
        for (int r = 0; r < rows; r++) {
            char *p = &data[r * host.row_bytes];
            for (int b = 0; type == Q8_0 && b < cols / 32; b++) ((uint16_t *)&scale[r * scale_row_bytes(cols)])[b] = f16_from_ref(size / 64 * (0.5 + rnd(&rng)));
            for (int c = 0; c < cols; c++) {
                float x = (float)(size * rnd_normal(&rng));
                if (type == F32) ((float *)p)[c] = x;
                if (type == F16) ((uint16_t *)p)[c] = f16_from_ref(x);
                if (type == BF16) ((uint16_t *)p)[c] = bf16_from_ref(x);
                if (type == Q8_0) p[c] = (char)(rnd_int(&rng, 255) - 127);
            }
        }
        mat = K->weight(type, rows, cols, data.data(), type == Q8_0 ? scale.data() : NULL);
    }
    Weights(const Weights &) = delete;
    ~Weights() { K->release((void *)mat.data); }
};
static const char *const names[] = { "f32", "f16", "bf16", "q8_0" };

// ----------------------------------------------------------------------------

// What was put can be got, in pieces of every size and past the end of what put keeps for itself.
static void test_memory() {
    Ints x(6 << 20), y(x.size());
    for (int &v : x) v = (int)rnd_u64(&rng);
    Device<int> d(x.size());
    size_t at = 0;
    for (size_t n = 1; at < x.size(); n = n * 3 + 1) {
        n = std::min(n, x.size() - at);
        K->put(d + at, &x[at], n * sizeof(int));
        at += n;
    }
    for (int i = 0; i < 50; i++) {
        y.assign(100000, i);                                     // the same host memory each time
        K->put(d + 100000 * (i % 5), y.data(), y.size() * sizeof(int));
    }
    for (int i = 0; i < 500000; i++) x[i] = 45 + i / 100000;
    check(d.host() == x, "what was put is not what was got");
}

static void test_rows() {
    for (int type = 0; type < N_TYPES; type++)
        for (int dim : { 32, 96, 4096 }) {
            Weights w((Type)type, 7, dim, 1);
            Ints id = { 3, -1, 0, 6 };
            Floats y0 = normal(4 * dim);
            Device<float> y(y0);
            Device<int> d_id(id);
            K->embed(y, w.mat, d_id, 4);
            Doubles want(y0.begin(), y0.end());
            embed_ref(want.data(), w.host, id.data(), 4);
            close_to("embed", y.host().data(), want.data(), want.size(), 1e-7, NAME("embed %s %d", names[type], dim));     // a product of two floats at most
        }
    for (int n : { 1, 33, 300 }) {
        int dim = 33;
        Floats x = normal(400 * dim);
        Ints row(n);
        for (int &r : row) r = rnd_int(&rng, 400);
        Device<float> dx(x), y((size_t)n * dim), z((size_t)n * dim);
        K->rows_copy(y, dx, row.data(), n, dim);
        K->rows_copy(z, dx, NULL, n, dim);
        K->rows_copy(z, z, NULL, n, dim);
        Floats hy = y.host(), hz = z.host();
        bool same = true;
        for (int i = 0; i < n * dim; i++) same &= hy[i] == x[row[i / dim] * dim + i % dim] && hz[i] == x[i];
        check(same, "rows_copy of %d", n);
    }
}

static void test_norms() {
    for (int T : { 1, 33 })
        for (int dim : { 1, 33, 172, 1025, 4096 }) {
            Floats x = normal((size_t)T * dim, 3), w = normal(dim), b = normal(dim);
            for (float &v : x) v += 1;
            Device<float> dx(x), dw(w), db(b), y((size_t)T * dim);
            Doubles rms((size_t)T * dim), ln(rms), silu(rms);
            rmsnorm_ref(rms.data(), x.data(), w.data(), T, dim, 1e-5f);
            layernorm_ref(ln.data(), x.data(), w.data(), b.data(), T, dim, 1e-5f);
            K->rmsnorm(y, dx, dw, T, dim, 1e-5f);
            close_to("rmsnorm", y.host().data(), rms.data(), rms.size(), 2e-6, NAME("rmsnorm %d %d", T, dim));      // a few roundings and a sum of 256 partial sums
            K->layernorm(dx, dx, dw, db, T, dim, 1e-5f);                                                             // in place
            close_to("layernorm", dx.host().data(), ln.data(), ln.size(), 5e-6, NAME("layernorm %d %d", T, dim));
            Floats h = normal((size_t)T * dim * 2, 4);
            silu_mul_ref(silu.data(), h.data(), T, dim);
            Device<float> dh(h);
            K->silu_mul(y, dh, T, dim);
            close_to("silu_mul", y.host().data(), silu.data(), silu.size(), 2e-6, NAME("silu_mul %d %d", T, dim));
        }
}

// A dot product of size about 1 is summed in float. 32 lanes share it in matvec; in a tile one accumulator takes all 4,096
// products, and each of its roundings may cost 2^-24 of it: up to 5e-6 was seen here, tensor cores may round twice as badly.
// bf16's hi + lo keeps 16 bits of an activation: 2^-17 of each product, 1e-5 in the sum.
static double matmul_tol(int, int T) { return T > FEW ? 2e-5 : 2e-6; }

static void matmul_case(int type, int T, int rows, int cols, Act act, bool use_bias, bool add, double x_size) {
    Weights w((Type)type, rows, cols, 1 / sqrt(cols));
    Floats x = normal((size_t)T * cols, x_size), bias = normal(rows), y0 = normal((size_t)T * rows);
    Device<float> dx(x), db(bias), y(y0);
    K->matmul(y, dx, w.mat, use_bias ? (float *)db : NULL, act, add, T);
    Floats got = y.host();
    Doubles want((size_t)T * rows);
    matmul_ref(want.data(), add ? y0.data() : NULL, x.data(), w.host, use_bias ? bias.data() : NULL, act, T);
    if (x_size != 1) for (size_t i = 0; i < want.size(); i++) { want[i] /= x_size; got[i] = (float)(got[i] / x_size); }
    char kind[40];
    snprintf(kind, sizeof kind, "matmul %s %s", names[type], T <= FEW ? "few" : "tiles");
    close_to(kind, got.data(), want.data(), want.size(), matmul_tol(type, T),
             NAME("matmul %s T %d rows %d cols %d act %d bias %d add %d x %g", names[type], T, rows, cols, act, use_bias, add, x_size));
}

static void test_matmul() {
    int there = n_multiprocessors;
    n_multiprocessors = 2;               // so that 200 rows go in tiles of 128 and 129 rows in tiles of 96
    for (int type = 0; type < N_TYPES; type++) {
        int small = type == Q8_0 ? 32 : 1, odd = type == Q8_0 ? 96 : 33, wide = type == Q8_0 ? 576 : 588;
        for (int T : { 1, 2, 4, 5, 8, 9, 16, 17, 33, 65, 129, 200 }) {
            matmul_case(type, T, 1, small, ACT_NONE, false, false, 1);
            matmul_case(type, T, 33, odd, ACT_GELU, true, false, 1);
            matmul_case(type, T, 129, type == Q8_0 ? 160 : 172, ACT_QUICK_GELU, true, true, 1);
            if (!quick) matmul_case(type, T, 65, wide, ACT_NONE, false, true, 1);
            if (T == 17 || T == 65) matmul_case(type, T, 265, odd, ACT_NONE, true, true, 1);      // more outputs than a tile has
        }
        n_multiprocessors = 1;           // a tile of 96 and one of 128 at a real inner dimension
        for (int T : { 1, 3, 16, 96, 128 }) if (!quick || T < 4) matmul_case(type, T, T > FEW ? 128 : 40, 4096, ACT_NONE, false, false, 1);
        n_multiprocessors = 2;
        for (double size : { 1e-5, 3e4 }) matmul_case(type, 17, 33, odd, ACT_NONE, false, false, size);      // f16 ends at 65504
        matmul_case(type, 17, 33, odd, ACT_NONE, false, false, 1e7);

        // a row's bits are the same beside 1 and beside 16 rows, and beside 17 and 200
        int rows = 50, cols = 288;
        Weights w((Type)type, rows, cols, 0.1);
        Floats x = normal(200 * cols);
        Device<float> dx(x), y(200 * rows);
        Ints sizes = { 1, 2, 3, 7, 8, 9, 16 };
        Floats first;
        for (int T : sizes) {
            K->matmul(y, dx, w.mat, NULL, ACT_NONE, false, T);
            Floats got = y.host();
            if (T == 1) first = got;
            check(!memcmp(got.data(), first.data(), rows * sizeof(float)), "matmul %s: row 0 beside %d others has other bits", names[type], T - 1);
        }
        for (int T : { 17, 64, 65, 129, 200 }) {
            K->matmul(y, dx, w.mat, NULL, ACT_NONE, false, T);
            Floats got = y.host();
            if (T == 17) first = got;
            check(!memcmp(got.data(), first.data(), 17 * rows * sizeof(float)), "matmul %s: rows beside %d others have other bits", names[type], T - 17);
        }
    }
    n_multiprocessors = there;
}

// cos and sin of all positions
static Floats turns(int positions, int hd) {
    Floats cs((size_t)positions * hd);
    for (int p = 0; p < positions; p++) for (int i = 0; i < hd / 2; i++) {
        double phi = p * pow(10000, -2.0 * i / hd);
        cs[(size_t)p * hd + 2 * i] = (float)cos(phi); cs[(size_t)p * hd + 2 * i + 1] = (float)sin(phi);
    }
    return cs;
}

static void test_rope() {
    for (int hd : { 16, 104, 128 }) {
        int T = 33, H = 3, G = 1, stride = (H + 2 * G) * hd;
        Floats x = normal(T * stride), cs = turns(50, hd), scale = normal(50);
        Ints pos(T), rot(T);
        for (int t = 0; t < T; t++) { pos[t] = t + 7; rot[t] = (t * 3) % 50; }
        for (int scaled = 0; scaled < 2; scaled++) {
            Device<float> dx(x), dcs(cs), ds(scale);
            Device<int> dpos(pos), drot(rot);
            Rows rows = { T, 1, NULL, NULL, dpos, drot }, h_rows = { T, 1, NULL, NULL, pos.data(), rot.data() };
            K->rope(dx, dcs, scaled ? (float *)ds : NULL, &rows, H, G, hd);
            Doubles want(x.size());
            rope_ref(want.data(), x.data(), cs.data(), scaled ? scale.data() : NULL, &h_rows, H, G, hd);
            close_to("rope", dx.host().data(), want.data(), want.size(), 1e-6, NAME("rope %d scaled %d", hd, scaled));
        }
    }
}

// Weights that sum to 1 meet values of size 1.5; an error of a logit is a relative error of its weight. Logits are float sums
// of up to 128 products of size 3, before the division by sqrt(head_dim): good to 1e-5.
enum { ATTEND_TOL_E6 = 20 };
static void test_attend() {
    for (int hd : { 16, 32, 64, 104, 128 })
        for (int Tk : { 1, 33, 65, 257 }) {
            int Tq = Tk == 33 ? 1 : Tk == 257 ? 65 : Tk, H = 2;
            if (quick && Tk > 65) continue;
            int qs = H * hd, ks = 2 * H * hd;                    // keys and values interleaved
            Floats q = normal(Tq * qs, 2), kv = normal(Tk * ks, 1.5);
            Device<float> dq(q), dkv(kv), o(Tq * qs);
            K->attend(o, dq, qs, dkv, dkv + H * hd, ks, Tq, Tk, H, hd);
            Doubles want(Tq * qs);
            attend_ref(want.data(), q.data(), qs, kv.data(), kv.data() + H * hd, ks, Tq, Tk, H, hd);
            close_to("attend", o.host().data(), want.data(), want.size(), ATTEND_TOL_E6 * 1e-6, NAME("attend %d, %d x %d", hd, Tq, Tk));
        }
}

// ----------------------------------------------------------------------------
// the cache

struct Pass {                                // the rows of a pass, on the device and on the host
    Ints seq, pos, rot;
    Device<int> d_seq, d_pos, d_rot;
    Rows rows, h_rows;
    Pass(const Ints &seq_, const Ints &pos_, const Ints &rot_, int B) : seq(seq_), pos(pos_), rot(rot_), d_seq(seq), d_pos(pos), d_rot(rot),
        rows{ (int)seq.size(), B, NULL, d_seq, d_pos, d_rot }, h_rows{ (int)seq.size(), B, NULL, seq.data(), pos.data(), rot.data() } {}
};

// The device's slots of a sequence against the naive ones. tol: for keys and values; 0: they were copied, so the same bits.
// Then the naive ones take the device's numbers, so that what comes next starts from the same.
static void same_cache(const char *when, KV *kv, RefKV *ref, int s, double tol, double tol_score) {
    int heads = ref->n_layers * ref->n_kv_heads, d = ref->head_dim;
    size_t n = 0, i = 0;
    Ints len(heads);
    K->kv_lens(kv, s, len.data());
    bool same = true;
    for (int h = 0; h < heads; h++) {
        int want = ref_head(ref, s, 0, h)->len;
        check(len[h] == want, "%s: length %d, want %d", when, len[h], want);
        same &= len[h] == want;
        n += want;
    }
    if (!same) return;
    Ints pos(n), rot(n);
    Floats score(n), k(n * d), v(n * d);
    Doubles w_score, w_k, w_v;
    K->kv_read(kv, s, pos.data(), rot.data(), score.data(), k.data(), v.data());
    for (int h = 0; h < heads; h++)
        for (int j = 0; j < len[h]; j++, i++) {
            RefSlot *x = &ref_head(ref, s, 0, h)->slot[j];
            same &= pos[i] == x->pos && rot[i] == x->rot;
            w_score.push_back(x->score);
            for (int e = 0; e < d; e++) {
                w_k.push_back(x->kv[e]);     x->kv[e] = k[i * d + e];
                w_v.push_back(x->kv[d + e]); x->kv[d + e] = v[i * d + e];
            }
        }
    check(same, "%s: positions differ", when);
    const char *kind = tol > 1e-4 ? "cache, merged f16" : tol > 0 ? "cache, merged f32" : "cache, copied";
    close_to("scores", score.data(), w_score.data(), n, tol_score, NAME("%s: scores", when));
    close_to(kind, k.data(), w_k.data(), w_k.size(), tol, NAME("%s: keys", when));
    close_to(kind, v.data(), w_v.data(), w_v.size(), tol, NAME("%s: values", when));
}

// kv_nearest for each layer, under a plan; what it says is in `into` and `w` afterwards.
static void check_nearest(const char *name, KV *kv, RefKV *ref, int s, const std::vector<char> &keep, Ints *into, Floats *w) {
    size_t at = 0;
    for (int l = 0; l < ref->n_layers; l++) {
        K->kv_nearest(&(*into)[at], &(*w)[at], kv, s, l, (const bool *)&keep[at]);
        for (int g = 0; g < ref->n_kv_heads; g++) {
            RefHead *c = ref_head(ref, s, l, g);
            Floats got;
            Doubles want;
            bool right = true;
            for (int i = 0; i < c->len; i++) {
                int to = (*into)[at + i];
                double best = -2;
                for (int j = 0; j < c->len; j++) if (keep[at + j]) best = std::max(best, ref_cosine(ref, &c->slot[i], &c->slot[j]));
                if (keep[at + i] || best == -2) { right &= to == -1; continue; }
                right &= to >= 0 && to < c->len && keep[at + to] && ref_cosine(ref, &c->slot[i], &c->slot[to]) >= best - 1e-6;    // or one as near
                got.push_back((*w)[at + i]);
                want.push_back(best);
            }
            check(right, "%s: nearest, layer %d head %d", name, l, g);
            close_to("kv_nearest", got.data(), want.data(), got.size(), 2e-6, NAME("%s: nearest's cosine", name));
            at += c->len;
        }
    }
}

// A prompt, its votes, a plan, decoding with votes and drops, a second prompt over the compressed cache: everything in the
// order in which a program does it, for one shape.
static void cache_case(int hd, Type type, int H, int G, int n_prompt) {
    const int L = 2, S = 3, s0 = 1;          // sequence 1 has the prompt; 2 becomes its copy
    char name[100];
    snprintf(name, sizeof name, "cache %s hd %d, %d/%d heads, %d rows", names[type], hd, H, G, n_prompt);
    const double tol = ATTEND_TOL_E6 * 1e-6, tol_votes = 2e-5;
    int width = (H + 2 * G) * hd, positions = 2 * n_prompt + 64;
    KV *kv = K->kv_new(L, G, hd, S, type);
    RefKV ref = ref_new(L, G, hd, S, type);
    Floats cs = turns(positions, hd);
    Device<float> d_cs(cs);
    std::vector<uint8_t> shown(positions, 1);
    for (int i = 0; i < positions; i += 3) shown[i] = 0;
    shown[0] = shown[n_prompt + 2] = 1;      // the first row, and one that decodes, would see nothing else
    const uint8_t *lists[S] = { NULL, shown.data(), NULL };

    auto pass = [&](const char *when, const Ints &seq, const Ints &pos, int B, const uint8_t *const *visible, bool vote, bool column) {
        Pass p(seq, pos, pos, B);
        int T = p.rows.T;
        for (int l = 0; l < L; l++) {
            Floats qkv = normal((size_t)T * width, 1.5);
            Device<float> d(qkv), o((size_t)T * H * hd), lse((size_t)T * H);
            Doubles wo(o.n), wl(lse.n);
            K->kv_append(kv, l, d, &p.rows, H);
            ref_append(&ref, l, qkv.data(), &p.h_rows, H);
            K->kv_attend(o, lse, kv, l, d, &p.rows, H, visible, vote);
            ref_attend(wo.data(), wl.data(), &ref, l, qkv.data(), &p.h_rows, H, visible, vote);
            close_to("kv_attend", o.host().data(), wo.data(), wo.size(), tol, NAME("%s: %s: o", name, when));
            close_to("kv_attend lse", lse.host().data(), wl.data(), wl.size(), tol, NAME("%s: %s: lse", name, when));
            if (!column) continue;
            int slots = ref_head(&ref, s0, l, 0)->len;
            Floats map((size_t)T * slots), sums(slots);
            Doubles want(map.size());
            K->kv_map(map.data(), kv, l, d, lse, &p.rows, H, visible);
            ref_map(want.data(), &ref, l, qkv.data(), wl.data(), &p.h_rows, H, visible);
            close_to("kv_map", map.data(), want.data(), want.size(), tol_votes, NAME("%s: %s: map", name, when));
            for (int n : { (2 * T + 2) / 3, T }) {
                K->kv_vote(kv, l, d, lse, &p.rows, H, visible, n);
                ref_vote(&ref, l, qkv.data(), wl.data(), &p.h_rows, H, visible, n);
                K->kv_column_sums(sums.data(), kv, l, d, lse, &p.rows, H, visible, n);
                Doubles mean(slots);
                for (int t = T - n; t < T; t++) for (int j = 0; j < slots; j++) mean[j] += want[(size_t)t * slots + j];
                close_to("kv_column_sums", sums.data(), mean.data(), slots, tol_votes, NAME("%s: %s: column sums of %d", name, when, n));
            }
        }
    };
    auto total = [&](int s) { size_t n = 0; for (int h = 0; h < L * G; h++) n += ref_head(&ref, s, 0, h)->len; return n; };
    auto reserve = [&](int s, int extra) { K->kv_reserve(kv, s, extra); ref_reserve(&ref, s, extra); };
    auto copy = [&](int to, int from) { K->kv_copy(kv, to, from); ref_copy(&ref, to, from); };
    auto same = [&](const char *when, int s, double tol_k = 0) {
        same_cache(NAME("%s: %s, sequence %d", name, when, s), kv, &ref, s, tol_k, tol_votes);
        check(K->kv_bytes(kv) == ref_bytes(&ref), "%s: %s: kv_bytes %zu, want %zu", name, when, K->kv_bytes(kv), ref_bytes(&ref));
    };
    auto random_keep = [&](int s, double drop) {
        std::vector<char> keep(total(s));
        for (char &k : keep) k = rnd(&rng) >= drop;
        return keep;
    };

    // the prompt
    Ints seq(n_prompt, s0), pos(n_prompt);
    for (int t = 0; t < n_prompt; t++) pos[t] = t;
    reserve(s0, n_prompt);
    pass("prompt", seq, pos, 1, n_prompt % 2 ? NULL : lists, false, true);
    same("prompt", s0);

    // a plan that merges by nearness, somewhat disturbed: some kept slots are sources too, some that leave go nowhere
    std::vector<char> keep = random_keep(s0, 0.6);
    move_bytes = n_prompt % 2 ? 0 : 64 << 20;                    // one layer at a time, or all at once
    Ints into(keep.size(), -1);
    Floats w(keep.size(), 1.0f);
    check_nearest(name, kv, &ref, s0, keep, &into, &w);
    size_t at = 0;
    for (int h = 0; h < L * G; h++) {
        int n = ref_head(&ref, s0, 0, h)->len;
        for (int i = 0; i < n; i++) {
            int *to = &into[at + i];
            if (rnd(&rng) < 0.1) *to = rnd(&rng) < 0.5 ? -1 : rnd_int(&rng, n);
            if (*to >= 0 && !keep[at + *to]) *to = -1;
        }
        at += n;
    }
    const double tol_merge = type == F16 ? 2e-3 : 5e-6;          // an f16 may round to its neighbour; a turn is four products
    K->kv_apply(kv, s0, (bool *)keep.data(), into.data(), w.data(), 0.5f, NULL);
    ref_apply(&ref, s0, (bool *)keep.data(), into.data(), w.data(), 0.5f, NULL);
    same("merged", s0, tol_merge);
    reserve(s0, 12);
    same("shrunk", s0);

    // sequence 2 as its copy, sequence 0 with a short prompt of its own; then three decode as a batch, with votes and drops
    copy(2, s0);
    same("copied", 2);
    reserve(0, 16);
    pass("short prompt", { 0, 0, 0 }, { 0, 1, 2 }, 1, NULL, false, false);
    Ints next = { 3, n_prompt, n_prompt };
    for (int step = 0; step < 6; step++) {
        pass("decode", { 2, 0, 1 }, { next[2], next[0], next[1] }, 3, step == 2 ? lists : NULL, step % 2 == 0, false);
        for (int &n : next) n++;
        K->kv_drop_lowest(kv, 2, 1, 1);
        for (int h = 0; h < L * G; h++) {
            int lowest = ref_lowest(ref_head(&ref, 2, 0, h), 1, 1);
            if (lowest >= 0) ref_remove(ref_head(&ref, 2, 0, h), lowest);
        }
        if (step % 3 != 2) {
            Ints slot(L * G);
            for (int h = 0; h < L * G; h++) {
                slot[h] = rnd_int(&rng, ref_head(&ref, s0, 0, h)->len + 1) - 1;
                if (slot[h] >= 0) ref_remove(ref_head(&ref, s0, 0, h), slot[h]);
            }
            K->kv_drop(kv, s0, slot.data());
        }
        for (int s = 0; s < S; s++) same("decoded", s);
    }

    // holes and all: further rows that fill them, a copy, a turn of the keys, a move
    pass("more rows", { s0, s0 }, { next[1], next[1] + 1 }, 1, NULL, false, true);
    same("more rows", s0);
    copy(0, s0);
    same("copied with holes", 0);
    for (int again = 0; again < 2; again++) {
        keep = random_keep(s0, 0.3);
        K->kv_apply(kv, s0, (bool *)keep.data(), NULL, NULL, 0, d_cs);
        ref_apply(&ref, s0, (bool *)keep.data(), NULL, NULL, 0, cs.data());
        same("renumbered", s0, tol_merge);
    }
    reserve(2, 3);
    same("reserved with holes", 2);
    K->kv_scores_clear(kv, 2);
    for (int h = 0; h < L * G; h++) for (int j = 0; j < ref_head(&ref, 2, 0, h)->len; j++) ref_head(&ref, 2, 0, h)->slot[j].score = 0;
    same("scores cleared", 2);
    K->kv_clear(kv, 2);
    ref_clear(&ref, 2);
    same("cleared", 2);
    K->kv_free(kv);
    ref_free(&ref);
}

static void test_cache() {
    cache_case(16, F32, 2, 2, 1);
    cache_case(32, F16, 2, 1, 33);
    cache_case(16, F16, 4, 2, 66);
    cache_case(64, F32, 2, 2, 65);
    cache_case(104, F16, 1, 1, 40);
    cache_case(104, F32, 1, 1, 34);
    if (quick) return;
    cache_case(16, F16, 3, 1, 300);       // more slots than a block has threads
    cache_case(32, F32, 2, 2, 97);
    cache_case(64, F16, 2, 2, 129);
    cache_case(128, F32, 2, 1, 66);
    cache_case(128, F16, 2, 2, 200);
}

static void test_cosine() {
    for (int dim : { 1, 33, 4096 }) {
        int n = 9, m = 5;
        Floats a = normal(n * dim), b = normal(m * dim), got(n * m);
        for (int i = 0; i < dim; i++) a[i] = 0;                  // a row of zeros: cosine 0
        Device<float> da(a), db(b);
        K->cosine(got.data(), da, n, db, m, dim);
        Doubles want(n * m);
        for (int i = 0; i < n * m; i++) want[i] = cosine_ref(&a[i / m * dim], &b[i % m * dim], dim);
        close_to("cosine", got.data(), want.data(), want.size(), 2e-6, NAME("cosine %d", dim));
    }
}

// A decode step recorded and replayed gives the bits of one that is launched, while caches grow, lose slots and move.
static void test_graph() {
    const int L = 2, H = 2, hd = 32, dim = H * hd, S = 2, width = 3 * dim;
    Weights w(F16, width, dim, 0.1);
    Floats table(L * 64 * hd, 0.6f), xs = normal(20 * S * dim);
    Floats result[2];
    for (int graph = 0; graph < 2; graph++) {
        KV *kv = K->kv_new(L, H, hd, S, F16);
        for (int s = 0; s < S; s++) K->kv_reserve(kv, s, 20);
        Device<int> seq(Ints{ 1, 0 }), pos(S), rot(S);
        Device<float> x(S * dim), qkv(S * width), o(S * dim), lse(S * H), cs(table);
        int replays = 0;
        for (int step = 0; step < 14; step++) {
            Ints p(S, step);
            K->put(x, &xs[step * S * dim], S * dim * sizeof(float));
            K->put(pos, p.data(), S * sizeof(int));
            K->put(rot, p.data(), S * sizeof(int));
            Rows rows = { S, S, NULL, seq, pos, rot };
            bool done = graph && K->replay(7);
            replays += done;
            if (!done) {
                if (graph) K->record(7);
                for (int l = 0; l < L; l++) {
                    K->matmul(qkv, x, w.mat, NULL, ACT_NONE, false, S);
                    K->rope(qkv, cs, NULL, &rows, H, H, hd);
                    K->kv_append(kv, l, qkv, &rows, H);
                    K->kv_attend(o, lse, kv, l, qkv, &rows, H, NULL, true);
                    K->rows_copy(x, o, NULL, S, dim);
                }
                if (graph) K->stop();
            }
            Floats out = o.host();
            result[graph].insert(result[graph].end(), out.begin(), out.end());
            if (step > 4) K->kv_drop_lowest(kv, 0, 1, 2);
            if (step == 8) K->kv_reserve(kv, 1, 10);
            if (step == 10) K->kv_reserve(kv, 1, 40);           // the longest head grew: recorded anew
            Ints len(L * H);
            K->kv_lens(kv, 1, len.data());
            check(len[0] == step + 1 && len[L * H - 1] == step + 1, "graph: length %d after %d steps", len[0], step + 1);
        }
        check(!graph || (replays >= 8 && replays <= 10), "graph: %d of 14 steps were replayed", replays);
        Floats score(K->kv_bytes(kv));
        Ints len(L * H);
        K->kv_lens(kv, 0, len.data());
        int n = 0;
        for (int v : len) n += v;
        K->kv_read(kv, 0, NULL, NULL, score.data(), NULL, NULL);
        result[graph].insert(result[graph].end(), score.begin(), score.begin() + n);
        K->kv_free(kv);
    }
    check(result[0].size() == result[1].size() && !memcmp(result[0].data(), result[1].data(), result[0].size() * sizeof(float)), "a graph's results have other bits");
}

// Twice the same: on the CPU threads run in another order the second time, on a GPU blocks do by themselves.
static void test_again() {
    Floats result[2];
    uint64_t start = rng;
    for (int run = 0; run < 2; run++) {
        rng = start;
        const int T = 70, H = 2, hd = 64, width = 3 * H * hd;
        Weights w(F16, width, 160, 0.1);
        Device<float> x(normal(T * 160)), qkv(T * width), o(T * H * hd), lse(T * H);
        K->matmul(qkv, x, w.mat, NULL, ACT_NONE, false, T);
        Ints seq(T, 0), pos(T);
        for (int t = 0; t < T; t++) pos[t] = t;
        Pass p(seq, pos, pos, 1);
        KV *kv = K->kv_new(1, H, hd, 1, F16);
        K->kv_reserve(kv, 0, T + 1);
        K->kv_append(kv, 0, qkv, &p.rows, H);
        K->kv_attend(o, lse, kv, 0, qkv, &p.rows, H, NULL, false);
        K->kv_vote(kv, 0, qkv, lse, &p.rows, H, NULL, T);
        Floats out = o.host(), score(T * H + H);
        K->kv_read(kv, 0, NULL, NULL, score.data(), NULL, NULL);
        result[run] = out;
        result[run].insert(result[run].end(), score.begin(), score.begin() + T * H);
        Pass d({ 0 }, { T }, { T }, 1);
        K->kv_append(kv, 0, qkv, &d.rows, H);
        K->kv_attend(o, lse, kv, 0, qkv, &d.rows, H, NULL, true);
        out = o.host();
        result[run].insert(result[run].end(), out.begin(), out.begin() + H * hd);
        K->kv_read(kv, 0, NULL, NULL, score.data(), NULL, NULL);
        result[run].insert(result[run].end(), score.begin(), score.end());
        K->kv_free(kv);
    }
    check(!memcmp(result[0].data(), result[1].data(), result[0].size() * sizeof(float)), "the second run has other bits");
}

#include "planted_bugs.h"

int main(int argc, char **argv) {
    quick = argc > 1 && !strcmp(argv[1], "quick");
    setvbuf(stdout, NULL, _IONBF, 0);
#ifndef __CUDACC__
    check(survives([] { emu::n_devices = 0; return cuda() == NULL; }), "a machine without a device");
    check(survives([] { emu::capability = 75; return cuda() == NULL; }), "a device that is too old");
    check(survives([] { emu::no_code = true; return cuda() == NULL; }), "a device that this program was not compiled for");
#endif
    K = cuda();
    if (!K) return 1;
    struct { const char *name; void (*run)(); } tests[] = {
        { "memory", test_memory }, { "rows", test_rows }, { "norms", test_norms }, { "matmul", test_matmul }, { "rope", test_rope }, { "attend", test_attend },
        { "cache", test_cache }, { "cosine", test_cosine }, { "graph", test_graph }, { "again", test_again },
#ifndef __CUDACC__
        { "planted bugs", test_planted_bugs },
#endif
    };
    for (auto &t : tests) {
        if (argc > 1 && !quick && strcmp(argv[1], t.name)) continue;
        clock_t begin = clock();
        t.run();
        printf("%-14s %5.1f s\n", t.name, (double)(clock() - begin) / CLOCKS_PER_SEC);
    }
    printf("worst |got - want| / (1 + |want|):\n");
    for (int i = 0; i < n_errors; i++) printf("    %-20s %.1e of %.0e\n", errors[i].name, errors[i].worst, errors[i].tol);
    return finish();
}
