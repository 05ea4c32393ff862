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
// plain 16-bit floats, independent of the kernels' own

static double f16_double(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    double v = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}
static uint16_t double_f16(double x) {       // finite, in range
    uint16_t sign = x < 0 ? 0x8000 : 0;
    x = fabs(x);
    if (x < ldexp(1, -14)) return (uint16_t)(sign | (int)nearbyint(ldexp(x, 24)));
    int e;
    double m = frexp(x, &e);                 // x = m 2^e, m in [0.5, 1)
    return (uint16_t)(sign + ((e + 14) << 10) + (int)nearbyint(ldexp(m, 11)) - 1024);
}

// ----------------------------------------------------------------------------
// weights of each type, and what they mean

struct Weights { std::vector<char> data, scale; Doubles value; Mat mat; };
static const char *const names[] = { "f32", "f16", "bf16", "q8_0" };

static void make_weights(Weights *w, Type type, int rows, int cols, double size) {
    size_t stride = row_bytes(type, cols), scales = scale_row_bytes(cols);
    w->data.assign(rows * stride, 0);
    w->scale.assign(type == Q8_0 ? rows * scales : 0, 0);
    w->value.resize((size_t)rows * cols);
    for (int r = 0; r < rows; r++) {
        char *p = &w->data[r * stride];
        if (type == Q8_0) for (int b = 0; b < cols / 32; b++) ((uint16_t *)&w->scale[r * scales])[b] = double_f16(size / 64 * (0.5 + rnd(&rng)));
        for (int c = 0; c < cols; c++) {
            float x = (float)(size * rnd_normal(&rng));
            double *v = &w->value[(size_t)r * cols + c];
            if (type == F32) { ((float *)p)[c] = x; *v = x; }
            if (type == F16) { ((uint16_t *)p)[c] = double_f16(x); *v = f16_double(((uint16_t *)p)[c]); }
            if (type == BF16) { uint32_t u; memcpy(&u, &x, 4); u &= 0xffff0000; memcpy(&x, &u, 4); ((uint16_t *)p)[c] = (uint16_t)(u >> 16); *v = x; }
            if (type == Q8_0) { int8_t q = (int8_t)(rnd_int(&rng, 255) - 127); p[c] = q; *v = q * f16_double(((uint16_t *)&w->scale[r * scales])[c / 32]); }
        }
    }
    w->mat = K->weight(type, rows, cols, w->data.data(), type == Q8_0 ? w->scale.data() : NULL);
}
static void free_weights(Weights *w) { K->release((void *)w->mat.data); }

static double act_ref(double u, Act act) {
    return act == ACT_GELU ? u * (1 + erf(u / sqrt(2.0))) / 2 : act == ACT_QUICK_GELU ? u / (1 + exp(-1.702 * u)) : u;
}

// ----------------------------------------------------------------------------

static void test_rows() {
    for (int type = 0; type < N_TYPES; type++)
        for (int dim : { 32, 96, 4096 }) {
            Weights w;
            make_weights(&w, (Type)type, 7, dim, 1);
            Ints id = { 3, -1, 0, 6 };
            Floats y0 = normal(4 * dim);
            Device<float> y(y0);
            Device<int> d_id(id);
            K->embed(y, w.mat, d_id, 4);
            Doubles want(4 * dim);
            for (int t = 0; t < 4; t++) for (int i = 0; i < dim; i++) want[t * dim + i] = id[t] < 0 ? y0[t * dim + i] : w.value[id[t] * dim + i];
            close_to("embed", y.host().data(), want.data(), want.size(), 1e-7, NAME("embed %s %d", names[type], dim));     // a product of two floats at most
            free_weights(&w);
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
            Doubles rms((size_t)T * dim), ln(rms), silu((size_t)T * dim);
            for (int t = 0; t < T; t++) {
                double ss = 0, sum = 0, var = 0;
                for (int i = 0; i < dim; i++) { double v = x[(size_t)t * dim + i]; ss += v * v; sum += v; }
                for (int i = 0; i < dim; i++) { double v = x[(size_t)t * dim + i] - sum / dim; var += v * v; }
                for (int i = 0; i < dim; i++) {
                    double v = x[(size_t)t * dim + i];
                    rms[(size_t)t * dim + i] = w[i] * v / sqrt(ss / dim + 1e-5);
                    ln[(size_t)t * dim + i] = w[i] * (v - sum / dim) / sqrt(var / dim + 1e-5) + b[i];
                }
            }
            K->rmsnorm(y, dx, dw, T, dim, 1e-5f);
            close_to("rmsnorm", y.host().data(), rms.data(), rms.size(), 2e-6, NAME("rmsnorm %d %d", T, dim));      // a few roundings and a sum of 256 partial sums
            K->layernorm(dx, dx, dw, db, T, dim, 1e-5f);                                                             // in place
            close_to("layernorm", dx.host().data(), ln.data(), ln.size(), 5e-6, NAME("layernorm %d %d", T, dim));
            Floats h = normal((size_t)T * dim * 2, 4);
            for (int t = 0; t < T; t++) for (int i = 0; i < dim; i++) {
                double g = h[(size_t)t * 2 * dim + i];
                silu[(size_t)t * dim + i] = g / (1 + exp(-g)) * h[(size_t)t * 2 * dim + dim + i];
            }
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
    Weights w;
    make_weights(&w, (Type)type, rows, cols, 1 / sqrt(cols));
    Floats x = normal((size_t)T * cols, x_size), bias = normal(rows), y0 = normal((size_t)T * rows);
    Device<float> dx(x), db(bias), y(y0);
    K->matmul(y, dx, w.mat, use_bias ? (float *)db : NULL, act, add, T);
    Floats got = y.host();
    Doubles want((size_t)T * rows);
    for (int t = 0; t < T; t++)
        for (int r = 0; r < rows; r++) {
            double u = use_bias ? bias[r] : 0;
            for (int c = 0; c < cols; c++) u += (double)x[(size_t)t * cols + c] * w.value[(size_t)r * cols + c];
            want[(size_t)t * rows + r] = act_ref(u, act) + (add ? y0[(size_t)t * rows + r] : 0);
        }
    if (x_size != 1) for (size_t i = 0; i < want.size(); i++) { want[i] /= x_size; got[i] = (float)(got[i] / x_size); }
    char kind[40];
    snprintf(kind, sizeof kind, "matmul %s %s", names[type], T <= FEW ? "few" : "tiles");
    close_to(kind, got.data(), want.data(), want.size(), matmul_tol(type, T),
             NAME("matmul %s T %d rows %d cols %d act %d bias %d add %d x %g", names[type], T, rows, cols, act, use_bias, add, x_size));
    free_weights(&w);
}

static void test_matmul() {
    for (int type = 0; type < N_TYPES; type++) {
        int small = type == Q8_0 ? 32 : 1, odd = type == Q8_0 ? 96 : 33, wide = type == Q8_0 ? 576 : 588;
        for (int T : { 1, 2, 4, 5, 8, 9, 16, 17, 33, 65, 129 }) {
            matmul_case(type, T, 1, small, ACT_NONE, false, false, 1);
            matmul_case(type, T, 33, odd, ACT_GELU, true, false, 1);
            matmul_case(type, T, 129, type == Q8_0 ? 160 : 172, ACT_QUICK_GELU, true, true, 1);
            if (!quick) matmul_case(type, T, 65, wide, ACT_NONE, false, true, 1);
        }
        for (int T : { 1, 3, 16, 128 }) if (!quick || T < 4) matmul_case(type, T, T > FEW ? 128 : 40, 4096, ACT_NONE, false, false, 1);
        for (double size : { 1e-5, 3e4 }) matmul_case(type, 17, 33, odd, ACT_NONE, false, false, size);      // f16 ends at 65504
        matmul_case(type, 17, 33, odd, ACT_NONE, false, false, 1e7);

        // a row's bits are the same beside 1 and beside 16 rows, and beside 17 and 129
        int rows = 50, cols = 288;
        Weights w;
        make_weights(&w, (Type)type, rows, cols, 0.1);
        Floats x = normal(129 * cols);
        Device<float> dx(x), y(129 * rows);
        Ints sizes = { 1, 2, 3, 7, 8, 9, 16 };
        Floats first;
        for (int T : sizes) {
            K->matmul(y, dx, w.mat, NULL, ACT_NONE, false, T);
            Floats got = y.host();
            if (T == 1) first = got;
            check(!memcmp(got.data(), first.data(), rows * sizeof(float)), "matmul %s: row 0 beside %d others has other bits", names[type], T - 1);
        }
        for (int T : { 17, 64, 65, 129 }) {
            K->matmul(y, dx, w.mat, NULL, ACT_NONE, false, T);
            Floats got = y.host();
            if (T == 17) first = got;
            check(!memcmp(got.data(), first.data(), 17 * rows * sizeof(float)), "matmul %s: rows beside %d others have other bits", names[type], T - 17);
        }
        free_weights(&w);
    }
}

static void test_rope() {
    for (int hd : { 16, 104, 128 }) {
        int T = 33, H = 3, G = 1, stride = (H + 2 * G) * hd;
        Floats x = normal(T * stride), cs(50 * hd), scale = normal(50);
        Ints pos(T), rot(T);
        for (int t = 0; t < T; t++) { pos[t] = t + 7; rot[t] = (t * 3) % 50; }
        for (int p = 0; p < 50; p++) for (int i = 0; i < hd / 2; i++) {
            double phi = p * pow(10000, -2.0 * i / hd);
            cs[(p * hd / 2 + i) * 2] = (float)cos(phi); cs[(p * hd / 2 + i) * 2 + 1] = (float)sin(phi);
        }
        for (int scaled = 0; scaled < 2; scaled++) {
            Device<float> dx(x), dcs(cs), ds(scale);
            Device<int> dpos(pos), drot(rot);
            Rows rows = { T, 1, NULL, NULL, dpos, drot };
            K->rope(dx, dcs, scaled ? (float *)ds : NULL, &rows, H, G, hd);
            Doubles want(x.begin(), x.end());
            for (int t = 0; t < T; t++) for (int h = 0; h < H + G; h++) for (int i = 0; i < hd / 2; i++) {
                const float *u = &x[t * stride + h * hd + i];
                double c = cs[(rot[t] * hd / 2 + i) * 2], s = cs[(rot[t] * hd / 2 + i) * 2 + 1], f = scaled && h < H ? scale[pos[t]] : 1;
                want[t * stride + h * hd + i] = f * (u[0] * c - u[hd / 2] * s);
                want[t * stride + h * hd + i + hd / 2] = f * (u[hd / 2] * c + u[0] * s);
            }
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
            for (int t = 0; t < Tq; t++) for (int h = 0; h < H; h++) {
                Doubles p(Tk);
                double m = -1e300, sum = 0;
                for (int j = 0; j < Tk; j++) {
                    double s = 0;
                    for (int i = 0; i < hd; i++) s += (double)q[t * qs + h * hd + i] * kv[j * ks + h * hd + i];
                    p[j] = s / sqrt(hd);
                    m = std::max(m, p[j]);
                }
                for (double &v : p) sum += v = exp(v - m);
                for (int j = 0; j < Tk; j++) for (int i = 0; i < hd; i++) want[t * qs + h * hd + i] += p[j] / sum * kv[j * ks + H * hd + h * hd + i];
            }
            close_to("attend", o.host().data(), want.data(), want.size(), ATTEND_TOL_E6 * 1e-6, NAME("attend %d, %d x %d", hd, Tq, Tk));
        }
}

// ----------------------------------------------------------------------------
// the cache, naive: one list of slots for each (layer, sequence, head), in token order

struct Slot { int pos, rot; double score; Doubles k, v; };
struct Ref {
    int L, G, hd, S; Type type;
    std::vector<std::vector<Slot>> list;
    Ref(int L, int G, int hd, int S, Type type) : L(L), G(G), hd(hd), S(S), type(type), list(L * S * G) {}
    std::vector<Slot> &at(int l, int s, int g) { return list[(l * S + s) * G + g]; }
    double stored(double x) const { return type == F16 ? f16_double(double_f16(x)) : (float)x; }
    void append(int l, const Floats &qkv, int H, const Ints &seq, const Ints &pos, const Ints &rot) {
        for (size_t t = 0; t < seq.size(); t++) for (int g = 0; g < G; g++) {
            Slot n = { pos[t], rot[t], 0, Doubles(hd), Doubles(hd) };
            for (int i = 0; i < hd; i++) {
                n.k[i] = stored(qkv[(t * (H + 2 * G) + H + g) * hd + i]);
                n.v[i] = stored(qkv[(t * (H + 2 * G) + H + G + g) * hd + i]);
            }
            at(l, seq[t], g).push_back(n);
        }
    }
    // p[t, h, j], o, lse
    void attend(int l, const Floats &qkv, int H, const Ints &seq, const Ints &pos, const uint8_t *const *visible, Doubles *o, Doubles *lse, std::vector<Doubles> *p) {
        size_t T = seq.size();
        o->assign(T * H * hd, 0); lse->assign(T * H, 0); p->assign(T * H, Doubles());
        for (size_t t = 0; t < T; t++) for (int h = 0; h < H; h++) {
            std::vector<Slot> &c = at(l, seq[t], h / (H / G));
            Doubles &q = (*p)[t * H + h];
            double m = -INFINITY, sum = 0;
            for (Slot &s : c) {
                double x = 0;
                for (int i = 0; i < hd; i++) x += qkv[(t * (H + 2 * G) + h) * hd + i] * s.k[i];
                bool seen = s.pos <= pos[t] && !(visible && visible[seq[t]] && !visible[seq[t]][s.pos]);
                q.push_back(seen ? x / sqrt(hd) : -INFINITY);
                m = std::max(m, q.back());
            }
            for (double &x : q) sum += x = exp(x - m);
            (*lse)[t * H + h] = m + log(sum);
            for (size_t j = 0; j < c.size(); j++) {
                q[j] /= sum;
                for (int i = 0; i < hd; i++) (*o)[(t * H + h) * hd + i] += q[j] * c[j].v[i];
            }
        }
    }
    void apply(int s, const bool *keep, const int *into, const float *w, double self, const Floats *cs) {
        size_t at_ = 0;
        for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) {
            std::vector<Slot> &c = at(l, s, g), out;
            for (size_t j = 0; j < c.size(); j++) {
                if (!keep[at_ + j]) continue;
                Slot x = c[j];
                int n = 0;
                if (into) for (size_t i = 0; i < c.size(); i++) {
                    if (into[at_ + i] != (int)j) continue;
                    n++;
                    for (int e = 0; e < hd; e++) { x.k[e] += w[at_ + i] * c[i].k[e] + self * c[j].k[e]; x.v[e] += w[at_ + i] * c[i].v[e] + self * c[j].v[e]; }
                }
                for (int e = 0; e < hd; e++) { x.k[e] /= 1 + n; x.v[e] /= 1 + n; }
                if (cs) {
                    Doubles k = x.k;
                    for (int e = 0; e < hd / 2; e++) {
                        const float *a = &(*cs)[(out.size() * (hd / 2) + e) * 2], *b = &(*cs)[((size_t)x.rot * (hd / 2) + e) * 2];
                        double phi = atan2(a[1], a[0]) - atan2(b[1], b[0]);
                        x.k[e] = k[e] * cos(phi) - k[e + hd / 2] * sin(phi);
                        x.k[e + hd / 2] = k[e + hd / 2] * cos(phi) + k[e] * sin(phi);
                    }
                    x.rot = (int)out.size();
                }
                for (int e = 0; e < hd; e++) { x.k[e] = stored(x.k[e]); x.v[e] = stored(x.v[e]); }
                out.push_back(x);
            }
            at_ += c.size();
            c = out;
        }
    }
    size_t total(int s) { size_t n = 0; for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) n += at(l, s, g).size(); return n; }
};

// The device's slots of a sequence against the naive ones. tol_k: for what was computed, not copied
static void same_cache(const char *when, KV *kv, Ref &ref, int s, double tol_k, double tol_score) {
    size_t n = ref.total(s);
    Ints len(ref.L * ref.G), pos(n), rot(n);
    Floats score(n), k(n * ref.hd), v(n * ref.hd);
    K->kv_lens(kv, s, len.data());
    Doubles w_score, w_k, w_v;
    bool same = true;
    size_t i = 0;
    for (int l = 0; l < ref.L; l++) for (int g = 0; g < ref.G; g++) {
        check(len[l * ref.G + g] == (int)ref.at(l, s, g).size(), "%s: length %d, want %zu", when, len[l * ref.G + g], ref.at(l, s, g).size());
        same &= len[l * ref.G + g] == (int)ref.at(l, s, g).size();
    }
    if (!same) return;
    K->kv_read(kv, s, pos.data(), rot.data(), score.data(), k.data(), v.data());
    for (int l = 0; l < ref.L; l++) for (int g = 0; g < ref.G; g++)
        for (Slot &x : ref.at(l, s, g)) {
            same &= pos[i] == x.pos && rot[i] == x.rot;
            i++;
            w_score.push_back(x.score);
            w_k.insert(w_k.end(), x.k.begin(), x.k.end());
            w_v.insert(w_v.end(), x.v.begin(), x.v.end());
        }
    check(same, "%s: positions differ", when);
    close_to("scores", score.data(), w_score.data(), n, tol_score, NAME("%s: scores", when));
    close_to(tol_k > 1e-4 ? "cache, merged f16" : tol_k > 0 ? "cache, merged f32" : "cache, copied", k.data(), w_k.data(), w_k.size(), tol_k, NAME("%s: keys", when));
    close_to(tol_k > 1e-4 ? "cache, merged f16" : tol_k > 0 ? "cache, merged f32" : "cache, copied", v.data(), w_v.data(), w_v.size(), tol_k, NAME("%s: values", when));
    // what is compared next should start from the same numbers
    i = 0;
    for (int l = 0; l < ref.L; l++) for (int g = 0; g < ref.G; g++)
        for (Slot &x : ref.at(l, s, g)) {
            for (int e = 0; e < ref.hd; e++) { x.k[e] = k[i * ref.hd + e]; x.v[e] = v[i * ref.hd + e]; }
            i++;
        }
}

struct Pass {                                // the rows of a pass on the device
    Ints seq, pos, rot;
    Device<int> d_seq, d_pos, d_rot;
    Rows rows;
    Pass(const Ints &seq, const Ints &pos, const Ints &rot, int B) : seq(seq), pos(pos), rot(rot), d_seq(seq), d_pos(pos), d_rot(rot),
        rows{ (int)seq.size(), B, NULL, d_seq, d_pos, d_rot } {}
};

// A prompt, its votes, a plan, decoding with votes and drops, a second prompt over the compressed cache: everything in the
// order in which a program does it, for one shape.
static void cache_case(int hd, Type type, int H, int G, int n_prompt) {
    const int L = 2, S = 3, s0 = 1;          // sequence 1 has the prompt; 2 becomes its copy
    char name[100];
    snprintf(name, sizeof name, "cache %s hd %d, %d/%d heads, %d rows", names[type], hd, H, G, n_prompt);
    const double tol = ATTEND_TOL_E6 * 1e-6, tol_votes = 2e-5;
    int width = (H + 2 * G) * hd, positions = 2 * n_prompt + 64;
    KV *kv = K->kv_new(L, G, hd, S, type);
    Ref ref(L, G, hd, S, type);
    Floats cs((size_t)positions * hd);
    for (int p = 0; p < positions; p++) for (int i = 0; i < hd / 2; i++) {
        double phi = p * pow(10000, -2.0 * i / hd);
        cs[((size_t)p * hd / 2 + i) * 2] = (float)cos(phi); cs[((size_t)p * hd / 2 + i) * 2 + 1] = (float)sin(phi);
    }
    Device<float> d_cs(cs);
    std::vector<uint8_t> hidden(positions, 1);
    for (int i = 0; i < positions; i += 3) hidden[i] = 0;
    const uint8_t *lists[S] = { NULL, hidden.data(), NULL };

    auto pass = [&](const char *when, const Ints &seq, const Ints &pos, const Ints &rot, int B, const uint8_t *const *visible, bool vote, bool column) {
        Pass p(seq, pos, rot, B);
        int T = p.rows.T;
        for (int l = 0; l < L; l++) {
            Floats qkv = normal((size_t)T * width, 1.5);
            Device<float> d(qkv), o((size_t)T * H * hd), lse((size_t)T * H);
            K->kv_append(kv, l, d, &p.rows, H);
            ref.append(l, qkv, H, seq, pos, rot);
            K->kv_attend(o, lse, kv, l, d, &p.rows, H, visible, vote);
            Doubles wo, wl;
            std::vector<Doubles> prob;
            ref.attend(l, qkv, H, seq, pos, visible, &wo, &wl, &prob);
            close_to("kv_attend", o.host().data(), wo.data(), wo.size(), tol, NAME("%s: %s: o", name, when));
            close_to("kv_attend lse", lse.host().data(), wl.data(), wl.size(), tol, NAME("%s: %s: lse", name, when));
            if (vote) for (int t = 0; t < T; t++) for (int h = 0; h < H; h++) {
                std::vector<Slot> &c = ref.at(l, seq[t], h / (H / G));
                for (size_t j = 0; j < c.size(); j++) c[j].score += prob[t * H + h][j] / (H / G);
            }
            if (!column) continue;
            int n = T > 1 ? T * 2 / 3 : 1, slots = (int)ref.at(l, s0, 0).size();
            for (int all = 0; all < 2; all++) {
                if (all) n = T;
                K->kv_vote(kv, l, d, lse, &p.rows, H, visible, n);
                Doubles mean(slots, 0);
                for (int t = T - n; t < T; t++) for (int h = 0; h < H; h++) {
                    std::vector<Slot> &c = ref.at(l, s0, h / (H / G));
                    for (size_t j = 0; j < c.size(); j++) {
                        c[j].score += prob[t * H + h][j] / (H / G);
                        for (int i = 0; i < slots; i++) if (ref.at(l, s0, 0)[i].pos == c[j].pos) mean[i] += prob[t * H + h][j] / H;
                    }
                }
                Floats got(slots);
                K->kv_column_sums(got.data(), kv, l, d, lse, &p.rows, H, visible, n);
                close_to("kv_column_sums", got.data(), mean.data(), slots, tol_votes, NAME("%s: %s: column sums of %d", name, when, n));
            }
            Floats map((size_t)T * slots);
            Doubles want((size_t)T * slots, 0);
            K->kv_map(map.data(), kv, l, d, lse, &p.rows, H, visible);
            for (int t = 0; t < T; t++) for (int h = 0; h < H; h++) {
                std::vector<Slot> &c = ref.at(l, s0, h / (H / G));
                for (size_t j = 0; j < c.size(); j++) for (int i = 0; i < slots; i++) if (ref.at(l, s0, 0)[i].pos == c[j].pos) want[(size_t)t * slots + i] += prob[t * H + h][j] / H;
            }
            close_to("kv_map", map.data(), want.data(), want.size(), tol_votes, NAME("%s: %s: map", name, when));
        }
    };
    auto random_keep = [&](int s, double drop) {
        std::vector<char> keep(ref.total(s));
        for (char &k : keep) k = rnd(&rng) >= drop;
        return keep;
    };

    // the prompt
    K->kv_reserve(kv, s0, n_prompt);
    size_t size = type == F16 ? 2 : 4;
    check(K->kv_bytes(kv) == 2 * size * L * G * hd * n_prompt, "%s: kv_bytes", name);
    Ints seq(n_prompt, s0), pos(n_prompt), rot(n_prompt);
    for (int t = 0; t < n_prompt; t++) { pos[t] = t; rot[t] = t; }
    hidden[0] = hidden[n_prompt + 2] = 1;    // the first row, and one that decodes, would see nothing else
    pass("prompt", seq, pos, rot, 1, n_prompt % 2 ? NULL : lists, false, true);
    same_cache(NAME("%s: prompt", name), kv, ref, s0, 0, tol_votes);

    // nearest, for each layer, and a plan that merges by it; some kept slots are sources too, some leaving ones go nowhere
    std::vector<char> keep = random_keep(s0, 0.6);
    Ints into(keep.size(), -1);
    Floats w(keep.size(), 1.0f);
    size_t at = 0;
    for (int l = 0; l < L; l++) {
        size_t begin = at;
        for (int g = 0; g < G; g++) at += ref.at(l, s0, g).size();
        K->kv_nearest(&into[begin], &w[begin], kv, s0, l, (bool *)&keep[begin]);
        size_t i0 = begin;
        for (int g = 0; g < G; g++) {
            std::vector<Slot> &c = ref.at(l, s0, g);
            Doubles got_w, want_w;
            Floats got;
            bool right = true;
            for (size_t i = 0; i < c.size(); i++) {
                if (keep[i0 + i]) { right &= into[i0 + i] == -1; continue; }
                double best = -2, chosen = -2;
                bool any = false;
                for (size_t j = 0; j < c.size(); j++) {
                    if (!keep[i0 + j]) continue;
                    double dot = 0, a = 0, b = 0;
                    for (int e = 0; e < hd; e++) { dot += c[i].k[e] * c[j].k[e]; a += c[i].k[e] * c[i].k[e]; b += c[j].k[e] * c[j].k[e]; }
                    dot /= sqrt(a * b);
                    any = true;
                    best = std::max(best, dot);
                    if (into[i0 + i] == (int)j) chosen = dot;
                }
                if (!any) { right &= into[i0 + i] == -1; continue; }
                right &= chosen >= best - 1e-6;                  // the same slot, or one that is as near
                got.push_back(w[i0 + i]);
                want_w.push_back(chosen);
            }
            check(right, "%s: nearest, layer %d head %d", name, l, g);
            close_to("kv_nearest", got.data(), want_w.data(), got.size(), 2e-6, NAME("%s: nearest's cosine", name));
            i0 += c.size();
        }
    }
    for (size_t i = 0; i < keep.size(); i++) if (rnd(&rng) < 0.1) into[i] = rnd(&rng) < 0.5 ? -1 : into[rnd_int(&rng, (int)keep.size())];
    at = 0;
    for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) {    // only kept slots of the same head are targets
        size_t n = ref.at(l, s0, g).size();
        for (size_t i = 0; i < n; i++) if (into[at + i] >= 0 && (into[at + i] >= (int)n || !keep[at + into[at + i]])) into[at + i] = -1;
        at += n;
    }
    double tol_merge = type == F16 ? 2e-3 : 5e-6;                // an f16 may round to its neighbour; a turn multiplies four floats
    K->kv_apply(kv, s0, (bool *)keep.data(), into.data(), w.data(), 0.5f, NULL);
    ref.apply(s0, (bool *)keep.data(), into.data(), w.data(), 0.5, NULL);
    same_cache(NAME("%s: merged", name), kv, ref, s0, tol_merge, tol_votes);
    K->kv_reserve(kv, s0, 12);
    size_t bytes = 2 * size * hd * (ref.total(s0) + 12 * L * G);
    check(K->kv_bytes(kv) == bytes, "%s: kv_bytes after the plan: %zu, want %zu", name, K->kv_bytes(kv), bytes);
    same_cache(NAME("%s: shrunk", name), kv, ref, s0, 0, tol_votes);

    // sequence 2 as its copy, sequence 0 with a short prompt of its own; then three decode as a batch, with votes and drops
    K->kv_copy(kv, 2, s0);
    for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) ref.at(l, 2, g) = ref.at(l, s0, g);
    same_cache(NAME("%s: copied", name), kv, ref, 2, 0, tol_votes);
    K->kv_reserve(kv, 0, 16);
    pass("short prompt", { 0, 0, 0 }, { 0, 1, 2 }, { 0, 1, 2 }, 1, NULL, false, false);
    Ints next = { 3, n_prompt, n_prompt };
    for (int step = 0; step < 6; step++) {
        pass("decode", { 2, 0, 1 }, { next[2], next[0], next[1] }, { next[2], next[0], next[1] }, 3, step == 2 ? lists : NULL, step % 2 == 0, false);
        for (int &n : next) n++;
        int lo = 1, from_end = 1;
        K->kv_drop_lowest(kv, 2, lo, from_end);
        for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) {
            std::vector<Slot> &c = ref.at(l, 2, g);
            int best = -1;
            for (int i = lo; i < (int)c.size() - from_end; i++) if (best < 0 || c[i].score < c[best].score) best = i;
            if (best >= 0) c.erase(c.begin() + best);
        }
        if (step % 3 != 2) {
            Ints slot(L * G);
            for (int i = 0; i < L * G; i++) {
                std::vector<Slot> &c = ref.at(i / G, s0, i % G);
                slot[i] = rnd_int(&rng, (int)c.size() + 1) - 1;
                if (slot[i] >= 0) c.erase(c.begin() + slot[i]);
            }
            K->kv_drop(kv, s0, slot.data());
        }
        for (int s = 0; s < S; s++) same_cache(NAME("%s: step %d, sequence %d", name, step, s), kv, ref, s, 0, tol_votes);
    }

    // holes and all: a turn of the keys, a reserve, a further prompt that fills them, a copy with holes
    for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) for (int s = 0; s < S; s++) for (Slot &x : ref.at(l, s, g)) (void)x;
    pass("more rows", { s0, s0 }, { next[1], next[1] + 1 }, { next[1], next[1] + 1 }, 1, NULL, false, true);
    same_cache(NAME("%s: more rows", name), kv, ref, s0, 0, tol_votes);
    K->kv_copy(kv, 0, s0);
    for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) ref.at(l, 0, g) = ref.at(l, s0, g);
    same_cache(NAME("%s: copied with holes", name), kv, ref, 0, 0, tol_votes);
    keep = random_keep(s0, 0.3);
    K->kv_apply(kv, s0, (bool *)keep.data(), NULL, NULL, 0, d_cs);
    ref.apply(s0, (bool *)keep.data(), NULL, NULL, 0, &cs);
    same_cache(NAME("%s: renumbered", name), kv, ref, s0, tol_merge, tol_votes);
    K->kv_reserve(kv, 2, 3);
    same_cache(NAME("%s: reserved with holes", name), kv, ref, 2, 0, tol_votes);
    K->kv_scores_clear(kv, 2);
    for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) for (Slot &x : ref.at(l, 2, g)) x.score = 0;
    same_cache(NAME("%s: scores cleared", name), kv, ref, 2, 0, 0);
    K->kv_clear(kv, 2);
    for (int l = 0; l < L; l++) for (int g = 0; g < G; g++) ref.at(l, 2, g).clear();
    same_cache(NAME("%s: cleared", name), kv, ref, 2, 0, 0);
    K->kv_free(kv);
}

static void test_cache() {
    cache_case(16, F32, 2, 2, 1);
    cache_case(32, F16, 2, 1, 33);
    cache_case(16, F16, 4, 2, 66);
    cache_case(64, F32, 2, 2, 65);
    cache_case(104, F16, 1, 1, 40);
    cache_case(104, F32, 1, 1, 34);
    if (quick) return;
    cache_case(32, F32, 3, 1, 130);
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
        for (int i = 0; i < n * m; i++) {
            double xy = 0, xx = 0, yy = 0;
            for (int e = 0; e < dim; e++) { double x = a[i / m * dim + e], y = b[i % m * dim + e]; xy += x * y; xx += x * x; yy += y * y; }
            want[i] = xy / (std::max(sqrt(xx), 1e-12) * std::max(sqrt(yy), 1e-12));
        }
        close_to("cosine", got.data(), want.data(), want.size(), 2e-6, NAME("cosine %d", dim));
    }
}

// A decode step recorded and replayed gives the bits of one that is launched, while caches grow, lose slots and move.
static void test_graph() {
    const int L = 2, H = 2, hd = 32, dim = H * hd, S = 2, width = 3 * dim;
    Weights w;
    make_weights(&w, F16, width, dim, 0.1);
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
    free_weights(&w);
}

// Twice the same: on the CPU threads run in another order the second time, on a GPU blocks do by themselves.
static void test_again() {
    Floats result[2];
    uint64_t start = rng;
    for (int run = 0; run < 2; run++) {
        rng = start;
        const int T = 70, H = 2, hd = 64, width = 3 * H * hd;
        Weights w;
        make_weights(&w, F16, width, 160, 0.1);
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
        free_weights(&w);
    }
    check(!memcmp(result[0].data(), result[1].data(), result[0].size() * sizeof(float)), "the second run has other bits");
}

#include "planted_bugs.h"

int main(int argc, char **argv) {
    quick = argc > 1 && !strcmp(argv[1], "quick");
    setvbuf(stdout, NULL, _IONBF, 0);
    K = cuda();
    if (!K) return 1;
    struct { const char *name; void (*run)(); } tests[] = {
        { "rows", test_rows }, { "norms", test_norms }, { "matmul", test_matmul }, { "rope", test_rope }, { "attend", test_attend },
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
