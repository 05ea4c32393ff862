// test_policies.c: every row of the table of policies.c: its command line, the full-size vectors of the specifications, batches against
// single runs, and properties on thousands of random caches. Needs no file.
//
//     make build/test_policies && build/test_policies [CASES A POLICY]        worked examples: tests/own.gold, by tests/replay

#include <sys/wait.h>
#include <unistd.h>
#include "given.h"
#ifdef _OPENMP
#include <omp.h>
#endif

// ----------------------------------------------------------------------------
// the command line

// What a process that parses `spec` says on standard error before it ends; status: how.
static const char *said(const char *spec, double ratio, int n_layers, int *status) {
    static char text[4096];
    int fd[2];
    if (pipe(fd)) die(NULL, "pipe");
    fflush(NULL);
    pid_t child = fork();
    if (!child) {
        dup2(fd[1], 2);
        close(fd[0]);
        policy_parse(spec, ratio, n_layers);
        _exit(0);
    }
    close(fd[1]);
    size_t n = 0;
    for (ssize_t got; (got = read(fd[0], text + n, sizeof text - 1 - n)) > 0; n += got) {}
    text[n] = 0;
    close(fd[0]);
    waitpid(child, status, 0);
    *status = WIFEXITED(*status) ? WEXITSTATUS(*status) : 255;
    return text;
}

static void refused(const char *spec, const char *must_say) {
    int status;
    const char *text = said(spec, 0.5, 4, &status);
    check(status == 1 && strstr(text, "error: ") && strstr(text, must_say), "-p %s should be refused with `%s`, status %d: %s", spec, must_say, status, text);
}

static void test_command_line(void) {
    refused("elastik", "elastic:released");                   // lists what there is
    refused("", "prefixkv:online");
    refused("elastic:fixed", "there are full");
    refused("elastic+", "no such policy");
    refused("elastic:distnce=3", "start=1,distance=-25,merge=on|off");
    refused("elastic:distance=x", "not a number");
    refused("elastic:distance=1.5", "whole numbers");
    refused("elastic:distance", "no such policy");            // a word alone is a form
    refused("elastic:start=1,distance", "key=value");
    refused("elastic:merge=maybe", "on|off");
    refused("elastic:start=-1", "allowed are");
    refused("snapkv:r=1.7", "from 0 to 1");
    refused("snapkv:r=nan", "not a number");
    refused("snapkv:pool=4", "odd");
    refused("fastv:k=0", "from 1 to 3");
    refused("fastv:k=4", "from 1 to 3");
    refused("fastv:k=2,k=0.5", "whole numbers");
    refused("full:r=0.5", "no such option");
    refused("prefixkv:conf=/nonexistent", "No such file");
    refused("prefixkv:online:conf=x", "no such option");
    refused("snapkv+elastic", "both evict slots");
    refused("elastic:released+fastv:k=2", "stand alone");
    refused("fastv:k=2+lookm:released", "stand alone");
    refused("fastv:recompute+h2o", "stand alone");
    refused("fastv+fastv+fastv+fastv", "more than 4");
    int status;
    const char *text = said("h2o:important=0.2", NAN, 4, &status);
    check(status == 1 && strstr(text, "give both important and recent"), "important alone: %s", text);
    text = said("snapkv:recent=0.2", NAN, 4, &status);         // the window is the recent part by default, nothing is the important one
    check(status == 1 && strstr(text, "give both important and recent"), "recent alone: %s", text);
    text = said("simignore:released-7b", NAN, 4, &status);
    check(status == 1 && strstr(text, "k=5: allowed are whole numbers from 1 to 3"), "a default beyond the model: %s", text);
    text = said("full:what=all", NAN, 4, &status);
    check(status == 1 && strstr(text, "full takes no options"), "an option of full: %s", text);
    text = said("fastv", 0.5, 1, &status);
    check(status == 1 && strstr(text, "k=2"), "fastv on one layer: %s", text);

    Chain c = policy_parse("fastv:k=2,r=0.5+snapkv:r=0.6", NAN, 4);
    check(c.n == 2 && c.part[0].ratio == 0.5 && c.part[1].ratio == 0.6 && !strcmp(c.part[1].policy->name, "snapkv"), "two parts");
    policy_free(&c);
    c = policy_parse("snapkv+fastv", 0.25, 4);
    check(c.n == 2 && !strcmp(c.part[0].policy->name, "fastv") && c.part[1].ratio == 0.25, "the evictor comes last");
    policy_free(&c);
    static const struct { const char *spec; double ratio; int on; } on[] = {
        { "full", 0.5, 0 }, { "elastic", 0, 0 }, { "elastic", NAN, 0 }, { "elastic:r=0", 0.5, 0 }, { "elastic:r=0.1", NAN, 1 }, { "elastic:r=0.1", 0, 1 },
        { "h2o:important=0.1,recent=0.1", NAN, 1 }, { "h2o:important=0.1,recent=0.1", 0, 1 }, { "simignore:tokens=5", NAN, 1 }, { "fastv:keep=3", 0, 1 },
        { "fastv:k=2", NAN, 0 }, { "fastv+snapkv:r=0.5", NAN, 1 }, { "full+snapkv", 0.5, 1 }, { "fastv:lmms", NAN, 1 }, { "fastv:lmms", 0, 0 },
        { "simignore:released-13b:k=3", NAN, 1 }, { "simignore:released-7b:k=3", 0, 0 }, { "lookm:recent=1e-1,important=0x1p-3", NAN, 1 },
        { "snapkv:important=0.2", NAN, 1 }, { "snapkv:important=0.2,recent=0", NAN, 1 }, { "simignore:released-7b", 0, 0 } };
    for (size_t i = 0; i < sizeof on / sizeof *on; i++) {
        c = policy_parse(on[i].spec, on[i].ratio, 6);
        check(c.n == on[i].on, "-p %s -r %g: %d parts are on", on[i].spec, on[i].ratio, c.n);
        check(c.n || !c.flags, "-p %s -r %g: flags of a policy that is off", on[i].spec, on[i].ratio);
        policy_free(&c);
    }

    char path[] = "/tmp/vlm_conf_XXXXXX";
    int fd = mkstemp(path);
    FILE *f = fdopen(fd, "w");
    fprintf(f, "[0.0, 0.25, 5e-1, 0.9925]\n");
    fclose(f);
    char spec[128];
    snprintf(spec, sizeof spec, "prefixkv:conf=%s", path);
    c = policy_parse(spec, NAN, 4);
    check(c.n == 1 && c.part[0].conf && c.part[0].conf[1] == 0.25 && c.part[0].conf[3] == 0.9925, "conf=FILE");
    policy_free(&c);
    text = said(spec, NAN, 5, &status);
    check(status == 1 && strstr(text, "4 numbers for a model of 5 layers"), "conf of another model: %s", text);
    f = fopen(path, "w");
    fprintf(f, "[0.0, 0.25, 1.5, 0.9925]\n");
    fclose(f);
    text = said(spec, NAN, 4, &status);
    check(status == 1 && strstr(text, "fractions from 0 to 1"), "conf with 1.5: %s", text);
    remove(path);

    char *help = NULL;
    size_t n = 0;
    f = open_memstream(&help, &n);
    policy_help(f);
    fclose(f);
    for (const Policy *p = policies; p->name; p++) {
        check(strstr(help, p->name) && strstr(help, p->keeps) && strstr(help, p->options), "-p help lacks %s", p->name);
        for (const char *o = p->options; *o; o += strcspn(o, ","), o += *o == ',') {
            char line[64];
            snprintf(line, sizeof line, "\n%.*s  ", (int)strcspn(o, ",="), o);
            check(strstr(help, line) != NULL, "-p help does not say what %s of %s means", line + 1, p->name);
        }
        check(!(p->flags & (DECODE_VOTES | DECODE_SCORES | DECODE_ADMIT)) || p->flags & EVERY_TOKEN, "%s: flags", p->name);
        check(!(p->flags & DECODE_SCORES) || p->flags & DECODE_VOTES, "%s: flags", p->name);
        check(!(p->flags & PRUNES_ROWS) == !(p->admit && !p->compress), "%s: PRUNES_ROWS", p->name);
        check(!strstr(p->name, ":released") == !(p->flags & RELEASED), "%s: RELEASED", p->name);
    }
    free(help);
    check(ratio_of_keep(0.3) == 0.7 && ratio_of_keep(0.7) == 0.3 && ratio_of_keep(1) == 0 && ratio_of_keep(0) == 1, "-k as -r");
}

// ----------------------------------------------------------------------------
// full-size vectors of the specifications: inputs from a generator, results as checksums

static uint32_t lcg(uint32_t *x) { return *x = *x * 1664525u + 1013904223u; }

static uint32_t fnv(const int *x, int n) {
    uint32_t h = 0x811c9dc5u;
    for (int i = 0; i < n; i++)
        for (int b = 0; b < 4; b++) h = (h ^ ((uint32_t)x[i] >> (8 * b) & 255)) * 0x01000193u;
    return h;
}

static Runs *new_runs(Chain *chain, int L, int heads, int H, int d, int dim, int ctx) {
    given_start(L, heads, H, ctx);
    Runs *r = runs_new(chain, L, heads, H, d, dim, 1, ctx, F32, chain->flags & SLOT_POS, 42, NULL, (Mat){ 0 });
    r->tmp = need((size_t)ctx * dim, sizeof(float));
    return r;
}
static void end_runs(Runs *r) { free(r->tmp); runs_free(r); }

static int *g_targets[2], g_merged;
static void note_targets(void *ctx, const Runs *r, const Run *q) {
    (void)ctx; (void)r;
    for (int h = 0; h < 2; h++) {
        const Head *c = &q->head[h];
        int *slot = need(c->len, sizeof *slot), n = 0;
        for (int j = 0, s = 0; j < c->len; j++) { slot[j] = s; s += c->keep[j]; }
        g_targets[h] = need(c->len, sizeof(int));
        for (int j = 0; j < c->len; j++) if (c->into[j] >= 0) g_targets[h][n++] = slot[c->into[j]];
        g_merged = n;
        free(slot);
    }
}

static void test_lookm_full_size(void) {       // the vector of LOOK-M's specification, section 7: 2 heads of 640 slots of 128
    enum { L = 640, D = 128, H = 2, W = 3 * H * D };
    static const struct { const char *spec; uint32_t keep[2], target[2]; int merged; double sum_k, sum_v; } want[] = {
        { "h2o:lookm", { 0xd8774d7d, 0xe8fe49dc }, { 0 }, 0, -204.57812, -179.89062 },
        { "lookm:released:merge=none", { 0x8a64e00b, 0x9fe281b3 }, { 0 }, 0, -157.26562, -220.00781 },
        { "lookm:released:prior=off,merge=pivot", { 0xb86f508a, 0xfdd51c95 }, { 0x6f91d05d, 0xd60db55c }, 512, -141.23266, -154.28597 },
        { "lookm:released:prior=off,merge=average", { 0xb86f508a, 0xfdd51c95 }, { 0 }, 242, -91.21977, -198.32203 },
        { "lookm:released:prior=off,merge=weighted", { 0xb86f508a, 0xfdd51c95 }, { 0 }, 242, -102.59774, -149.67258 },
        { "lookm:released", { 0x8a64e00b, 0x9fe281b3 }, { 0xd771200f, 0xd9c88c71 }, 512, -137.80906, -180.25975 },
        { "lookm", { 0x8a64e00b, 0x9fe281b3 }, { 0xd771200f, 0xd9c88c71 }, 512, -137.80906, -180.25975 },
        { "lookm:released:merge=average", { 0x8a64e00b, 0x9fe281b3 }, { 0 }, 240, -91.27336, -159.51587 },
        { "lookm:released:merge=weighted", { 0x8a64e00b, 0x9fe281b3 }, { 0 }, 240, -103.78541, -135.82742 },
        { "snapkv:lookm", { 0x71ffedbd, 0x28182b3f }, { 0 }, 0, -271.68750, -147.39844 } };
    float *qkv = need((size_t)L * W, sizeof *qkv), *att = need((size_t)H * L * L, sizeof *att), *win = need((size_t)H * 64 * L, sizeof *win);
    int *weight = need(H * L, sizeof *weight), *id = need(L, sizeof *id), *pos = need(H * L, sizeof *pos);
    uint8_t kind[L];
    uint32_t x;
    for (int part = 0; part < 3; part++) {     // K 1001, V 1002, Q 1003: order head, position, dimension
        static const int at[3] = { H * D, 2 * H * D, 0 };
        x = 1001 + part;
        for (int h = 0; h < H; h++) for (int j = 0; j < L; j++) for (int i = 0; i < D; i++)
            qkv[(size_t)j * W + at[part] + h * D + i] = ((int)(lcg(&x) >> 24) - 128) / 128.0f;
    }
    x = 1004;
    for (int i = 0; i < H * L; i++) weight[i] = 1 + (lcg(&x) >> 24);
    x = 1005;
    for (int h = 0; h < H; h++) for (int i = 0; i < L; i++) for (int j = 0; j <= i; j++)
        att[((size_t)h * L + i) * L + j] = (((lcg(&x) >> 24) * weight[h * L + j]) >> 8) / 256.0f;
    check(qkv[H * D] == .2421875f && qkv[(size_t)639 * W + 2 * H * D + D + 127] == .578125f && att[(size_t)L] == .26953125f, "the generator");
    for (int h = 0; h < H; h++) for (int r = 0; r < 64; r++) {     // SnapKV: the window's attention from Q and K
        float *p = win + ((size_t)h * 64 + r) * L, most = -INFINITY;
        double sum = 0;
        for (int j = 0; j <= L - 64 + r; j++) {
            double dot = 0;
            for (int i = 0; i < D; i++) dot += (double)qkv[(size_t)(L - 64 + r) * W + h * D + i] * qkv[(size_t)j * W + H * D + h * D + i];
            p[j] = (float)(dot / sqrt(D));
            most = fmaxf(most, p[j]);
        }
        for (int j = 0; j <= L - 64 + r; j++) sum += exp(p[j] - most);
        for (int j = 0; j < L; j++) p[j] = j <= L - 64 + r ? (float)(exp(p[j] - most) / sum) : 0;
    }
    memset(kind, TEXT, L);
    memset(kind + 20, IMAGE, 576);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        Chain chain = policy_parse(want[i].spec, NAN, 1);
        policy_free(&chain);
        char spec[128];
        snprintf(spec, sizeof spec, "%s%cimportant=0.1,recent=0.1", want[i].spec, strchr(want[i].spec, '=') ? ',' : ':');
        chain = policy_parse(spec, NAN, 1);
        Runs *r = new_runs(&chain, 1, H, H, D, 1, L);
        bool snap = !strcmp(want[i].spec, "snapkv:lookm");
        given.att = snap ? win : att; given.queries = snap ? 64 : L; given.keys = L;
        r->watch = note_targets;
        pass_prompt(r, 0, id, kind, L);
        K->kv_append(r->kv, 0, qkv, &r->rows, H);
        vote(r, 0, qkv, NULL);
        compress(r, 0);
        float *k = need((size_t)H * L * D, sizeof *k), *v = need((size_t)H * L * D, sizeof *v);
        K->kv_read(r->kv, 0, pos, NULL, NULL, k, v);
        double sum_k = 0, sum_v = 0;
        for (int h = 0, at = 0; h < H; at += r->seq[0].head[h++].len) {
            int len = r->seq[0].head[h].len;
            check(len == 128 && fnv(pos + at, len) == want[i].keep[h], "%s, head %d: %d slots, checksum %08x", spec, h, len, fnv(pos + at, len));
            check(!want[i].target[h] || fnv(g_targets[h], g_merged) == want[i].target[h], "%s, head %d: targets", spec, h);
            check(!want[i].merged || g_merged == want[i].merged, "%s: %d merged", spec, g_merged);
        }
        for (int j = 0; j < 2 * 128 * D; j++) { sum_k += k[j]; sum_v += v[j]; }
        check(fabs(sum_k - want[i].sum_k) < 0.01 && fabs(sum_v - want[i].sum_v) < 0.01, "%s: sums %.5f %.5f, expected %.5f %.5f", spec, sum_k, sum_v, want[i].sum_k, want[i].sum_v);
        for (int h = 0; h < 2; h++) free(g_targets[h]);
        free(k); free(v);
        end_runs(r);
        policy_free(&chain);
    }
    free(qkv); free(att); free(win); free(weight); free(id); free(pos);
}

typedef struct { int n; long sum; uint32_t weighted; } Sum;
static Sum sum_of(const int *x, int n) {
    Sum s = { n, 0, 0 };
    for (int i = 0; i < n; i++) { s.sum += x[i]; s.weighted += (uint32_t)(i + 1) * (uint32_t)x[i]; }
    return s;
}

static void test_fastv_full_size(void) {       // FastV's specification, 6.3: 32 heads, 680 tokens; and 6.5: lengths
    enum { H = 32, N = 680 };
    static const struct { int s, r, M; long sum; uint32_t weighted; } want[] = {
        { 35, 58, 162, 20619, 780635 }, { 35, 72, 176, 24548, 1160909 }, { 35, 144, 248, 46851, 4404726 }, { 35, 288, 392, 96438, 17949250 },
        { 35, 432, 536, 138925, 39112080 }, { 36, 58, 162, 20619, 780635 }, { 36, 72, 176, 24548, 1160909 }, { 36, 144, 248, 46919, 4413962 },
        { 36, 288, 392, 96628, 17993562 }, { 36, 432, 536, 139501, 39237107 } };
    float *att = need(H * N, sizeof *att), *qkv = need((size_t)N * 3 * H * 2, sizeof *qkv), *lse = need(N * H, sizeof *lse), x[N];
    int id[N] = { 0 };
    uint8_t kind[N];
    uint32_t seed = 12345;
    for (int i = 0; i < H * N; i++) att[i] = (float)(lcg(&seed) >> 16) / 65536 / 512;
    check(att[0] == 1337 / 65536.0f / 512 && att[H * N - 1] == 57601 / 65536.0f / 512, "the generator");
    memset(kind, TEXT, N);
    memset(kind + 35, IMAGE, 576);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        char spec[128];
        if (want[i].s == 36) snprintf(spec, sizeof spec, "fastv:k=2,start=36,length=576,keep=%d", want[i].r);
        else snprintf(spec, sizeof spec, "fastv:k=2,r=%g", want[i].r == 58 ? 0.9 : 1 - want[i].r / 576.0);
        Chain chain = policy_parse(spec, NAN, 5);
        Runs *r = new_runs(&chain, 5, H, H, 2, 1, N + 2);
        pass_prompt(r, 0, id, kind, N);
        for (int l = 0; l < 5; l++) {
            given.att = att; given.queries = 1; given.keys = N;
            admit(r, l, x);
            K->kv_append(r->kv, l, qkv, &r->rows, H);
            vote(r, l, qkv, lse);
        }
        int window[N], n = 0;
        for (int t = 0; t < r->rows.T; t++) if (r->h_pos[t] >= want[i].s && r->h_pos[t] < want[i].s + 576) window[n++] = r->h_pos[t];
        Sum s = sum_of(window, n);
        check(r->rows.T == want[i].M && s.n == want[i].r && s.sum == want[i].sum && s.weighted == want[i].weighted, "%s: %d rows, %d %ld %u", spec, r->rows.T, s.n, s.sum, s.weighted);
        compress(r, 2);
        for (int t = 0; t < 2; t++) {
            pass_tokens(r, NULL, id, 1);
            for (int l = 0; l < 5; l++) { admit(r, l, x); K->kv_append(r->kv, l, qkv, &r->rows, H); vote(r, l, qkv, lse); }
            check(r->h_rot[0] == N + t, "%s: the next token stands at %d", spec, r->h_rot[0]);
            compress(r, -1);
        }
        for (int l = 0; l < 5; l++) check(r->seq[0].head[l * H].len == (l < 2 ? N : want[i].M) + 2, "%s: layer %d has %d", spec, l, r->seq[0].head[l * H].len);
        check(K->kv_bytes(r->kv) == (size_t)H * 2 * 2 * 4 * (2 * (N + 2) + 3 * (want[i].M + 2)), "%s: the cache has %zu bytes", spec, K->kv_bytes(r->kv));
        end_runs(r);
        policy_free(&chain);
    }
    free(att); free(qkv); free(lse);
}

static void test_simignore_full_size(void) {   // Simignore's specification, 6.7: 576 image rows of 16
    enum { N = 576, D = 16 };
    static const struct { int C; uint32_t seed; const char *spec; int n; long sum; uint32_t weighted; } want[] = {
        { 9, 777, "simignore:released-7b", 452, 127945, 38726152 }, { 12, 888, "simignore:released-13b", 451, 131758, 39422333 },
        { 3, 999, "simignore:released-7b:tokens=452", 452, 128572, 38921791 }, { 2, 4242, "simignore:released-13b:tokens=451", 426, 119846, 34258533 } };
    float *x = need((N + 1) * D, sizeof *x);
    int id[N + 1] = { 0 }, kept[N];
    uint8_t kind[N + 1];
    memset(kind, IMAGE, N);
    kind[N] = TEMPLATE;
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        Chain chain = policy_parse(want[i].spec, NAN, 8);
        Runs *r = new_runs(&chain, 8, 1, 1, 2, D, N + 1);
        uint32_t seed = want[i].seed;
        float *text = aligned_alloc(64, 64 * want[i].C);
        for (int j = 0; j < N * D; j++) x[j] = ((int)(lcg(&seed) >> 16) - 32768) / 32768.0f;
        for (int j = 0; j < want[i].C * D; j++) text[j] = ((int)(lcg(&seed) >> 16) - 32768) / 32768.0f;
        r->embed = K->weight(F32, want[i].C, D, text, NULL);
        r->text_id = need(want[i].C, sizeof(int));
        for (int c = 0; c < want[i].C; c++) r->text_id[c] = c;
        r->n_text = want[i].C;
        pass_prompt(r, 0, id, kind, N + 1);
        admit(r, 0, x);
        int n = 0;
        for (int t = 0; t < N; t++) if (r->visible[0][t]) kept[n++] = t;
        Sum s = sum_of(kept, n);
        check(s.n == want[i].n && s.sum == want[i].sum && s.weighted == want[i].weighted, "%s: %d %ld %u", want[i].spec, s.n, s.sum, s.weighted);
        free(text);
        end_runs(r);
        policy_free(&chain);
    }
    free(x);
}

// The published configuration of PrefixKV for LLaVA-1.5 7B at 0.8, where it is at hand (section 9 of its specification).
static void test_published_configuration(void) {
    const char *path = "../shared/data/prefixkv-confs/prefixkv_llava-v1.5-7b_0.8.json";
    static const int rot[] = { 461, 462, 463, 464, 464, 465, 466, 466, 467, 468, 469, 469 };
    if (access(path, R_OK)) { printf("skipped: %s is not there\n", path); return; }
    char spec[256];
    snprintf(spec, sizeof spec, "prefixkv:conf=%s", path);
    Chain chain = policy_parse(spec, NAN, 32);
    Runs *r = new_runs(&chain, 32, 1, 1, 2, 1, 660);
    float qkv[640 * 6] = { 0 };
    int id[640] = { 0 }, sum = 0;
    uint8_t kind[640] = { 0 };
    given.lot = 5;
    for (int t = 0; t <= 12; t++) {
        if (t) pass_tokens(r, NULL, id, 1); else pass_prompt(r, 0, id, kind, 640);
        check(!t || r->h_rot[0] == rot[t - 1], "%s: token %d stands at %d", spec, t, r->h_rot[0]);
        for (int l = 0; l < 32; l++) { K->kv_append(r->kv, l, qkv, &r->rows, 1); vote(r, l, qkv, NULL); }
        compress(r, t ? -1 : 12);
        for (int l = 0; t == 1 && l < 32; l++) sum += r->seq[0].head[l].len;
    }
    check(sum == 4132, "%s: after one token the layers hold %d", spec, sum);
    end_runs(r);
    policy_free(&chain);
}

// ----------------------------------------------------------------------------
// properties: what every page promises, counted here by hand, on random caches

#define hold(ok, ...) do { if (!(ok)) check(false, __VA_ARGS__); } while (0)   // a part of one check: each cache counts once

typedef struct {                 // a random sequence and a policy for it
    char spec[256];
    Chain chain;
    const char *name;            // of the evictor, or of the row pruner that stands alone
    int L, H, group, prompt, steps, n_text;
    uint8_t kind[64];
    double ratio, important, recent;
    int start, sinks, distance, window, keep, tokens, first_image, k;
    bool all, merge, prior, strict, fastv;       // fastv: stands in front
    int merging;                 // 0 none, 1 convex, 2 weighted
    uint64_t lot;
    int levels;
} Trial;

static double pick(uint64_t *s, const double *of, int n) { return of[rnd_int(s, n)]; }

static int kept_of_prompt(const Trial *t, const int *token, int L, const LayerMemo *memo, double rho);

// The parameters of a trial; its spec says the same to policy_parse.
static void trial(Trial *t, const Policy *p, uint64_t *s, const Chain *conf) {
    static const double ratios[] = { 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.97, 1 }, parts[] = { 0, 0.1, 0.2, 0.29, 0.5, 0.58 };
    *t = (Trial){ .name = p->name, .L = 1 + rnd_int(s, 3), .H = 1 + rnd_int(s, 2), .group = 1 + rnd_int(s, 2), .prompt = 1 + rnd_int(s, 40), .steps = rnd_int(s, 8),
                  .n_text = 1 + rnd_int(s, 3), .ratio = pick(s, ratios, 12), .k = 2, .keep = -1, .tokens = -1, .start = 1, .sinks = 4, .distance = -25, .window = 32,
                  .important = -1, .recent = -1, .merge = true, .prior = true, .lot = rnd_u64(s) | 1, .levels = rnd_int(s, 3) == 0 ? 4 : 0 };
    if (p->admit && !p->compress) t->L += 2;
    if (p->flags & RELEASED && p->admit) t->L += 5;
    for (int j = 0; j < t->prompt; j++) t->kind[j] = rnd_int(s, 2) ? TEMPLATE : TEXT;
    for (int n = rnd_int(s, 3), at = 0; n; n--) {                              // none, one or two pictures
        at += rnd_int(s, 8);
        for (int len = 1 + rnd_int(s, 16); len && at < t->prompt; len--) t->kind[at++] = IMAGE;
    }
    for (t->first_image = 0; t->first_image < t->prompt && t->kind[t->first_image] != IMAGE; t->first_image++) {}
    if (p->flags & RELEASED && p->admit) t->kind[t->prompt - 1] = TEXT;        // it may ignore every image row
    char *at = t->spec + sprintf(t->spec, "%s", p->name);
    char sep = ':';
#define ADD(...) (at += sprintf(at, "%c", sep), at += sprintf(at, __VA_ARGS__), sep = ',')
    bool often = rnd_int(s, 2);
    if (strstr(p->options, "what=") && rnd_int(s, 2)) { t->all = true; ADD("what=all"); }
    if (strstr(p->options, "sinks=4") && !strcmp(p->name, "streaming") && often) ADD("sinks=%d", t->sinks = rnd_int(s, 6));
    if (strstr(p->options, "start=1") && often) ADD("start=%d", t->start = rnd_int(s, 5));
    if (strstr(p->options, "distance") && often) ADD("distance=%d", t->distance = rnd_int(s, 24) - 16);
    if (strstr(p->options, "merge=on") && rnd_int(s, 4) == 0) { t->merge = false; ADD("merge=off"); }
    if (strstr(p->options, "window=32") && often) ADD("window=%d", t->window = 1 + rnd_int(s, 8));
    if (strstr(p->options, "important") && rnd_int(s, 3) == 0) ADD("important=%.17g", t->important = pick(s, parts, 6));
    if (strstr(p->options, "recent") && rnd_int(s, 3) == 0) ADD("recent=%.17g", t->recent = pick(s, parts, 6));
    if (strstr(p->options, "pivot")) {
        static const char *const merges[] = { "none", "average", "pivot", "weighted" };
        int m = rnd_int(s, 4);
        ADD("merge=%s", merges[m]);
        t->merging = m == 0 ? 0 : m == 3 ? 2 : 1;
        if (rnd_int(s, 3) == 0) { t->prior = false; ADD("prior=off"); }
        if (strstr(p->options, "strict") && rnd_int(s, 3) == 0) { t->strict = true; ADD("budget=strict"); }
    }
    if (!strncmp(p->name, "elastic", 7)) t->merging = t->merge;
    if (p->compress && kept_of_prompt(t, (int[]){ 0 }, 1, NULL, 0) < 0) t->merging = 2;      // a row that this file does not know
    if (!strncmp(p->name, "fastv", 5)) {
        ADD("k=%d", t->k = 1 + rnd_int(s, t->L - 1));
        if (rnd_int(s, 3) == 0) { int n = 0; for (int j = 0; j < t->prompt; j++) n += t->kind[j] == IMAGE; ADD("keep=%d", t->keep = rnd_int(s, n + 1)); }
        if (rnd_int(s, 3) == 0) ADD("score=all");
    }
    if (!strncmp(p->name, "simignore", 9) && rnd_int(s, 2)) ADD("tokens=%d", t->tokens = rnd_int(s, 12));
    if (!strncmp(p->name, "simignore:rel", 13)) ADD("k=%d", t->k = 1 + rnd_int(s, t->L - 1));
    t->fastv = p->compress && !(p->flags & RELEASED) && t->L > 1 && rnd_int(s, 3) == 0;
    if (t->fastv) { t->k = 1 + rnd_int(s, t->L - 1); sprintf(at, "+fastv:k=%d,r=0.5", t->k); }
    t->chain = policy_parse(t->spec, t->ratio, t->L);
    if (conf) {                                                                // prefixkv's offline form
        Part *part = &t->chain.part[t->chain.n - 1];
        part->conf = need(t->L, sizeof(double));
        for (int l = 0; l < t->L; l++) part->conf[l] = pick(s, ratios, 12);
    }
}

static int trunc_part(int L, double given_part, double ratio) { return (int)((double)L * (given_part >= 0 ? given_part : (1.0 - ratio) / 2)); }
static int over(int n, int N, double ratio) { double q = 1.0 - ratio, product = (double)N * q; return (int)((double)n - product); }
static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

// What a layer must hold after the prompt: token[] are the L rows that entered it.
static int kept_of_prompt(const Trial *t, const int *token, int L, const LayerMemo *memo, double rho) {
    int n_image = 0, f = over(L, L, t->ratio), M = trunc_part(L, t->recent, t->ratio), N = trunc_part(L, t->important, t->ratio), text = 0, image = 0;
    for (int j = 0; j < L; j++) n_image += t->kind[token[j]] == IMAGE;
    bool any = memchr(t->kind, IMAGE, t->prompt) != NULL;
    for (int j = 0; j < L - M; j++) { if (t->kind[token[j]] == IMAGE) image++; else text++; }
    const char *n = t->name;
    if (!strcmp(n, "random") || !strcmp(n, "stride")) return t->all ? L - f : L - n_image + (int)rint(n_image * (1.0 - t->ratio));
    if (!strcmp(n, "streaming")) return least(L, t->sinks + most(0, L - f - t->sinks));
    if (!strcmp(n, "streaming:released")) return least(L, t->start) + most(0, L - t->start - most(0, f));
    if (!strcmp(n, "h2o")) return least(L, N + M);
    if (!strcmp(n, "h2o:released")) return f <= 0 ? L : f > 1 ? 1 + most(0, L - 2 - f) : t->start < L - 1 ? L - 1 : L;
    if (!strcmp(n, "h2o:lookm") || !strcmp(n, "roco")) return any ? least(L, N + M) : L;
    if (!strcmp(n, "snapkv")) { int W = t->recent >= 0 ? M : least(t->window, L); return least(L, W + (t->important >= 0 ? N : most(0, L - f - W))); }
    if (!strcmp(n, "snapkv:lookm")) return least(L, N + M);
    if (!strcmp(n, "elastic")) return L - least(most(f, 0), most(0, L - t->start - 1));
    if (!strcmp(n, "elastic:released")) { int m = L - t->start - 1; return f <= 0 ? L : f == 1 ? L - 1 : m <= 0 ? L : t->start + m - least(f, m - 2); }
    if (!strncmp(n, "prefixkv", 8)) return L - least(most(0, memo ? memo->forget : (int)rint(rho * L)), most(0, L - t->start - 1));
    if (!strcmp(n, "lookm:released") && !any) return L;
    if (!strncmp(n, "lookm", 5)) {
        if (L <= N + M) return L;
        if (!t->prior) return N + M;
        return M + (t->strict ? least(text, N) : text) + least(image, most(0, N - text));
    }
    return -1;
}

// The same after a token: len and seen count it already. B: what stayed of the prompt's L rows.
static int kept_of_token(const Trial *t, int len, int seen, int L, int p, double rho) {
    int f = over(len, seen, t->ratio), fL = over(L, L, t->ratio);
    const char *n = t->name;
    if (!strcmp(n, "streaming")) { int B = most(0, L - fL - t->sinks); return len - most(0, len - B - t->sinks); }
    if (!strcmp(n, "streaming:released")) return len - most(0, least(len, t->start + f) - t->start);
    if (!strcmp(n, "h2o")) { int M = trunc_part(L, t->recent, t->ratio), B = M + trunc_part(L, t->important, t->ratio); return len > B ? len - 1 : len; }
    if (!strcmp(n, "h2o:released")) return f >= 1 && t->start < len - 1 ? len - 1 : len;
    if (!strncmp(n, "elastic", 7)) return f >= 1 && p < len ? len - 1 : len;
    if (!strncmp(n, "prefixkv", 8)) return over(len, seen, rho) >= 1 && p < len ? len - 1 : len;
    return len;
}

// Slots that must be there whatever they score: token index `j` of `L` rows token[], after the prompt.
static bool safe(const Trial *t, const int *token, int j, int L, double ratio) {
    const char *n = t->name;
    int M = trunc_part(L, t->recent, ratio);
    bool image = t->kind[token[j]] == IMAGE;
    if (!strcmp(n, "random") || !strcmp(n, "stride")) return !t->all && !image;
    if (!strcmp(n, "streaming")) return j < t->sinks;
    if (!strcmp(n, "streaming:released")) return j < t->start;
    if (!strcmp(n, "h2o:released")) return j == L - 1;
    if (!strcmp(n, "elastic:released")) return over(L, L, ratio) >= 2 && (j < t->start || j == L - 1);
    if (!strcmp(n, "elastic") || !strncmp(n, "prefixkv", 8)) return j < t->start || j == L - 1;
    if (!strcmp(n, "snapkv")) return j >= L - (t->recent >= 0 ? M : t->window);
    if (!strncmp(n, "lookm", 5) && t->prior && !t->strict && !image) return true;
    return j >= L - M && (!strcmp(n, "h2o") || !strcmp(n, "snapkv:lookm") || !strncmp(n, "lookm", 5) || !strcmp(n, "h2o:lookm") || !strcmp(n, "roco"));
}

typedef struct { int n; int *pos, *rot; float *k, *v; size_t all; int *len; } Snapshot;
static Snapshot snapshot(const Runs *r) {
    Snapshot s = { .len = need(n_heads_of(r), sizeof(int)) };
    K->kv_lens(r->kv, 0, s.len);
    for (int i = 0; i < n_heads_of(r); i++) s.all += s.len[i];
    s.pos = need(s.all, sizeof(int)); s.rot = need(s.all, sizeof(int));
    s.k = need(s.all * r->head_dim, sizeof(float)); s.v = need(s.all * r->head_dim, sizeof(float));
    K->kv_read(r->kv, 0, s.pos, s.rot, NULL, s.k, s.v);
    return s;
}
static void snapshot_free(Snapshot *s) { free(s->len); free(s->pos); free(s->rot); free(s->k); free(s->v); }

enum { D = 64 };                 // value rows are one-hot: after a merge a row holds the weight of each token in it
static void rows_of_pass(const Runs *r, float *qkv, int layer, int group) {
    int H = r->n_kv_heads, width = (group + 2) * H * D;
    for (int t = 0; t < r->rows.T; t++)
        for (int h = 0; h < H; h++) {
            float *k = qkv + (size_t)t * width + (group * H + h) * D, *v = k + H * D;
            uint64_t s = 77 + r->h_pos[t] * 131 + h * 7 + layer;
            memset(k, 0, D * sizeof *k);
            memset(v, 0, D * sizeof *v);
            for (int i = 0; i < 8; i++) k[i] = (float)rnd(&s) - 0.5f;
            v[r->h_pos[t]] = 1;
        }
}

static int looked;               // plans that a watcher was shown
static void watch_nothing(void *ctx, const Runs *r, const Run *q) {
    (void)ctx; (void)r;
    for (int i = 0; i < n_heads_of(r); i++) looked += q->head[i].len > 0 && q->head[i].pos != NULL;
}

// Runs a trial and leaves its cache in `end`. False: nothing at all would stay, and the program would have ended.
static bool run_trial(Trial *t, Snapshot *end, bool checks, bool watched) {
    int L = t->L, H = t->H, ctx = t->prompt + t->steps + 1, heads = H * t->group;
    const Part *e = evictor(&t->chain);
    given_start(L, heads, H, ctx);
    given.lot = t->lot;
    given.levels = t->levels;
    Runs *r = runs_new(&t->chain, L, heads, H, D, 4, 1, ctx, F32, t->chain.flags & SLOT_POS, t->lot, NULL, (Mat){ 0 });
    static float cos_sin[128 * D], x[64 * 4], tmp[64 * 4], text[64];
    for (int i = 0; i < 128 * D / 2; i++) cos_sin[2 * i] = 1;                  // no turn at all: keys stay comparable
    r->cos_sin = cos_sin;
    r->tmp = tmp;
    uint64_t s = t->lot;
    for (int i = 0; i < 64 * 4; i++) x[i] = (float)rnd(&s) - 0.5f;
    for (int i = 0; i < t->n_text * 16; i++) text[i] = (float)rnd(&s) - 0.5f;
    r->embed = (Mat){ F32, t->n_text, 4, 64, text, NULL };
    r->n_text = t->n_text;
    r->text_id = need(t->n_text, sizeof(int));
    if (watched) r->watch = watch_nothing;
    float *qkv = need((size_t)t->prompt * (heads + 2 * H) * D, sizeof *qkv), *lse = need((size_t)t->prompt * heads, sizeof *lse);
    int id[64] = { 0 }, rows[16] = { 0 }, token[16][64], seen[16], lens[16], p[16] = { 0 };
    double rho[16] = { 0 };
    int extra = 0, held = 0, longest[32], first_len[32], lens_before[32], grown = 0;
    bool stays = true;
    for (int step = 0; step <= t->steps && stays; step++) {
        if (step) pass_tokens(r, NULL, id, 1); else pass_prompt(r, 0, id, t->kind, t->prompt);
        int T = t->prompt;
        for (int l = 0; l < L; l++) {
            admit(r, l, x);
            rows_of_pass(r, qkv, l, t->group);
            K->kv_append(r->kv, l, qkv, &r->rows, heads);
            if (token_votes(r)) given_token_votes(r, l);
            vote(r, l, qkv, lse);
            if (step) continue;
            rows[l] = seen[l] = lens[l] = r->rows.T;
            memcpy(token[l], r->h_pos, r->rows.T * sizeof(int));
            if (checks) {                                                      // rows: budget, order, the last one
                int want = T;
                if (t->fastv || (t->chain.part[0].policy->flags & PRUNES_ROWS && !(t->chain.part[0].policy->flags & DECODE_ADMIT))) {
                    const Part *part = &t->chain.part[0];
                    int n = 0, last = t->kind[T - 1] == IMAGE, at = strncmp(part->policy->name, "fastv", 5) ? 0 : t->k;
                    for (int j = 0; j < T; j++) n += t->kind[j] == IMAGE;
                    int m = t->fastv ? (int)rint(n * 0.5) : t->keep >= 0 && n ? t->keep : t->tokens >= 0 ? least(n, t->tokens)
                          : !strcmp(part->policy->name, "fastv:lmms") ? (int)(n * (1.0 - t->ratio)) : (int)rint(n * (1.0 - t->ratio));
                    if (l >= at) want = T - n + most(m, last);
                }
                if (!strncmp(t->name, "simignore:released", 18)) want = rows[l];
                hold(rows[l] == want, "%s -r %g: %d of %d rows enter layer %d, expected %d", t->spec, t->ratio, rows[l], T, l, want);
                for (int j = 0; j < rows[l]; j++)
                    hold((!j || token[l][j] > token[l][j - 1]) && token[l][j] < T && r->h_rot[j] == token[l][j], "%s: rows out of order", t->spec);
                hold(token[l][rows[l] - 1] == T - 1, "%s: the last row is gone", t->spec);
                int i = 0;                                                     // what is no image stays (but for simignore's window)
                for (int j = 0; j < T; j++) {
                    while (i < rows[l] && token[l][i] < j) i++;
                    hold(t->kind[j] == IMAGE || !strncmp(t->name, "simignore:released", 18) || (i < rows[l] && token[l][i] == j), "%s: row %d is gone", t->spec, j);
                }
            }
            if (e && !step && t->kind[0] < 9) {
                int n = kept_of_prompt(t, token[l], rows[l], NULL, e->conf ? e->conf[l] : 0);
                if (n == 0 && strncmp(t->name, "prefixkv", 8)) stays = false;
            }
        }
        if (!stays) break;
        compress(r, step ? -1 : t->steps);
        LayerMemo *memo = e && e->policy->mem_layer ? (LayerMemo *)((char *)r->seq[0].mem + parts_mem(r, t->chain.n - 1)) : NULL;
        bool prefix = !strncmp(t->name, "prefixkv", 8);
        if (checks && !step && prefix && !e->conf) {                           // the search: its counts, scaled to the target
            double all = 0, target = 0;
            for (int l = 0; l < L; l++) { all += memo[l].count; target += rows[l]; }
            target *= t->ratio;
            for (int l = 0; l < L; l++)
                hold(memo[l].forget == (all > 0 ? (int)(memo[l].count * target / all) : 0) && memo[l].count <= most(0, rows[l] - t->start - 2), "%s: layer %d forgets %d", t->spec, l, memo[l].forget);
        }
        for (int l = 0; l < L && e && checks; l++) {
            if (prefix) rho[l] = e->conf ? e->conf[l] : (double)memo[l].forget / rows[l];
            if (memo) p[l] = memo[l].fixed_point;
            if (step) { lens[l]++; seen[l]++; }
            int want = step ? kept_of_token(t, lens[l], seen[l], rows[l], p[l], rho[l]) : kept_of_prompt(t, token[l], rows[l], prefix && !e->conf ? &memo[l] : NULL, rho[l]);
            if (want < 0) want = r->seq[0].head[l * H].len;
            for (int h = 0; h < H; h++)
                hold(r->seq[0].head[l * H + h].len == want, "%s -r %g, %d rows, layer %d, step %d: %d slots, expected %d", t->spec, t->ratio, rows[l], l, step, r->seq[0].head[l * H + h].len, want);
            lens[l] = want;
            if (!step && memo && t->distance > 0 && (strcmp(t->name, "elastic:released") || over(rows[l], rows[l], t->ratio) >= 2)) hold(p[l] == t->distance, "%s: fixed point %d", t->spec, p[l]);
        }
        if (!checks) continue;
        Snapshot now = snapshot(r);
        size_t at = 0;
        for (int i = 0; i < L * H; at += now.len[i++]) {
            int l = i / H, n = now.len[i];
            hold(n == r->seq[0].head[i].len && n > 0, "%s: run.h counts %d slots, the cache %d", t->spec, r->seq[0].head[i].len, n);
            for (int j = 0; j < n; j++) {
                int pos = now.pos[at + j], owner = -1;
                for (int a = 0; a < rows[l]; a++) if (token[l][a] == pos) owner = a;
                hold((!j || pos > now.pos[at + j - 1]) && (pos >= t->prompt ? pos <= t->prompt + step - 1 : owner >= 0), "%s: slot %d holds token %d", t->spec, j, pos);
                if (t->chain.flags & SLOT_POS && !strcmp(t->name, "streaming")) hold(now.rot[at + j] == j, "%s: slot %d stands at %d", t->spec, j, now.rot[at + j]);
                else if (pos < t->prompt || !(t->chain.flags & SLOT_POS)) hold(now.rot[at + j] == pos, "%s: token %d stands at %d", t->spec, pos, now.rot[at + j]);
                const float *v = now.v + (at + j) * D;
                float sum = 0, lowest = 0;
                for (int c = 0; c < D; c++) { sum += v[c]; lowest = v[c] < lowest ? v[c] : lowest; }
                if (t->merging == 1) hold(fabs(sum - 1) < 1e-5 && lowest >= 0 && (v[pos] > 0 || !strcmp(t->name, "elastic:released")), "%s: token %d: weights sum to %g", t->spec, pos, sum);
                if (t->merging == 0) hold(sum == 1 && v[pos] == 1, "%s: token %d: content has changed", t->spec, pos);
            }
            for (int j = 0; !step && e && j < rows[l]; j++) {
                bool there = false;
                for (int a = 0; a < n; a++) there |= now.pos[at + a] == token[l][j];
                hold(there || !safe(t, token[l], j, rows[l], t->ratio), "%s -r %g, layer %d of %d rows: slot %d was safe and is gone", t->spec, t->ratio, l, rows[l], j);
            }
        }
        for (int i = 0; i < L * H && !step; i++) held += now.len[i];
        if (!step) extra = (int)((K->kv_bytes(r->kv) / (2 * D * 4) - held) / (L * H));
        for (int i = 0; i < L * H && step; i++) longest[i] = most(longest[i], r->seq[0].head[i].len + (lens_before[i] + 1 > now.len[i]));
        for (int i = 0; i < L * H && !step; i++) longest[i] = first_len[i] = now.len[i];
        for (int i = 0; i < L * H; i++) lens_before[i] = now.len[i];
        snapshot_free(&now);
    }
    for (int i = 0; i < L * H && checks && stays; i++) grown = most(grown, longest[i] - first_len[i]);   // memory: what was needed, no more and no less
    hold(!checks || !stays || extra == grown, "%s -r %g: room for %d more slots a head was taken, %d were needed", t->spec, t->ratio, extra, grown);
    if (end) *end = stays ? snapshot(r) : (Snapshot){ 0 };
    runs_free(r);
    free(qkv);
    free(lse);
    return stays;
}

static bool same_snapshot(const Snapshot *a, const Snapshot *b, int heads) {
    return a->all == b->all && !memcmp(a->len, b->len, heads * sizeof(int)) && !memcmp(a->pos, b->pos, a->all * sizeof(int)) && !memcmp(a->rot, b->rot, a->all * sizeof(int))
        && !memcmp(a->k, b->k, a->all * D * sizeof(float)) && !memcmp(a->v, b->v, a->all * D * sizeof(float));
}

static void test_properties(const Policy *p, int cases) {
    uint64_t s = 2024 + (p - policies);
    int ended = 0;
    for (int i = 0; i < cases; i++) {
        Trial t;
        static const Chain offline;
        trial(&t, p, &s, !strcmp(p->name, "prefixkv") && i % 2 ? &offline : NULL);
        Snapshot a, b;
        int failed = n_failed;
        if (!run_trial(&t, &a, true, false)) ended++;
        else {
            run_trial(&t, &b, false, i % 2);                                   // a second run, looked at every other time
            check(same_snapshot(&a, &b, t.L * t.H), "%s -r %g: a second run differs", t.spec, t.ratio);
            snapshot_free(&a);
            snapshot_free(&b);
        }
        if (n_failed > failed && n_failed < 20) printf("   case %d of %s\n", i, p->name);
        policy_free(&t.chain);
    }
    printf("%-24s %d caches, of which %d would have been left empty\n", p->name, cases, ended);
}

// Simignore's release: by default FastV's window is the image's, one later; what was ignored leaves the layers before k.
static void test_simignore_released(void) {
    for (int i = 0; i < 20; i++) {
        Snapshot end[2];
        for (int explicit = 0; explicit < 2; explicit++) {
            Trial t = { .name = "simignore:released-7b", .L = 3, .H = 2, .group = 1, .prompt = 26, .steps = 2, .n_text = 3, .ratio = 0.5, .keep = -1, .tokens = -1,
                        .lot = 1000 + i, .k = 2, .merging = 2 };
            memset(t.kind, TEXT, sizeof t.kind);
            memset(t.kind + 4, IMAGE, 16);
            sprintf(t.spec, "simignore:released-7b:k=2,i0=0%s", explicit ? ",start=5,length=16,keep=4" : "");
            t.chain = policy_parse(t.spec, t.ratio, t.L);
            run_trial(&t, &end[explicit], true, false);
            const int *len = end[explicit].len;
            check(len[0] == 26 - 8 + 2 && len[3] == len[0] && len[4] == 26 - 16 + 4 + 2, "simignore:released-7b: layers of %d, %d, %d slots", len[0], len[2], len[4]);
            policy_free(&t.chain);
        }
        check(same_snapshot(&end[0], &end[1], 6), "simignore:released-7b: the window is not the image's, one later");
        snapshot_free(&end[0]);
        snapshot_free(&end[1]);
    }
}

// Where nothing would stay the program says so and ends.
static void test_nothing_stays(void) {
    static const char *const specs[] = { "random:what=all", "streaming:sinks=0", "streaming:released:start=0", "h2o", "lookm:prior=off", "snapkv:lookm" };
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        int fd[2], status;
        if (pipe(fd)) die(NULL, "pipe");
        fflush(NULL);
        pid_t child = fork();
        if (!child) {
            dup2(fd[1], 2);
            Chain chain = policy_parse(specs[i], 1, 2);
            Runs *r = new_runs(&chain, 2, 1, 1, 2, 1, 12);
            float qkv[12 * 6] = { 0 };
            int id[12] = { 0 };
            uint8_t kind[12] = { TEXT, IMAGE, IMAGE };
            pass_prompt(r, 0, id, kind, 12);
            for (int l = 0; l < 2; l++) { K->kv_append(r->kv, l, qkv, &r->rows, 1); vote(r, l, qkv, NULL); }
            compress(r, 0);
            _exit(0);
        }
        char text[1024] = "";
        size_t n = 0;
        close(fd[1]);
        for (ssize_t got; (got = read(fd[0], text + n, sizeof text - 1 - n)) > 0; n += got) {}
        close(fd[0]);
        waitpid(child, &status, 0);
        check(WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(text, "nothing at all would stay") && strstr(text, specs[i]), "-p %s -r 1: %s", specs[i], text);
    }
}

// ----------------------------------------------------------------------------
// batches: sequences that decode side by side end up as each would alone, with the CPU's own attention

enum { BL = 3, BH = 2, BHEADS = 4, BD = 16, BSTEPS = 6, BSEQS = 3, BCTX = 48 };
static void real_rows(const Runs *r, float *qkv, int layer, int only) {
    int width = (BHEADS + 2 * BH) * BD;
    for (int t = 0; t < r->rows.T; t++) {
        uint64_t s = 1 + layer + 10 * (uint64_t)r->h_pos[t] + 1000 * (uint64_t)(only >= 0 ? only : r->h_seq[t]);
        for (int i = 0; i < 3; i++) rnd_u64(&s);
        for (int i = 0; i < width; i++) qkv[(size_t)t * width + i] = (float)rnd_normal(&s);
    }
}
static void real_pass(Runs *r, float *qkv, float *o, float *lse, int only) {
    float x[BCTX * 4] = { 0 };
    for (int t = 0; t < r->rows.T; t++) {
        uint64_t s = 7 + 31 * (uint64_t)r->h_pos[t] + 1000 * (uint64_t)(only >= 0 ? only : r->h_seq[t]);
        for (int i = 0; i < 4; i++) x[4 * t + i] = (float)rnd_normal(&s);
    }
    for (int l = 0; l < BL; l++) {
        admit(r, l, x);
        real_rows(r, qkv, l, only);
        K->kv_append(r->kv, l, qkv, &r->rows, BHEADS);
        K->kv_attend(o, lse, r->kv, l, qkv, &r->rows, BHEADS, visible(r), token_votes(r));
        vote(r, l, qkv, lse);
    }
}
static Runs *real_runs(Chain *chain, int n, float *tmp, const float *cos_sin) {
    Runs *r = runs_new(chain, BL, BHEADS, BH, BD, 4, n, BCTX, F32, chain->flags & SLOT_POS, 9, cos_sin, (Mat){ 0 });
    r->tmp = tmp;
    return r;
}
static void real_prompt(Runs *r, int seq, int which, float *qkv, float *o, float *lse) {
    int id[BCTX] = { 0 }, T = 20 + 5 * which;
    uint8_t kind[BCTX];
    for (int t = 0; t < T; t++) kind[t] = t >= 3 + which && t < 15 + which ? IMAGE : TEXT;
    pass_prompt(r, seq, id, kind, T);
    real_pass(r, qkv, o, lse, which);
    compress(r, BSTEPS);
}

static void test_batch(const Policy *p) {
    static float tmp[BCTX * 4], qkv[BCTX * (BHEADS + 2 * BH) * BD], o[BCTX * BHEADS * BD], lse[BCTX * BHEADS], cos_sin[BCTX * BD];
    char spec[128];
    for (int t = 0; t < BCTX; t++) for (int i = 0; i < BD / 2; i++) {
        cos_sin[(t * BD / 2 + i) * 2] = cosf(t * powf(10000, -2.0f * i / BD));
        cos_sin[(t * BD / 2 + i) * 2 + 1] = sinf(t * powf(10000, -2.0f * i / BD));
    }
    for (int behind = 0; behind < 2; behind++) {
        if (behind && (!p->compress || p->flags & RELEASED)) continue;
        snprintf(spec, sizeof spec, "%s%s%s", p->name, strstr(p->options, "k=") ? ":k=1" : "", behind ? "+fastv:k=1,r=0.5" : "");
        Chain chain = policy_parse(spec, 0.5, BL);
        K = &cpu;
        int id[BSEQS] = { 0 };
        Runs *all = real_runs(&chain, BSEQS, tmp, cos_sin);
        for (int s = 0; s < BSEQS; s++) real_prompt(all, s, s, qkv, o, lse);
        for (int t = 0; t < BSTEPS; t++) {
            pass_tokens(all, NULL, id, BSEQS);
            real_pass(all, qkv, o, lse, -1);
            compress(all, -1);
        }
        for (int s = 0; s < BSEQS; s++) {
            Runs *one = real_runs(&chain, 1, tmp, cos_sin);
            real_prompt(one, 0, s, qkv, o, lse);
            for (int t = 0; t < BSTEPS; t++) {
                pass_tokens(one, NULL, id, 1);
                real_pass(one, qkv, o, lse, s);
                compress(one, -1);
            }
            int a[BL * BH], b[BL * BH];
            size_t n = 0;
            K->kv_lens(all->kv, s, a);
            K->kv_lens(one->kv, 0, b);
            check(!memcmp(a, b, sizeof a), "%s: sequence %d has other lengths in a batch", spec, s);
            for (int i = 0; i < BL * BH; i++) n += a[i];
            if (!memcmp(a, b, sizeof a)) {
                int *pa = need(n, 4), *pb = need(n, 4);
                float *va = need(2 * n * BD, 4), *vb = need(2 * n * BD, 4);
                K->kv_read(all->kv, s, pa, NULL, NULL, va, va + n * BD);
                K->kv_read(one->kv, 0, pb, NULL, NULL, vb, vb + n * BD);
                check(!memcmp(pa, pb, n * 4) && !memcmp(va, vb, 2 * n * BD * 4), "%s: sequence %d differs in a batch", spec, s);
                free(pa); free(pb); free(va); free(vb);
            }
            runs_free(one);
        }
        runs_free(all);
        policy_free(&chain);
    }
}

// A copy of a sequence (-B) goes on as the original does, and a cleared one starts as a new one would.
static void test_copy(const Policy *p) {
    static float tmp[BCTX * 4], qkv[BCTX * (BHEADS + 2 * BH) * BD], o[BCTX * BHEADS * BD], lse[BCTX * BHEADS], cos_sin[BCTX * BD];
    char spec[128];
    snprintf(spec, sizeof spec, "%s%s", p->name, strstr(p->options, "k=") ? ":k=1" : "");
    Chain chain = policy_parse(spec, 0.5, BL);
    K = &cpu;
    int id[2] = { 0 }, a[BL * BH], b[BL * BH];
    Runs *r = real_runs(&chain, 2, tmp, cos_sin);
    for (int round = 0; round < 2; round++) {
        real_prompt(r, 0, round, qkv, o, lse);
        runs_copy(r, 1, 0);
        for (int t = 0; t < BSTEPS; t++) {
            pass_tokens(r, NULL, id, 2);
            real_pass(r, qkv, o, lse, 0);
            compress(r, -1);
        }
        size_t n = 0;
        K->kv_lens(r->kv, 0, a);
        K->kv_lens(r->kv, 1, b);
        check(!memcmp(a, b, sizeof a), "%s: a copy has other lengths", spec);
        for (int i = 0; i < BL * BH; i++) n += a[i];
        int *pa = need(2 * n, 4);
        K->kv_read(r->kv, 0, pa, NULL, NULL, NULL, NULL);
        K->kv_read(r->kv, 1, pa + n, NULL, NULL, NULL, NULL);
        check(!memcmp(pa, pa + n, n * 4), "%s: a copy holds other tokens", spec);
        free(pa);
        runs_clear(r, 0);
        runs_clear(r, 1);
        check(K->kv_bytes(r->kv) == 0, "%s: a cleared cache still has %zu bytes", spec, K->kv_bytes(r->kv));
    }
    runs_free(r);
    policy_free(&chain);
}

int main(int argc, char **argv) {
    int cases = argc > 1 ? atoi(argv[1]) : 10000;
#ifdef _OPENMP
    omp_set_num_threads(1);                    // the caches are small; and a process that forks must not have threads
#endif
    test_command_line();
    test_nothing_stays();
    test_lookm_full_size();
    test_fastv_full_size();
    test_simignore_full_size();
    test_simignore_released();
    test_published_configuration();
    for (const Policy *p = policies; p->name; p++) {
        if (!p->admit && !p->compress) continue;
        if (!(p->flags & (SPLIT_7B | SPLIT_13B))) { test_batch(p); test_copy(p); }       // those need a text set beside the prompt
        test_properties(p, cases);
    }
    check(looked > 0, "nobody was shown a plan");
    return finish();
}
