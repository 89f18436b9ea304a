// AMX: eight tile registers of 16 rows of 64 bytes, and an instruction that multiplies two of bfloat16 and adds
// the products to one of floats. With EMULATE_AMX the same in plain C++, so that what is built on it can be
// tested on processors that have no AMX.
#ifdef EMULATE_AMX
#define AMX_NAMES
namespace {

struct Tile { float words[16][16]; };
thread_local Tile tiles_of_thread[8];

inline void load_tile(int t, const void* from, int64_t stride) {
    for (int i = 0; i < 16; i++) std::memcpy(tiles_of_thread[t].words[i], (const char*)from + i * stride, 64);
}

inline void store_tile(int t, void* to, int64_t stride) {
    for (int i = 0; i < 16; i++) std::memcpy((char*)to + i * stride, tiles_of_thread[t].words[i], 64);
}

inline float half_of(float word, int which) {  // one of the two bfloat16 of a word
    uint32_t bits;
    std::memcpy(&bits, &word, 4);
    bits = which ? bits & 0xffff0000u : bits << 16;
    std::memcpy(&word, &bits, 4);
    return word;
}

inline void add_tile_products(int c, int a, int b) {
    Tile &sums = tiles_of_thread[c], &left = tiles_of_thread[a], &right = tiles_of_thread[b];
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 16; j++)
                for (int h = 0; h < 2; h++)
                    sums.words[i][j] += half_of(left.words[i][k], h) * half_of(right.words[k][j], h);
}

bool has_amx() { return true; }

}  // namespace
#define LOAD_TILE(t, from, stride) load_tile(t, from, stride)
#define STORE_TILE(t, to, stride) store_tile(t, to, stride)
#define ADD_PRODUCTS(c, a, b) add_tile_products(c, a, b)
#define CONFIGURE_TILES()
#define RELEASE_TILES()

#else
#define AMX_NAMES ",amx-tile,amx-bf16"
namespace {

struct alignas(64) TileConfig {  // eight tiles of 16 rows of 64 bytes
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig tile_config;

bool has_amx() {  // the processor has it, and the system lets this process use it
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
#ifdef __linux__
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace
#define LOAD_TILE(t, from, stride) _tile_loadd(t, from, stride)
#define STORE_TILE(t, to, stride) _tile_stored(t, to, stride)
#define ADD_PRODUCTS(c, a, b) _tile_dpbf16ps(c, a, b)
#define CONFIGURE_TILES() _tile_loadconfig(&tile_config)
#define RELEASE_TILES() _tile_release()
#endif
