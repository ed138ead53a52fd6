// Runs the kernels of plugins/block_causal_attention, unchanged, on a CPU: every thread is a fiber, and every instruction that a CPU lacks is done
// here as its specification says. Built and called by tests/ops/block_causal_attention/test_kernels_on_cpu.py, once per head dimension.
//
// What is asynchronous on a GPU happens here as late as it may, or as early. Late (even seeds): a product reads shared memory and registers when it is
// waited for, and bulk copies land at some time, in any order. Early (odd seeds): a product reads when it is issued, and a copy lands when nothing
// else can move. In both its result is NaN until it is waited for. Released too early, awaited too late or not at all: the numbers come out wrong, or
// nothing moves any more, which ends in an error and not in a hang.

#include <ucontext.h>

#ifndef AAPT_DYNAMIC
#define AAPT_DYNAMIC 0
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

// ---------------------------------------------------------------- fibers

struct Index { unsigned x = 0, y = 0, z = 0; };

struct Operation {
    float* c;
    const unsigned* a;
    unsigned long long b;
    int n, k;
    std::vector<float> result;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Index index;
    bool done = false;
    std::function<bool()> ready;  // empty: it can run
    std::vector<Operation> issued;  // groups of products that were not waited for
};

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static Fiber* running = nullptr;
static Index block_index, block_size, grid_size;
static unsigned progress = 0;  // counts everything that can wake somebody
static std::function<void()> body;
static bool late = true;
static std::mt19937 chance;
static unsigned rounds = 0, resting = 0;  // of the scheduler; fibers that wait for a later round and for nothing else

static void suspend_until(std::function<bool()> ready) {
    if (ready()) return;
    Fiber* me = running;
    me->ready = std::move(ready);
    swapcontext(&me->context, &scheduler);
}

static unsigned me() { return running->index.x; }

// A thread is held up for a while, as by other warps, so that others get ahead of it.
static void rest() {
    if (!late || chance() % 2) return;
    const unsigned until = rounds + chance() % 24;
    ++resting;
    suspend_until([until] { return rounds >= until; });
    --resting;
}

// All `size` threads around this one come here; the last one does `work` for all.
struct Meeting { unsigned arrived = 0, round = 0; };
static std::map<unsigned, Meeting> meetings;  // key: kind and group

static void meet(unsigned kind, unsigned size, const std::function<void(unsigned first)>& work) {
    const unsigned group = me() / size;
    Meeting& meeting = meetings[kind * 1024 + group];
    const unsigned round = meeting.round;
    if (++meeting.arrived == size) {
        meeting.arrived = 0;
        ++meeting.round;
        ++progress;
        work(group * size);
    } else {
        suspend_until([&meeting, round] { return meeting.round != round; });
    }
}

// ---------------------------------------------------------------- shared memory, barriers, copies

// Where a kernel's shared memory begins. A driver promises 16 bytes for dynamic memory, no more.
static constexpr unsigned SHARED_AT = AAPT_DYNAMIC ? 1024 + 272 : 1024;
static unsigned char* shared_base = nullptr;
static unsigned shared_size = 0, dynamic_bytes = 0;  // the latter as a launch asks for it

static unsigned char* at(unsigned address, unsigned bytes) {
    if (address < SHARED_AT || address - SHARED_AT + bytes > shared_size) throw std::runtime_error("shared memory out of bounds");
    return shared_base + (address - SHARED_AT);
}

struct Barrier { unsigned arrivals = 0, pending = 0; long bytes = 0; unsigned ended = 0; };
static std::map<unsigned, Barrier> barriers;

struct Copy { unsigned target; const unsigned char* source; unsigned bytes, barrier; };
static std::vector<Copy> copies;

static Barrier& barrier_at(unsigned address) {
    auto found = barriers.find(address);
    if (found == barriers.end()) throw std::runtime_error("a barrier that was not initialised");
    return found->second;
}

static void settle(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.arrivals;
        ++barrier.ended;
        ++progress;
    }
}

static void land() {
    if (copies.empty()) return;
    const size_t i = chance() % copies.size();  // in any order
    const Copy copy = copies[i];
    copies.erase(copies.begin() + (long)i);
    std::memcpy(at(copy.target, copy.bytes), copy.source, copy.bytes);
    Barrier& barrier = barrier_at(copy.barrier);
    barrier.bytes -= copy.bytes;
    ++progress;
    settle(barrier);
}

// ---------------------------------------------------------------- the names of CUDA

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define threadIdx (running->index)
#define blockIdx block_index
#define blockDim block_size
#define gridDim grid_size

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };

static void __syncthreads() { meet(1, block_size.x, [](unsigned) {}); }

// ---------------------------------------------------------------- the hardware, as in the first part of the source

static unsigned shared_address(const void* p) {
    shared_base = (unsigned char*)p;
    const bool aligned = (uintptr_t)p % 1024 == 0;
    if (!AAPT_DYNAMIC && !aligned) throw std::runtime_error("shared memory is not aligned");
    return SHARED_AT;
}

static void barrier_init(unsigned barrier, unsigned arrivals) {
    at(barrier, 8);
    barriers[barrier] = {arrivals, arrivals, 0, 0};
}
static void barrier_init_done() {}
static void barrier_arrive(unsigned address) {
    Barrier& barrier = barrier_at(address);
    if (barrier.pending == 0) throw std::runtime_error("more arrivals than a barrier was made for");
    --barrier.pending;
    settle(barrier);
    rest();
}
static void barrier_expect(unsigned address, unsigned bytes) {
    barrier_at(address).bytes += bytes;
    barrier_arrive(address);
}
static void barrier_wait(unsigned address, unsigned parity) {  // the phase before the first counts as ended, with parity 1
    if (parity > 1) throw std::runtime_error("a parity is 0 or 1");
    Barrier& barrier = barrier_at(address);
    suspend_until([&barrier, parity] { return (barrier.ended & 1) != parity; });
}
static void bulk_load(unsigned target, const unsigned char* source, unsigned bytes, unsigned barrier) {
    if (target % 16 || (uintptr_t)source % 16 || bytes % 16) throw std::runtime_error("a bulk copy is not aligned");
    copies.push_back({target, source, bytes, barrier});
    ++progress;
}

// What was asked to be in L2, in the order of asking.
static std::vector<const unsigned char*> prefetches;
static void prefetch_l2(const unsigned char* source, unsigned bytes) {
    if ((uintptr_t)source % 16 || bytes % 16) throw std::runtime_error("a prefetch is not aligned");
    prefetches.push_back(source);
}

#if AAPT_DYNAMIC
#define AAPT_SHARED(name, bytes) static unsigned char name[256 * 1024]
#else
#define AAPT_SHARED(name, bytes) static unsigned char name[bytes] __attribute__((aligned(1024)))
#endif

template <int N> void registers_down() { meet(2, 128, [](unsigned) {}); }
template <int N> void registers_up() { meet(2, 128, [](unsigned) {}); }
static float exp2_fast(float x) { return std::exp2(x); }
static float divide(float x, float y) { return x / y; }
static float as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static unsigned e4m3(float x) {
    if (std::isnan(x)) return 0x7f;
    const unsigned sign = std::signbit(x) ? 0x80 : 0;
    const double magnitude = std::min((double)std::fabs(x), 448.0);
    const int exponent = std::max(std::ilogb(std::max(magnitude, 0x1p-60)), -6);
    const unsigned eighths = (unsigned)std::nearbyint(std::ldexp(magnitude, 3 - exponent));  // 0 .. 16, ties to even
    return sign | ((unsigned)(exponent + 6) * 8 + eighths);
}
static double from_e4m3(unsigned code) {
    if ((code & 0x7f) == 0x7f) return std::numeric_limits<double>::quiet_NaN();
    const int exponent = (int)(code >> 3 & 15);
    const double magnitude = exponent ? std::ldexp(8 + (code & 7), exponent - 10) : std::ldexp(code & 7, -9);
    return code & 0x80 ? -magnitude : magnitude;
}
static unsigned e4m3x2(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
static unsigned bf16(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned bf16x2(float low, float high) { return bf16(low) | bf16(high) << 16; }

static float lanes[1024];
template <int LANES> float from_lane_xor(float x) {
    lanes[me()] = x;
    meet(3, 32, [](unsigned) {});
    const float other = lanes[me() ^ LANES];
    meet(3, 32, [](unsigned) {});
    return other;
}

// 64 x n = 64 x k . k x n. Register maps of A and of the result, and addresses behind a descriptor, as PTX defines them.
static void execute(unsigned first, unsigned which) {
    const Operation shape = fibers[first].issued[which];
    const unsigned long long b = shape.b;
    const unsigned start = (unsigned)(b & 0x3fff) << 4, stride = (unsigned)(b >> 32 & 0x3fff) << 4, code = (unsigned)(b >> 62);
    const unsigned span = code == 1 ? 128 : code == 2 ? 64 : code == 3 ? 32 : 0;
    if (!span || (b >> 49 & 7)) throw std::runtime_error("a descriptor that is not known here");
    std::vector<double> matrix_a(64 * shape.k), matrix_b(shape.n * shape.k);
    for (unsigned thread = 0; thread < 128; ++thread) {
        const Operation& operation = fibers[first + thread].issued[which];
        if (operation.b != b || operation.n != shape.n || operation.k != shape.k) throw std::runtime_error("a warpgroup disagrees on a product");
        for (int r = 0; r < shape.k / 8; ++r)
            for (int byte = 0; byte < 4; ++byte) {
                const unsigned row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (r & 1), column = 32 * (r / 4) + 16 * (r / 2 % 2) + 4 * (thread % 4) + byte;
                matrix_a[row * shape.k + column] = from_e4m3(operation.a[r] >> 8 * byte & 0xff);
            }
    }
    for (int n = 0; n < shape.n; ++n)
        for (int k = 0; k < shape.k; ++k) {  // a step of 32 advances the start; a row within 8 the span; the swizzle acts on the sum
            unsigned address = start + k / 32 * 32 + n / 8 * stride + n % 8 * span + k % 32;
            address ^= (address >> 7 & (span / 16 - 1)) << 4;
            matrix_b[n * shape.k + k] = from_e4m3(*at(address, 1));
        }
    for (unsigned thread = 0; thread < 128; ++thread) {
        Operation& operation = fibers[first + thread].issued[which];
        operation.result.resize(shape.n / 2);
        for (int i = 0; i < shape.n / 2; ++i) {
            const unsigned row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
            double sum = 0;
            for (int k = 0; k < shape.k; ++k) sum += matrix_a[row * shape.k + k] * matrix_b[column * shape.k + k];
            operation.result[i] = (float)sum;
        }
    }
}
static void deliver(Fiber& fiber) {
    const Operation& operation = fiber.issued.front();
    std::copy(operation.result.begin(), operation.result.end(), operation.c);
    fiber.issued.erase(fiber.issued.begin());
}
template <int C, int A> void multiply(float (&c)[C], const unsigned (&a)[A], unsigned long long b) {
    std::fill(c, c + C, std::numeric_limits<float>::quiet_NaN());
    running->issued.push_back({c, a, b, 2 * C, 8 * A, {}});
    meet(4, 128, [](unsigned first) {
        if (!late) execute(first, (unsigned)fibers[first].issued.size() - 1);
    });
}
template <int PENDING> void multiply_wait() {
    meet(5, 128, [](unsigned first) {
        while (fibers[first].issued.size() > PENDING) {
            if (late) execute(first, 0);
            for (unsigned thread = 0; thread < 128; ++thread) deliver(fibers[first + thread]);
        }
    });
}
template <int N> void touch(float (&)[N]) {}
template <int N> void touch(unsigned (&)[N]) {}
using std::fmaf;
using std::fmaxf;

#include "block_causal_attention.cu"

// ---------------------------------------------------------------- launches

static std::exception_ptr failure;

static void enter() {
    try {
        body();
    } catch (...) {
        failure = std::current_exception();
    }
    running->done = true;
    swapcontext(&running->context, &scheduler);
}

static void run_block(unsigned threads) {
    barriers.clear();
    copies.clear();
    meetings.clear();
    shared_size = AAPT_DYNAMIC ? dynamic_bytes : RING_BYTES;
    if (shared_base) std::memset(shared_base, 0x7f, shared_size);  // NaN
    fibers.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(1 << 16);
        fiber.index.x = i;
        fiber.done = false;
        fiber.ready = nullptr;
        fiber.issued.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<unsigned> warps((threads + 31) / 32);  // in a new order every time
    for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
    unsigned left = threads;
    while (left) {
        const unsigned before = progress, left_before = left;
        ++rounds;
        std::shuffle(warps.begin(), warps.end(), chance);
        for (unsigned warp : warps)
            for (unsigned i = 32 * warp; i < std::min(threads, 32 * warp + 32); ++i) {
                Fiber& fiber = fibers[i];
                if (fiber.done || (fiber.ready && !fiber.ready())) continue;
                fiber.ready = nullptr;
                running = &fiber;
                swapcontext(&scheduler, &fiber.context);
                if (failure) std::rethrow_exception(failure);
                left -= fiber.done;
            }
        if ((late && chance() % 3 == 0) || (progress == before && left == left_before)) land();
        if (progress == before && left == left_before && !resting) throw std::runtime_error("nothing moves any more");
    }
    if (!copies.empty()) throw std::runtime_error("a copy was never waited for");
    for (const Fiber& fiber : fibers)
        if (!fiber.issued.empty()) throw std::runtime_error("a product was never waited for");
}

template <class Call> static const char* launch(unsigned grid_x, unsigned grid_y, unsigned threads, unsigned seed, Call call) {
    static std::string message;
    chance.seed(seed);
    resting = 0;
    block_size.x = threads;
    grid_size = {grid_x, grid_y, 1};
    late = seed % 2 == 0;
    body = call;
    failure = nullptr;
    try {
        for (block_index.y = 0; block_index.y < grid_y; ++block_index.y)
            for (block_index.x = 0; block_index.x < grid_x; ++block_index.x) run_block(threads);
    } catch (const std::exception& problem) {
        message = problem.what();
        return message.c_str();
    }
    return nullptr;
}

extern "C" {
void ask_for_dynamic(unsigned bytes) { dynamic_bytes = bytes; }
long prefetched(const unsigned char** sources, long most) {  // how many; and forgets them
    const long count = (long)prefetches.size();
    std::copy_n(prefetches.begin(), std::min(count, most), sources);
    prefetches.clear();
    return count;
}
const char* run_pack(unsigned x, unsigned y, unsigned threads, unsigned seed, const u16* k, const u16* v, const float* k_scale, const float* k_mean,
                     const float* v_scale, int T, int H, u8* k_block, u8* v_block) {
    return launch(x, y, threads, seed, [=] { aapt_pack(k, v, k_scale, k_mean, v_scale, T, H, k_block, v_block); });
}
const char* run_attend(unsigned x, unsigned y, unsigned threads, unsigned seed, const u16* q, const u8* k_block, const u8* v_block, const u8* k_cache,
                       const u8* v_cache, const int* cache_len, const float* q_scale, const float* k_scale, const float* v_scale, int T, int H,
                       int cache_tiles, u16* out) {
    return launch(x, y, threads, seed,
                  [=] { aapt_attend(q, k_block, v_block, k_cache, v_cache, cache_len, q_scale, k_scale, v_scale, T, H, cache_tiles, out); });
}
const char* run_commit(unsigned x, unsigned y, unsigned threads, unsigned seed, const u8* k_block, const u8* v_block, const int* slot, int T, int H,
                       int cache_tiles, u8* k_cache, u8* v_cache) {
    return launch(x, y, threads, seed, [=] { aapt_commit(k_block, v_block, slot, T, H, cache_tiles, k_cache, v_cache); });
}
void quantise(const float* x, u8* codes, long count) {
    for (long i = 0; i < count; ++i) codes[i] = (u8)e4m3x2(x[i], 0.0f);
}
}
