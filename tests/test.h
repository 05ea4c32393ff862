// test.h: what every test program uses. A failed check prints where and what, and the program ends with one line
// "N passed, M failed" and status 1 if anything failed.

#ifndef TEST_H
#define TEST_H
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int n_passed, n_failed;

// One check. `...` is a printf format that names it.
#define check(ok, ...) do { \
        if (ok) n_passed++; \
        else { n_failed++; if (n_failed <= 50) { printf("FAILED %s:%d: ", __FILE__, __LINE__); printf(__VA_ARGS__); printf("\n"); } } \
    } while (0)

// |got - want| <= tol * (1 + |want|) for all n; counts as one check; prints the worst.
static inline bool check_close_at(const char *file, int line, const char *name, const float *got, const double *want, size_t n, double tol) {
    size_t worst = 0;
    double err = -1;
    for (size_t i = 0; i < n; i++) {
        double e = fabs(got[i] - want[i]) / (1 + fabs(want[i]));
        if (!(e <= err)) { err = e; worst = i; if (e != e) break; }
    }
    bool ok = n == 0 || err <= tol;    // NaN fails
    if (ok) n_passed++;
    else if (n_failed++ < 50)
        printf("FAILED %s:%d: %s: [%zu] got %.9g, want %.9g, off by %.2g, allowed %.2g\n", file, line, name, worst, got[worst], want[worst], err, tol);
    return ok;
}
#define check_close(name, got, want, n, tol) check_close_at(__FILE__, __LINE__, name, got, want, n, tol)

// Random numbers that are the same everywhere (xorshift64*).
static inline uint64_t rnd_u64(uint64_t *s) {
    *s ^= *s >> 12; *s ^= *s << 25; *s ^= *s >> 27;
    return *s * 2685821657736338717ull;
}
static inline double rnd(uint64_t *s) { return (double)(rnd_u64(s) >> 11) / 9007199254740992.0; }          // [0, 1)
static inline int rnd_int(uint64_t *s, int n) { return (int)(rnd(s) * n); }                                 // 0 … n-1
static inline double rnd_normal(uint64_t *s) { return sqrt(-2 * log(1 - rnd(s))) * cos(6.283185307179586 * rnd(s)); }

// The last line of a test program, and its exit status.
static inline int finish(void) {
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0 || n_passed == 0;
}

#endif
