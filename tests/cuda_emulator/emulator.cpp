// The scheduler of emulator.h: fibers, barriers, warp collectives, shared memory.
#include "emulator.h"

#include <algorithm>
#include <memory>
#include <sys/mman.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void) (p), (void) (n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void) (p), (void) (n))
#endif

namespace emulator {
namespace {

// -- fibers ------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// swapcontext asks the kernel for the signal mask each time; this is a hundred times faster
struct Context {
    void * stack_pointer;
};
extern "C" void emulator_switch(Context * from, const Context * to);
asm(R"(
    .text
    .globl emulator_switch
    .hidden emulator_switch
    .type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_switch, . - emulator_switch
)");

void prepare(Context & context, char * stack, size_t n, void (*entry)()) {
    void ** top = (void **) (stack + n) - 2; // entered as if called: the return address lies 8 below a multiple of 16
    *top = (void *) entry;
    context.stack_pointer = top - 6;
}
#else
#include <ucontext.h>
using Context = ucontext_t;

void emulator_switch(Context * from, const Context * to) {
    swapcontext(from, to);
}

void prepare(Context & context, char * stack, size_t n, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = n;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

constexpr size_t stack_size = 256 << 10;
constexpr size_t guard_size = 4 << 10;
constexpr unsigned max_threads = 1024;
constexpr size_t max_shared = 48 << 10; // static shared memory of a block on every architecture
constexpr size_t gap = 64;              // between shared variables; the address sanitizer watches it

char * stack_of(unsigned thread) {
    static char * const stacks = [] {
        const size_t n = max_threads * stack_size;
        void * p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) {
            throw Fault("no memory for the stacks of a block");
        }
        for (size_t i = 0; i < max_threads; ++i) {
            mprotect((char *) p + i * stack_size, guard_size, PROT_NONE);
        }
        return (char *) p;
    }();
    return stacks + thread * stack_size + guard_size;
}

// -- a block -----------------------------------------------------------------------------------------------------------

enum State { ready, at_barrier, at_collective, finished };

struct Site {
    const char * file = "";
    int line = 0;
    bool operator==(const Site & other) const { return line == other.line && !strcmp(file, other.file); }
};

struct Fiber : Thread {
    Context context;
    State state;
    Site site; // where it waits
    unsigned number, lane;

    // its part of a warp collective
    int operation;
    uint32_t mask;
    uint64_t value, result;
    unsigned source; // lane that a shuffle reads
};

enum { collective_sync, collective_shuffle, collective_ballot, collective_add };

struct SharedVariable {
    int line;
    size_t at, n;
};

struct Block {
    const std::function<void()> * body;
    std::vector<Fiber> fibers;
    std::vector<SharedVariable> variables;
    size_t n_shared;
    alignas(256) char shared[max_shared + 256 * gap];
    std::string fault;
    Context scheduler;
};

Block block;
Fiber * running = nullptr;
Order chosen_order = forward;
uint64_t random_state = 1;
std::string dropped_barrier;

uint64_t random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

void arrange(std::vector<unsigned> & numbers) {
    if (chosen_order == shuffled) {
        for (size_t i = numbers.size(); i > 1; --i) {
            std::swap(numbers[i - 1], numbers[random_number() % i]);
        }
    }
}

std::vector<unsigned> numbers_up_to(unsigned n) {
    std::vector<unsigned> numbers(n);
    for (unsigned i = 0; i < n; ++i) {
        numbers[i] = chosen_order == backward ? n - 1 - i : i;
    }
    arrange(numbers);
    return numbers;
}

void yield() {
    emulator_switch(&running->context, &block.scheduler);
}

void enter_fiber() {
    (*block.body)();
    running->state = finished;
    yield();
    std::abort(); // a finished fiber is never resumed
}

std::string name_of(const Fiber & f) {
    const auto triple = [](dim3 v) {
        return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
    };
    return "block " + triple(f.block) + " thread " + triple(f.index);
}

std::string name_of(const Site & site) {
    const char * slash = strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// Nobody can go on: say who waits where.
[[noreturn]] void report_deadlock() {
    static const char * const names[] = {"is ready", "waits at the barrier", "waits for its warp", "has finished"};
    std::string text = "deadlock in block (" + std::to_string(block.fibers[0].block.x) + ", " +
                       std::to_string(block.fibers[0].block.y) + ", " + std::to_string(block.fibers[0].block.z) + "):";
    for (size_t i = 0; i < block.fibers.size();) { // neighbours that wait alike share a line
        const Fiber & f = block.fibers[i];
        size_t end = i + 1;
        while (end < block.fibers.size() && block.fibers[end].state == f.state && block.fibers[end].site == f.site &&
               block.fibers[end].mask == f.mask) {
            ++end;
        }
        char mask[32] = "";
        if (f.state == at_collective) {
            snprintf(mask, sizeof(mask), ", mask %08x", f.mask);
        }
        text += "\n  threads " + std::to_string(i) + " to " + std::to_string(end - 1) + ": " + names[f.state] +
                (f.state == finished ? "" : " at " + name_of(f.site)) + mask;
        i = end;
    }
    throw Fault(text);
}

bool release_barrier() {
    for (const Fiber & f : block.fibers) {
        if (f.state != at_barrier) {
            return false;
        }
        if (!(f.site == block.fibers[0].site)) {
            report_deadlock();
        }
    }
    for (Fiber & f : block.fibers) {
        f.state = ready;
    }
    return true;
}

void run_block(std::vector<unsigned> order) {
    for (;;) {
        bool moved = false, all_finished = true;
        for (unsigned number : order) {
            Fiber & f = block.fibers[number];
            if (f.state != ready) {
                continue;
            }
            moved = true;
            running = &f;
            emulator_switch(&block.scheduler, &f.context);
            running = nullptr;
            if (!block.fault.empty()) {
                throw Fault(block.fault);
            }
        }
        for (const Fiber & f : block.fibers) {
            all_finished &= f.state == finished;
        }
        if (all_finished) {
            return;
        }
        if (!release_barrier() && !moved) {
            report_deadlock();
        }
        arrange(order);
    }
}

// The last lane of the mask to arrive computes what all of them get.
uint64_t collective(int operation, Site site, uint32_t mask, uint64_t value, unsigned source) {
    Fiber & me = *running;
    if (!(mask >> me.lane & 1)) {
        fail("collective at " + name_of(site) + " by a lane outside its own mask");
    }
    me.operation = operation;
    me.site = site;
    me.mask = mask;
    me.value = value;
    me.source = source;
    me.state = at_collective;

    const unsigned first = me.number - me.lane;
    const auto lane_of = [&](unsigned lane) {
        return first + lane < block.fibers.size() ? &block.fibers[first + lane] : nullptr;
    };
    uint32_t votes = 0;
    int64_t sum = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) {
            continue;
        }
        const Fiber * f = lane_of(lane);
        if (!f || f->state != at_collective || f->mask != mask || f->operation != operation || !(f->site == site)) {
            yield(); // until the last one comes, or nobody can move
            return me.result;
        }
        votes |= (uint32_t) (f->value != 0) << lane;
        sum += (int) f->value;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) {
            continue;
        }
        Fiber & f = *lane_of(lane);
        f.state = ready;
        if (operation == collective_shuffle) {
            if (!(mask >> f.source & 1)) {
                fail("shuffle at " + name_of(site) + " reads lane " + std::to_string(f.source) + " outside its mask");
            }
            f.result = lane_of(f.source)->value;
        } else {
            f.result = operation == collective_ballot ? votes : (uint64_t) sum;
        }
    }
    return me.result;
}

} // namespace

bool (*other_device)(const LaunchRecord & launch) = nullptr;

const Thread & self() {
    return *running;
}

void fail(const std::string & what) {
    if (!running) {
        throw Fault(what);
    }
    block.fault = what + ", " + name_of(*running);
    yield();
    std::abort();
}

void drop_barrier(const std::string & file, int line) {
    dropped_barrier = file + ":" + std::to_string(line);
}

void barrier(const char * file, int line) {
    running->site = {file, line};
    if (!dropped_barrier.empty() && name_of(running->site) == dropped_barrier) {
        return;
    }
    running->state = at_barrier;
    yield();
}

void sync_warp(const char * file, int line) {
    collective(collective_sync, {file, line}, 0xffffffff, 0, 0);
}

uint32_t ballot(const char * file, int line, uint32_t mask, bool x) {
    return (uint32_t) collective(collective_ballot, {file, line}, mask, x, 0);
}

int reduce_add(const char * file, int line, uint32_t mask, int x) {
    return (int) collective(collective_add, {file, line}, mask, (uint64_t) x, 0);
}

uint64_t shuffle_bits(Source source, const char * file, int line, uint32_t mask, uint64_t bits, int which, int width) {
    const int lane = (int) running->lane;
    const int base = lane & ~(width - 1);
    int from = lane;
    switch (source) {
    case from_lane:
        from = base + (which & (width - 1));
        break;
    case from_xor:
        from = (lane ^ which) < base + width ? lane ^ which : lane;
        break;
    case from_up:
        from = lane - which >= base ? lane - which : lane;
        break;
    case from_down:
        from = lane + which < base + width ? lane + which : lane;
        break;
    }
    return collective(collective_shuffle, {file, line}, mask, bits, (unsigned) from);
}

void * shared_bytes(int line, size_t n) {
    for (const SharedVariable & v : block.variables) {
        if (v.line == line) {
            return block.shared + v.at;
        }
    }
    const size_t at = block.variables.empty()
                          ? gap
                          : (block.variables.back().at + block.variables.back().n + 2 * gap - 1) / gap * gap;
    block.n_shared += n;
    if (block.n_shared > max_shared) {
        fail("a block takes more than 48 KiB of static shared memory");
    }
    block.variables.push_back({line, at, n});
    ASAN_UNPOISON_MEMORY_REGION(block.shared + at, n);
    memset(block.shared + at, 0xff, n); // NaN in every float type
    return block.shared + at;
}

void set_order(Order order, uint64_t seed) {
    chosen_order = order;
    random_state = seed * 0x9e3779b97f4a7c15 + 1;
}

void run(dim3 grid, dim3 size, const std::function<void()> & thread) {
    const uint64_t n_threads = (uint64_t) size.x * size.y * size.z;
    if (n_threads == 0 || n_threads > max_threads || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
        grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
        throw Fault("a launch of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                    std::to_string(grid.z) + " blocks of " + std::to_string(n_threads) + " threads");
    }
    block.body = &thread;
    for (unsigned number : numbers_up_to(grid.x * grid.y * grid.z)) {
        block.fibers.assign(n_threads, Fiber{});
        block.variables.clear();
        block.n_shared = 0;
        block.fault.clear();
        ASAN_POISON_MEMORY_REGION(block.shared, sizeof(block.shared));
        for (unsigned i = 0; i < n_threads; ++i) {
            Fiber & f = block.fibers[i];
            f.index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
            f.block = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
            f.block_size = size;
            f.grid_size = grid;
            f.number = i;
            f.lane = i % 32;
            f.state = ready;
            ASAN_UNPOISON_MEMORY_REGION(stack_of(i), stack_size - guard_size);
            prepare(f.context, stack_of(i), stack_size - guard_size, enter_fiber);
        }
        try {
            run_block(numbers_up_to((unsigned) n_threads));
        } catch (...) {
            running = nullptr;
            throw;
        }
    }
}

} // namespace emulator
