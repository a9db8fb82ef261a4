// Attention on tensor cores over paged KV, for bf16 and f16 and heads of 64 and 128; online softmax as in
// FlashAttention-2. `cpu::attention` is what it must compute.
//
// Tiles lie in shared memory as [row][16-byte chunk], a row's chunks exchanged by its low bits, so that neither copies
// nor `ldmatrix` meet a bank twice. Fragments are those of mma.m16n8k16: a lane has rows lane/4 and lane/4 + 8.

#include "numbers.cuh"

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// 16 bytes into shared memory; zeros where there is nothing to be read.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until no more than N groups are under way.
template <int N>
__device__ __forceinline__ void landed() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load4(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void load4_turned(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ u32 pair(float low, float high, bf16) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(u32*)&both;
}

__device__ __forceinline__ u32 pair(float low, float high, f16) {
    __half2 both = __floats2half2_rn(low, high);
    return *(u32*)&both;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// The address of a row's chunk in a tile of rows of D numbers.
template <int D>
__device__ __forceinline__ u32 chunk_at(u32 tile, u32 row, u32 chunk) {
    return tile + row * (D * 2) + ((chunk ^ (row & 7)) << 4);
}

struct Flash {
    const void* qkv;
    void* out; // [rows][heads][dim]
    const Queries* queries;
    Pages pages;
    Heads heads;
    // Decode only: how many blocks share a sequence's keys, and what each found, [queries][head][block]: its output
    // unscaled, and {maximum, sum}.
    u32 splits;
    float* outs;
    float2* sums;
};

// One head's element of the keys at `position`; rows beyond the end are not looked up.
template <typename T, int D>
__device__ __forceinline__ const T* key_at(const Flash& p, const T* head, u32 table, u32 position) {
    u32 page = __umulhi(position, p.pages.magic);
    return head + p.pages.tables[table + page] * p.pages.page + (position - page * p.pages.page_tokens) * D;
}

const float LOG2E = 1.4426950408889634f;

// ---- Prefill: 128 queries of one head a block, 64 keys at a time. Four warps, 32 queries each.

const int ROWS = 128, KEYS = 64;

template <typename T, int D>
__device__ __forceinline__ void load_keys(const Flash& p, const T* head, u32 table, int block, int end, u32 tile) {
    constexpr int CHUNKS = D / 8, AT_ONCE = 128 / CHUNKS;
    u32 chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
#pragma unroll
    for (int i = 0; i < KEYS / AT_ONCE; i++, row += AT_ONCE) {
        int position = block * KEYS + row;
        bool there = position < end;
        copy16(chunk_at<D>(tile, row, chunk), key_at<T, D>(p, head, table, there ? position : 0) + chunk * 8, there);
    }
}

template <typename T, int D>
__device__ __forceinline__ void prefill(const Flash& p) {
    extern __shared__ __align__(128) u8 memory[];
    constexpr int CHUNKS = D / 8, STEPS = D / 16, PARTS = KEYS / 8, OUTS = D / 8;
    const u32 q_tile = shared_address(memory), k_tile = q_tile + ROWS * D * 2, v_tile = k_tile + KEYS * D * 2;
    const Queries queries = p.queries[blockIdx.y];
    const u32 head = blockIdx.x, kv_head = head / (p.heads.heads / p.heads.kv_heads);
    const u32 width = (p.heads.heads + 2 * p.heads.kv_heads) * D;
    const T* keys = (const T*)p.pages.base + (u64)kv_head * p.pages.page_tokens * D;
    const T* values = keys + p.pages.value;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int end = queries.position + (int)queries.count;
    const int first = first_seen(p.heads, queries.position) / KEYS, last = (end - 1) / KEYS;

    const T* q = (const T*)p.qkv + (u64)queries.row * width + head * D;
    for (u32 i = threadIdx.x; i < ROWS * CHUNKS; i += 128) {
        u32 row = i / CHUNKS, chunk = i % CHUNKS;
        bool there = row < queries.count;
        copy16(chunk_at<D>(q_tile, row, chunk), q + (u64)(there ? row : 0) * width + chunk * 8, there);
    }
    load_keys<T, D>(p, keys, queries.table, last, end, k_tile);
    commit();

    float out[2][OUTS][4], maximum[2][2], sum[2][2];
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) maximum[m][h] = -INFINITY, sum[m][h] = 0;
#pragma unroll
        for (int n = 0; n < OUTS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[m][n][i] = 0;
    }
    const float scale = p.heads.scale * LOG2E;

    for (int block = last; block >= first; block--) {
        landed<0>();
        __syncthreads();
        load_keys<T, D>(p, values, queries.table, block, end, v_tile);
        commit();

        float scores[2][PARTS][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < PARTS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) scores[m][n][i] = 0;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
                load4(a[m], chunk_at<D>(q_tile, warp * 32 + m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int n = 0; n < PARTS / 2; n++) {
                u32 b[4];
                load4(b, chunk_at<D>(k_tile, n * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    multiply(scores[m][2 * n], a[m], b[0], b[1], T());
                    multiply(scores[m][2 * n + 1], a[m], b[2], b[3], T());
                }
            }
        }

        // The first of this warp's queries must see the whole block, and the last one too.
        int lowest = queries.position + (int)warp * 32;
        if (block * KEYS + KEYS - 1 > lowest || first_seen(p.heads, lowest + 31) > block * KEYS) {
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    int position = lowest + m * 16 + h * 8 + (int)lane / 4, from = first_seen(p.heads, position);
#pragma unroll
                    for (int n = 0; n < PARTS; n++)
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            int key = block * KEYS + n * 8 + (int)lane % 4 * 2 + i;
                            if (key > position || key < from) scores[m][n][2 * h + i] = -INFINITY;
                        }
                }
        }

#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float higher = maximum[m][h];
#pragma unroll
                for (int n = 0; n < PARTS; n++)
                    higher = fmaxf(higher, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
                higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
                higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
                // A query that has seen no key yet stays at nothing.
                float base = higher == -INFINITY ? 0 : higher * scale;
                float keep = exp2_fast(maximum[m][h] * scale - base);
                maximum[m][h] = higher;
                float total = 0;
#pragma unroll
                for (int n = 0; n < PARTS; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float weight = exp2_fast(scores[m][n][2 * h + i] * scale - base);
                        scores[m][n][2 * h + i] = weight;
                        total += weight;
                    }
                sum[m][h] = sum[m][h] * keep + total;
#pragma unroll
                for (int n = 0; n < OUTS; n++) out[m][n][2 * h] *= keep, out[m][n][2 * h + 1] *= keep;
            }

        landed<0>();
        __syncthreads();
        if (block > first) {
            load_keys<T, D>(p, keys, queries.table, block - 1, end, k_tile);
            commit();
        }

#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            u32 a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float(&s)[4] = scores[m][2 * step + i / 2];
                    a[m][i] = i % 2 ? pair(s[2], s[3], T()) : pair(s[0], s[1], T());
                }
#pragma unroll
            for (int n = 0; n < OUTS / 2; n++) {
                u32 b[4];
                load4_turned(b, chunk_at<D>(v_tile, step * 16 + lane % 16, n * 2 + lane / 16));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    multiply(out[m][2 * n], a[m], b[0], b[1], T());
                    multiply(out[m][2 * n + 1], a[m], b[2], b[3], T());
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            u32 row = warp * 32 + m * 16 + h * 8 + lane / 4;
            if (row >= queries.count) continue;
            u32* to = (u32*)((T*)p.out + ((u64)(queries.row + row) * p.heads.heads + head) * D) + lane % 4;
            float by = 1.0f / total;
#pragma unroll
            for (int n = 0; n < OUTS; n++) to[n * 4] = pair(out[m][n][2 * h] * by, out[m][n][2 * h + 1] * by, T());
        }
}

#define PREFILL(name, type, dim) \
    extern "C" __global__ void __launch_bounds__(128, 2) name(const __grid_constant__ Flash p) { prefill<type, dim>(p); }
PREFILL(prefill_f16_64, f16, 64)
PREFILL(prefill_f16_128, f16, 128)
PREFILL(prefill_bf16_64, bf16, 64)
PREFILL(prefill_bf16_128, bf16, 128)

// ---- Decode: one query of up to 16 heads that share keys, and a part of the keys, a block. Each of four warps takes
// every fourth 16 keys and has copies of its own under way, so none waits for another before the end.

const int UNIT = 16, STAGES = 3;

template <typename T, int D>
__device__ __forceinline__ void load_unit(const Flash& p, const T* keys, u32 table, int unit, int end, u32 tile) {
    constexpr int CHUNKS = D / 8, AT_ONCE = 32 / CHUNKS;
    u32 lane = threadIdx.x % 32, chunk = lane % CHUNKS, row = lane / CHUNKS;
    // A unit lies in one page: pages have a multiple of 16 tokens.
    const T* from = key_at<T, D>(p, keys, table, unit * UNIT) + chunk * 8;
#pragma unroll
    for (int i = 0; i < UNIT / AT_ONCE; i++, row += AT_ONCE) {
        bool there = unit * UNIT + (int)row < end;
        copy16(chunk_at<D>(tile, row, chunk), from + row * D, there);
        copy16(chunk_at<D>(tile + UNIT * D * 2, row, chunk), from + p.pages.value + row * D, there);
    }
}

template <typename T, int D>
__device__ __forceinline__ void decode(const Flash& p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ float maxima[4][16], totals[4][16];
    constexpr int STEPS = D / 16, OUTS = D / 8, STAGE = 2 * UNIT * D * 2;
    const Queries query = p.queries[blockIdx.z];
    if (query.position < 0) return;
    const u32 group = p.heads.heads / p.heads.kv_heads, parts = (group + 15) / 16;
    const u32 kv_head = blockIdx.y / parts, first_head = kv_head * group + blockIdx.y % parts * 16;
    const u32 shared = min(16u, (kv_head + 1) * group - first_head); // heads of this block
    const T* keys = (const T*)p.pages.base + (u64)kv_head * p.pages.page_tokens * D;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 tiles = shared_address(memory) + warp * STAGES * STAGE;
    const int end = query.position + 1, seen = first_seen(p.heads, query.position);
    const int units = (end + UNIT - 1) / UNIT - seen / UNIT, each = (units + p.splits - 1) / p.splits;
    const int first = seen / UNIT + (int)blockIdx.x * each + (int)warp;
    const int last = seen / UNIT + min(units, ((int)blockIdx.x + 1) * each); // excluded

    // Row g of the fragments is head g.
    u32 a[STEPS][4];
    const T* q = (const T*)p.qkv + (u64)query.row * (p.heads.heads + 2 * p.heads.kv_heads) * D + first_head * D;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 g = lane / 4 + i % 2 * 8;
            a[step][i] = g < shared ? *(const u32*)(q + g * D + step * 16 + i / 2 * 8 + lane % 4 * 2) : 0;
        }

#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (first + 4 * stage < last) load_unit<T, D>(p, keys, query.table, first + 4 * stage, end, tiles + stage * STAGE);
        commit();
    }
    float out[OUTS][4], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < OUTS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[n][i] = 0;
    const float scale = p.heads.scale * LOG2E;

    int slot = 0;
    for (int unit = first; unit < last; unit += 4) {
        landed<STAGES - 2>();
        __syncwarp();
        int ahead = unit + 4 * (STAGES - 1), free = slot == 0 ? STAGES - 1 : slot - 1;
        if (ahead < last) load_unit<T, D>(p, keys, query.table, ahead, end, tiles + free * STAGE);
        commit();
        const u32 k_tile = tiles + slot * STAGE, v_tile = k_tile + UNIT * D * 2;
        slot = slot + 1 == STAGES ? 0 : slot + 1;

        float scores[2][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 b[4];
            load4(b, chunk_at<D>(k_tile, lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
            multiply(scores[0], a[step], b[0], b[1], T());
            multiply(scores[1], a[step], b[2], b[3], T());
        }
        if (unit * UNIT + UNIT > end || unit * UNIT < seen) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int key = unit * UNIT + n * 8 + (int)lane % 4 * 2 + i % 2;
                    if (key >= end || key < seen) scores[n][i] = -INFINITY;
                }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float higher = fmaxf(fmaxf(scores[0][2 * h], scores[0][2 * h + 1]), fmaxf(scores[1][2 * h], scores[1][2 * h + 1]));
            higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
            higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
            // Every unit has a key that is seen.
            higher = fmaxf(higher, maximum[h]);
            float keep = exp2_fast((maximum[h] - higher) * scale), total = 0;
            maximum[h] = higher;
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float weight = exp2_fast((scores[n][2 * h + i] - higher) * scale);
                    scores[n][2 * h + i] = weight;
                    total += weight;
                }
            sum[h] = sum[h] * keep + total;
#pragma unroll
            for (int n = 0; n < OUTS; n++) out[n][2 * h] *= keep, out[n][2 * h + 1] *= keep;
        }
        u32 weights[4] = {pair(scores[0][0], scores[0][1], T()), pair(scores[0][2], scores[0][3], T()),
                          pair(scores[1][0], scores[1][1], T()), pair(scores[1][2], scores[1][3], T())};
#pragma unroll
        for (int n = 0; n < OUTS / 2; n++) {
            u32 b[4];
            load4_turned(b, chunk_at<D>(v_tile, lane % 16, n * 2 + lane / 16));
            multiply(out[2 * n], weights, b[0], b[1], T());
            multiply(out[2 * n + 1], weights, b[2], b[3], T());
        }
        __syncwarp();
    }
    landed<0>();

    // The warps' outputs, [warp][head][dim], over the tiles.
    float* outs = (float*)memory;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = sum[h];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        u32 g = lane / 4 + h * 8;
        if (lane % 4 == 0) maxima[warp][g] = maximum[h], totals[warp][g] = total;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int n = 0; n < OUTS; n++)
            *(float2*)&outs[(warp * 16 + lane / 4 + h * 8) * D + n * 8 + lane % 4 * 2] =
                make_float2(out[n][2 * h], out[n][2 * h + 1]);
    __syncthreads();
    for (u32 i = threadIdx.x; i < shared * D; i += 128) {
        u32 g = i / D, d = i % D;
        float highest = fmaxf(fmaxf(maxima[0][g], maxima[1][g]), fmaxf(maxima[2][g], maxima[3][g]));
        float base = highest == -INFINITY ? 0 : highest, x = 0, total = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float keep = exp2_fast((maxima[w][g] - base) * scale);
            x += outs[(w * 16 + g) * D + d] * keep;
            total += totals[w][g] * keep;
        }
        u32 head = first_head + g;
        if (p.splits == 1) {
            write(((T*)p.out)[((u64)query.row * p.heads.heads + head) * D + d], x / total);
            continue;
        }
        u64 at = ((u64)blockIdx.z * p.heads.heads + head) * p.splits + blockIdx.x;
        p.outs[at * D + d] = x;
        if (d == 0) p.sums[at] = make_float2(highest * scale, total);
    }
}

#define DECODE(name, type, dim) \
    extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ Flash p) { decode<type, dim>(p); }
DECODE(decode_f16_64, f16, 64)
DECODE(decode_f16_128, f16, 128)
DECODE(decode_bf16_64, bf16, 64)
DECODE(decode_bf16_128, bf16, 128)

// What the blocks of `decode` found, into one: a block a head and query, a thread a number of the head.
template <typename T>
__device__ __forceinline__ void gather(const Flash& p) {
    const Queries query = p.queries[blockIdx.y];
    if (query.position < 0) return;
    u64 at = ((u64)blockIdx.y * p.heads.heads + blockIdx.x) * p.splits;
    float highest = -INFINITY, x = 0, total = 0;
    for (u32 i = 0; i < p.splits; i++) highest = fmaxf(highest, p.sums[at + i].x);
    for (u32 i = 0; i < p.splits; i++) {
        float2 found = p.sums[at + i];
        float keep = exp2_fast(found.x - highest);
        x += p.outs[(at + i) * p.heads.dim + threadIdx.x] * keep;
        total += found.y * keep;
    }
    write(((T*)p.out)[((u64)query.row * p.heads.heads + blockIdx.x) * p.heads.dim + threadIdx.x], x / total);
}

extern "C" __global__ void gather_f16(const __grid_constant__ Flash p) { gather<f16>(p); }
extern "C" __global__ void gather_bf16(const __grid_constant__ Flash p) { gather<bf16>(p); }
