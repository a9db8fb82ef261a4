// Numbers as they are stored, and what the kernels of the model know of a step. `compute.rs` mirrors the structs.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;
typedef __half f16;
typedef __nv_bfloat16 bf16;

__device__ __forceinline__ float read(float x) { return x; }
__device__ __forceinline__ float read(f16 x) { return __half2float(x); }
__device__ __forceinline__ float read(bf16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void write(float& to, float x) { to = x; }
__device__ __forceinline__ void write(f16& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void write(bf16& to, float x) { to = __float2bfloat16_rn(x); }

// A dtype that is known when the kernel runs.
enum Stored : u32 { F32, F16, BF16 };

__device__ __forceinline__ float read(const void* from, u32 stored, u64 at) {
    if (stored == F32) return ((const float*)from)[at];
    return stored == F16 ? read(((const f16*)from)[at]) : read(((const bf16*)from)[at]);
}

__device__ __forceinline__ void write(void* to, u32 stored, u64 at, float x) {
    if (stored == F32) ((float*)to)[at] = x;
    else if (stored == F16) write(((f16*)to)[at], x);
    else write(((bf16*)to)[at], x);
}

// The pages of one layer: elements from one page, and from keys to values. In a page [k|v][kv_head][token][dim].
struct Pages {
    void* base;
    u64 page, value;
    const u32* tables; // of all sequences
    u32 page_tokens;
    u32 magic; // of a division by page_tokens: n / page_tokens = umulhi(n, magic) for n * page_tokens below 2^32
};

// The heads of a layer. A row of `qkv` is [heads][dim] queries, then [kv_heads][dim] keys, then as many values.
struct Heads {
    u32 heads, kv_heads, dim;
    u32 window; // positions that a query sees, itself included
    float scale;
};

// A row: its position, or -1 if it is there only to fill a batch; where its sequence's pages begin in `tables`.
struct Row {
    int position;
    u32 table;
};

// Queries of one sequence that are computed together: the first one's row, how many, its position (-1 as in `Row`),
// and pages.
struct Queries {
    u32 row, count;
    int position;
    u32 table;
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
}

// The first position that a query sees.
__device__ __forceinline__ int first_seen(const Heads& heads, int position) {
    return position + 1 > (int)heads.window ? position + 1 - (int)heads.window : 0;
}

// c += a * b on tensor cores: 16 rows of a, 8 columns of b, 16 numbers each. The lane's numbers of a are rows lane/4 and
// lane/4 + 8, those of b column lane/4, those of c as a's rows.
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
