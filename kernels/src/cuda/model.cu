// What a model computes besides products: embeddings, norms, RoPE with the KV write, the gated MLP, attention for heads
// that `attention.cu` does not take. The CPU references are in `cpu`.

#include "numbers.cuh"

// ---- Loading

struct Convert {
    void* to;
    const void* from;
    u64 count;
    u32 to_stored, from_stored;
};

extern "C" __global__ void convert(Convert p) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; at < p.count; at += (u64)gridDim.x * blockDim.x) write(p.to, p.to_stored, at, read(p.from, p.from_stored, at));
}

struct Dummy {
    void* to;
    u64 count, seed;
    u32 stored;
    float around, width; // uniform in around +- width
};

extern "C" __global__ void dummy(Dummy p) {
    u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; at < p.count; at += (u64)gridDim.x * blockDim.x) {
        u64 x = (at + p.seed) * 0x9E3779B97F4A7C15; // splitmix64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
        float unit = (float)(u32)((x ^ (x >> 31)) >> 40) * (1.0f / 8388608.0f) - 1.0f;
        write(p.to, p.stored, at, p.around + p.width * unit);
    }
}

// ---- Rows

struct Embed {
    const void* table;
    const u32* tokens;
    float* out;
    u32 stored, width;
};

extern "C" __global__ void embed(Embed p) {
    u64 from = (u64)p.tokens[blockIdx.x] * p.width, to = (u64)blockIdx.x * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) p.out[to + i] = read(p.table, p.stored, from + i);
}

struct Select {
    const u32* from;
    u32* out;
    const u32* rows;
    u32 words; // 4 bytes each, of a row
};

extern "C" __global__ void choose(Select p) {
    u64 from = (u64)p.rows[blockIdx.x] * p.words, to = (u64)blockIdx.x * p.words;
    for (u32 i = threadIdx.x; i < p.words; i += blockDim.x) p.out[to + i] = p.from[from + i];
}

struct Bias {
    void* out;
    const float* bias;
    u32 stored, width;
};

extern "C" __global__ void bias(Bias p) {
    u64 row = (u64)blockIdx.x * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x)
        write(p.out, p.stored, row + i, read(p.out, p.stored, row + i) + p.bias[i]);
}

struct Norm {
    const float* x;
    const float* weight;
    void* out;
    u32 width;
    float eps;
};

// A block a row.
template <typename T>
__device__ __forceinline__ void norm(const Norm& p) {
    __shared__ float sums[32];
    const float* x = p.x + (u64)blockIdx.x * p.width;
    T* out = (T*)p.out + (u64)blockIdx.x * p.width;
    u32 quads = p.width % 4 == 0 ? p.width / 4 : 0;
    float sum = 0;
    for (u32 i = threadIdx.x; i < quads; i += blockDim.x) {
        float4 v = ((const float4*)x)[i];
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    for (u32 i = quads * 4 + threadIdx.x; i < p.width; i += blockDim.x) sum += x[i] * x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0);
    float scale = 1.0f / sqrtf(sum / (float)p.width + p.eps);
    struct __align__(4 * sizeof(T)) Quad {
        T of[4];
    };
    for (u32 i = threadIdx.x; i < quads; i += blockDim.x) {
        float4 v = ((const float4*)x)[i], w = ((const float4*)p.weight)[i];
        Quad quad;
        write(quad.of[0], v.x * scale * w.x);
        write(quad.of[1], v.y * scale * w.y);
        write(quad.of[2], v.z * scale * w.z);
        write(quad.of[3], v.w * scale * w.w);
        ((Quad*)out)[i] = quad;
    }
    for (u32 i = quads * 4 + threadIdx.x; i < p.width; i += blockDim.x) write(out[i], x[i] * scale * p.weight[i]);
}

extern "C" __global__ void norm_f32(Norm p) { norm<float>(p); }
extern "C" __global__ void norm_f16(Norm p) { norm<f16>(p); }
extern "C" __global__ void norm_bf16(Norm p) { norm<bf16>(p); }

struct Gate {
    const void* wide; // [rows][gate | up]
    void* out;        // [rows][width]
    u32 width;
};

// silu(gate) * up; a block's row is y, so many elements a thread that they are 16 bytes.
template <typename T>
__device__ __forceinline__ void gate(const Gate& p) {
    constexpr u32 EACH = 16 / sizeof(T);
    struct __align__(16) Some {
        T of[EACH];
    };
    const T* from = (const T*)p.wide + (u64)blockIdx.y * 2 * p.width;
    T* to = (T*)p.out + (u64)blockIdx.y * p.width;
    u32 at = (blockIdx.x * blockDim.x + threadIdx.x) * EACH;
    if (at >= p.width) return;
    auto gated = [](T gate, T up) {
        float x = read(gate);
        return x / (1.0f + __expf(-x)) * read(up);
    };
    if (p.width % EACH == 0) {
        Some gates = *(const Some*)(from + at), ups = *(const Some*)(from + p.width + at), out;
#pragma unroll
        for (u32 i = 0; i < EACH; i++) write(out.of[i], gated(gates.of[i], ups.of[i]));
        *(Some*)(to + at) = out;
        return;
    }
    for (u32 i = at; i < min(at + EACH, p.width); i++) write(to[i], gated(from[i], from[p.width + i]));
}

extern "C" __global__ void gate_f32(Gate p) { gate<float>(p); }
extern "C" __global__ void gate_f16(Gate p) { gate<f16>(p); }
extern "C" __global__ void gate_bf16(Gate p) { gate<bf16>(p); }

// ---- RoPE and the KV write

struct Turn {
    void* qkv;
    const float* frequencies; // of half a head
    const float* query_norm;  // or null
    const float* key_norm;
    const Row* rows;
    Pages pages;
    Heads heads;
    float turn_scale, eps;
};

// Normalises and turns queries in place; keys, likewise, and values go to their pages. A row is
// x; the blocks of y share its heads out, a warp a head.
template <typename T>
__device__ __forceinline__ void turn(const Turn& p) {
    extern __shared__ float angles[]; // [cos|sin][half]
    Row row = p.rows[blockIdx.x];
    if (row.position < 0) return;
    u32 dim = p.heads.dim, half = dim / 2;
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) {
        float sin, cos;
        sincosf((float)row.position * p.frequencies[i], &sin, &cos);
        angles[i] = cos * p.turn_scale;
        angles[half + i] = sin * p.turn_scale;
    }
    __syncthreads();
    u32 page = p.pages.tables[row.table + row.position / p.pages.page_tokens];
    u32 slot = row.position % p.pages.page_tokens;
    T* qkv = (T*)p.qkv + (u64)blockIdx.x * (p.heads.heads + 2 * p.heads.kv_heads) * dim;
    T* kept = (T*)p.pages.base + page * p.pages.page + slot * dim;
    struct __align__(2 * sizeof(T)) Two {
        T of[2];
    };
    u32 lane = threadIdx.x % 32, all = p.heads.heads + 2 * p.heads.kv_heads;
    for (u32 h = blockIdx.y * 8 + threadIdx.x / 32; h < all; h += gridDim.y * 8) {
        const T* from = qkv + h * dim;
        bool query = h < p.heads.heads, value = h >= p.heads.heads + p.heads.kv_heads;
        u32 kv_head = (h - p.heads.heads) % p.heads.kv_heads;
        T* to = query ? qkv + h * dim : kept + (value ? p.pages.value : 0) + kv_head * p.pages.page_tokens * dim;
        if (value) {
            for (u32 i = lane; i < half; i += 32) ((Two*)to)[i] = ((const Two*)from)[i];
            continue;
        }
        const float* norm = query ? p.query_norm : p.key_norm;
        float scale = 1;
        if (norm) {
            float sum = 0;
            for (u32 i = lane; i < dim; i += 32) sum += read(from[i]) * read(from[i]);
            scale = 1.0f / sqrtf(warp_sum(sum) / (float)dim + p.eps);
        }
        auto turned = [&](T low, T high, u32 i, T& to_low, T& to_high) {
            float a = read(low), b = read(high);
            if (norm) a = a * scale * norm[i], b = b * scale * norm[half + i];
            float cos = angles[i], sin = angles[half + i];
            write(to_low, a * cos - b * sin);
            write(to_high, b * cos + a * sin);
        };
        if (half % 2) {
            for (u32 i = lane; i < half; i += 32) turned(from[i], from[half + i], i, to[i], to[half + i]);
            continue;
        }
        for (u32 i = lane; i < half / 2; i += 32) {
            Two low = ((const Two*)from)[i], high = ((const Two*)(from + half))[i], out[2];
            turned(low.of[0], high.of[0], 2 * i, out[0].of[0], out[1].of[0]);
            turned(low.of[1], high.of[1], 2 * i + 1, out[0].of[1], out[1].of[1]);
            ((Two*)to)[i] = out[0];
            ((Two*)(to + half))[i] = out[1];
        }
    }
}

extern "C" __global__ void turn_f32(Turn p) { turn<float>(p); }
extern "C" __global__ void turn_f16(Turn p) { turn<f16>(p); }
extern "C" __global__ void turn_bf16(Turn p) { turn<bf16>(p); }

// ---- Attention for any heads

struct Plain {
    const void* qkv;
    void* out; // [rows][heads][dim]
    const Row* rows;
    Pages pages;
    Heads heads;
};

const u32 PLAIN_DIMS = 8; // of each lane at most: heads of up to 256

// A warp for each row and head: y and x. Four warps of a block share the keys out, each by an online softmax.
template <typename T>
__device__ __forceinline__ void plain(const Plain& p) {
    __shared__ float outs[4][PLAIN_DIMS * 32], maxima[4], sums[4];
    Row row = p.rows[blockIdx.y];
    if (row.position < 0) return;
    u32 dim = p.heads.dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 head = blockIdx.x, kv_head = head / (p.heads.heads / p.heads.kv_heads);
    const T* from = (const T*)p.qkv + (u64)blockIdx.y * (p.heads.heads + 2 * p.heads.kv_heads) * dim + head * dim;
    const T* keys = (const T*)p.pages.base + (u64)kv_head * p.pages.page_tokens * dim;
    float query[PLAIN_DIMS], out[PLAIN_DIMS];
#pragma unroll
    for (u32 d = 0; d < PLAIN_DIMS; d++) {
        query[d] = lane + 32 * d < dim ? read(from[lane + 32 * d]) * p.heads.scale : 0;
        out[d] = 0;
    }
    float maximum = -INFINITY, sum = 0;
    for (int at = first_seen(p.heads, row.position) + warp; at <= row.position; at += 4) {
        u32 page = p.pages.tables[row.table + at / p.pages.page_tokens];
        const T* key = keys + page * p.pages.page + (at % p.pages.page_tokens) * dim;
        const T* value = key + p.pages.value;
        float score = 0;
#pragma unroll
        for (u32 d = 0; d < PLAIN_DIMS; d++)
            if (lane + 32 * d < dim) score += query[d] * read(key[lane + 32 * d]);
        score = warp_sum(score);
        float higher = fmaxf(maximum, score), keep = expf(maximum - higher), weight = expf(score - higher);
        maximum = higher;
        sum = sum * keep + weight;
#pragma unroll
        for (u32 d = 0; d < PLAIN_DIMS; d++)
            if (lane + 32 * d < dim) out[d] = out[d] * keep + weight * read(value[lane + 32 * d]);
    }
    for (u32 d = 0; d < PLAIN_DIMS; d++) outs[warp][lane + 32 * d] = out[d];
    if (lane == 0) maxima[warp] = maximum, sums[warp] = sum;
    __syncthreads();
    maximum = fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3]));
    sum = 0;
    for (u32 w = 0; w < 4; w++) sum += sums[w] * expf(maxima[w] - maximum);
    T* to = (T*)p.out + ((u64)blockIdx.y * p.heads.heads + head) * dim;
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) {
        float x = 0;
        for (u32 w = 0; w < 4; w++) x += outs[w][i] * expf(maxima[w] - maximum);
        write(to[i], x / sum);
    }
}

extern "C" __global__ void plain_f32(Plain p) { plain<float>(p); }
extern "C" __global__ void plain_f16(Plain p) { plain<f16>(p); }
extern "C" __global__ void plain_bf16(Plain p) { plain<bf16>(p); }
