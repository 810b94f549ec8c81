// CUDA's execution model on one host thread: what a kernel compiled by g++ runs on.
//
// Owns: blocks run one after another, the threads of a block as fibers that yield at barriers and at warp collectives, in
// an order the caller chooses; shared memory, poisoned with NaN when a block starts. Refuses, with the names of the
// threads involved: barriers or collectives that part of a block or warp never reaches (a deadlock on the device), ones
// reached at different places, shuffles from lanes outside the mask, launches beyond the limits of every architecture we
// compile for. What it cannot show: memory order between blocks, approximations of -use_fast_math, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a kernel can ask about the thread that runs it.
struct Thread {
    dim3 index, block, block_size, grid_size;
};

const Thread & self();

// Ends the launch with a Fault that names the running thread; on no thread, throws it at once.
[[noreturn]] void fail(const std::string & what);

void barrier(const char * file, int line);

// From now on threads run past the barrier at this line of this file: a fault for tests of the tests.
void drop_barrier(const std::string & file, int line);
void sync_warp(const char * file, int line);
uint32_t ballot(const char * file, int line, uint32_t mask, bool x);
int reduce_add(const char * file, int line, uint32_t mask, int x);

enum Source { from_lane, from_xor, from_up, from_down };
uint64_t shuffle_bits(Source, const char * file, int line, uint32_t mask, uint64_t bits, int which, int width);

template <typename T>
T shuffle(Source source, const char * file, int line, uint32_t mask, T x, int which, int width = 32) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof(T));
    bits = shuffle_bits(source, file, line, mask, bits, which, width);
    memcpy(&x, &bits, sizeof(T));
    return x;
}

// The block's variable declared at this line. Every thread of a block gets the same bytes, NaN at first.
void * shared_bytes(int line, size_t n);

template <typename T>
T & shared(int line) {
    return *(T *) shared_bytes(line, sizeof(T));
}

enum Order { forward, backward, shuffled };
void set_order(Order order, uint64_t seed);

void run(dim3 grid, dim3 block, const std::function<void()> & thread);

// What runs launches in place of the fibers while it is set: another account of the device under the same host code. It
// gets a kernel's address and its arguments as the kernel takes them; false ends the launch with a Fault.
struct LaunchRecord {
    const void * kernel;
    dim3 grid, block;
    size_t n_dynamic_shared;
    size_t n_arguments;
    const void * const * arguments;
    const size_t * sizes;
};
extern bool (*other_device)(const LaunchRecord & launch);

// kernel<<<grid, block, n_shared, stream>>>(arguments...)
struct Launch {
    dim3 grid, block;
    size_t n_dynamic_shared;
    void * stream;

    template <typename... Parameters, typename... Arguments>
    void operator()(void (*kernel)(Parameters...), Arguments &&... arguments) const {
        const std::tuple<std::decay_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
        if (other_device) {
            std::apply(
                [&](const auto &... copy) {
                    const void * const pointers[] = {&copy...};
                    const size_t sizes[] = {sizeof(copy)...};
                    if (!other_device(
                            {(const void *) kernel, grid, block, n_dynamic_shared, sizeof...(copy), pointers, sizes})) {
                        fail("a launch on the other device failed");
                    }
                },
                copies);
            return;
        }
        if (n_dynamic_shared != 0) {
            fail("dynamic shared memory is not emulated");
        }
        run(grid, block, [&] { std::apply(kernel, copies); });
    }
};

} // namespace emulator
