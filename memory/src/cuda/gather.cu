// Copies a list of pieces, as a rule out of another GPU's memory, on few multiprocessors. `gather.rs` mirrors every
// struct here.
//
// Each piece is cut into tiles, which the blocks take by turns: a tile is what the threads of a block load at once.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

constexpr u32 THREADS = 512, LOADS = 8, TILE = THREADS * LOADS * 16;
constexpr u32 PIECES = 128;

struct Piece {
    u64 from, to, bytes;
};

// Goes with the launch, which takes 4 KiB: no copy of a list comes before.
struct Job {
    u32 tiles;
    u32 ends[PIECES]; // tiles up to each piece's end
    Piece pieces[PIECES];
};

__device__ __forceinline__ void copy_bytes(u64 from, u64 to, u64 bytes) {
    for (u64 i = threadIdx.x; i < bytes; i += THREADS) *(u8*)(to + i) = *(const u8*)(from + i);
}

__device__ __forceinline__ void copy_tile(u64 from, u64 to, u32 bytes) {
    u32 head = u32(-to) & 15;
    if (((from ^ to) & 15) != 0 || bytes < head + 16) return copy_bytes(from, to, bytes);
    u32 units = (bytes - head) / 16, tail = head + units * 16;
    if (head > 0) copy_bytes(from, to, head);
    // Read and written once: neither cache is to keep it.
    const ulonglong2* source = (const ulonglong2*)(from + head);
    ulonglong2* target = (ulonglong2*)(to + head);
    ulonglong2 data[LOADS];
#pragma unroll
    for (u32 i = 0; i < LOADS; ++i) {
        u32 n = i * THREADS + threadIdx.x;
        if (n < units) data[i] = __ldcs(source + n);
    }
#pragma unroll
    for (u32 i = 0; i < LOADS; ++i) {
        u32 n = i * THREADS + threadIdx.x;
        if (n < units) __stcs(target + n, data[i]);
    }
    if (tail < bytes) copy_bytes(from + tail, to + tail, bytes - tail);
}

extern "C" __global__ void __launch_bounds__(THREADS) gather(const __grid_constant__ Job job) {
    u32 piece = 0, begin = 0;
    for (u32 tile = blockIdx.x; tile < job.tiles; tile += gridDim.x) {
        while (tile >= job.ends[piece]) begin = job.ends[piece++];
        const Piece& of = job.pieces[piece];
        u64 at = u64(tile - begin) * TILE, left = of.bytes - at;
        copy_tile(of.from + at, of.to + at, left < TILE ? u32(left) : TILE);
    }
}
