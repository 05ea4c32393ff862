// error.h: how a program of this project ends when it cannot go on.

#ifndef ERROR_H
#define ERROR_H
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

// error: WHAT: WHY      hint: what to try (NULL: nothing to try)
// Prints both on standard error and exits with 1. `format` makes WHAT and WHY.
__attribute__((noreturn, format(printf, 2, 3)))
static inline void die(const char *hint, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    if (hint) fprintf(stderr, "\nhint:  %s", hint);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

// Zeroed memory, or the end: with file and line of the caller.
static inline void *need_at(size_t n, size_t size, const char *file, int line) {
    void *p = calloc(n ? n : 1, size);
    if (!p) die("close other programs, or take a smaller model, image or --ctx", "%s:%d: out of memory for %zu bytes", file, line, n * size);
    return p;
}
#define need(n, size) need_at(n, size, __FILE__, __LINE__)

#endif
