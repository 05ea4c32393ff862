// tokenizer.h: text to token ids and back. tokenizer.c holds both kinds; it knows nothing of models and prompts.
//
// The tokenizer section of a model file (model.h), little-endian, validated before use:
//
//     u32 kind: 1 SentencePiece BPE, 2 tiktoken BPE
//     u32 n: number of pieces, ids 0 … n-1
//     u32 bytes: of all piece texts together            u32 0
//     n entries of 12 bytes: f32 score, u32 type, u32 end (where this piece's text ends in the text below)
//     the texts, one after the other, `bytes` bytes
//
// Types (SentencePiece's own): 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte. Texts are UTF-8 and not empty,
// those of normal pieces all different, and "<0x00>" … "<0xFF>" are all there. 4 and 5 are refused: LLaMA's vocabulary has none.
// What the exporter must check, because the section does not say it: model type BPE with byte fallback, normaliser "identity",
// dummy prefix, spaces escaped and not removed.

#ifndef TOKENIZER_H
#define TOKENIZER_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Tokenizer Tokenizer;

// From a model file's section, which must stay mapped; `path` is for messages. Ends the program with one clear error where
// the section is broken.
Tokenizer *tokenizer_open(const uint8_t *data, size_t bytes, const char *path);
void tokenizer_close(Tokenizer *t);
int tokenizer_size(const Tokenizer *t);                           // number of pieces n
const char *tokenizer_piece(const Tokenizer *t, int id, int *len); // its text as stored ("▁The", "<0x0A>"), not zero-terminated; NULL and 0 where there is no such id

// Ids of `len` bytes of text as one plain string: nothing in it is special. `prefix`: with SentencePiece's dummy "▁" in front
// (for a text that stands at a start). Writes at most `cap` ids and returns how many there are (call with cap 0 to count);
// a text of len bytes never has more than 3 len + 3 (every broken byte becomes U+FFFD, three byte pieces; and the prefix).
int tokenizer_encode(const Tokenizer *t, const char *text, size_t len, bool prefix, int *ids, int cap);

// Decoding, id by id, for a terminal: `out` gets only whole characters; an invalid byte comes out as U+FFFD. The space in front of
// the first piece is dropped; control pieces and ids without a piece have no text; <unk> is " ⁇ ", as in the library.
typedef struct {
    bool started;            // the first piece's leading space was dealt with
    int n;                   // bytes held back
    uint8_t held[4];         // of an unfinished character
} Decoder;                   // all zero at the start of an answer
// Writes the text of one id (id < 0: the end, flush) to out and returns the number of bytes: at most tokenizer_max_piece(t) + 16.
int tokenizer_decode(const Tokenizer *t, Decoder *d, int id, char *out);
int tokenizer_max_piece(const Tokenizer *t);                      // bytes of the longest piece

#endif
