// Gated residual blocks in float32 on the CPU, computing open channels only; 02e_native.ipynb explains it.
// Plain C++17 with GCC's or Clang's vector types: no torch headers, so that it compiles in seconds. Images are N, H, W, C.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Rows {  // relu(convolution + bias), selected output channels only
    const float* x;     // padded image
    const int* x_at;    // where in x an output pixel's window starts
    long line;          // floats in a line of x
    int k, channels;    // kernel size; input channels, a multiple of the lanes
    const float *w, *bias;  // (outputs, k, k, channels), (outputs)
    const int* open;    // the selected output channels
    int open_count;
    float* y;           // compact features
    const int* y_at;    // where in y an output pixel is
};

struct Columns {  // convolution over a list of input channels, with bias, residual and ReLU
    const float* x;     // padded compact image
    const int* x_at;
    long line;
    int k, length;      // kernel size; window line: k * (listed channels)
    const float* w;     // (blocks, k, k, channels, block)
    const int* w_at;    // (k, length), growing: where in a block of w the weights of a window's features stand
    long w_block;       // floats in a block of w
    const float* bias;  // padded to whole blocks
    int outputs;
    const float* residual;  // (pixels, outputs) or null
    bool relu;
    float* y;
    const int* y_at;
};

struct Scratch {  // one a thread, kept from call to call
    std::vector<float> padded, first, second, panel, side_by_side;
    std::vector<int> in, mid, out, open, open2, list;
    static float* need(std::vector<float>& v, long n) {  // room for n floats, from the start of a cache line
        if (long(v.size()) < n + 16) v.resize(n + 16);
        return v.data() + (64 - reinterpret_cast<uintptr_t>(v.data()) % 64) % 64 / 4;
    }
};
thread_local Scratch scratch;

}  // namespace

#define NAME plain
#define LANES 4
#define ROW_PIXELS 3
#define COLUMN_PIXELS 6
#include "tiles.h"
#undef NAME
#undef LANES

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define NAME avx2
#define LANES 8
#include "tiles.h"
#undef NAME
#undef LANES
#undef ROW_PIXELS
#undef COLUMN_PIXELS
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif
#define NAME avx512
#define LANES 16
#define ROW_PIXELS 6
#define COLUMN_PIXELS 14
#include "tiles.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

void rows(int lanes, const Rows& s, int from, int to) {
#ifdef __x86_64__
    if (lanes == 16) return avx512::rows(s, from, to);
    if (lanes == 8) return avx2::rows(s, from, to);
#endif
    plain::rows(s, from, to);
}

void columns(int lanes, const Columns& s, int from, int to, int block, int last) {
#ifdef __x86_64__
    if (lanes == 16) return avx512::columns(s, from, to, block, last);
    if (lanes == 8) return avx2::columns(s, from, to, block, last);
#endif
    plain::columns(s, from, to, block, last);
}

int up(int n, int to) { return (n + to - 1) / to * to; }

// f(from, to) over parts of 0 … n, one a thread
template <typename F> void split(int threads, int n, F f) {
    threads = std::max(1, std::min(threads, n));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) f(int(long(n) * t / threads), int(long(n) * (t + 1) / threads));
}

struct Image {  // lines of pixels with a border of zeros
    int h, w, c, pad;
    long line() const { return long(w + 2 * pad) * c; }
    long size() const { return line() * (h + 2 * pad); }
};

void clear_border(const Image& m, float* x) {
    if (!m.pad) return;
    const long side = long(m.pad) * m.c;
    std::memset(x, 0, m.pad * m.line() * 4);
    for (int i = m.pad; i < m.pad + m.h; i++) {
        std::memset(x + i * m.line(), 0, side * 4);
        std::memset(x + (i + 1) * m.line() - side, 0, side * 4);
    }
    std::memset(x + (m.pad + m.h) * m.line(), 0, m.pad * m.line() * 4);
}

// x (h, w, c) inside a border, its channels filled up with zeros to m.c
void copy_padded(const Image& m, const float* x, int c, float* y) {
    clear_border(m, y);
    for (int i = 0; i < m.h; i++) {
        float* to = y + (i + m.pad) * m.line() + m.pad * m.c;
        const float* from = x + long(i) * m.w * c;
        if (c == m.c) std::memcpy(to, from, long(m.w) * c * 4);
        else for (int j = 0; j < m.w; j++, to += m.c, from += c) {
            std::memcpy(to, from, c * 4);
            std::memset(to + c, 0, (m.c - c) * 4);
        }
    }
}

// the windows' places in a padded image, for every output pixel
void windows(const Image& m, int h, int w, int stride, std::vector<int>& at) {
    at.resize(h * w);
    for (int i = 0; i < h; i++)
        for (int j = 0; j < w; j++) at[i * w + j] = int(i * stride * m.line() + long(j) * stride * m.c);
}

void pixels(const Image& m, std::vector<int>& at) {  // the places of the pixels themselves
    windows(m, m.h, m.w, 1, at);
    for (int& a : at) a += int(m.pad * m.line() + m.pad * m.c);
}

void list_open(const uint8_t* mask, int n, std::vector<int>& open) {
    open.clear();
    for (int i = 0; i < n; i++) if (mask[i]) open.push_back(i);
}

// where in a block of weights (k, k, channels, block) the listed channels of a window stand
void list_weights(int k, int channels, int block, const std::vector<int>& open, std::vector<int>& at) {
    at.clear();
    for (int tap = 0; tap < k * k; tap++) for (int c : open) at.push_back((tap * channels + c) * block);
}

void run_rows(int lanes, int threads, Rows& s, int pixels) {
    if (pixels >= 64 * threads) return split(threads, pixels, [&](int from, int to) { rows(lanes, s, from, to); });
    split(threads, (s.open_count + 3) / 4, [&](int from, int to) {
        Rows part = s;
        part.open += 4 * from, part.open_count = std::min(4 * to, s.open_count) - 4 * from, part.y += 4 * from;
        rows(lanes, part, 0, pixels);
    });
}

void run_columns(int lanes, int threads, const Columns& s, int pixels) {
    const int blocks = up(s.outputs, 2 * lanes) / (2 * lanes);
    if (pixels >= 64 * threads) return split(threads, pixels, [&](int from, int to) { columns(lanes, s, from, to, 0, blocks); });
    split(threads, blocks, [&](int from, int to) { columns(lanes, s, 0, pixels, from, to); });
}

// the panel of a convolution of which inputs and outputs are selected: (blocks, k * k, open inputs, block)
void pack_panel(int k, int c, int o, int block, const std::vector<int>& in, const std::vector<int>& out, const float* w,
                const float* bias, float* panel, float* panel_bias) {
    for (size_t b = 0; b < out.size(); b += block) {
        const int n = int(std::min(out.size() - b, size_t(block)));
        for (int tap = 0; tap < k * k; tap++)
            for (int i : in) {
                const float* row = w + (long(tap) * c + i) * o;
                for (int j = 0; j < n; j++) panel[j] = row[out[b + j]];
                for (int j = n; j < block; j++) panel[j] = 0;
                panel += block;
            }
        for (int j = 0; j < block; j++) panel_bias[b + j] = j < n ? bias[out[b + j]] : 0;
    }
}

// images over threads; within an image the threads that are left
template <typename F> void over_images(int threads, int n, F f) {
    if (n == 1) return f(0, threads);
    split(threads, n, [&](int from, int to) { for (int i = from; i < to; i++) f(i, 1); });
}

}  // namespace

extern "C" {

int bas_lanes() {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

// dense convolution; w (blocks, k, k, c, 2 * lanes)
void bas_conv(int lanes, int threads, int n, int h, int w, int c, int o, int k, int stride, int pad, int relu,
              const float* x, const float* weights, const float* bias, const float* residual, float* y) {
    const int ho = (h + 2 * pad - k) / stride + 1, wo = (w + 2 * pad - k) / stride + 1;
    over_images(threads, n, [&](int image, int inner) {
        Scratch& t = scratch;
        const Image in{h, w, c, pad}, out{ho, wo, o, 0};
        const float* from = x + long(image) * h * w * c;
        float* padded = pad ? Scratch::need(t.padded, in.size()) : nullptr;
        if (pad) copy_padded(in, from, c, padded);
        windows(in, ho, wo, stride, t.in), pixels(out, t.out);
        t.list.resize(k * k * c);
        for (size_t i = 0; i < t.list.size(); i++) t.list[i] = int(i) * 2 * lanes;
        Columns s{pad ? padded : from, t.in.data(), in.line(), k, k * c, weights, t.list.data(), long(k) * k * c * 2 * lanes, bias, o,
                  residual ? residual + image * out.size() : nullptr, bool(relu), y + image * out.size(), t.out.data()};
        run_columns(lanes, inner, s, ho * wo);
    });
}

// relu(second(mask * relu(first(x))) + residual); first (m, k, k, c up to lanes), second (blocks, k, k, m, 2 * lanes)
void bas_basic(int lanes, int threads, int n, int h, int w, int c, int m, int o, int k, int stride, const uint8_t* mask,
               const float* x, const float* w1, const float* b1, const float* w2, const float* b2, const float* residual, float* y) {
    const int pad = k / 2, ho = (h + 2 * pad - k) / stride + 1, wo = (w + 2 * pad - k) / stride + 1;
    over_images(threads, n, [&](int image, int inner) {
        Scratch& t = scratch;
        list_open(mask + long(image) * m, m, t.open);
        const int open = int(t.open.size());
        const Image in{h, w, up(c, lanes), pad}, mid{ho, wo, open, pad}, out{ho, wo, o, 0};
        const float* from = x + long(image) * h * w * c;
        const bool as_is = !pad && in.c == c;
        float *padded = Scratch::need(t.padded, in.size()), *first = Scratch::need(t.first, mid.size());
        if (!as_is && open) copy_padded(in, from, c, padded);
        clear_border(mid, first);
        windows(in, ho, wo, stride, t.in), pixels(mid, t.out);
        Rows a{as_is ? from : padded, t.in.data(), in.line(), k, in.c, w1, b1, t.open.data(), open, first, t.out.data()};
        run_rows(lanes, inner, a, ho * wo);
        windows(mid, ho, wo, 1, t.mid), pixels(out, t.out);
        list_weights(k, m, 2 * lanes, t.open, t.list);
        Columns b{first, t.mid.data(), mid.line(), k, k * open, w2, t.list.data(), long(k) * k * m * 2 * lanes, b2, o,
                  residual + image * out.size(), true, y + image * out.size(), t.out.data()};
        run_columns(lanes, inner, b, ho * wo);
    });
}

// relu(third(mask2 * relu(second(mask1 * relu(first(x))))) + residual), 1x1, k x k, 1x1;
// first (m1, c up to lanes), second (k, k, m1, m2), third (blocks, m2, 2 * lanes)
void bas_bottleneck(int lanes, int threads, int n, int h, int w, int c, int m1, int m2, int o, int k, int stride,
                    const uint8_t* mask1, const uint8_t* mask2, const float* x, const float* w1, const float* b1, const float* w2,
                    const float* b2, const float* w3, const float* b3, const float* residual, float* y) {
    const int pad = k / 2, ho = (h + 2 * pad - k) / stride + 1, wo = (w + 2 * pad - k) / stride + 1, block = 2 * lanes;
    over_images(threads, n, [&](int image, int inner) {
        Scratch& t = scratch;
        list_open(mask1 + long(image) * m1, m1, t.open), list_open(mask2 + long(image) * m2, m2, t.open2);
        const int open1 = int(t.open.size()), open2 = int(t.open2.size());
        const Image in{h, w, up(c, lanes), 0}, one{h, w, open1, pad}, two{ho, wo, open2, 0}, out{ho, wo, o, 0};
        const float* from = x + long(image) * h * w * c;
        float *first = Scratch::need(t.first, one.size()), *second = Scratch::need(t.second, two.size());
        if (open2) {  // nothing of the first two convolutions is used otherwise
            float* padded = in.c == c ? nullptr : Scratch::need(t.padded, in.size());
            if (padded) copy_padded(in, from, c, padded);
            clear_border(one, first);
            windows(in, h, w, 1, t.in), pixels(one, t.out);
            Rows a{padded ? padded : from, t.in.data(), in.line(), 1, in.c, w1, b1, t.open.data(), open1, first, t.out.data()};
            run_rows(lanes, inner, a, h * w);
            const long size = long(k) * k * open1 * block;
            const int blocks = up(open2, block) / block;
            float* panel = Scratch::need(t.panel, size * blocks + blocks * block);
            pack_panel(k, m1, m2, block, t.open, t.open2, w2, b2, panel, panel + size * blocks);
            t.list.resize(k * k * open1);
            for (size_t i = 0; i < t.list.size(); i++) t.list[i] = int(i) * block;
            windows(one, ho, wo, stride, t.mid), pixels(two, t.out);
            Columns b{first, t.mid.data(), one.line(), k, k * open1, panel, t.list.data(), size, panel + size * blocks, open2,
                      nullptr, true, second, t.out.data()};
            run_columns(lanes, inner, b, ho * wo);
        }
        windows(two, ho, wo, 1, t.in), pixels(out, t.out);
        list_weights(1, m2, block, t.open2, t.list);
        Columns d{second, t.in.data(), two.line(), 1, open2, w3, t.list.data(), long(m2) * block, b3, o,
                  residual + image * out.size(), true, y + image * out.size(), t.out.data()};
        run_columns(lanes, inner, d, ho * wo);
    });
}

}  // extern "C"
