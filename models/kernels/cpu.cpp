// The kernels of a ConvNeXt block for CPUs: depthwise 7x7 convolution with LayerNorm, and GELU with GRN.
//
// Tokens are rows x [T, C] of fp32 or bf16; sums are fp32. A *tile* is S x S tokens: a visible patch (packed), or a square
// of a dense grid. A tile's *window* has the row in x of each token within 3 of the tile, -1 where there is none (hidden,
// or outside of the image); such taps are skipped. Loops run over groups of channels, as wide as the CPU's registers.
// Sums over tokens are partial sums of fixed chunks: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

using std::int32_t, std::int64_t, std::uint16_t, std::uint32_t;

constexpr int MARGIN = 3, KERNEL = 7;
#if defined(__AVX512F__)
constexpr int WIDEST = 16;
#elif defined(__AVX__)
constexpr int WIDEST = 8;
#else
constexpr int WIDEST = 4;
#endif

struct bf16 {
    uint16_t bits;
};

template <int L> using Floats __attribute__((vector_size(4 * L))) = float;
template <int L> using Words __attribute__((vector_size(4 * L))) = uint32_t;
template <int L> using Halves __attribute__((vector_size(2 * L))) = uint16_t;

template <int L> inline Floats<L> load(const float *from) {
    Floats<L> values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

template <int L> inline Floats<L> load(const bf16 *from) {
    Halves<L> halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats<L>)(__builtin_convertvector(halves, Words<L>) << 16);
}

template <int L> inline void store(float *to, Floats<L> values) { std::memcpy(to, &values, sizeof values); }

template <int L> inline void store(bf16 *to, Floats<L> values) { // rounds to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
    if constexpr (L == 16) {
        auto rounded = _mm512_cvtneps_pbh((__m512)values);
        std::memcpy(to, &rounded, sizeof rounded);
        return;
    }
#endif
    Words<L> words = (Words<L>)values;
    Words<L> rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    Halves<L> halves = __builtin_convertvector(values == values ? rounded : (Words<L>)(rounded * 0 + 0x7fc0), Halves<L>);
    std::memcpy(to, &halves, sizeof halves);
}

// Call body(integral constant L, first channel) for all channels, with the widest L that fits.
template <int L = WIDEST, class Body> inline void over_channels(int64_t first, int64_t last, Body &&body) {
    for (; first + L <= last; first += L)
        body(std::integral_constant<int, L>(), first);
    if constexpr (L > 1)
        if (first < last)
            over_channels<(L > 8 ? 8 : 1)>(first, last, body);
}

struct Geometry { // models/kernels/depthwise.py
    int64_t batch, height, width, s, n;
    const int32_t *slot, *patch;
};

template <int S> struct Tiles {
    static constexpr int SIDE = S + 2 * MARGIN;
    Geometry g;
    int64_t across, down, count;

    explicit Tiles(const Geometry &geometry) : g(geometry) {
        across = (g.width + S - 1) / S, down = (g.height + S - 1) / S;
        count = g.s ? g.batch * g.n : g.batch * across * down;
    }

    // The window of a tile: rows [SIDE * SIDE].
    void window(int64_t tile, int32_t *rows) const {
        int64_t image = g.s ? tile / g.n : tile / (across * down);
        int64_t place = g.s ? g.patch[tile] : tile % (across * down);
        int64_t top = place / across * S - MARGIN, left = place % across * S - MARGIN;
        for (int64_t y = top; y < top + SIDE; y++)
            for (int64_t x = left; x < left + SIDE; x++, rows++) {
                *rows = -1;
                if (y < 0 || x < 0 || y >= g.height || x >= g.width)
                    continue;
                if (!g.s) {
                    *rows = (image * g.height + y) * g.width + x;
                } else if (int32_t k = g.slot[(image * down + y / S) * across + x / S]; k >= 0) {
                    *rows = ((image * g.n + k) * S + y % S) * S + x % S;
                }
            }
    }

    static int32_t row_of(const int32_t *window, int y, int x) { return window[(y + MARGIN) * SIDE + x + MARGIN]; }
};

// Call body(kx, o, value) for each tap kx, output o and visible input `value` of a row of a window: L channels from c on.
template <int S, int L, class X, class Body>
inline void over_taps(const X *x, const int32_t *rows, int64_t C, int64_t c, Body &&body) {
#pragma GCC unroll 16
    for (int j = 0; j < S + 2 * MARGIN; j++) {
        if (rows[j] < 0)
            continue;
        Floats<L> value = load<L>(x + rows[j] * C + c);
#pragma GCC unroll 8
        for (int kx = 0; kx < KERNEL; kx++)
            if (int o = j - kx; o >= 0 && o < S)
                body(kx, o, value);
    }
}

// Convolve row y of a tile, L channels from c on: out [S, C].
template <int S, int L, class X>
inline void convolve_row(const X *x, const float *taps, const float *bias, const int32_t *window, int y, int64_t C,
                         int64_t c, float *out) {
    Floats<L> sums[S];
    for (int o = 0; o < S; o++)
        sums[o] = bias ? load<L>(bias + c) : Floats<L>{};
    for (int ky = 0; ky < KERNEL; ky++) {
        const int32_t *rows = window + (y + ky) * Tiles<S>::SIDE;
        const float *tap = taps + ky * KERNEL * C + c;
        over_taps<S, L>(x, rows, C, c, [&](int kx, int o, Floats<L> value) { sums[o] += load<L>(tap + kx * C) * value; });
    }
    for (int o = 0; o < S; o++)
        store<L>(out + o * C + c, sums[o]);
}

struct Norm { // null: none
    const float *weight, *bias;
    float eps;
    void *normed; // saved for backward, as is rstd
    float *rstd;
};

// LayerNorm of one token z [C].
template <class Y> inline void layer_norm(const float *z, const Norm &norm, int64_t C, int64_t row, Y *out) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; c++)
        sum += z[c];
    float mean = sum / C;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++)
        squares += (z[c] - mean) * (z[c] - mean);
    float rstd = 1 / std::sqrt(squares / C + norm.eps);
    norm.rstd[row] = rstd;
    over_channels(0, C, [&](auto L, int64_t c) {
        auto normed = (load<L>(z + c) - mean) * rstd;
        store<L>((Y *)norm.normed + row * C + c, normed);
        store<L>(out + row * C + c, normed * load<L>(norm.weight + c) + load<L>(norm.bias + c));
    });
}

template <int S, class X, class Y>
void convolve(const X *x, const float *taps, const float *bias, const Norm *norm, Y *out, const Geometry &g, int64_t C,
              int threads) {
    Tiles<S> tiles(g);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> tile(S * S * C);
        int32_t window[Tiles<S>::SIDE * Tiles<S>::SIDE];
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < tiles.count; t++) {
            tiles.window(t, window);
            over_channels(0, C, [&](auto L, int64_t c) {
                for (int y = 0; y < S; y++)
                    convolve_row<S, L>(x, taps, bias, window, y, C, c, tile.data() + y * S * C);
            });
            for (int i = 0; i < S * S; i++) {
                int64_t row = Tiles<S>::row_of(window, i / S, i % S);
                const float *z = tile.data() + i * C;
                if (row < 0)
                    continue; // beyond the edge of a dense grid
                if (norm)
                    layer_norm(z, *norm, C, row, out);
                else
                    over_channels(0, C, [&](auto L, int64_t c) { store<L>(out + row * C + c, load<L>(z + c)); });
            }
        }
    }
}

// Gradient of the taps, of `chunks` parts of the tiles: partial [chunks, 49, C].
template <int S, class X>
void grad_taps(const X *x, const float *grad, float *partial, int64_t chunks, const Geometry &g, int64_t C, int threads) {
    constexpr int SIDE = Tiles<S>::SIDE;
    Tiles<S> tiles(g);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float *sums = partial + chunk * KERNEL * KERNEL * C;
        std::fill(sums, sums + KERNEL * KERNEL * C, 0.0f);
        int32_t window[SIDE * SIDE];
        for (int64_t t = chunk * tiles.count / chunks; t < (chunk + 1) * tiles.count / chunks; t++) {
            tiles.window(t, window);
            over_channels(0, C, [&](auto L, int64_t c) {
                for (int ky = 0; ky < KERNEL; ky++) {
                    Floats<L> taps[KERNEL] = {};
                    for (int y = 0; y < S; y++) {
                        const int32_t *rows = window + (y + ky) * SIDE;
                        Floats<L> grads[S];
                        for (int o = 0; o < S; o++) {
                            int64_t row = Tiles<S>::row_of(window, y, o);
                            grads[o] = row < 0 ? Floats<L>{} : load<L>(grad + row * C + c);
                        }
                        over_taps<S, L>(x, rows, C, c,
                                        [&](int kx, int o, Floats<L> value) { taps[kx] += grads[o] * value; });
                    }
                    for (int kx = 0; kx < KERNEL; kx++) {
                        float *sum = sums + (ky * KERNEL + kx) * C + c;
                        store<L>(sum, load<L>(sum) + taps[kx]);
                    }
                }
            });
        }
    }
}

// LayerNorm's backward: gradient of its input [T, C] and, of chunks of rows, of bias, weight and norm bias.
template <class Y>
void norm_backward(const Y *grad, const Y *normed, const float *rstd, const float *weight, float *out, float *partial,
                   int64_t T, int64_t C, int64_t chunks, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float *bias = partial + chunk * 3 * C, *norm_weight = bias + C, *norm_bias = norm_weight + C;
        std::fill(bias, bias + 3 * C, 0.0f);
        for (int64_t t = chunk * T / chunks; t < (chunk + 1) * T / chunks; t++) {
            Floats<WIDEST> wide[2] = {};
            float mean = 0, product = 0;
            over_channels(0, C, [&](auto L, int64_t c) {
                auto g = load<L>(grad + t * C + c), z = load<L>(normed + t * C + c);
                store<L>(norm_weight + c, load<L>(norm_weight + c) + g * z);
                store<L>(norm_bias + c, load<L>(norm_bias + c) + g);
                g *= load<L>(weight + c);
                store<L>(out + t * C + c, g);
                if constexpr (L == WIDEST)
                    wide[0] += g, wide[1] += g * z;
                else
                    for (int i = 0; i < L; i++)
                        mean += g[i], product += g[i] * z[i];
            });
            for (int i = 0; i < WIDEST; i++)
                mean += wide[0][i], product += wide[1][i];
            mean /= C, product /= C;
            over_channels(0, C, [&](auto L, int64_t c) {
                auto g = load<L>(out + t * C + c), z = load<L>(normed + t * C + c);
                g = (g - mean - z * product) * rstd[t];
                store<L>(out + t * C + c, g);
                store<L>(bias + c, load<L>(bias + c) + g);
            });
        }
    }
}

constexpr float INV_SQRT_2PI = 0.39894228f;

// A polynomial, highest coefficient first.
template <int L, class... More> inline Floats<L> horner(Floats<L> x, float first, More... more) {
    Floats<L> sum = Floats<L>{} + first;
    ((sum = sum * x + more), ...);
    return sum;
}

// exp(x) of x <= 0, as 2^k exp(r) with |r| <= log(2) / 2; 0 below -87.
template <int L> inline Floats<L> exp_negative(Floats<L> x) {
    typedef int32_t Ints __attribute__((vector_size(4 * L)));
    x = x < -87.0f ? Floats<L>{} - 87.0f : x;
    Floats<L> k = x * 1.44269504f + 12582912.0f; // rounds to an integer
    Ints power = (Ints)k << 23;
    k -= 12582912.0f;
    Floats<L> r = x - k * 0.693359375f - k * -2.12194440e-4f;
    Floats<L> e = horner<L>(r, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f);
    return (Floats<L>)((Ints)e + power);
}

// GELU is h Phi(h), its slope Phi(h) + h phi(h). Both fits are minimax.
template <int L> struct Gelu {
    Floats<L> cdf, density; // Phi, and phi times sqrt(2 pi)

    // With q = exp(-h^2 / 2) and t = 1 / (1 + .21 |h|): Phi(-|h|) = q P(t), relative error 1.6e-8.
    Gelu(Floats<L> h, float) {
        density = exp_negative<L>(-0.5f * h * h);
        Floats<L> t = 1.0f / (1.0f + 0.21f * (h < 0 ? -h : h));
        Floats<L> tail = density * t * horner<L>(t, -0.07165733f, 0.28359364f, -0.33026418f, 0.34941384f, -0.09393451f,
                                                    0.12487694f, 0.06919101f, 0.08506903f, 0.08371156f);
        cdf = h < 0 ? tail : 1.0f - tail;
    }

    // For bf16, whose own error is 2e-3: Phi(h) = .5 + h P(h^2), absolute error 1.3e-5; constant beyond 4.25.
    Gelu(Floats<L> h, bf16) {
        density = exp_negative<L>(-0.5f * h * h);
        Floats<L> near = h > 4.25f ? Floats<L>{} + 4.25f : h < -4.25f ? Floats<L>{} - 4.25f : h;
        cdf = 0.5f + near * horner<L>(near * near, 5.56489287e-11f, -5.32778399e-9f, 2.25543618e-7f, -5.62644174e-6f,
                                      9.34188326e-5f, -1.1085616e-3f, 9.81597284e-3f, -6.63444932e-2f, 0.398902339f);
    }
};

struct Grn { // models/kernels/gelu_grn.py
    int64_t images, tokens, D, over_batch;
    const float *gamma;
    float eps;
};

constexpr int GROUP = 4;    // vectors of channels at a time: one alone would wait for memory
constexpr int PART = 64;    // tokens of a partial sum: less rounding

// Sums over an image's tokens, N vectors of channels from c on: of a^2, a = gelu(h) (also stored in `out`), to sums [D];
// or, backward, of grad a and of grad, to sums [2, D].
template <bool BACKWARD, int L, int N, class H>
inline void sum_channels(const H *h, const H *grad, H *out, float *sums, int64_t tokens, int64_t D, int64_t c) {
    Floats<L> a_sum[N] = {}, g_sum[N] = {};
    for (int64_t first = 0; first < tokens; first += PART) {
        Floats<L> a_part[N] = {}, g_part[N] = {};
        for (int64_t t = first; t < std::min(first + PART, tokens); t++)
            for (int i = 0; i < N; i++) {
                int64_t at = t * D + c + i * L;
                auto x = load<L>(h + at);
                auto a = x * Gelu<L>(x, H()).cdf;
                if constexpr (BACKWARD) {
                    auto g = load<L>(grad + at);
                    a_part[i] += g * a, g_part[i] += g;
                } else {
                    a_part[i] += a * a;
                    store<L>(out + at, a);
                }
            }
        for (int i = 0; i < N; i++)
            a_sum[i] += a_part[i], g_sum[i] += g_part[i];
    }
    for (int i = 0; i < N; i++) {
        store<L>(sums + c + i * L, a_sum[i]);
        if constexpr (BACKWARD)
            store<L>(sums + D + c + i * L, g_sum[i]);
    }
}

// The sums of all images; called by all threads.
template <bool BACKWARD, class H> void sum_tokens(const Grn &grn, const H *h, const H *grad, H *out, float *sums) {
    constexpr int BLOCK = GROUP * WIDEST;
    int64_t D = grn.D, blocks = (D + BLOCK - 1) / BLOCK;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < grn.images * blocks; task++) {
        int64_t image = task / blocks, c = task % blocks * BLOCK, at = image * grn.tokens * D;
        float *to = sums + image * (BACKWARD ? 2 : 1) * D;
        const H *g = BACKWARD ? grad + at : nullptr;
        H *o = BACKWARD ? nullptr : out + at;
        if (c + BLOCK <= D)
            sum_channels<BACKWARD, WIDEST, GROUP>(h + at, g, o, to, grn.tokens, D, c);
        else
            over_channels(c, D, [&](auto L, int64_t c) { sum_channels<BACKWARD, L, 1>(h + at, g, o, to, grn.tokens, D, c); });
    }
}

// out = gelu(h) (1 + gamma norm / mean) + beta. Saves norm [images, D] and mean [images].
template <class H>
void gelu_grn(const Grn &grn, const H *h, const float *beta, H *out, float *norm, float *mean, int threads) {
    int64_t images = grn.images, tokens = grn.tokens, D = grn.D;
#pragma omp parallel num_threads(threads)
    {
        sum_tokens<false>(grn, h, (const H *)nullptr, out, norm);
        if (grn.over_batch) {
#pragma omp for
            for (int64_t c = 0; c < D; c++) {
                float sum = 0;
                for (int64_t i = 0; i < images; i++)
                    sum += norm[i * D + c];
                for (int64_t i = 0; i < images; i++)
                    norm[i * D + c] = sum;
            }
        }
#pragma omp for
        for (int64_t i = 0; i < images; i++) {
            double sum = 0;
            for (int64_t c = i * D; c < (i + 1) * D; c++)
                sum += norm[c] = std::sqrt(norm[c]);
            mean[i] = sum / D + grn.eps;
        }
#pragma omp for schedule(dynamic, 16)
        for (int64_t t = 0; t < images * tokens; t++) {
            const float *n = norm + t / tokens * D;
            float factor = 1 / mean[t / tokens];
            over_channels(0, D, [&](auto L, int64_t c) {
                auto scale = 1.0f + load<L>(grn.gamma + c) * load<L>(n + c) * factor;
                store<L>(out + t * D + c, load<L>(out + t * D + c) * scale + load<L>(beta + c));
            });
        }
    }
}

// Gradients of h, gamma and beta; scratch: sums [images, 2, D], ratio [images, D].
template <class H>
void gelu_grn_backward(const Grn &grn, const H *h, const H *grad, const float *norm, const float *mean, float *sums,
                       float *ratio, H *out, float *grad_gamma, float *grad_beta, int threads) {
    int64_t images = grn.images, tokens = grn.tokens, D = grn.D;
#pragma omp parallel num_threads(threads)
    {
        sum_tokens<true>(grn, h, grad, (H *)nullptr, sums);
#pragma omp for
        for (int64_t c = 0; c < D; c++) {
            float products = 0;
            grad_gamma[c] = grad_beta[c] = 0;
            for (int64_t i = 0; i < images; i++) {
                grad_gamma[c] += norm[i * D + c] / mean[i] * sums[2 * i * D + c];
                grad_beta[c] += sums[(2 * i + 1) * D + c];
                products += sums[2 * i * D + c];
            }
            if (grn.over_batch) // all images share one norm
                for (int64_t i = 0; i < images; i++)
                    sums[2 * i * D + c] = products;
        }
#pragma omp for
        for (int64_t i = 0; i < images; i++) {
            const float *products = sums + 2 * i * D, *n = norm + i * D;
            double sum = 0;
            for (int64_t c = 0; c < D; c++)
                sum += grn.gamma[c] * products[c] * n[c];
            float shift = sum / D / mean[i] / mean[i];
            for (int64_t c = 0; c < D; c++)
                ratio[i * D + c] = n[c] > 0 ? (grn.gamma[c] * products[c] / mean[i] - shift) / n[c] : 0;
        }
#pragma omp for schedule(dynamic, 16)
        for (int64_t t = 0; t < images * tokens; t++) {
            const float *n = norm + t / tokens * D, *r = ratio + t / tokens * D;
            float factor = 1 / mean[t / tokens];
            over_channels(0, D, [&](auto L, int64_t c) {
                auto x = load<L>(h + t * D + c);
                Gelu<L> gelu(x, H());
                auto scale = 1.0f + load<L>(grn.gamma + c) * load<L>(n + c) * factor;
                auto g = load<L>(grad + t * D + c) * scale + x * gelu.cdf * load<L>(r + c);
                store<L>(out + t * D + c, g * (gelu.cdf + x * INV_SQRT_2PI * gelu.density));
            });
        }
    }
}

#define FOR_SIDE(call)                                                                                                 \
    switch (side) {                                                                                                    \
    case 1: { constexpr int S = 1; call; } break;                                                                      \
    case 2: { constexpr int S = 2; call; } break;                                                                      \
    case 4: { constexpr int S = 4; call; } break;                                                                      \
    case 7: { constexpr int S = 7; call; } break;                                                                      \
    case 8: { constexpr int S = 8; call; } break;                                                                      \
    }

extern "C" {

void depthwise(const void *x, int64_t x_bf16, const float *taps, const float *bias, const Norm *norm, void *out, int64_t out_bf16,
               const Geometry *g, int64_t side, int64_t C, int64_t threads) {
    FOR_SIDE(
        if (x_bf16 && out_bf16) convolve<S>((const bf16 *)x, taps, bias, norm, (bf16 *)out, *g, C, threads);
        else if (x_bf16) convolve<S>((const bf16 *)x, taps, bias, norm, (float *)out, *g, C, threads);
        else if (out_bf16) convolve<S>((const float *)x, taps, bias, norm, (bf16 *)out, *g, C, threads);
        else convolve<S>((const float *)x, taps, bias, norm, (float *)out, *g, C, threads))
}

void depthwise_taps(const void *x, int64_t x_bf16, const float *grad, float *partial, int64_t chunks, const Geometry *g,
                    int64_t side, int64_t C, int64_t threads) {
    FOR_SIDE(
        if (x_bf16) grad_taps<S>((const bf16 *)x, grad, partial, chunks, *g, C, threads);
        else grad_taps<S>((const float *)x, grad, partial, chunks, *g, C, threads))
}

void layer_norm_backward(const void *grad, const void *normed, int64_t is_bf16, const float *rstd, const float *weight,
                         float *out, float *partial, int64_t T, int64_t C, int64_t chunks, int64_t threads) {
    if (is_bf16)
        norm_backward((const bf16 *)grad, (const bf16 *)normed, rstd, weight, out, partial, T, C, chunks, threads);
    else
        norm_backward((const float *)grad, (const float *)normed, rstd, weight, out, partial, T, C, chunks, threads);
}

void gelu_grn_forward(const Grn *grn, const void *h, int64_t is_bf16, const float *beta, void *out, float *norm, float *mean,
                      int64_t threads) {
    if (is_bf16)
        gelu_grn(*grn, (const bf16 *)h, beta, (bf16 *)out, norm, mean, threads);
    else
        gelu_grn(*grn, (const float *)h, beta, (float *)out, norm, mean, threads);
}

void gelu_grn_backward(const Grn *grn, const void *h, const void *grad, int64_t is_bf16, const float *norm, const float *mean,
                       float *sums, float *ratio, void *out, float *grad_gamma, float *grad_beta, int64_t threads) {
    if (is_bf16)
        gelu_grn_backward(*grn, (const bf16 *)h, (const bf16 *)grad, norm, mean, sums, ratio, (bf16 *)out, grad_gamma,
                          grad_beta, threads);
    else
        gelu_grn_backward(*grn, (const float *)h, (const float *)grad, norm, mean, sums, ratio, (float *)out, grad_gamma,
                          grad_beta, threads);
}
}
