// tokenizer_cli.c: tokenizer.c for another program to talk to, as tests/tokenizer_parity.py does.
//
//     build/tokenizer_cli MODEL.bin < requests > answers
//
// A request is a byte 'e' (encode, with the prefix), 'n' (encode, without) or 'd' (decode), a u32 count, and as many bytes of text
// ('d': i32 ids). The answer is a u32 count and as many i32 ids ('d': bytes of text). All in the byte order of this machine.

#include "model.h"
#include "tokenizer.h"

static void get(void *p, size_t n) { if (fread(p, 1, n, stdin) != n) die(NULL, "a request ends too early"); }
static void put(const void *p, size_t n) { if (fwrite(p, 1, n, stdout) != n) die(NULL, "cannot write: %s", strerror(errno)); }

int main(int argc, char **argv) {
    if (argc != 2) die("tokenizer_cli MODEL.bin", "expected one argument");
    ModelFile f = model_open(argv[1]);
    Tokenizer *t = tokenizer_open(f.data + f.header->tok_offset, f.header->tok_bytes, argv[1]);
    for (int op; (op = getchar()) != EOF; ) {
        uint32_t n, n_out = 0;
        get(&n, sizeof n);
        if (op == 'd') {
            int *ids = need(n, sizeof *ids);
            char *out = need(n + 1, tokenizer_max_piece(t) + 16);
            Decoder d = { 0 };
            get(ids, n * sizeof *ids);
            for (uint32_t i = 0; i < n; i++) n_out += tokenizer_decode(t, &d, ids[i], out + n_out);
            n_out += tokenizer_decode(t, &d, -1, out + n_out);
            put(&n_out, sizeof n_out);
            put(out, n_out);
            free(ids);
            free(out);
        } else {
            char *text = need(n, 1);
            get(text, n);
            int cap = tokenizer_encode(t, text, n, op == 'e', NULL, 0), *ids = need(cap, sizeof *ids);
            n_out = tokenizer_encode(t, text, n, op == 'e', ids, cap);
            put(&n_out, sizeof n_out);
            put(ids, n_out * sizeof *ids);
            free(text);
            free(ids);
        }
    }
    tokenizer_close(t);
    model_close(&f);
    return 0;
}
