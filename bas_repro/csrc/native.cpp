// Gated residual networks on the CPU, computing open channels only; 02e_native.ipynb explains it.
// Plain C++17 with GCC's or Clang's vector types and no torch headers, so that it compiles in seconds.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Kind { INPUT, CONVOLUTION, MAX_POOL, AVERAGE, GATE, SAMPLE, RESIZE };

struct Grid {          // features of an image: lines of pixels, channels innermost, a border of zeros
    int64_t at;        // number in the workspace at which the border begins
    int32_t h, w, c;   // lines, pixels of a line, numbers of a pixel (unused ones included)
    int32_t border;    // pixels on each side
    int64_t line() const { return int64_t(w + 2 * border) * c; }
    int64_t pixel(int i, int j) const { return at + (i + border) * line() + int64_t(j + border) * c; }
};

struct Layer {         // native.Layer of the notebook, field by field
    int32_t kind, k, stride, dilation, pad;
    int32_t inputs, outputs;  // channels
    int32_t ins, outs;        // numbers of the gates that select among them, or -1
    int32_t joined;           // the channels of a window's line are read as one piece
    int32_t relu, scores;     // end with a ReLU; this is the network's output, in float
    int32_t wait;             // all threads wait for each other when it is done
    int32_t hidden;           // of a gating module: its neurons,
    int32_t gates, first;     // its gates (1 or 2) and the channels of the first of them,
    int32_t column;           // where its channels stand among those of all gates
    Grid source, to, plus;    // plus: what is added before the ReLU; c = 0: nothing
    const void* w;
    const float *b, *w2, *b2;
};

struct Call {          // what the images of a batch share
    const Layer* layers;
    int32_t layer_count, images;
    int32_t gate_count, channels;  // gates of the network, and their channels
    int32_t shared;          // whether an image is worth more than one thread
    const float* x;
    int64_t strides[4];      // of x, in numbers: image, channel, line, pixel
    const uint8_t* forced;   // (images, channels), or null: the gating modules decide
    float *scores, *logits;  // (images, scores_size), (images, channels)
    uint8_t* open;           // (images, channels)
    double* spent;           // or null; (layers, 2): milliseconds of thread 0 in all, and in making panels
    char* workspace;         // one for each thread, workspace_size bytes apart
    int64_t workspace_size, scores_size;
};

struct Scratch {       // one a thread, kept from call to call
    std::vector<float> panel, rows, sums;
    std::vector<std::vector<int>> open;  // the open channels of each gate
    static float* need(std::vector<float>& v, int64_t n) {  // room for n floats, from a cache line's start
        if (int64_t(v.size()) < n + 16) v.resize(n + 16);
        return v.data() + (64 - reinterpret_cast<uintptr_t>(v.data()) % 64) % 64 / 4;
    }
};
thread_local Scratch scratch;

struct Parts {         // 0 … n in parts that differ by one at most: 49 in twelves are 10, 10, 10, 10 and 9
    int count, size, larger;  // `larger` parts of size + 1 come first
    Parts(int n, int most) : count((n + most - 1) / most) {
        size = count ? n / count : 0;
        larger = n - count * size;
    }
    int start(int i) const { return i * size + std::min(i, larger); }
};

struct Window {        // of a convolution of one image
    int lines, cells, words;      // lines; pieces of a line that are neighbours in memory; words of a piece
    int64_t line, cell;           // numbers from one to the next
    int taps, in_count, outputs;  // k * k; inputs and outputs that are computed with
    const int *in, *out;          // which, or null: all
    uint32_t bits[512];           // if both are selected, the inputs again, a bit each
    int length() const { return lines * cells * words; }
};

struct Ahead {         // weights that come next, fetched into the second cache while tiles compute
    const char* base;         // of `groups` groups, `group` bytes apart
    int64_t group, step;
    int groups, count;
    const int* list;          // `count` pieces of a group, at list[i] * step; null: one
    int64_t bytes;            // of a piece
    int g = 0, i = 0;
    int64_t at = 0;
    int64_t lines() const { return groups * count * ((bytes + 63) / 64); }
    void fetch(int n) {       // the next n cache lines
        for (; n > 0 && g < groups; n--) {
            __builtin_prefetch(base + g * group + (list ? list[i] * step : 0) + at, 0, 2);
            if ((at += 64) < bytes) continue;
            at = 0;
            if (++i < count) continue;
            i = 0, g++;
        }
    }
};

struct Stopwatch {     // adds to *to, unless that is null, what passes until it goes out of scope
    double* to;
    std::chrono::steady_clock::time_point start;
    explicit Stopwatch(double* to) : to(to) {
        if (to) start = std::chrono::steady_clock::now();
    }
    ~Stopwatch() {
        using ms = std::chrono::duration<double, std::milli>;
        if (to) *to += ms(std::chrono::steady_clock::now() - start).count();
    }
};

inline int up(int n, int to) { return (n + to - 1) / to * to; }

}  // namespace

// clang has another pragma for the instructions that a part of a file may use
#ifdef __clang__
#define DO(text) _Pragma(#text)
#define BEGIN(names) DO(clang attribute push(__attribute__((target(names))), apply_to = function))
#define END DO(clang attribute pop)
#else
#define DO(text) _Pragma(#text)
#define BEGIN(names) DO(GCC push_options) DO(GCC target(names))
#define END DO(GCC pop_options)
#endif

#define NAME plain
#define LANES 4
#define PIXELS 6
#include "tiles.h"
#undef NAME
#undef LANES

#ifdef __x86_64__
BEGIN("avx2,fma")
#define NAME avx2
#define LANES 8
#include "tiles.h"
#undef NAME
#undef LANES
#undef PIXELS
END
BEGIN("avx512f,avx2,fma")
#define NAME avx512
#define LANES 16
#define PIXELS 12
#include "tiles.h"
#undef NAME
END
BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2,avx2,fma")
#define NAME bf16
#define BF16
#include "tiles.h"
#undef NAME
#undef PIXELS
END
#include "amx.h"
BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2,avx2,fma" AMX_NAMES)
#define NAME amx
#define AMX
#define PIXELS 32
#include "tiles.h"
END
#endif

extern "C" {

int bas_lanes() {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

int bas_bf16() {
#ifdef __x86_64__
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

int bas_amx() {
#ifdef __x86_64__
    return bas_bf16() && has_amx();
#else
    return 0;
#endif
}

// unit: 0 float, 1 bfloat16, 2 bfloat16 with AMX. Gives the first image that is not finite, or -1.
// Images go to one thread each; those that are left when every thread has had as many are shared by all, if they
// are worth it.
int bas_run(int lanes, int unit, int threads, const Call* call) {
    auto run = plain::run;
#ifdef __x86_64__
    if (lanes == 8) run = avx2::run;
    if (lanes == 16) run = unit == 2 ? amx::run : unit ? bf16::run : avx512::run;
#endif
    int bad = call->images;
    if (!call->shared) threads = std::max(1, std::min(threads, call->images));
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : bad)
    {
        int thread = 0, count = 1;
#ifdef _OPENMP
        if (threads > 1) thread = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        const int whole = call->shared ? call->images / count * count : call->images;
        for (int i = thread; i < whole; i += count)
            if (!run(*call, i, thread, 0, 1)) bad = std::min(bad, i);
#pragma omp barrier
        for (int i = whole; i < call->images; i++)
            if (!run(*call, i, 0, thread, count)) bad = std::min(bad, i);
    }
    return bad == call->images ? -1 : bad;
}

}  // extern "C"
