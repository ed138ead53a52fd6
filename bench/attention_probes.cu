// What only a GPU can tell about wgmma on e4m3. Compiled behind plugins/block_causal_attention/block_causal_attention.cu, whose functions it calls;
// bench/attention.py launches it and says what the answers mean.

// c [64, N] = a [64, K] . b [N, K], all along K, by one call of `multiply`: its register maps, descriptor and swizzle, and its rounding.
template <int N, int K, int SPAN> __device__ __forceinline__ void product(const u8* a, const u8* b, float* c, u8* tile) {
    const int thread = threadIdx.x, row = 16 * (thread >> 5) + ((thread & 31) >> 2);
    for (int i = thread; i < N * K; i += 128) tile[swizzled<SPAN>(i)] = b[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // written by threads, read by the tensor core
    __syncthreads();
    u32 operand[K / 8];
#pragma unroll
    for (int r = 0; r < K / 8; ++r)
        operand[r] = *(const u32*)(a + (row + 8 * (r & 1)) * K + 32 * (r >> 2) + 16 * (r >> 1 & 1) + 4 * (thread & 3));
    float result[N / 2];
    multiply(result, operand, descriptor<SPAN>(shared_address(tile)));
    multiply_wait<0>();
    touch(result);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) c[(row + 8 * (i >> 1 & 1)) * N + 8 * (i >> 2) + 2 * (thread & 3) + (i & 1)] = result[i];
}

extern "C" __global__ void __launch_bounds__(128) probe_scores_64(const u8* a, const u8* b, float* c) {
    __shared__ __align__(1024) u8 tile[64 * 64];
    product<64, 64, 64>(a, b, c, tile);
}
extern "C" __global__ void __launch_bounds__(128) probe_scores_128(const u8* a, const u8* b, float* c) {
    __shared__ __align__(1024) u8 tile[64 * 128];
    product<64, 128, 128>(a, b, c, tile);
}
extern "C" __global__ void __launch_bounds__(128) probe_values_128(const u8* a, const u8* b, float* c) {
    __shared__ __align__(1024) u8 tile[128 * 64];
    product<128, 64, 64>(a, b, c, tile);
}

// Rate of m64n128k32 in a dependent chain, A in registers: 2 warpgroups per thread block, four products per turn, of which the last two take back what
// the first two added, so that no accumulator overflows.
#define AAPT_INOUT4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define AAPT_INOUT16(x, i) AAPT_INOUT4(x, i), AAPT_INOUT4(x, i + 4), AAPT_INOUT4(x, i + 8), AAPT_INOUT4(x, i + 12)
#define AAPT_HALVES4(x, i) "+r"(x[i]), "+r"(x[i + 1]), "+r"(x[i + 2]), "+r"(x[i + 3])
#define AAPT_HALVES16(x, i) AAPT_HALVES4(x, i), AAPT_HALVES4(x, i + 4), AAPT_HALVES4(x, i + 8), AAPT_HALVES4(x, i + 12)
#define AAPT_N128_HALF "wgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3 "

template <int SIGN> __device__ __forceinline__ void again(float (&c)[64], const u32 (&a)[8], u64 b) {
    asm volatile(AAPT_BEGIN "add.s64 b1, %72, 2;\n"                                        //
                 AAPT_N128 AAPT_R64 "}, {%64, %65, %66, %67}, %72, more, %73, 1;\n"          //
                 AAPT_N128 AAPT_R64 "}, {%68, %69, %70, %71}, b1, more, %73, 1;\n" AAPT_END  //
                 : AAPT_INOUT16(c, 0), AAPT_INOUT16(c, 16), AAPT_INOUT16(c, 32), AAPT_INOUT16(c, 48)
                 : AAPT_IN4(a, 0), AAPT_IN4(a, 4), "l"(b), "n"(SIGN)
                 : "memory");
}
template <int SIGN> __device__ __forceinline__ void again(u32 (&c)[32], const u32 (&a)[8], u64 b) {  // float16 accumulators, two to a register
    asm volatile(AAPT_BEGIN "add.s64 b1, %40, 2;\n"                                             //
                 AAPT_N128_HALF AAPT_R32 "}, {%32, %33, %34, %35}, %40, more, %41, 1;\n"          //
                 AAPT_N128_HALF AAPT_R32 "}, {%36, %37, %38, %39}, b1, more, %41, 1;\n" AAPT_END  //
                 : AAPT_HALVES16(c, 0), AAPT_HALVES16(c, 16)
                 : AAPT_IN4(a, 0), AAPT_IN4(a, 4), "l"(b), "n"(SIGN)
                 : "memory");
}

template <class C, int N> __device__ __forceinline__ void rate(const u8* data, int turns, u32* out, u8* tile) {
    for (int i = threadIdx.x; i < 128 * 64; i += 256) tile[i] = data[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const u64 b = descriptor<64>(shared_address(tile));
    u32 a[8];
    C c[N];
#pragma unroll
    for (int r = 0; r < 8; ++r) a[r] = *(const u32*)(data + (threadIdx.x * 32 + 4 * r));
#pragma unroll
    for (int i = 0; i < N; ++i) c[i] = 0;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        again<1>(c, a, b);
        again<-1>(c, a, b);
        multiply_wait<1>();
    }
    multiply_wait<0>();
    touch(c);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += (float)c[i];
    if (sum == 12345.0f) out[threadIdx.x] = 1;  // keeps the work
}

extern "C" __global__ void __launch_bounds__(256) probe_rate_f32(const u8* data, int turns, u32* out) {
    __shared__ __align__(1024) u8 tile[128 * 64];
    rate<float, 64>(data, turns, out, tile);
}
extern "C" __global__ void __launch_bounds__(256) probe_rate_f16(const u8* data, int turns, u32* out) {
    __shared__ __align__(1024) u8 tile[128 * 64];
    rate<u32, 32>(data, turns, out, tile);
}
