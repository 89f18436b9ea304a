// The two tiles and their loops, for vectors of LANES floats. native.cpp includes this file once per instruction set,
// with NAME (a namespace), LANES, ROW_PIXELS and COLUMN_PIXELS (pixels of a tile, as many as the registers hold).
namespace NAME {

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int ROWS = 4, MOST_PIXELS = ROW_PIXELS * 4 / 3, BLOCK = 2 * LANES, BATCH = 16;  // rows of a tile; output channels of a tile; tiles whose sums are in flight

inline Vec load(const float* p) { return *(const Vec*)p; }
inline void store(float* p, Vec v) { *(Vec*)p = v; }
inline Four load4(const float* p) { return *(const Four*)p; }
inline Vec relu(Vec v) { return v < 0 ? Vec{} : v; }  // NaN stays

// Tiles of at most `most` pixels whose sizes differ by one at most: 49 pixels in sixes are 9 tiles of 5 or 6.
struct Tiles {
    int from, count, size, larger;  // `larger` tiles of size + 1 come first
    Tiles(int from, int to, int most) : from(from), count((to - from + most - 1) / most) {
        size = count ? (to - from) / count : 0, larger = to - from - count * size;
    }
    int start(int t) const { return from + t * size + std::min(t, larger); }
};

// ---- first convolution: the rows of the open output channels, vectors over its inputs --------------------------------

// sums[p][r] (+)= x[p] . w[r] for P pixels and R rows, over `lines` lines of `length` floats; lane sums are added up later
template <int P, int R>
inline __attribute__((always_inline)) void rows_tile(bool begin, const float* x, const int* at, const float* const* w, int lines, long line, int length, long run, float* sums) {
    Vec a[P][R];
    for (int p = 0; p < P; p++) for (int r = 0; r < R; r++) a[p][r] = begin ? Vec{} : load(sums + (p * ROWS + r) * LANES);
    const float *px[P], *pw[R];
    for (int p = 0; p < P; p++) px[p] = x + at[p];
    for (int r = 0; r < R; r++) pw[r] = w[r];
    for (int l = 0; l < lines; l++) {
        for (long i = 0; i < length; i += LANES)
            if constexpr (R == ROWS) {
                Vec v[P];
                for (int p = 0; p < P; p++) v[p] = load(px[p] + i);
                for (int r = 0; r < R; r++) {
                    const Vec u = load(pw[r] + i);
                    for (int p = 0; p < P; p++) a[p][r] += v[p] * u;
                }
            } else {
                Vec u[R];
                for (int r = 0; r < R; r++) u[r] = load(pw[r] + i);
                for (int p = 0; p < P; p++) {
                    const Vec v = load(px[p] + i);
                    for (int r = 0; r < R; r++) a[p][r] += v * u[r];
                }
            }
        for (int p = 0; p < P; p++) px[p] += line;
        for (int r = 0; r < R; r++) pw[r] += run;
    }
    for (int p = 0; p < P; p++) for (int r = 0; r < R; r++) store(sums + (p * ROWS + r) * LANES, a[p][r]);
}

template <int P, int R, typename... A> inline __attribute__((always_inline)) void pick_rows(int p, A... args) {
    if (p == P) rows_tile<P, R>(args...);
    else if constexpr (P > 1) pick_rows<P - 1, R>(p, args...);
}

// the four sums over lanes of four vectors that stand one after the other
inline Four add_lanes(const float* s) {
    Four r[4];
    for (int i = 0; i < 4; i++) {
        r[i] = load4(s + i * LANES);
        for (int j = 4; j < LANES; j += 4) r[i] += load4(s + i * LANES + j);
    }
    Four a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5) + __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    Four b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5) + __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
}

void rows(const Rows& s, int from, int to) {
    const Tiles fours(from, to, ROW_PIXELS), threes(from, to, MOST_PIXELS);
    const int n = s.open_count, lack = (ROWS - n % ROWS) % ROWS, of_three = 3 * lack <= n ? 3 * lack : 0;  // 10 rows: 3, 3, 4
    const long run = long(s.k) * s.channels;  // the taps of one line are neighbours in memory
    const bool small = s.k * run <= 1280;     // four rows of weights fit into the first cache
    const long piece = small ? run : std::min(run, 768L);
    constexpr int TILE = MOST_PIXELS * ROWS * LANES;
    float sums[BATCH * TILE] = {};
    for (int r = 0, many; r < n; r += many) {
        many = std::min(r < of_three ? 3 : ROWS, n - r);
        const Tiles& tiles = many == 3 ? threes : fours;
        const float* w[ROWS];
        float bias[ROWS];
        for (int i = 0; i < ROWS; i++) {
            const int row = s.open[r + std::min(i, many - 1)];
            w[i] = s.w + row * s.k * run, bias[i] = s.bias[row];
        }
        for (int t0 = 0; t0 < tiles.count; t0 += BATCH) {
            const int t1 = std::min(t0 + BATCH, tiles.count);
            for (int l = 0; l < (small ? 1 : s.k); l++)
                for (long i = 0; i < run; i += piece) {
                    const float* v[ROWS];
                    for (int j = 0; j < ROWS; j++) v[j] = w[j] + l * run + i;
                    for (int t = t0; t < t1; t++) {
                        const int p = tiles.start(t), pixels = tiles.start(t + 1) - p, lines = small ? s.k : 1, length = int(std::min(piece, run - i));
                        const float* x = s.x + l * s.line + i;
                        float* to = sums + (t - t0) * TILE;
                        if (many == 3) pick_rows<MOST_PIXELS, 3>(pixels, l + i == 0, x, s.x_at + p, v, lines, s.line, length, run, to);
                        else pick_rows<ROW_PIXELS, ROWS>(pixels, l + i == 0, x, s.x_at + p, v, lines, s.line, length, run, to);
                    }
                }
            for (int t = t0; t < t1; t++)
                for (int p = tiles.start(t), q = 0; p < tiles.start(t + 1); p++, q++) {
                    Four v = add_lanes(sums + (t - t0) * TILE + q * ROWS * LANES) + load4(bias);
                    v = v < 0 ? Four{} : v;
                    float* y = s.y + s.y_at[p] + r;
                    if (many == ROWS) *(Four*)y = v;
                    else for (int i = 0; i < many; i++) y[i] = v[i];
                }
        }
    }
}

// ---- second convolution: the columns of the open input channels, vectors over its outputs ----------------------------

// The first tile of a block reads the listed rows of its weights and lays them side by side for the tiles that follow.
template <int P, bool LAY>
inline __attribute__((always_inline)) void columns_tile(const Columns& s, int p0, int block, const float* w, float* panel, const int*& next, const int* next_end) {
    Vec a[P][2];
    for (int p = 0; p < P; p++) a[p][0] = load(s.bias + block * BLOCK), a[p][1] = load(s.bias + block * BLOCK + LANES);
    const float *row = LAY ? w : panel, *px[P];
    for (int p = 0; p < P; p++) px[p] = s.x + s.x_at[p0 + p];
    const int* at = s.w_at;
    for (int l = 0; l < s.k; l++) {
        for (int i0 = 0; i0 < s.length; i0 += 8) {
            if (next < next_end) __builtin_prefetch(w + s.w_block + *next++, 0, 2);
            const int i1 = std::min(i0 + 8, s.length);
            for (long i = i0; i < i1; i++) {
                if (LAY) row = w + *at++;
                const Vec u = load(row), v = load(row + LANES);
                if (LAY) store(panel, u), store(panel + LANES, v), panel += BLOCK;
                else row += BLOCK;
                for (int p = 0; p < P; p++) {
                    const Vec f = px[p][i] - Vec{};
                    a[p][0] += f * u, a[p][1] += f * v;
                }
            }
        }
        for (int p = 0; p < P; p++) px[p] += s.line;
    }
    const int left = s.outputs - block * BLOCK;  // the last block may be narrower
    for (int p = 0; p < P; p++) {
        const long to = s.y_at[p0 + p] + block * BLOCK, from = long(p0 + p) * s.outputs + block * BLOCK;
        for (int h = 0; h < 2; h++) {
            Vec v = a[p][h];
            const int n = std::min(left - h * LANES, LANES);
            if (n == LANES) {
                if (s.residual) v += load(s.residual + from + h * LANES);
                store(s.y + to + h * LANES, s.relu ? relu(v) : v);
            } else for (int i = 0; i < n; i++) {
                const float z = v[i] + (s.residual ? s.residual[from + h * LANES + i] : 0);
                s.y[to + h * LANES + i] = s.relu && z < 0 ? 0 : z;
            }
        }
    }
}

template <int P, bool LAY, typename... A> inline __attribute__((always_inline)) void pick_columns(int p, A&&... args) {
    if (p == P) columns_tile<P, LAY>(args...);
    else if constexpr (P > 1) pick_columns<P - 1, LAY>(p, args...);
}

void columns(const Columns& s, int from, int to, int block, int last) {
    Tiles tiles(from, to, COLUMN_PIXELS);
    const int listed = s.k * s.length;
    const bool all = !listed || s.w_at[listed - 1] == (listed - 1) * BLOCK;  // their rows lie side by side already
    float* room = all ? nullptr : Scratch::need(scratch.side_by_side, long(listed) * BLOCK);
    for (; block < last; block++) {
        const int *next = s.w_at, *next_end = block + 1 < last ? s.w_at + listed : next;  // the next block's weights
        const float* w = s.w + block * s.w_block;
        float* panel = all ? const_cast<float*>(w) : room;
        for (int t = 0; t < tiles.count; t++) {
            const int p = tiles.start(t), n = tiles.start(t + 1) - p;
            if (t || all) pick_columns<COLUMN_PIXELS, false>(n, s, p, block, w, panel, next, next_end);
            else pick_columns<COLUMN_PIXELS, true>(n, s, p, block, w, panel, next, next_end);
        }
    }
}

}  // namespace NAME
