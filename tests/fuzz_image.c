// fuzz_image.c: hostile JPEG and PNG files, for the checks of include/image.h and stb_image together.
//
//     build/fuzz_image [N [SEED]]          N mutations of the files in tests/images (default 20000), from the root;
//                                          input i of seed s is input 0 of seed s + i: that is how to see one again
//     clang -DLIBFUZZER -fsanitize=fuzzer,address,undefined …  && ./fuzz_image CORPUS      the same target for libFuzzer
//
// Any outcome is right but a sanitizer's complaint, a crash, or seconds for one input. To be built with
// -fsanitize=address,undefined -fno-sanitize=shift,signed-integer-overflow: inside stb_image 2.27 damaged DC
// coefficients can add up beyond an int, and missing bits be shifted too far; pixels come from those, no index does.

#define IMAGE_MAX_MEGAPIXELS 1          // what takes seconds at 64 times the size is not worth finding slowly
#include "image.h"

static size_t n_decoded;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    Image image = {0};
    if (image_decode(&image, data, n)) return 0;
    n_decoded++;
    unsigned sum = 0;                   // reads every byte of it
    for (size_t i = 0; i < (size_t)image.w * image.h * 3; i++) sum += image.rgb[i];
    Image square = image_square(image, 8, sum % 3);
    image_free(image), image_free(square);
    return 0;
}

#ifndef LIBFUZZER
#include <dirent.h>
#include "test.h"

enum { MAX_FILES = 100, MAX_BYTES = 1 << 16 };
static struct { uint8_t *data; size_t n; } files[MAX_FILES];
static int n_files;
static uint64_t current;                // seed of the input under way

void __asan_on_error(void);
void __asan_on_error(void) { fprintf(stderr, "\nto see it again: fuzz_image 1 %llu\n", (unsigned long long)current); }

static void read_files(const char *folder) {
    struct dirent **names;
    int n = scandir(folder, &names, NULL, alphasort);
    if (n < 0) die("run it from the root of the repository", "%s: %s", folder, strerror(errno));
    for (int i = 0; i < n; i++) {
        char path[512];
        const char *dot = strrchr(names[i]->d_name, '.');
        snprintf(path, sizeof path, "%s/%s", folder, names[i]->d_name);
        bool wanted = dot && (!strcmp(dot, ".jpg") || !strcmp(dot, ".png")) && !strstr(path, ".jpg.") && !strstr(path, "large") && n_files < MAX_FILES;
        free(names[i]);
        if (!wanted) continue;
        FILE *f = fopen(path, "rb");
        if (!f) die(NULL, "%s: %s", path, strerror(errno));
        files[n_files].data = need(MAX_BYTES, 1);
        files[n_files].n = fread(files[n_files].data, 1, MAX_BYTES, f);
        n_files++;
        fclose(f);
    }
    free(names);
    if (!n_files) die("run tests/images/make.py", "%s: no pictures", folder);
}

// A file with one to eight edits; most hit the first 700 bytes, where the headers are.
static size_t mutate(uint8_t *out, uint64_t *s) {
    static const uint8_t interesting[] = {0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 63, 64, 127, 128, 192, 193, 194, 196, 217, 218, 219, 221, 254, 255};
    int f = rnd_int(s, n_files);
    size_t n = files[f].n;
    memcpy(out, files[f].data, n);
    for (int edits = 1 + rnd_int(s, 8); edits > 0; edits--) {
        size_t at = rnd_int(s, rnd_int(s, 4) && n > 700 ? 700 : (int)n), len = 1 + rnd_int(s, rnd_int(s, 2) ? 4 : 64);
        if (at + len > n) len = n - at;
        switch (rnd_int(s, 9)) {
        case 0: out[at] ^= 1 << rnd_int(s, 8); break;
        case 1: out[at] = rnd_int(s, 256); break;
        case 2: case 3: out[at] = interesting[rnd_int(s, sizeof interesting)]; break;
        case 4: out[at] += rnd_int(s, 2) ? 1 : -1; break;
        case 5:                                                             // remove
            if (n - len < 20) break;
            memmove(out + at, out + at + len, n - at - len), n -= len;
            break;
        case 6:                                                             // repeat
            if (n + len > MAX_BYTES) break;
            memmove(out + at + len, out + at, n - at), n += len;
            break;
        case 7: {                                                           // from another place of this or another file
            int g = rnd_int(s, 2) ? f : rnd_int(s, n_files);
            size_t from = rnd_int(s, (int)files[g].n);
            if (from + len > files[g].n) len = files[g].n - from;
            if (at + len <= n) memcpy(out + at, files[g].data + from, len);
            break;
        }
        case 8: for (size_t i = 0; i < len; i++) out[at + i] = rnd_int(s, 256); break;
        }
    }
    return n;
}

int main(int argc, char **argv) {
    long n = argc > 1 ? atol(argv[1]) : 20000;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    read_files("tests/images");
    uint8_t *out = need(MAX_BYTES + 64, 1);
    for (long i = 0; i < n; i++) {
        current = seed + i;
        uint64_t state = current * 0x9E3779B97F4A7C15u + 1;
        size_t bytes = mutate(out, &state);
        uint8_t *exact = malloc(bytes);                                     // so that a sanitizer sees the end
        memcpy(exact, out, bytes);
        LLVMFuzzerTestOneInput(exact, bytes);
        free(exact);
    }
    check(n_decoded > (size_t)n / 50 || n < 100, "only %zu of %ld inputs got past the checks: they test nothing", n_decoded, n);
    printf("%ld inputs, %zu decoded\n", n, n_decoded);
    for (int i = 0; i < n_files; i++) free(files[i].data);
    free(out);
    return finish();
}
#endif
