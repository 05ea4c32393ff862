// image_cli.c: include/image.h for another program to talk to, as tests/image_parity.py does.
//
//     build/image_cli < requests > answers
//
// A request is a byte, then i32 w, h, a, b, mode, then 3 w h bytes of picture (file requests: w bytes of JPEG or PNG):
//     'r'  resize to a x b                  answer: 3 a b bytes           mode: an enum value of image.h
//     's'  square of side a                 answer: 3 a a bytes
//     'n'  the same, normalised for CLIP    answer: 3 a a floats (CHW)
//     'p'  the same, in patches of b        answer: 3 a a floats
//     'f'  decode                           answer: i32 w, h, then 3 w h bytes; w = 0: an error, h bytes of message
// All in the byte order of this machine.

#include "image.h"

static const float clip_mean[3] = {0.48145466f, 0.4578275f, 0.40821073f}, clip_std[3] = {0.26862954f, 0.26130258f, 0.27577711f};

static void get(void *p, size_t n) { if (fread(p, 1, n, stdin) != n) die(NULL, "a request ends too early"); }
static void put(const void *p, size_t n) { if (fwrite(p, 1, n, stdout) != n) die(NULL, "cannot write: %s", strerror(errno)); }

int main(void) {
    for (int op; (op = getchar()) != EOF; ) {
        int32_t arg[5];
        get(arg, sizeof arg);
        Image in = {arg[0], arg[1], NULL}, out = {0};
        size_t bytes = op == 'f' ? (size_t)in.w : (size_t)in.w * in.h * 3;
        int a = arg[2], b = arg[3], mode = arg[4];
        in.rgb = need(bytes, 1);
        get(in.rgb, bytes);
        if (op == 'f') {
            const char *error = image_decode(&out, in.rgb, bytes);
            int32_t size[2] = {error ? 0 : out.w, error ? (int)strlen(error) : out.h};
            put(size, sizeof size);
            if (error) put(error, size[1]);
            else put(out.rgb, (size_t)out.w * out.h * 3);
        } else {
            out = op == 'r' ? image_resize(in, a, b, mode) : image_square(in, a, mode);
            float *chw = need((size_t)3 * out.w * out.h, sizeof(float)), *rows = need((size_t)3 * out.w * out.h, sizeof(float));
            image_normalize(chw, out, clip_mean, clip_std);
            if (op == 'p') image_patches(rows, chw, a, b);
            if (op == 'r' || op == 's') put(out.rgb, (size_t)3 * out.w * out.h);
            else put(op == 'n' ? chw : rows, (size_t)3 * out.w * out.h * sizeof(float));
            free(chw), free(rows);
        }
        fflush(stdout);
        image_free(in), image_free(out);
    }
    return 0;
}
