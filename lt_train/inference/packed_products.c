/* Products of a few rows and a packed weight on a CPU, where libraries that are made for large products reach half of its rates.

A block of outputs lies in one piece, input by input: all rows are multiplied by it while the next block is fetched. Each number is
summed in the order of the inputs, so a row's result depends on nothing that shares the batch.

Compiled when first used (packed_weights.py). */

#include <omp.h>
#include <stdint.h>
#include <string.h>

/* Registers hold the sums of ROWS rows and one block, the block's weights of one input, and a row's number for it. */
#ifdef __AVX512F__
#define ROWS 14
enum { LANES = 16 };
#else
#define ROWS 6
enum { LANES = 8 };
#endif
enum { VECTORS = 2, BLOCK = VECTORS * LANES, LINE = 64 / sizeof(float), LINES = BLOCK / LINE };

const int block = BLOCK; /* outputs */

typedef float lanes __attribute__((vector_size(4 * LANES)));

static inline lanes load(const float *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* `rows` rows, a constant where this is inlined, and one block, of which y has the first `count` outputs.
   ahead: what is fetched meanwhile, `lines` cache lines for each input. */
static inline __attribute__((always_inline)) void multiply_rows(const int rows, const float *restrict x, const float *restrict w,
                                                                const float *restrict bias, int in, int out, int count,
                                                                const float *ahead, int lines, float *restrict y) {
    lanes sums[ROWS][VECTORS];
    const float *row[ROWS];
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        row[r] = x + (int64_t)r * in;
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[r][v] = load(bias + v * LANES);
    }
    for (int k = 0; k < in; k++, w += BLOCK) {
        for (int line = 0; line < lines; line++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
        lanes weights[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) weights[v] = load(w + v * LANES);
#pragma GCC unroll 14
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sums[r][v] += row[r][k] * weights[v];
    }
    if (count == BLOCK)
#pragma GCC unroll 14
        for (int r = 0; r < rows; r++) memcpy(y + (int64_t)r * out, sums[r], sizeof sums[r]);
    else
        for (int r = 0; r < rows; r++) memcpy(y + (int64_t)r * out, sums[r], sizeof(float) * count);
}

/* x: [rows, in]. packed: [blocks, in, BLOCK]. bias: [blocks, BLOCK]. y: [rows, out]. */
void multiply(const float *x, const float *packed, const float *bias, int rows, int in, int out, float *y) {
    int blocks = (out + BLOCK - 1) / BLOCK, passes = (rows + ROWS - 1) / ROWS, lines = (LINES + passes - 1) / passes;
#pragma omp parallel for schedule(dynamic)
    for (int b = 0; b < blocks; b++) {
        const float *w = packed + (int64_t)b * in * BLOCK, *next = w + (int64_t)omp_get_num_threads() * in * BLOCK;
        int count = out - b * BLOCK < BLOCK ? out - b * BLOCK : BLOCK;
        for (int pass = 0, done = 0, here; pass < passes; pass++, done += here) {
            here = (rows - done + passes - pass - 1) / (passes - pass);
            switch (here) {
#define CASE(R)                                                                                                                   \
    case R:                                                                                                                       \
        multiply_rows(R, x + (int64_t)done * in, w, bias + b * BLOCK, in, out, count, next + (int64_t)pass * lines * in * LINE,   \
                      pass * lines < LINES ? lines : 0, y + (int64_t)done * out + b * BLOCK);                                     \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS == 14
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
            }
        }
    }
}
