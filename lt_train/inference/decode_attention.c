/* Attention of a decoding step on a CPU: a few queries of each sequence and KV head to all cached keys it sees.

Matrix products with so few rows read keys at a fraction of the memory's rate. Here every key and value is read once, for all queries
of its head. Blocks of keys are joined by a running softmax, so a sequence's result depends on nothing that shares the batch.

Compiled when first used (compiled_attention.py), once for each type of the cache: -DBF16, -DFP16, or neither for fp32. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16 /* floats of a vector, and keys that are scored at a time */
#else
#define LANES 8
#endif
enum {
    SPAN = 64,  /* dimensions whose sums stay in registers */
    TILE = 32,  /* values that are added at a time */
};

typedef float lanes __attribute__((vector_size(4 * LANES)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (int __attribute__((vector_size(4 * LANES)))){__VA_ARGS__})
#endif

static inline lanes load(const float *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float *to, lanes value) { memcpy(to, &value, sizeof value); }

/* The vectors' sums, in their order: halves, quarters and so on are added, each time of two vectors in one. */
static inline lanes sums_of(const lanes v[LANES]) {
    lanes halves[LANES / 2], quarters[LANES / 4];
#if LANES == 16
    lanes eighths[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        halves[i] = PICK(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    PICK(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        quarters[i] = PICK(halves[i], halves[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                      PICK(halves[i], halves[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        eighths[i] = PICK(quarters[i], quarters[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                     PICK(quarters[i], quarters[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return PICK(eighths[0], eighths[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           PICK(eighths[0], eighths[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#else
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        halves[i] = PICK(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + PICK(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        quarters[i] = PICK(halves[i], halves[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) + PICK(halves[i], halves[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return PICK(quarters[0], quarters[1], 0, 8, 2, 10, 4, 12, 6, 14) + PICK(quarters[0], quarters[1], 1, 9, 3, 11, 5, 13, 7, 15);
#endif
}

#if defined(BF16)
typedef uint16_t cached;
static inline float value_of(cached x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
#elif defined(FP16)
typedef _Float16 cached;
static inline float value_of(cached x) { return (float)x; }
#else
typedef float cached;
static inline float value_of(cached x) { return x; }
#endif

/* To the second cache: the processor alone fetches too late. */
static inline void fetch(const cached *from, int count) {
    for (int line = 0; line < count; line += 64 / (int)sizeof(cached)) __builtin_prefetch(from + line, 0, 2);
}

/* `count` cached numbers as floats; `room` holds them where they are of another type */
static inline const float *widened(const cached *restrict numbers, int count, float *restrict room) {
#if defined(BF16) || defined(FP16)
    for (int i = 0; i < count; i++) room[i] = value_of(numbers[i]);
    return room;
#else
    return numbers;
#endif
}

/* e^x for x <= 0, to the precision of a float: 2^n times a polynomial (Cephes, expf). Unlike libm's it is computed for many x at once. */
static inline float exp_of_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float nearest = 12582912.0f; /* 1.5 * 2^23: added and taken away, it rounds */
    float n = (x * 1.44269504f + nearest) - nearest;
    float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return (p * f * f + f + 1.0f) * power;
}

/* scores[j, p] = scaling * q[j] . keys[p], for `count` keys; as many values from `next` on are fetched */
static inline void score(const float *restrict q, const cached *restrict keys, const cached *next, int queries, int count, int size,
                         int block, float scaling, float *restrict scores) {
    int p = 0, whole = size - size % LANES;
    for (; p + LANES <= count; p += LANES) {
        fetch(next + (int64_t)p * size, LANES * size);
        float room[LANES * size];
        const float *tile = widened(keys + (int64_t)p * size, LANES * size, room);
        for (int j = 0; j < queries; j++) {
            const float *query = q + (int64_t)j * size;
            lanes sums[LANES] = {};
            for (int d = 0; d < whole; d += LANES)
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) sums[i] += load(query + d) * load(tile + i * size + d);
            lanes sum = sums_of(sums);
            for (int d = whole; d < size; d++)
                for (int i = 0; i < LANES; i++) sum[i] += query[d] * tile[i * size + d];
            store(scores + j * block + p, sum * scaling);
        }
    }
    for (; p < count; p++)
        for (int j = 0; j < queries; j++) {
            float s = 0;
#pragma omp simd reduction(+ : s)
            for (int d = 0; d < size; d++) s += q[(int64_t)j * size + d] * value_of(keys[(int64_t)p * size + d]);
            scores[j * block + p] = s * scaling;
        }
}

/* out[j] += weights[j] . values, for `count` values; as many keys from `next` on are fetched */
static inline void add(const float *restrict weights, const cached *restrict values, const cached *next, int queries, int count,
                       int size, int block, float *restrict out) {
    for (int p = 0; p < count; p += TILE) {
        int tiled = count - p < TILE ? count - p : TILE;
        fetch(next + (int64_t)p * size, tiled * size);
        float room[TILE * size];
        const float *tile = widened(values + (int64_t)p * size, tiled * size, room);
        for (int j = 0; j < queries; j++) {
            const float *weight = weights + j * block + p;
            float *sum = out + (int64_t)j * size;
            int d = 0;
            for (; d + SPAN <= size; d += SPAN) {
                lanes sums[SPAN / LANES];
#pragma GCC unroll 8
                for (int i = 0; i < SPAN / LANES; i++) sums[i] = load(sum + d + i * LANES);
                for (int k = 0; k < tiled; k++)
#pragma GCC unroll 8
                    for (int i = 0; i < SPAN / LANES; i++) sums[i] += weight[k] * load(tile + k * size + d + i * LANES);
#pragma GCC unroll 8
                for (int i = 0; i < SPAN / LANES; i++) store(sum + d + i * LANES, sums[i]);
            }
            for (int k = 0; k < tiled; k++)
                for (int e = d; e < size; e++) sum[e] += weight[k] * tile[k * size + e];
        }
    }
}

/* One query: scores become weights relative to its largest score so far, and what was summed before is made relative to it too. */
static inline void join(float *restrict scores, int count, float *largest, float *total, float *restrict out, int size) {
    float most = *largest;
#pragma omp simd reduction(max : most)
    for (int p = 0; p < count; p++) most = scores[p] > most ? scores[p] : most;
    float factor = exp_of_negative(*largest - most), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int p = 0; p < count; p++) {
        scores[p] = exp_of_negative(scores[p] - most);
        sum += scores[p];
    }
    *total = *total * factor + sum;
    *largest = most;
#pragma omp simd
    for (int d = 0; d < size; d++) out[d] *= factor;
}

static inline int within(int64_t keys, int block) { return keys < 0 ? 0 : keys < block ? (int)keys : block; }

/* q, out: [rows, heads, queries, size]; query j of a head belongs to the new token j % tokens.
   keys, values: those of block i's first head begin at start[i], those of its next head head_stride elements further on.
   length: keys of each block, at most `block`. first: [rows + 1], where each row's blocks begin.
   seen, left: [rows, tokens]: a new token sees the keys before seen, counted from the row's first on, but for the `left` keys that
   follow the row's first `always` ones, which are blocks of their own.
   sinks: [heads, queries], or null. */
void attend(const float *q, const cached *keys, const cached *values, const int64_t *start, const int64_t *length,
            const int64_t *first, const int64_t *seen, const int64_t *left, const int64_t *always, int64_t head_stride, int block,
            int rows, int heads, int queries, int tokens, int size, float scaling, const float *sinks, float *out) {
#pragma omp parallel for schedule(dynamic)
    for (int pair = 0; pair < rows * heads; pair++) {
        int row = pair / heads, head = pair % heads, later = (pair + omp_get_num_threads()) % (rows * heads);
        const cached *of_later = keys + start[first[later / heads]] + later % heads * head_stride;
        const float *q_here = q + (int64_t)pair * queries * size;
        float *out_here = out + (int64_t)pair * queries * size;
        float largest[queries], total[queries], scores[queries * block];
        memset(out_here, 0, sizeof(float) * queries * size);
        for (int j = 0; j < queries; j++) {
            largest[j] = sinks ? sinks[head * queries + j] : -1e30f;
            total[j] = sinks ? 1.0f : 0.0f;
        }
        const int64_t *sees = seen + (int64_t)row * tokens, *leaves = left + (int64_t)row * tokens;
        for (int64_t i = first[row], before = 0; i < first[row + 1]; before += length[i++]) {
            int64_t at = start[i] + head * head_stride;
            const cached *next = i + 1 < first[row + 1] ? keys + start[i + 1] + head * head_stride : of_later;
            int here = (int)length[i], count = within(sees[tokens - 1] - before, here); /* the newest token sees the latest key */
            score(q_here, keys + at, values + at, queries, count, size, block, scaling, scores);
            for (int j = 0; j < queries; j++) {
                int own = within(sees[j % tokens] - before, here);
                int from = before < always[row] ? 0 : within(always[row] + leaves[j % tokens] - before, own);
                float *weights = scores + j * block;
                join(weights + from, own - from, &largest[j], &total[j], out_here + (int64_t)j * size, size);
                for (int p = 0; p < from; p++) weights[p] = 0;
                for (int p = own; p < count; p++) weights[p] = 0;
            }
            add(scores, values + at, next, queries, count, size, block, out_here);
        }
        for (int j = 0; j < queries; j++)
            for (int d = 0; d < size; d++) out_here[(int64_t)j * size + d] /= total[j];
    }
}
