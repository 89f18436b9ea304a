// What depends on the processor: vectors of LANES floats, tiles of at most PIXELS pixels, features in float or,
// with BF16, in bfloat16; with AMX, tiles of another kind. native.cpp includes this file once for each set of
// instructions. A word is what a lane multiplies in a step: a float, or two neighbouring channels in bfloat16.
namespace NAME {

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
constexpr int BLOCK = 2 * LANES;  // outputs of a tile

inline Vec load(const float* p) { return *(const Vec*)p; }
inline void store(float* p, Vec v) { *(Vec*)p = v; }
inline Vec relu(Vec v) { return v < 0 ? Vec{} : v; }  // NaN stays

#ifdef BF16
typedef uint16_t Value;
constexpr int PAIR = 2;  // values of a word
inline Vec read(const Value* p) {
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline void write(Value* p, Vec v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
inline Vec add_products(Vec sum, Vec words, const Value* word) {
    int32_t w;
    std::memcpy(&w, word, 4);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)words, (__m512bh)_mm512_set1_epi32(w));
}
#else
typedef float Value;
constexpr int PAIR = 1;
inline Vec read(const Value* p) { return load(p); }
inline void write(Value* p, Vec v) { store(p, v); }
inline Vec add_products(Vec sum, Vec words, const Value* word) { return sum + words * (*word - Vec{}); }
#endif

struct Run {  // one image on one of the threads that share it
    const Call& call;
    int image, thread, threads;
    Value* memory;
    int from(int n) const { return int(int64_t(n) * thread / threads); }  // this thread's part of 0 … n
    int to(int n) const { return int(int64_t(n) * (thread + 1) / threads); }
    double* spent(const Layer& l, int what) const {  // 0: in all; 1: in making panels
        return call.spent && thread == 0 ? call.spent + 2 * (&l - call.layers) + what : nullptr;
    }
};

// ---- panels: the weights of a block of outputs, (words of a window, vectors of outputs) -------------------

template <int... I> inline Vec zip(Vec a, Vec b, bool high, std::integer_sequence<int, I...>) {
    return high ? __builtin_shufflevector(a, b, (LANES / 2 + I / 2 + I % 2 * LANES)...)
                : __builtin_shufflevector(a, b, (I / 2 + I % 2 * LANES)...);
}

// LANES rows of words, from word `at` on, become columns
inline __attribute__((always_inline)) void turn(const float* const* rows, int64_t at, float* to, int step) {
    constexpr auto all = std::make_integer_sequence<int, LANES>();
    Vec a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) a[i] = load(rows[i] + at);
    for (int n = 1; n < LANES; n *= 2) {  // each round interleaves the first half of the rows with the second
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = zip(a[i], a[i + LANES / 2], false, all);
            b[2 * i + 1] = zip(a[i], a[i + LANES / 2], true, all);
        }
        for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
    for (int i = 0; i < LANES; i++) store(to + i * step, a[i]);
}

// selected outputs: their rows
void pack_rows(const float* const* rows, int length, int vectors, float* panel) {
    const int step = vectors * LANES;
    for (int v = 0; v < vectors; v++)
        for (int q = 0; q < length; q += LANES)
            turn(rows + v * LANES, q, panel + int64_t(q) * step + v * LANES, step);
}

// selected inputs: w (taps, inputs, BLOCK)
void pack_columns(const Value* w, const Window& s, int inputs, int vectors, float* panel) {
    for (int tap = 0; tap < s.taps; tap++, w += int64_t(inputs) * BLOCK)
        for (int i = 0; i < s.in_count; i += PAIR, panel += vectors * LANES) {
#ifdef BF16  // a row of w is in an order that makes the interleaved halves the outputs 0 … 15 and 16 … 31
            const bool last = i + 1 == s.in_count;
            const __m512i a = _mm512_loadu_si512(w + s.in[i] * BLOCK);
            const __m512i b = last ? _mm512_setzero_si512() : _mm512_loadu_si512(w + s.in[i + 1] * BLOCK);
            _mm512_storeu_si512(panel, _mm512_unpacklo_epi16(a, b));
            if (vectors == 2) _mm512_storeu_si512(panel + LANES, _mm512_unpackhi_epi16(a, b));
#else
            for (int v = 0; v < vectors; v++) store(panel + v * LANES, load(w + s.in[i] * BLOCK + v * LANES));
#endif
        }
}

// selected inputs of a row (taps, inputs): (taps, words); may write a vector past its end
void pick_inputs(const Value* row, const Window& s, int inputs, Value* to) {
    for (int tap = 0; tap < s.taps; tap++, row += inputs, to += s.words * PAIR) {
#ifdef BF16
        Value* next = to;
        for (int c = 0; c < inputs; c += 32) {
            const uint32_t bits = s.bits[c / 32];
            const __m512i values = _mm512_maskz_loadu_epi16(bits, row + c);
            _mm512_storeu_si512(next, _mm512_maskz_compress_epi16(bits, values));
            next += __builtin_popcount(bits);
        }
#else
        for (int i = 0; i < s.in_count; i++) to[i] = row[s.in[i]];
#endif
        if (s.in_count % PAIR) to[s.in_count] = 0;
    }
}

// The weights of a layer stand as the selection wants them, inputs filled up to words:
// none (blocks, words of a window, BLOCK); inputs (blocks, taps, inputs, BLOCK); outputs, both (outputs, row)
int64_t row_size(const Layer& l) { return up(l.k * l.k * up(l.inputs, PAIR), PAIR * LANES); }

const Value* block_of(const Layer& l, const Window& s, int block) {  // where nothing or inputs are selected
    const int64_t numbers = s.in ? s.taps * up(l.inputs, PAIR) : s.length() * PAIR;
    return (const Value*)l.w + block * numbers * BLOCK;
}

// A panel is followed by LANES rows of zeros, or of other panels.
const float* panel_of(const Run& r, const Layer& l, const Window& s, int block) {
    const Stopwatch watch(r.spent(l, 1));
    const int vectors = s.outputs - block * BLOCK > LANES ? 2 : 1;
    if (!s.in && !s.out) return (const float*)block_of(l, s, block);
    const int length = s.length(), full = up(length, LANES);
    float* panel = Scratch::need(scratch.panel, int64_t(full + LANES) * BLOCK);
    float* end = panel + int64_t(length) * vectors * LANES;
    if (!s.out) {
        pack_columns(block_of(l, s, block), s, up(l.inputs, PAIR), vectors, panel);
        std::fill(end, end + LANES * vectors * LANES, 0.f);
        return panel;
    }
    float* picked = s.in ? Scratch::need(scratch.rows, int64_t(full) * BLOCK + LANES) : nullptr;
    const float* rows[BLOCK];
    for (int i = 0; i < vectors * LANES; i++) {  // past the last output, the last one again
        const int output = s.out[std::min(block * BLOCK + i, s.outputs - 1)];
        const Value* row = (const Value*)l.w + output * row_size(l);
        if (s.in) pick_inputs(row, s, up(l.inputs, PAIR), (Value*)(picked + int64_t(i) * full));
        rows[i] = s.in ? picked + int64_t(i) * full : (const float*)row;
    }
    pack_rows(rows, length, vectors, panel);
    std::fill(end, end + LANES * vectors * LANES, 0.f);
    return panel;
}

// what panel_of will read
Ahead ahead_of(const Layer& l, const Window& s, int block) {
    constexpr int64_t value = sizeof(Value);
    const int64_t row = row_size(l) * value, piece = BLOCK * value;
    const int left = std::min(BLOCK, s.outputs - block * BLOCK);
    if (s.out) return {(const char*)l.w, 0, row, 1, left, s.out + block * BLOCK, row};
    const char* w = (const char*)block_of(l, s, block);
    if (s.in) return {w, up(l.inputs, PAIR) * piece, piece, s.taps, s.in_count, s.in, piece};
    return {w, 0, 0, 1, 1, nullptr, int64_t(s.length()) * BLOCK * 4};
}

// ---- convolution ------------------------------------------------------------------------------------------

#ifdef AMX
// Two tiles of 16 pixels and two of 16 outputs, four of sums; sums (pixels, vectors * LANES). Pixels are
// gathered, 16 words of each at a time; where a piece of a window ends, zeros meet the weights of the next.
void tile(int pixels, int vectors, const Window& s, const Value* x, const int64_t* at, const float* panel,
          const float* bias, float* sums, Ahead& ahead, int lines) {
    alignas(64) int32_t words[PIXELS][LANES] = {};
    const int step = vectors * LANES, stride = step * 4;
    const bool right = vectors == 2, below = pixels > LANES;
    for (int p = 0; p < PIXELS; p++) std::memcpy(sums + p * step, bias, stride);
    LOAD_TILE(0, sums, stride);
    LOAD_TILE(1, sums + (right ? LANES : 0), stride);
    LOAD_TILE(2, sums + LANES * step, stride);
    LOAD_TILE(3, sums + LANES * step + (right ? LANES : 0), stride);
    for (int l = 0; l < s.lines; l++)
        for (int c = 0; c < s.cells; c++, panel += s.words * step)
            for (int i = 0; i < s.words; i += LANES) {
                const __mmask16 some = s.words - i < LANES ? (1 << (s.words - i)) - 1 : 0xffff;
                const Value* from = x + l * s.line + c * s.cell + i * PAIR;
                ahead.fetch(lines);
                for (int p = 0; p < pixels; p++)
                    _mm512_store_si512(words[p], _mm512_maskz_loadu_epi32(some, from + at[p]));
                LOAD_TILE(4, words[0], LANES * 4);
                LOAD_TILE(5, words[LANES], LANES * 4);
                LOAD_TILE(6, panel + i * step, stride);
                LOAD_TILE(7, panel + i * step + (right ? LANES : 0), stride);
                ADD_PRODUCTS(0, 4, 6);
                if (right) ADD_PRODUCTS(1, 4, 7);
                if (below) ADD_PRODUCTS(2, 5, 6);
                if (below && right) ADD_PRODUCTS(3, 5, 7);
            }
    if (right) STORE_TILE(1, sums + LANES, stride);
    STORE_TILE(0, sums, stride);
    if (below && right) STORE_TILE(3, sums + LANES * step + LANES, stride);
    if (below) STORE_TILE(2, sums + LANES * step, stride);
}
#else
// P pixels and V vectors of outputs; sums (P, V * LANES)
template <int P, int V>
inline __attribute__((always_inline)) void sum_tile(const Window& s, const Value* x, const int64_t* at,
                                                    const float* panel, const float* bias, float* sums,
                                                    Ahead& ahead, int lines) {
    Vec a[P][V];
    for (int p = 0; p < P; p++)
        for (int v = 0; v < V; v++) a[p][v] = load(bias + v * LANES);
    for (int l = 0; l < s.lines; l++)
        for (int c = 0; c < s.cells; c++) {
            const Value* from = x + l * s.line + c * s.cell;
            for (int i = 0; i < s.words;) {
                ahead.fetch(lines);
                const int end = std::min(i + 16, s.words);
                for (; i < end; i++, panel += V * LANES, from += PAIR) {
                    Vec w[V];
                    for (int v = 0; v < V; v++) w[v] = load(panel + v * LANES);
                    for (int p = 0; p < P; p++)
                        for (int v = 0; v < V; v++) a[p][v] = add_products(a[p][v], w[v], from + at[p]);
                }
            }
        }
    for (int p = 0; p < P; p++)
        for (int v = 0; v < V; v++) store(sums + (p * V + v) * LANES, a[p][v]);
}

template <int P, int V, typename... A> inline __attribute__((always_inline)) void pick(int p, A&&... args) {
    if (p == P) sum_tile<P, V>(args...);
    else if constexpr (P > 1) pick<P - 1, V>(p, args...);
}

void tile(int pixels, int vectors, const Window& s, const Value* x, const int64_t* at, const float* panel,
          const float* bias, float* sums, Ahead& ahead, int lines) {
    if (vectors == 2) pick<PIXELS, 2>(pixels, s, x, at, panel, bias, sums, ahead, lines);
    else pick<PIXELS, 1>(pixels, s, x, at, panel, bias, sums, ahead, lines);
}
#endif

void window_of(const Layer& l, Window& s) {
    s.in = l.ins < 0 ? nullptr : scratch.open[l.ins].data();
    s.out = l.outs < 0 ? nullptr : scratch.open[l.outs].data();
    s.in_count = s.in ? int(scratch.open[l.ins].size()) : l.inputs;
    s.outputs = s.out ? int(scratch.open[l.outs].size()) : l.outputs;
    s.lines = l.k, s.cells = l.joined ? 1 : l.k, s.taps = l.k * l.k;
    s.words = up(l.joined ? l.k * s.in_count : s.in_count, PAIR) / PAIR;
    s.line = l.source.line() * l.dilation, s.cell = int64_t(l.source.c) * l.dilation;
    if (!s.in || !s.out) return;
    std::memset(s.bits, 0, sizeof s.bits);
    for (int i = 0; i < s.in_count; i++) s.bits[s.in[i] / 32] |= 1u << s.in[i] % 32;
}

// what is left to do with the sums of one pixel
inline void finish(const Run& r, const Layer& l, float* sums, int64_t to, int64_t plus, int vectors) {
    for (int v = 0; v < vectors; v++, to += LANES, plus += LANES) {
        Vec y = load(sums + v * LANES);
        if (l.plus.c) y += read(r.memory + plus);
        if (l.relu) y = relu(y);
        if (l.scores) store(r.call.scores + r.image * r.call.scores_size + to, y);
        else write(r.memory + to, y);
    }
}

struct Pixel {  // walks over the pixels of the output
    int i, j, w;
    Pixel(int p, int w) : i(p / w), j(p % w), w(w) {}
    void next() {
        if (++j == w) j = 0, i++;
    }
};

void one_tile(const Run& r, const Layer& l, const Window& s, int block, int from, int n, const float* panel,
              const float* bias, Ahead& ahead, int lines) {
    const int vectors = s.outputs - block * BLOCK > LANES ? 2 : 1;
    const Value* x = r.memory + l.source.pixel(-l.pad, -l.pad);
    int64_t at[PIXELS];
    float sums[PIXELS * BLOCK];
    Pixel pixel(from, l.to.w);
    for (int p = 0; p < n; p++, pixel.next())
        at[p] = l.stride * (pixel.i * l.source.line() + int64_t(pixel.j) * l.source.c);
    tile(n, vectors, s, x, at, panel, bias, sums, ahead, lines);
    pixel = Pixel(from, l.to.w);
    for (int p = 0; p < n; p++, pixel.next()) {
        const int64_t to = l.to.pixel(pixel.i, pixel.j), plus = l.plus.pixel(pixel.i, pixel.j);
        finish(r, l, sums + p * vectors * LANES, to + block * BLOCK, plus + block * BLOCK, vectors);
    }
}

// Work is counted in units of a tile, block after block. Threads share the tiles where features weigh more, so
// that each finds in its own cache what it wrote before; else the blocks (4: measured, two threads on Zen 5).
void convolution(const Run& r, const Layer& l) {
    Window s;
    window_of(l, s);
    const Parts tiles(l.to.h * l.to.w, PIXELS);
    const bool by_tiles = 4 * l.to.h * l.to.w >= s.taps * s.outputs;
    const int first = by_tiles ? r.from(tiles.count) : 0;
    const int count = (by_tiles ? r.to(tiles.count) : tiles.count) - first;
    const int units = up(s.outputs, BLOCK) / BLOCK * count, last = by_tiles ? units : r.to(units);
    for (int unit = by_tiles ? 0 : r.from(units); unit < last;) {
        const int block = unit / count, end = std::min(last, (block + 1) * count);
        const float* panel = panel_of(r, l, s, block);
        float bias[BLOCK] = {};
        for (int i = 0; i < std::min(BLOCK, s.outputs - block * BLOCK); i++)
            bias[i] = l.b[s.out ? s.out[block * BLOCK + i] : block * BLOCK + i];
        Ahead ahead{};
        if (end < last) ahead = ahead_of(l, s, block + 1);
        const int lines = int(ahead.lines() / ((s.length() / 16 + 1) * count) + 1);  // each time it is asked
        for (; unit < end; unit++) {
            const int t = first + unit % count, from = tiles.start(t);
            one_tile(r, l, s, block, from, tiles.start(t + 1) - from, panel, bias, ahead, lines);
        }
    }
}

// ---- other layers -----------------------------------------------------------------------------------------

bool input(const Run& r, const Layer& l) {  // false: not finite
    const int64_t* s = r.call.strides;
    const int n = l.to.w * l.outputs;
    float* line = Scratch::need(scratch.sums, up(n, LANES));
    std::fill(line, line + up(n, LANES), 0.f);
    Vec check = {};
    for (int i = r.from(l.to.h); i < r.to(l.to.h); i++) {
        for (int c = 0; c < l.outputs; c++) {
            const float* x = r.call.x + r.image * s[0] + c * s[1] + i * s[2];
            for (int j = 0; j < l.to.w; j++) line[j * l.outputs + c] = x[j * s[3]];
        }
        for (int j = 0; j < n; j += LANES) {
            check += load(line + j) * 0;
            Value values[LANES];
            write(values, load(line + j));
            std::memcpy(r.memory + l.to.pixel(i, 0) + j, values, std::min(LANES, n - j) * sizeof(Value));
        }
    }
    for (int j = 0; j < LANES; j++)
        if (check[j] != 0) return false;
    return true;
}

void max_pool(const Run& r, const Layer& l) {
    for (int i = r.from(l.to.h); i < r.to(l.to.h); i++)
        for (int j = 0; j < l.to.w; j++) {
            const int top = i * l.stride - l.pad, left = j * l.stride - l.pad;
            const int bottom = std::min(top + l.k, l.source.h), right = std::min(left + l.k, l.source.w);
            for (int c = 0; c < l.outputs; c += LANES) {
                Vec most = -INFINITY - Vec{};
                for (int a = std::max(top, 0); a < bottom; a++)
                    for (int b = std::max(left, 0); b < right; b++) {
                        const Vec v = read(r.memory + l.source.pixel(a, b) + c);
                        most = v > most ? v : most;
                    }
                write(r.memory + l.to.pixel(i, j) + c, most);
            }
        }
}

// the means of lines top … bottom and pixels left … right
void means(const Run& r, const Layer& l, int top, int bottom, int left, int right, float* to) {
    constexpr int MANY = 4;  // vectors of a pixel that are read together
    for (int c = 0; c < l.inputs; c += MANY * LANES) {
        const int n = std::min(MANY, (l.inputs - c + LANES - 1) / LANES);
        Vec a[MANY] = {};
        for (int i = top; i < bottom; i++)
            for (int j = left; j < right; j++)
                for (int v = 0; v < n; v++) a[v] += read(r.memory + l.source.pixel(i, j) + c + v * LANES);
        for (int v = 0; v < n; v++) store(to + c + v * LANES, a[v] / float((bottom - top) * (right - left)));
    }
}

void average(const Run& r, const Layer& l) {  // torch's adaptive average pool
    const Grid &g = l.source, &out = l.to;
    float* mean = Scratch::need(scratch.sums, up(l.inputs, LANES));
    for (int p = r.from(out.h * out.w); p < r.to(out.h * out.w); p++) {
        const int i = p / out.w, j = p % out.w;
        const int bottom = ((i + 1) * g.h + out.h - 1) / out.h, right = ((j + 1) * g.w + out.w - 1) / out.w;
        means(r, l, i * g.h / out.h, bottom, j * g.w / out.w, right, mean);
        for (int c = 0; c < l.inputs; c += LANES) write(r.memory + out.pixel(i, j) + c, load(mean + c));
    }
}

// y = w^T x + b with w (inputs, outputs filled up to vectors)
void linear(const float* w, const float* b, const float* x, int inputs, int outputs, float* y) {
    for (int o = 0; o < up(outputs, LANES); o += LANES) {
        Vec a = load(b + o);
        for (int i = 0; i < inputs; i++) a += x[i] * load(w + i * up(outputs, LANES) + o);
        store(y + o, a);
    }
}

// A gating module, in float. Every thread decides for itself, which is sooner done than waiting for another.
void gate(const Run& r, const Layer& l) {
    const int inputs = up(l.inputs, LANES), hidden = up(l.hidden, LANES);
    float* mean = Scratch::need(scratch.sums, inputs + hidden + up(l.outputs, LANES));
    float *h = mean + inputs, *logits = h + hidden;
    means(r, l, 0, l.source.h, 0, l.source.w, mean);
    linear((const float*)l.w, l.b, mean, l.inputs, l.hidden, h);
    for (int j = 0; j < hidden; j += LANES) store(h + j, relu(load(h + j)));
    linear(l.w2, l.b2, h, l.hidden, l.outputs, logits);
    const int64_t at = int64_t(r.image) * r.call.channels + l.column;
    for (int g = 0; g < l.gates; g++) {
        scratch.open[l.outs + g].clear();
        scratch.open[l.outs + g].reserve(l.outputs);  // an empty list is no null pointer: that means all
    }
    for (int c = 0; c < l.outputs; c++) {
        const bool second = c >= l.first, on = r.call.forced ? r.call.forced[at + c] : logits[c] > 0;
        if (on) scratch.open[l.outs + second].push_back(second ? c - l.first : c);
        if (r.thread == 0) r.call.open[at + c] = on, r.call.logits[at + c] = logits[c];
    }
}

void sample(const Run& r, const Layer& l) {  // fewer pixels; the old channels stand in the middle of zeros
    const int before = (l.outputs - l.inputs) / 2;
    for (int i = r.from(l.to.h); i < r.to(l.to.h); i++)
        for (int j = 0; j < l.to.w; j++) {
            Value* to = r.memory + l.to.pixel(i, j);
            const Value* from = r.memory + l.source.pixel(i * l.stride, j * l.stride);
            std::memset(to, 0, l.to.c * sizeof(Value));
            std::memcpy(to + before, from, l.inputs * sizeof(Value));
        }
}

struct Between {  // where a pixel of an enlarged line lies among those of the old one, as torch has it
    int before, after;
    float share;  // of `after`
    Between(int i, int n, int old) {
        const float x = std::max((i + 0.5f) * old / n - 0.5f, 0.f);
        before = std::min(int(x), old - 1), after = std::min(before + 1, old - 1), share = x - before;
    }
};

void resize(const Run& r, const Layer& l) {  // bilinear, align_corners=False
    const auto pixel = [&](int i, int j, int c) { return read(r.memory + l.source.pixel(i, j) + c); };
    for (int i = r.from(l.to.h); i < r.to(l.to.h); i++)
        for (int j = 0; j < l.to.w; j++) {
            const Between y(i, l.to.h, l.source.h), x(j, l.to.w, l.source.w);
            for (int c = 0; c < l.outputs; c += LANES) {
                const Vec a = pixel(y.before, x.before, c), b = pixel(y.before, x.after, c);
                const Vec d = pixel(y.after, x.before, c), e = pixel(y.after, x.after, c);
                const Vec above = a + (b - a) * x.share, below = d + (e - d) * x.share;
                write(r.memory + l.to.pixel(i, j) + c, above + (below - above) * y.share);
            }
        }
}

// One image in workspace number `slot`, on thread `thread` of `threads`; false: it saw what is no number.
bool run(const Call& call, int image, int slot, int thread, int threads) {
    const Run r{call, image, thread, threads, (Value*)(call.workspace + slot * call.workspace_size)};
    bool finite = true;
#ifdef AMX
    CONFIGURE_TILES();
#endif
    if (int(scratch.open.size()) < call.gate_count) scratch.open.resize(call.gate_count);
    for (int i = 0; i < call.layer_count; i++) {
        const Layer& l = call.layers[i];
        const Stopwatch watch(r.spent(l, 0));
        if (l.kind == INPUT) finite = input(r, l);
        if (l.kind == CONVOLUTION) convolution(r, l);
        if (l.kind == MAX_POOL) max_pool(r, l);
        if (l.kind == AVERAGE) average(r, l);
        if (l.kind == GATE) gate(r, l);
        if (l.kind == SAMPLE) sample(r, l);
        if (l.kind == RESIZE) resize(r, l);
        if (threads > 1 && l.wait) {
#pragma omp barrier
        }
    }
#ifdef AMX
    RELEASE_TILES();
#endif
    return finite;
}

}  // namespace NAME
