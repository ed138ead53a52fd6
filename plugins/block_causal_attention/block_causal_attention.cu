// FP8 block-causal attention over a KV cache, for Hopper (sm_90a): aapt_pack, aapt_attend, aapt_commit.
//
// README.md beside this file draws the layout and the order of things; aapt_deploy/ops/block_causal_attention/hopper_fp8.py defines both in NumPy.
// One source for NVRTC, nvcc, PyTorch and TensorRT: no includes, plain launches, flat parameters.
// Static shared memory stays within 48 KB, unless AAPT_DYNAMIC asks for dynamic.
// Compile once per head dimension: -DAAPT_HEAD_DIM=128 | 64, for sm_90a.
//
// Everything that only the hardware can do is in the first part, as one function per instruction. Outside a CUDA compiler that part is left to the
// file which includes this one: tests/kernels_on_cpu.cpp runs the rest, unchanged, on a CPU.

#ifndef AAPT_HEAD_DIM
#define AAPT_HEAD_DIM 128
#endif
#if AAPT_HEAD_DIM != 128 && AAPT_HEAD_DIM != 64
#error "AAPT_HEAD_DIM must be 128 or 64"
#endif

// Tiles of K and of V that shared memory holds. PV runs one tile behind QK, so K is one ahead.
#ifndef AAPT_RING_K
#define AAPT_RING_K (AAPT_HEAD_DIM == 128 ? 3 : 6)
#define AAPT_RING_V (AAPT_HEAD_DIM == 128 ? 2 : 4)
#endif

// 1: the ring lies in dynamic shared memory, which may be larger than 48 KB; the launch says how
// much. 0: static, as an ahead-of-time plugin needs it.
#ifndef AAPT_DYNAMIC
#define AAPT_DYNAMIC 0
#endif

// The visits by which the copy of a tile into L2 runs ahead of its use; 0: no such copies.
#ifndef AAPT_PREFETCH
#define AAPT_PREFETCH 8
#endif

// 1: the prologue loads all of a thread's queries, then divides. 0: value by value.
#ifndef AAPT_LOADS_FIRST
#define AAPT_LOADS_FIRST 1
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int D = AAPT_HEAD_DIM;
constexpr int TILE_KEYS = 64;
constexpr int TILE_BYTES = TILE_KEYS * D;
constexpr int QUERY_ROWS = 128;       // of one thread block: 64 per consumer warpgroup
constexpr int CONSUMER_WARPS = 8;     // in two warpgroups, behind the producer's
constexpr int RING_K = AAPT_RING_K;
constexpr int RING_V = AAPT_RING_V;
constexpr int PREFETCH = AAPT_PREFETCH;
constexpr int SWIZZLE_ATOM = 1024;    // bytes to which a ring is aligned

#ifdef __CUDACC__

// ---------------------------------------------------------------- the hardware

__device__ __forceinline__ u32 shared_address(const void* p) {
    u32 address;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(p));
    return address;
}

// Barriers in shared memory. A phase ends when all arrivals are in and all expected bytes have landed.

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits, before __syncthreads: other threads and the copy engine see them.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {  // one arrival, and bytes to come
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// Returns once the phase of this parity has ended. On a new barrier the phase before the first counts as ended: parity 1 returns at once.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@ended bra ENDED;\n"
        "bra AGAIN;\n"
        "ENDED:\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
}

// 16-byte aligned, a multiple of 16 bytes; counts towards what `barrier` expects.
__device__ __forceinline__ void bulk_load(u32 target, const u8* source, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target), "l"(source), "r"(bytes),
                 "r"(barrier)
                 : "memory");
}

// The same run of bytes on its way into L2; a hint that nothing waits for.
__device__ __forceinline__ void prefetch_l2(const u8* source, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// Shared memory of a thread block, static or as the launch gives it.
#if AAPT_DYNAMIC
#define AAPT_SHARED(name, bytes) extern __shared__ __align__(1024) u8 name[]
#else
#define AAPT_SHARED(name, bytes) __shared__ __align__(1024) u8 name[bytes]
#endif

// A warpgroup gives registers back, or takes them. All of its threads must come here.
template <int N> __device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 e4m3x2(float low, float high) {  // to nearest even, saturating; two bytes
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 bf16x2(float low, float high) {  // to nearest even
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float divide(float x, float y) { return __fdiv_rn(x, y); }
__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }
template <int LANES> __device__ __forceinline__ float from_lane_xor(float x) { return __shfl_xor_sync(0xffffffffu, x, LANES); }

// Products of a warpgroup, m64nNk32, e4m3 x e4m3 -> float32: A from registers, B from shared memory by descriptor, both along K; the next 32 values
// of K are at descriptor + 2. `multiply` begins a group: a = A(0) B(0) + A(1) B(1) + ..; the result and A belong to the tensor core until
// `multiply_wait` and `touch`.

#define AAPT_OUT4(x, i) "=f"(x[i]), "=f"(x[i + 1]), "=f"(x[i + 2]), "=f"(x[i + 3])
#define AAPT_OUT16(x, i) AAPT_OUT4(x, i), AAPT_OUT4(x, i + 4), AAPT_OUT4(x, i + 8), AAPT_OUT4(x, i + 12)
#define AAPT_OUT32(x) AAPT_OUT16(x, 0), AAPT_OUT16(x, 16)
#define AAPT_OUT64(x) AAPT_OUT16(x, 0), AAPT_OUT16(x, 16), AAPT_OUT16(x, 32), AAPT_OUT16(x, 48)
#define AAPT_IN4(x, i) "r"(x[i]), "r"(x[i + 1]), "r"(x[i + 2]), "r"(x[i + 3])
#define AAPT_R32                                                                    \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define AAPT_R64                                                                          \
    AAPT_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "   \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define AAPT_BEGIN                                                 \
    "{\n"                                                          \
    ".reg .pred fresh, more;\n"                                    \
    ".reg .b64 b1, b2, b3;\n"                                      \
    "setp.ne.b32 fresh, 0, 0;\n" /* false: the accumulator starts from zero */ \
    "setp.eq.b32 more, 0, 0;\n"                                    \
    "wgmma.fence.sync.aligned;\n"
#define AAPT_END "wgmma.commit_group.sync.aligned;\n}"
#define AAPT_N64 "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
#define AAPT_N128 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "

__device__ __forceinline__ void multiply(float (&c)[32], const u32 (&a)[8], u64 b) {  // 64 x 64, K = 64
    asm volatile(AAPT_BEGIN "add.s64 b1, %40, 2;\n"                                                        //
                 AAPT_N64 AAPT_R32 "}, {%32, %33, %34, %35}, %40, fresh, 1, 1;\n"                          //
                 AAPT_N64 AAPT_R32 "}, {%36, %37, %38, %39}, b1, more, 1, 1;\n" AAPT_END                   //
                 : AAPT_OUT32(c)
                 : AAPT_IN4(a, 0), AAPT_IN4(a, 4), "l"(b)
                 : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[32], const u32 (&a)[16], u64 b) {  // 64 x 64, K = 128
    asm volatile(AAPT_BEGIN "add.s64 b1, %48, 2;\nadd.s64 b2, %48, 4;\nadd.s64 b3, %48, 6;\n"              //
                 AAPT_N64 AAPT_R32 "}, {%32, %33, %34, %35}, %48, fresh, 1, 1;\n"                          //
                 AAPT_N64 AAPT_R32 "}, {%36, %37, %38, %39}, b1, more, 1, 1;\n"                            //
                 AAPT_N64 AAPT_R32 "}, {%40, %41, %42, %43}, b2, more, 1, 1;\n"                            //
                 AAPT_N64 AAPT_R32 "}, {%44, %45, %46, %47}, b3, more, 1, 1;\n" AAPT_END                   //
                 : AAPT_OUT32(c)
                 : AAPT_IN4(a, 0), AAPT_IN4(a, 4), AAPT_IN4(a, 8), AAPT_IN4(a, 12), "l"(b)
                 : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[64], const u32 (&a)[8], u64 b) {  // 64 x 128, K = 64
    asm volatile(AAPT_BEGIN "add.s64 b1, %72, 2;\n"                                                        //
                 AAPT_N128 AAPT_R64 "}, {%64, %65, %66, %67}, %72, fresh, 1, 1;\n"                         //
                 AAPT_N128 AAPT_R64 "}, {%68, %69, %70, %71}, b1, more, 1, 1;\n" AAPT_END                  //
                 : AAPT_OUT64(c)
                 : AAPT_IN4(a, 0), AAPT_IN4(a, 4), "l"(b)
                 : "memory");
}

// Until at most `PENDING` of this warpgroup's groups are unfinished.
template <int PENDING> __device__ __forceinline__ void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Registers that the tensor core wrote or read become ordinary here: the compiler moves no use of them above this point, and no computation of them
// below it.
template <int N> __device__ __forceinline__ void touch(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void touch(u32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#endif  // __CUDACC__

// ---------------------------------------------------------------- the layout

// Byte address with 16-byte pieces exchanged inside groups of 8 rows of SPAN bytes.
template <int SPAN> __host__ __device__ __forceinline__ int swizzled(int offset) { return offset ^ (((offset >> 7) & (SPAN / 16 - 1)) << 4); }

// Where channel d of key 0..63 lies in a K tile.
__host__ __device__ __forceinline__ int k_offset(int key, int d) { return swizzled<D>(key * D + d); }

// Where byte column 0..63 of channel d lies in a V tile, and which key 0..63 that column holds.
__host__ __device__ __forceinline__ int v_offset(int d, int column) { return swizzled<64>(d * TILE_KEYS + column); }
__host__ __device__ __forceinline__ int key_of_column(int column) {
    return (column & 48) | ((column & 12) >> 1) | ((column & 2) << 2) | (column & 1);
}

// Byte column of a key: the inverse.
__host__ __device__ __forceinline__ int column_of_key(int key) { return (key & 48) | ((key & 6) << 1) | ((key & 8) >> 2) | (key & 1); }

// Shared-memory matrix descriptor of a tile with rows of SPAN bytes: address, leading offset 1 (unused), 8 rows to the next group, swizzle code.
template <int SPAN> __host__ __device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)(address >> 4) | (u64)1 << 16 | (u64)(8 * SPAN >> 4) << 32 | (u64)(SPAN == 128 ? 1 : 2) << 62;
}

__host__ __device__ __forceinline__ int tiles_of(int tokens) { return (tokens + TILE_KEYS - 1) / TILE_KEYS; }
__host__ __device__ __forceinline__ int clamped(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// First byte of a tile in an image [H, tiles, TILE_BYTES].
__host__ __device__ __forceinline__ u64 tile_at(int head, int tiles, int tile) { return ((u64)head * (u64)tiles + (u64)tile) * (u64)TILE_BYTES; }

// ---------------------------------------------------------------- pack

__device__ __forceinline__ float bf16_low(u32 pair) { return as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(u32 pair) { return as_float(pair & 0xffff0000u); }

__device__ __forceinline__ u32 e4m3x4(float x0, float x1, float x2, float x3) { return e4m3x2(x0, x1) | e4m3x2(x2, x3) << 16; }

// k, v bf16 [T, H, D] -> block images. Grid (tiles of T, H), any block size. Bytes behind the last token are zero.
extern "C" __global__ void __launch_bounds__(256)
aapt_pack(const u16* __restrict__ k, const u16* __restrict__ v, const float* __restrict__ k_scale, const float* __restrict__ k_mean,
          const float* __restrict__ v_scale, int T, int H, u8* __restrict__ k_block, u8* __restrict__ v_block) {
    const int tile = blockIdx.x, head = blockIdx.y, first = tile * TILE_KEYS;
    const u64 image = tile_at(head, tiles_of(T), tile);

    // K: four neighbouring channels of one key are four neighbouring bytes.
    for (int i = threadIdx.x; i < TILE_BYTES / 4; i += blockDim.x) {
        const int key = i / (D / 4), d = i % (D / 4) * 4;
        u32 four = 0;
        if (first + key < T) {
            const uint2 x = *(const uint2*)(k + ((u64)(first + key) * (u64)H + (u64)head) * (u64)D + (u64)d);
            const float* mean = k_mean + (u64)head * D + d;
            const float scale = k_scale[head];
            four = e4m3x4(divide(bf16_low(x.x) - mean[0], scale), divide(bf16_high(x.x) - mean[1], scale),  //
                          divide(bf16_low(x.y) - mean[2], scale), divide(bf16_high(x.y) - mean[3], scale));
        }
        *(u32*)(k_block + image + k_offset(key, d)) = four;
    }

    // V: four neighbouring bytes are one channel of four keys. Two channels at a time, neighbouring threads read neighbouring channels.
    for (int i = threadIdx.x; i < TILE_BYTES / 8; i += blockDim.x) {
        const int d = i % (D / 2) * 2, column = i / (D / 2) * 4;
        float even[4], odd[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            const int token = first + key_of_column(column + b);
            const u32 x = token < T ? *(const u32*)(v + ((u64)token * (u64)H + (u64)head) * (u64)D + (u64)d) : 0u;
            even[b] = divide(bf16_low(x), v_scale[(u64)head * D + d]);
            odd[b] = divide(bf16_high(x), v_scale[(u64)head * D + d + 1]);
        }
        *(u32*)(v_block + image + v_offset(d, column)) = e4m3x4(even[0], even[1], even[2], even[3]);
        *(u32*)(v_block + image + v_offset(d + 1, column)) = e4m3x4(odd[0], odd[1], odd[2], odd[3]);
    }
}

// ---------------------------------------------------------------- commit

// Moves the T tokens of block images into the caches, from token slot[0] on. Grid (tiles of T + 1, H), any block size: a block that does not begin
// at a tile touches one tile more. No other token changes; nothing happens if the block does not fit.
extern "C" __global__ void __launch_bounds__(256)
aapt_commit(const u8* __restrict__ k_block, const u8* __restrict__ v_block, const int* __restrict__ slot, int T, int H, int cache_tiles,
            u8* __restrict__ k_cache, u8* __restrict__ v_cache) {
    const int begin = slot[0], head = blockIdx.y;
    if (begin < 0 || begin > cache_tiles * TILE_KEYS - T) return;
    const int tile = begin / TILE_KEYS + blockIdx.x;
    if (tile * TILE_KEYS >= begin + T) return;
    const int shift = tile * TILE_KEYS - begin;  // token of the block under key 0 of this tile; negative in the first tile
    const u64 cache = tile_at(head, cache_tiles, tile), block = tile_at(head, tiles_of(T), 0);

    // K: 16 channels of one key at a time.
    for (int i = threadIdx.x; i < TILE_BYTES / 16; i += blockDim.x) {
        const int key = i / (D / 16), d = i % (D / 16) * 16, token = key + shift;
        if (token < 0 || token >= T) continue;
        const u64 source = block + (u64)(token / TILE_KEYS) * TILE_BYTES + k_offset(token % TILE_KEYS, d);
        *(uint4*)(k_cache + cache + k_offset(key, d)) = *(const uint4*)(k_block + source);
    }

    // V: four keys of one channel lie side by side in the cache, and anywhere in the block.
    for (int i = threadIdx.x; i < TILE_BYTES / 4; i += blockDim.x) {
        const int d = i / (TILE_KEYS / 4), column = i % (TILE_KEYS / 4) * 4;
        u8* const target = v_cache + cache + v_offset(d, column);
        u32 four = 0, filled = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            const int token = key_of_column(column + b) + shift;
            if (token < 0 || token >= T) continue;
            const u64 source = block + (u64)(token / TILE_KEYS) * TILE_BYTES + v_offset(d, column_of_key(token % TILE_KEYS));
            four |= (u32)v_block[source] << 8 * b;
            filled |= 1u << b;
        }
        if (filled == 15u) {
            *(u32*)target = four;
        } else {
#pragma unroll
            for (int b = 0; b < 4; ++b)
                if (filled >> b & 1u) target[b] = (u8)(four >> 8 * b);
        }
    }
}

// ---------------------------------------------------------------- attend

// Place in a ring of SLOTS. The parity is that of the phase which ends when the slot has been filled; its complement's, when it has been emptied.
template <int SLOTS> struct Place {
    u32 slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// Shared memory: [ K tiles | V tiles | K full | K empty | V full | V empty ], addresses as numbers.
struct Ring {
    u32 base;
    __device__ __forceinline__ u32 k_tile(u32 slot) const { return base + slot * TILE_BYTES; }
    __device__ __forceinline__ u32 v_tile(u32 slot) const { return base + (RING_K + slot) * TILE_BYTES; }
    __device__ __forceinline__ u32 barrier(u32 index) const { return base + (RING_K + RING_V) * TILE_BYTES + 8 * index; }
    __device__ __forceinline__ u32 k_full(u32 slot) const { return barrier(slot); }
    __device__ __forceinline__ u32 k_empty(u32 slot) const { return barrier(RING_K + slot); }
    __device__ __forceinline__ u32 v_full(u32 slot) const { return barrier(2 * RING_K + slot); }
    __device__ __forceinline__ u32 v_empty(u32 slot) const { return barrier(2 * RING_K + RING_V + slot); }
};
constexpr int RING_BYTES = (RING_K + RING_V) * (TILE_BYTES + 16);
static_assert(RING_BYTES + SWIZZLE_ATOM <= 227 * 1024, "more than a thread block may have");

// The tiles that one thread block visits, in order: the block's from the last to the first, then the cache's from the last valid one to the first.
struct Visits {
    int block_tiles, cache_tiles, head, allocated_tiles;
    __device__ __forceinline__ int count() const { return block_tiles + cache_tiles; }
    __device__ __forceinline__ const u8* tile(int visit, const u8* block, const u8* cache) const {
        return visit < block_tiles ? block + tile_at(head, block_tiles, block_tiles - 1 - visit)
                                   : cache + tile_at(head, allocated_tiles, cache_tiles - 1 - (visit - block_tiles));
    }
};

// One thread feeds the ring, K one visit ahead of V: K0 K1 V0 K2 V1 ..
__device__ __forceinline__ void produce(const Ring ring, const Visits visits, const u8* k_block, const u8* v_block, const u8* k_cache, const u8* v_cache) {
    Place<RING_K> k;
    Place<RING_V> v;
    const int count = visits.count();
#pragma unroll 1
    for (int visit = 0; visit <= count; ++visit) {
        // The thread blocks of a head visit the same tiles: each prefetches its share of them.
        const int ahead = visit + PREFETCH;
        if (PREFETCH && ahead < count && ahead % (int)gridDim.x == (int)blockIdx.x) {
            prefetch_l2(visits.tile(ahead, k_block, k_cache), TILE_BYTES);
            prefetch_l2(visits.tile(ahead, v_block, v_cache), TILE_BYTES);
        }
        if (visit < count) {
            barrier_wait(ring.k_empty(k.slot), k.parity ^ 1);
            barrier_expect(ring.k_full(k.slot), TILE_BYTES);
            bulk_load(ring.k_tile(k.slot), visits.tile(visit, k_block, k_cache), TILE_BYTES, ring.k_full(k.slot));
            k.next();
        }
        if (visit > 0) {
            barrier_wait(ring.v_empty(v.slot), v.parity ^ 1);
            barrier_expect(ring.v_full(v.slot), TILE_BYTES);
            bulk_load(ring.v_tile(v.slot), visits.tile(visit - 1, v_block, v_cache), TILE_BYTES, ring.v_full(v.slot));
            v.next();
        }
    }
}

// Scores of keys from `valid` on become -inf. Register i of a thread holds column 8 (i / 4) + 2 (lane % 4) + i % 2.
__device__ __forceinline__ void mask(float (&s)[32], int valid, int lane) {
#pragma unroll
    for (int i = 0; i < 32; ++i)
        if (8 * (i >> 2) + 2 * (lane & 3) + (i & 1) >= valid) s[i] = as_float(0xff800000u);
}

// What a thread knows of its two rows, g and g + 8: register i belongs to row (i / 2) % 2.
struct Rows {
    float maximum[2], sum[2];  // the sum is this thread's share
};

// Scores -> p = 2^((s - maximum) c + 8), in place, under the new maximum; rescale = 2^((old - new) c), what earlier sums are worth now.
__device__ __forceinline__ void softmax(float (&s)[32], Rows& rows, float (&rescale)[2], float c) {
    float high[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 4; i < 32; ++i) high[i & 3] = fmaxf(high[i & 3], s[i]);
    float bias[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float m = fmaxf(high[2 * row], high[2 * row + 1]);
        m = fmaxf(m, from_lane_xor<1>(m));
        m = fmaxf(m, from_lane_xor<2>(m));
        m = fmaxf(m, rows.maximum[row]);
        rescale[row] = exp2_fast((rows.maximum[row] - m) * c);
        rows.maximum[row] = m;
        bias[row] = 8.0f - m * c;
    }
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        s[i] = exp2_fast(fmaf(s[i], c, bias[i >> 1 & 1]));
        sum[i & 3] += s[i];
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) rows.sum[row] = fmaf(rows.sum[row], rescale[row], sum[2 * row] + sum[2 * row + 1]);
}

// p as operand A, two times 32 keys. Its columns come out as V tiles have theirs: no value leaves its thread.
__device__ __forceinline__ void to_operand(const float (&p)[32], u32 (&a)[8]) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        const int i = 16 * (r >> 2) + 8 * (r >> 1 & 1) + 2 * (r & 1);
        a[r] = e4m3x4(p[i], p[i + 1], p[i + 4], p[i + 5]);
    }
}

// A warpgroup's 64 rows of Q, from row `first` on, as operand A: register r of step k holds 4 channels of row 16 warp + g + 8 (r % 2). Rows from T on
// are zero.
__device__ __forceinline__ void load_queries(u32 (&a)[D / 8], const u16* q, int first, int T, int H, int head, float scale, int thread) {
    const int row = first + 16 * (thread >> 5) + ((thread & 31) >> 2);
    const auto loaded = [&](int i) {  // four channels of one row
        const int token = row + 8 * (i & 1), d = 32 * (i >> 2) + 16 * (i >> 1 & 1) + 4 * (thread & 3);
        uint2 x = {0u, 0u};
        if (token < T) x = *(const uint2*)(q + ((u64)token * (u64)H + (u64)head) * (u64)D + (u64)d);
        return x;
    };
    const auto divided = [&](uint2 x) {
        return e4m3x4(divide(bf16_low(x.x), scale), divide(bf16_high(x.x), scale),  //
                      divide(bf16_low(x.y), scale), divide(bf16_high(x.y), scale));
    };
#if AAPT_LOADS_FIRST
    // A division may call a function, and the compiler moves no load across a call.
    uint2 x[D / 8];
#pragma unroll
    for (int i = 0; i < D / 8; ++i) x[i] = loaded(i);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) a[i] = divided(x[i]);
#else
#pragma unroll
    for (int i = 0; i < D / 8; ++i) a[i] = divided(loaded(i));
#endif
}

// acc v_scale / sum -> bf16. Register i is column 8 (i / 4) + 2 (lane % 4) + i % 2 of row (i / 2) % 2.
__device__ __forceinline__ void store(const float (&acc)[D / 2], Rows& rows, const float* v_scale, u16* out, int first, int T, int H, int head,
                                      int thread) {
    const int row = first + 16 * (thread >> 5) + ((thread & 31) >> 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = rows.sum[r];
        sum += from_lane_xor<1>(sum);
        sum += from_lane_xor<2>(sum);
        const int token = row + 8 * r;
        if (token >= T) continue;
        const float share = 1.0f / sum;
        u16* const line = out + ((u64)token * (u64)H + (u64)head) * (u64)D;
#pragma unroll
        for (int i = 0; i < D / 2; i += 4) {
            const int d = 2 * i + 2 * (thread & 3);
            const float* scale = v_scale + (u64)head * D + d;
            *(u32*)(line + d) = bf16x2(acc[i + 2 * r] * scale[0] * share, acc[i + 2 * r + 1] * scale[1] * share);
        }
    }
}

// A warpgroup with 64 query rows. The products of a visit overlap with the softmax of the next: while P.V of visit j - 1 runs, the scores of visit j
// become probabilities.
__device__ __forceinline__ void consume(const Ring ring, const Visits visits, const u32 (&q)[D / 8], float (&acc)[D / 2], Rows& rows, float c,
                                        int block_tail, int cache_tail, int lane) {
    Place<RING_K> k;
    Place<RING_V> v;
    const int count = visits.count();
    const u64 k_first = descriptor<D>(ring.k_tile(0)), v_first = descriptor<64>(ring.v_tile(0));
    float s[32], t[D / 2], rescale[2], next_rescale[2];
    u32 p[8];

    barrier_wait(ring.k_full(k.slot), k.parity);
    multiply(s, q, k_first);
    multiply_wait<0>();
    touch(s);
    if (lane == 0) barrier_arrive(ring.k_empty(k.slot));
    k.next();
    mask(s, block_tail, lane);
    softmax(s, rows, rescale, c);
    to_operand(s, p);
    if (count > 1) barrier_wait(ring.k_full(k.slot), k.parity);

#pragma unroll 1
    for (int visit = 1; visit < count; ++visit) {
        multiply(s, q, k_first + k.slot * (TILE_BYTES >> 4));
        barrier_wait(ring.v_full(v.slot), v.parity);
        multiply(t, p, v_first + v.slot * (TILE_BYTES >> 4));
        multiply_wait<1>();
        touch(s);
        if (lane == 0) barrier_arrive(ring.k_empty(k.slot));
        k.next();
        if (visit == visits.block_tiles) mask(s, cache_tail, lane);
        softmax(s, rows, next_rescale, c);
        touch(s);
        // The wait for the next K tile stands here and not at the top because it ends a basic block: ptxas moves the whole softmax behind the second
        // wait of the products otherwise, and nothing overlaps any more.
        if (visit + 1 < count) barrier_wait(ring.k_full(k.slot), k.parity);
        multiply_wait<0>();
        touch(t);
        touch(p);
        if (lane == 0) barrier_arrive(ring.v_empty(v.slot));
        v.next();
#pragma unroll
        for (int i = 0; i < D / 2; ++i) acc[i] = fmaf(acc[i], rescale[i >> 1 & 1], t[i]);
        to_operand(s, p);
        rescale[0] = next_rescale[0];
        rescale[1] = next_rescale[1];
    }

    barrier_wait(ring.v_full(v.slot), v.parity);
    multiply(t, p, v_first + v.slot * (TILE_BYTES >> 4));
    multiply_wait<0>();
    touch(t);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) acc[i] = fmaf(acc[i], rescale[i >> 1 & 1], t[i]);
}

// q bf16 [T, H, D], block images, caches, valid tokens of the caches -> out bf16 [T, H, D]. Grid (ceil(T / 128), H), 384 threads: a producer warpgroup
// and two consumers.
extern "C" __global__ void __launch_bounds__(384, 1)
aapt_attend(const u16* __restrict__ q, const u8* __restrict__ k_block, const u8* __restrict__ v_block, const u8* __restrict__ k_cache,
            const u8* __restrict__ v_cache, const int* __restrict__ cache_len, const float* __restrict__ q_scale, const float* __restrict__ k_scale,
            const float* __restrict__ v_scale, int T, int H, int cache_tiles, u16* __restrict__ out) {
    // The swizzle acts on absolute addresses. Where dynamic shared memory begins is the driver's
    // choice, so a launch asks for SWIZZLE_ATOM bytes more.
    AAPT_SHARED(shared, RING_BYTES);
    const u32 place = shared_address(shared);
    const Ring ring = {AAPT_DYNAMIC ? (place + SWIZZLE_ATOM - 1) & ~(SWIZZLE_ATOM - 1u) : place};
    const int head = blockIdx.y, cached = clamped(cache_len[0], 0, cache_tiles * TILE_KEYS);
    const Visits visits = {tiles_of(T), tiles_of(cached), head, cache_tiles};

    if (threadIdx.x == 0) {
        // Behind the last query row the second consumer has nothing to do, and does not arrive.
        const u32 warps = blockIdx.x * QUERY_ROWS + 64 < T ? CONSUMER_WARPS : CONSUMER_WARPS / 2;
        for (u32 slot = 0; slot < RING_K; ++slot) {
            barrier_init(ring.k_full(slot), 1);
            barrier_init(ring.k_empty(slot), warps);
        }
        for (u32 slot = 0; slot < RING_V; ++slot) {
            barrier_init(ring.v_full(slot), 1);
            barrier_init(ring.v_empty(slot), warps);
        }
        barrier_init_done();
    }
    __syncthreads();

    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    if (warpgroup == 0) {
        registers_down<24>();
        if (thread == 0) produce(ring, visits, k_block, v_block, k_cache, v_cache);
    } else {
        const int first = blockIdx.x * QUERY_ROWS + (warpgroup - 1) * 64;
        if (first >= T) return;
        registers_up<240>();
        u32 a[D / 8];
        float acc[D / 2];
        Rows rows = {{as_float(0xff800000u), as_float(0xff800000u)}, {0.0f, 0.0f}};
#pragma unroll
        for (int i = 0; i < D / 2; ++i) acc[i] = 0.0f;
        load_queries(a, q, first, T, H, head, q_scale[head], thread);
        const float c = q_scale[head] * k_scale[head] * (D == 128 ? 0.12751743f : 0.18033688f);  // log2(e) / sqrt(D)
        consume(ring, visits, a, acc, rows, c, T - (visits.block_tiles - 1) * TILE_KEYS, cached - (visits.cache_tiles - 1) * TILE_KEYS, thread & 31);
        store(acc, rows, v_scale, out, first, T, H, head, thread);
    }
}
