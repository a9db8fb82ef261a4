// Paged to packed KV, back, and from pages to other pages. The CPU reference is `layout::PagedLayout`, and the
// checksum `checksum::Checksum`. `mod.rs` mirrors every struct here.
//
// A chunk's layer is a run of rows, in packed order [head][value][token][row]. It is moved in pieces of 4 KiB, each by
// one warp, which also has the piece's checksum while its bytes are in registers: [8 loads][32 lanes][16 bytes], so that
// a load or store of the warp is 512 bytes in a row, where rows are as long.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

// n / divisor for n below 2^31.
struct Divisor {
    u32 divisor, magic, shift;
};

__device__ __forceinline__ u32 divide(u32 n, Divisor by) {
    return (__umulhi(n, by.magic) + n) >> by.shift;
}

// Where pages lie: bytes from one layer, page, head, value (from keys to values) and token to the next.
struct Pages {
    u64 base, layer, page, head, value, token;
    const u32* table;
};

struct __align__(16) Chunk {
    u64 packed;      // address of layer 0
    u64 layer_bytes; // of one packed layer
    u32 pages;       // where the chunk's pages begin in the tables
    Divisor tokens;
};

struct Job {
    Pages source, target; // of which a packed side is not used
    const Chunk* chunks;
    u64* sums; // [layer of the model][chunk]; what pieces hash to is added
    Divisor row, page_tokens;
    Divisor pieces_of, chunks_of; // pieces of the longest chunk, chunks
    u32 values_log2;
    u32 first_layer;
    u32 pieces; // of all layers and chunks
};

enum Place { NOWHERE, PACKED, PAGED };

// ---- XXH3-64 of 4,096 bytes, with seed 0

__device__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb,
    0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088,
    0x4ef90da297486471, 0xd8acdea946ef1938, 0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a,
    0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};

const u64 P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
const u64 P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9,
          P64_4 = 0x85EBCA77C2B2AE63, P64_5 = 0x27D4EB2F165667C5;

// The words of the secret that one lane needs, in registers.
struct Keys {
    ulonglong2 of[2]; // of the lane's two stripes of a block
    ulonglong2 last;  // of the last stripe of all
    ulonglong2 scramble, merge;

    __device__ __forceinline__ explicit Keys(u32 lane) {
        u32 pair = lane & 3, word = lane / 4 + 2 * pair;
        of[0] = make_ulonglong2(secret(8 * word), secret(8 * word + 8));
        of[1] = make_ulonglong2(secret(8 * word + 64), secret(8 * word + 72));
        last = make_ulonglong2(secret(121 + 16 * pair), secret(129 + 16 * pair));
        scramble = make_ulonglong2(secret(128 + 16 * pair), secret(136 + 16 * pair));
        merge = make_ulonglong2(secret(11 + 16 * pair), secret(19 + 16 * pair));
    }

    // Eight bytes of the secret from byte `at` on.
    static __device__ __forceinline__ u64 secret(u32 at) {
        u64 word = __ldg(SECRET + at / 8);
        return at % 8 == 0 ? word : word >> at % 8 * 8 | __ldg(SECRET + at / 8 + 1) << 64 - at % 8 * 8;
    }
};

__device__ __forceinline__ u64 xor_shift_multiply(u64 acc, u64 key) {
    return (acc ^ acc >> 47 ^ key) * P32_1;
}

// What a lane holds, plus what the lane `mask` away holds of the same; each gives away what it does not keep.
__device__ __forceinline__ u64 halve(u64 low, u64 high, bool keeps_high, u32 mask) {
    return (keeps_high ? high : low) + __shfl_xor_sync(~0u, keeps_high ? low : high, mask);
}

// XXH3-64 of the piece whose 16-byte units the lanes of a warp hold. Every lane has it. XXH3 goes through four blocks of
// 16 stripes of four pairs of words: a lane has two stripes of each block, of one pair.
__device__ __forceinline__ u64 hash(const ulonglong2 (&data)[8], const Keys& keys, u32 lane) {
    u32 pair = lane & 3;
    u64 acc0[4] = {}, acc1[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        // The last stripe of all has a key of its own.
        ulonglong2 key = i == 7 && lane >= 28 ? keys.last : keys.of[i % 2];
        u64 k0 = data[i].x ^ key.x, k1 = data[i].y ^ key.y;
        acc0[i / 2] += data[i].y + u64(u32(k0)) * (k0 >> 32);
        acc1[i / 2] += data[i].x + u64(u32(k1)) * (k1 >> 32);
    }
    // Then lanes 8b to 8b + 7 have block b.
    bool upper = lane & 16, odd = lane & 8;
    u64 own0 = halve(halve(acc0[0], acc0[2], upper, 16), halve(acc0[1], acc0[3], upper, 16), odd, 8);
    u64 own1 = halve(halve(acc1[0], acc1[2], upper, 16), halve(acc1[1], acc1[3], upper, 16), odd, 8);
    own0 += __shfl_xor_sync(~0u, own0, 4);
    own1 += __shfl_xor_sync(~0u, own1, 4);
    u64 sum0 = pair == 0 ? P32_3 : pair == 1 ? P64_2 : pair == 2 ? P64_4 : P64_5;
    u64 sum1 = pair == 0 ? P64_1 : pair == 1 ? P64_3 : pair == 2 ? P32_2 : P32_1;
#pragma unroll
    for (int block = 0; block < 4; ++block) {
        sum0 += __shfl_sync(~0u, own0, block * 8 + pair);
        sum1 += __shfl_sync(~0u, own1, block * 8 + pair);
        if (block < 3) {
            sum0 = xor_shift_multiply(sum0, keys.scramble.x);
            sum1 = xor_shift_multiply(sum1, keys.scramble.y);
        }
    }
    u64 a = sum0 ^ keys.merge.x, b = sum1 ^ keys.merge.y;
    u64 folded = a * b ^ __umul64hi(a, b);
    folded += __shfl_xor_sync(~0u, folded, 1);
    folded += __shfl_xor_sync(~0u, folded, 2);
    u64 h = 4096 * P64_1 + folded;
    h = (h ^ h >> 37) * 0x165667919E3779F9;
    return h ^ h >> 32;
}

// What a piece adds to the checksum: SplitMix64 of its hash and its index, so that its place matters.
__device__ __forceinline__ u64 placed(u64 hash, u32 piece) {
    u64 z = hash + (u64(piece) + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

// ---- moving

// Where unit `n` of a packed layer lies in pages. Rows are counted in units.
__device__ __forceinline__ u64 in_pages(const Pages& pages, const Job& job, const Chunk& chunk, u32 n, u32 unit) {
    u32 row = divide(n, job.row), column = n - row * job.row.divisor;
    u32 part = divide(row, chunk.tokens), token = row - part * chunk.tokens.divisor;
    u32 page = divide(token, job.page_tokens), slot = token - page * job.page_tokens.divisor;
    u32 head = part >> job.values_log2, value = part & ((1 << job.values_log2) - 1);
    return __ldg(pages.table + chunk.pages + page) * pages.page + head * pages.head + value * pages.value +
           slot * pages.token + column * unit;
}

// Sixteen bytes of rows that are no multiple of 16 long, or do not begin at one. Zeros beyond the chunk's end.
template <Place FROM, Place TO>
__device__ __noinline__ ulonglong2 move_bytes(const Job& job, const Chunk& chunk, u64 source, u64 target, u32 first) {
    u64 low = 0, high = 0;
#pragma unroll 1
    for (u32 i = 0; i < 16 && first + i < chunk.layer_bytes; ++i) {
        u64 from = FROM == PAGED ? in_pages(job.source, job, chunk, first + i, 1) : first + i;
        u64 to = TO == PAGED ? in_pages(job.target, job, chunk, first + i, 1) : first + i;
        u64 value = *(const u8*)(source + from);
        if (TO != NOWHERE) *(u8*)(target + to) = u8(value);
        (i < 8 ? low : high) |= value << i % 8 * 8;
    }
    return make_ulonglong2(low, high);
}

// Read and written once: neither cache is to keep it.
__device__ __forceinline__ ulonglong2 load(u64 address) {
    return __ldcs((const ulonglong2*)address);
}

__device__ __forceinline__ void store(u64 address, ulonglong2 value) {
    __stcs((ulonglong2*)address, value);
}

// Moves in units of 128 bytes, which every row is a multiple of; of 16; or of one.
template <Place FROM, Place TO, int BYTES, bool SUM> __device__ __forceinline__ void move(const Job& job) {
    constexpr u32 UNITS = 4096 / BYTES;
    u32 lane = threadIdx.x & 31;
    const Keys keys(lane); // that nothing uses, where there is no checksum
    u32 warps = gridDim.x * (blockDim.x / 32);
    for (u32 at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; at < job.pieces; at += warps) {
        u32 run = divide(at, job.pieces_of), piece = at - run * job.pieces_of.divisor;
        u32 layers = divide(run, job.chunks_of), index = run - layers * job.chunks_of.divisor;
        u32 layer = job.first_layer + layers;
        const Chunk chunk = job.chunks[index];
        u32 units = u32(chunk.layer_bytes / BYTES), first = piece * UNITS;
        if (first >= units) continue; // this chunk is shorter than the longest
        u64 packed = chunk.packed + layer * chunk.layer_bytes;
        u64 source = FROM == PAGED ? job.source.base + layer * job.source.layer : packed;
        u64 target = TO == PAGED ? job.target.base + layer * job.target.layer : packed;
        ulonglong2 data[8];
        if (BYTES == 128) {
            // Each lane looks up one of the piece's 32 lines, for all.
            u32 mine = first + lane, from = mine, to = mine;
            if (FROM == PAGED && mine < units) from = u32(in_pages(job.source, job, chunk, mine, 128) / 128);
            if (TO == PAGED && mine < units) to = u32(in_pages(job.target, job, chunk, mine, 128) / 128);
            u32 column = lane % 8 * 16;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                u32 line = i * 4 + lane / 8;
                u32 n = FROM == PAGED ? __shfl_sync(~0u, from, line) : first + line;
                data[i] = first + line < units ? load(source + u64(n) * 128 + column) : make_ulonglong2(0, 0);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                u32 line = i * 4 + lane / 8;
                u32 n = TO == PAGED ? __shfl_sync(~0u, to, line) : first + line;
                if (TO != NOWHERE && first + line < units) store(target + u64(n) * 128 + column, data[i]);
            }
        } else if (BYTES == 16) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                u32 n = first + i * 32 + lane;
                data[i] = make_ulonglong2(0, 0);
                if (n < units) data[i] = load(source + (FROM == PAGED ? in_pages(job.source, job, chunk, n, 16) : u64(n) * 16));
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                u32 n = first + i * 32 + lane;
                if (TO == NOWHERE || n >= units) continue;
                store(target + (TO == PAGED ? in_pages(job.target, job, chunk, n, 16) : u64(n) * 16), data[i]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                data[i] = move_bytes<FROM, TO>(job, chunk, source, target, first + (i * 32 + lane) * 16);
        }
        if (SUM) {
            u64 h = hash(data, keys, lane);
            if (lane == 0) atomicAdd(job.sums + layer * job.chunks_of.divisor + index, placed(h, piece));
        }
    }
}

// ---- what is launched: in units of 128 bytes without the checksum and with it, of 16, and in bytes

#define KERNEL(name, from, to, bytes, sum)                                                                             \
    extern "C" __global__ void __launch_bounds__(512) name(const __grid_constant__ Job job) {                       \
        move<from, to, bytes, sum>(job);                                                                               \
    }
#define SUMS(name, from, to)                                                                                           \
    KERNEL(name##_sum, from, to, 128, true)                                                                            \
    KERNEL(name##_units_sum, from, to, 16, true)                                                                       \
    KERNEL(name##_bytes_sum, from, to, 1, true)
#define KERNELS(name, from, to)                                                                                        \
    KERNEL(name, from, to, 128, false)                                                                                 \
    SUMS(name, from, to)

KERNELS(pack, PAGED, PACKED)
KERNELS(scatter, PACKED, PAGED)
KERNELS(carry, PAGED, PAGED)
SUMS(digest, PAGED, NOWHERE)
