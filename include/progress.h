// progress.h: the clock, Ctrl-C, and a line on the terminal for whatever takes longer than two seconds.

#ifndef PROGRESS_H
#define PROGRESS_H
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static inline double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

// OpenMP's threads spin while they wait for each other, which beside any other busy process makes decoding several times slower than
// sleeping does. The library reads its setting when it is loaded, so the program starts itself once more. First thing in main.
static inline void calm_threads(char **argv) {
    if (getenv("OMP_WAIT_POLICY")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    execv("/proc/self/exe", argv);               // where there is no /proc this fails, and threads wait as the library likes
}

static volatile sig_atomic_t interrupts;      // how often Ctrl-C was pressed since the last answer began
static bool quiet;                            // -q

static inline void on_interrupt(int signal) {
    (void)signal;
    if (++interrupts > 1) _exit(130);
}

// Part `i` of `n` of something that began at `start_ms` is about to run. Says so after two seconds and then every second (every ten
// where nobody watches a terminal); ends the program where Ctrl-C was pressed, since there is no answer yet that could be cut short.
static inline void progress(const char *what, int i, int n, double start_ms) {
    static double said;
    double now = now_ms();
    if (interrupts) { fputs("\ninterrupted\n", stderr); exit(130); }
    bool tty = isatty(2);
    if (quiet || now - start_ms < 2000 || now - said < (tty ? 1000 : 10000)) return;
    said = now;
    fprintf(stderr, "%s%s: %d of %d, %.0f s%s", tty ? "\r" : "", what, i, n, (now - start_ms) / 1e3, tty ? "   " : "\n");
    if (tty && i + 1 >= n) fputc('\n', stderr);
}

#endif
