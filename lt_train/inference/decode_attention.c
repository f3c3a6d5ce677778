/* Attention of a decoding step on a CPU: a few queries of each sequence and KV head to all cached keys it sees.

Matrix products with so few rows read keys at a fraction of the memory's rate. Here every key and value is read once, for all queries
of its head. Blocks of keys are joined by a running softmax, so a sequence's result depends on nothing that shares the batch.

Compiled when first used (compiled_attention.py), once for each type of the cache: -DBF16, -DFP16, or neither for fp32. */

#include <stdint.h>
#include <string.h>

enum { TOGETHER = 4 }; /* keys that are read at a time */

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

/* scores[j, p] = scaling * q[j] . keys[p], for `count` keys of a block */
static inline void score(const float *restrict q, const cached *restrict keys, int queries, int count, int size, int block,
                         float scaling, float *restrict scores) {
    int p = 0;
    for (; p + TOGETHER <= count; p += TOGETHER) {
        const cached *k0 = keys + (int64_t)p * size, *k1 = k0 + size, *k2 = k1 + size, *k3 = k2 + size;
        for (int j = 0; j < queries; j++) {
            const float *query = q + (int64_t)j * size;
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
            for (int d = 0; d < size; d++) {
                s0 += query[d] * value_of(k0[d]);
                s1 += query[d] * value_of(k1[d]);
                s2 += query[d] * value_of(k2[d]);
                s3 += query[d] * value_of(k3[d]);
            }
            float *four = scores + j * block + p;
            four[0] = s0 * scaling;
            four[1] = s1 * scaling;
            four[2] = s2 * scaling;
            four[3] = s3 * scaling;
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

/* out[j] += weights[j] . values, for `count` values of a block */
static inline void add(const float *restrict weights, const cached *restrict values, int queries, int count, int size, int block,
                       float *restrict out) {
    int p = 0;
    for (; p + TOGETHER <= count; p += TOGETHER) {
        const cached *v0 = values + (int64_t)p * size, *v1 = v0 + size, *v2 = v1 + size, *v3 = v2 + size;
        for (int j = 0; j < queries; j++) {
            const float *four = weights + j * block + p;
            float w0 = four[0], w1 = four[1], w2 = four[2], w3 = four[3];
            float *sum = out + (int64_t)j * size;
#pragma omp simd
            for (int d = 0; d < size; d++)
                sum[d] += w0 * value_of(v0[d]) + w1 * value_of(v1[d]) + w2 * value_of(v2[d]) + w3 * value_of(v3[d]);
        }
    }
    for (; p < count; p++)
        for (int j = 0; j < queries; j++) {
#pragma omp simd
            for (int d = 0; d < size; d++) out[(int64_t)j * size + d] += weights[j * block + p] * value_of(values[(int64_t)p * size + d]);
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
        int row = pair / heads, head = pair % heads;
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
            int here = (int)length[i], count = within(sees[tokens - 1] - before, here); /* the newest token sees the latest key */
            score(q_here, keys + at, queries, count, size, block, scaling, scores);
            for (int j = 0; j < queries; j++) {
                int own = within(sees[j % tokens] - before, here);
                int from = before < always[row] ? 0 : within(always[row] + leaves[j % tokens] - before, own);
                float *weights = scores + j * block;
                join(weights + from, own - from, &largest[j], &total[j], out_here + (int64_t)j * size, size);
                for (int p = 0; p < from; p++) weights[p] = 0;
                for (int p = own; p < count; p++) weights[p] = 0;
            }
            add(scores, values + at, queries, count, size, block, out_here);
        }
        for (int j = 0; j < queries; j++)
            for (int d = 0; d < size; d++) out_here[(int64_t)j * size + d] /= total[j];
    }
}
