// Products of a few rows: decoding, where all there is to do is to read the weight once. A block has 16 of its rows, and
// its warps share their numbers out, so all that is read is under way at once. Sums are in an order that the matrix alone
// gives.

#include "numbers.cuh"

struct Few {
    const void* weight; // [outputs][inputs]
    const float* bias;  // or null
    const void* x;      // [rows][inputs]
    void* out;          // [rows][outputs], or half as many where they are a gate's and its projection's
    u32 rows, outputs, inputs;
    u32 stored, add; // of out; whether to add to it
};

const u32 WARPS = 8;
// Numbers of a row that a warp takes at a time in one product, and how many of these.
const u32 CHUNK = 32, AHEAD = 4;

__device__ __forceinline__ uint4 stream16(const void* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// A lane reads 16 bytes of a row, where the tensor core wants twice 4 and twice 4 more: numbers of both factors are
// exchanged in the same way.
template <typename T, int N, bool GATED>
__device__ __forceinline__ void few(const Few& p) {
    __shared__ float parts[WARPS][16][N * 8 + 1];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const u32 width = GATED ? p.outputs / 2 : p.outputs;
    const u32 first = blockIdx.x * (GATED ? 8 : 16);
    const T* low = (const T*)p.weight + (u64)(first + g) * p.inputs + lane % 4 * 8;
    const T* high = low + (u64)(GATED ? width : 8) * p.inputs;
    const T* x = (const T*)p.x + (u64)g * p.inputs + lane % 4 * 8;
    const u32 chunks = p.inputs / CHUNK;
    const uint4 zero = make_uint4(0, 0, 0, 0);

    uint4 a[AHEAD][2];
    auto load = [&](u32 chunk) {
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            bool there = chunk + i < chunks;
            a[i][0] = there ? stream16(low + (chunk + i) * CHUNK) : zero;
            a[i][1] = there ? stream16(high + (chunk + i) * CHUNK) : zero;
        }
    };
    float c[N][4] = {};
    u32 chunk = warp * AHEAD;
    load(chunk);
    for (; chunk < chunks; chunk += WARPS * AHEAD) {
        uint4 b[AHEAD][N];
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++)
#pragma unroll
            for (int n = 0; n < N; n++) {
                bool there = g + n * 8 < p.rows && chunk + i < chunks;
                b[i][n] = there ? *(const uint4*)(x + (u64)n * 8 * p.inputs + (chunk + i) * CHUNK) : zero;
            }
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            const u32 even[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
            const u32 odd[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
#pragma unroll
            for (int n = 0; n < N; n++) {
                multiply(c[n], even, b[i][n].x, b[i][n].y, T());
                multiply(c[n], odd, b[i][n].z, b[i][n].w, T());
            }
        }
        load(chunk + WARPS * AHEAD);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) parts[warp][g + i / 2 * 8][n * 8 + lane % 4 * 2 + i % 2] = c[n][i];
    __syncthreads();

    auto sum = [&](u32 output, u32 row) {
        float sum = 0;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) sum += parts[w][output][row];
        return sum;
    };
    const u32 each = GATED ? 8 : 16, output = threadIdx.x % each, row = threadIdx.x / each, column = first + output;
    if (row >= p.rows) return;
    float y = sum(output, row);
    if (p.bias) y += p.bias[column];
    if (GATED) {
        float up = sum(output + 8, row);
        if (p.bias) up += p.bias[width + column];
        y = y / (1.0f + __expf(-y)) * up;
    }
    u64 at = (u64)row * width + column;
    if (p.add) y += read(p.out, p.stored, at);
    write(p.out, p.stored, at, y);
}

#define FEW(type)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 3) few_##type##_8(Few p) { few<type, 1, false>(p); }    \
    extern "C" __global__ void __launch_bounds__(256, 2) few_##type##_16(Few p) { few<type, 2, false>(p); }   \
    extern "C" __global__ void __launch_bounds__(256, 3) gated_##type##_8(Few p) { few<type, 1, true>(p); }   \
    extern "C" __global__ void __launch_bounds__(256, 2) gated_##type##_16(Few p) { few<type, 2, true>(p); }
FEW(f16)
FEW(bf16)
