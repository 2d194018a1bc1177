// Fibers, and the scheduler that lets them run: see emulator.h. Only the emulated build compiles this.
#include "cuda/device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <sstream>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
}
#endif

// A context is where a fiber goes on. swapcontext() also saves the signal mask, by a system call that costs more than
// all else here; so x86-64 has its own.
#if defined(__x86_64__) && defined(__ELF__) && !defined(SPARSEKERN_EMULATOR_UCONTEXT)

extern "C" void sparsekern_switch_stack(void** from, void* to);

asm(R"(
    .text
    .globl sparsekern_switch_stack
    .hidden sparsekern_switch_stack
    .type sparsekern_switch_stack, @function
sparsekern_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size sparsekern_switch_stack, . - sparsekern_switch_stack
)");

namespace {

struct Context {
    void* stack_pointer = nullptr;
};

void start_at(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where `entry` would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    context.stack_pointer = top;
}

void switch_context(Context& from, Context& to) { sparsekern_switch_stack(&from.stack_pointer, to.stack_pointer); }

}  // namespace

#else

#include <ucontext.h>

namespace {

struct Context {
    ucontext_t registers;
};

void start_at(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = bytes;
    context.registers.uc_link = nullptr;
    makecontext(&context.registers, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

}  // namespace

#endif

namespace sparsekern::cuda {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr std::size_t kPage = 64 * 1024;  // a multiple of every system's
constexpr std::size_t kStack = 4 * kPage;

// Turns in which every thread only looked at flags that did not change, before that counts as a deadlock.
constexpr int kPatience = 20'000;

// Clusters that follow each other are made up of different fibers where ThreadSanitizer looks: a barrier in one is not to
// order what threads of another do.
#if defined(__SANITIZE_THREAD__)
constexpr std::size_t kTeams = 2;
#else
constexpr std::size_t kTeams = 1;
#endif

// A CUDA thread and its fiber. Fibers last, for the blocks and launches to come.
struct Thread {
    Context context;
    char* stack = nullptr;

    Block* block = nullptr;
    unsigned index = 0;
    const Wait* wait = nullptr;
    bool started = false, ended = false;

    void* fake_stack = nullptr;  // AddressSanitizer's
    void* fiber = nullptr;       // ThreadSanitizer's
    bool fenced = false;
    std::vector<const void*> atomics;  // touched since the last fence
};

// Takes a thread out of its kernel when the launch has failed elsewhere.
struct Abandoned {};

struct Action {
    unsigned turns;
    std::string what;
    std::function<void()> act;
    std::unique_ptr<char> tag;  // for ThreadSanitizer
};

struct Machine {
    std::mutex one_launch;
    std::vector<std::unique_ptr<Thread>> fibers;
    std::size_t team = 0;
    std::vector<Thread*> threads;  // of the cluster that runs
    std::vector<Block> blocks;     // likewise
    std::vector<Action> actions;
    Barrier cluster_barrier;
    const std::function<void()>* body = nullptr;
    std::exception_ptr error;
    Thread* failed = nullptr;
    Thread* running = nullptr;
    bool worked = false;      // a thread did more than look at a flag
    bool abandoning = false;  // the launch has failed, and threads that wait leave the kernel

    bool shuffled = false;
    std::uint64_t random = 0;

    Context host;
    void* host_fake_stack = nullptr;
    const void* host_stack = nullptr;
    std::size_t host_stack_bytes = 0;
    void* host_fiber = nullptr;
    // What hardware does on its own. Several of them, because the order in which one fiber acts is no order of actions.
    void* action_fibers[8] = {};
    unsigned next_action_fiber = 0;
    char started = 0, finished = 0;  // tags for ThreadSanitizer
};

Machine& machine() {
    static Machine* const only = new Machine;  // fibers may outlive whatever destroys static objects
    return *only;
}

std::uint64_t next_random() {
    std::uint64_t z = machine().random += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

template <class T>
void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

// From a fiber back to the scheduler, until it lets the fiber go on.
void leave(Thread& thread) {
    Machine& m = machine();
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(m.host_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&thread.fake_stack, m.host_stack, m.host_stack_bytes);
#endif
    switch_context(thread.context, m.host);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(thread.fake_stack, &m.host_stack, &m.host_stack_bytes);
#endif
    if (m.abandoning) throw Abandoned();
}

unsigned ended_in_cluster() {
    unsigned ended = 0;
    for (const Block& block : machine().blocks) ended += block.ended;
    return ended;
}

// Lets go who waits at the barrier, if nobody is missing but `absent` threads.
void complete(Barrier& barrier, unsigned absent) {
    if (barrier.arrived == 0 || barrier.arrived + absent < barrier.threads) return;
    barrier.arrived = 0;
    ++barrier.generation;
}

// A fiber's one function: a CUDA thread of one block after the other.
void live() {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &m.host_stack, &m.host_stack_bytes);
#endif
    for (;;) {
        acquire(&m.started);
        std::exception_ptr error;
        try {
            (*m.body)();
        } catch (...) {
            error = std::current_exception();
        }
        release(&m.finished);
        Unseen unseen;
        Thread& thread = *m.running;
        if (error && !m.abandoning) {
            m.error = std::move(error);
            m.failed = &thread;
        }
        thread.ended = true;
        ++thread.block->ended;
        m.worked = true;
        complete(thread.block->barriers[0], thread.block->ended);  // it waits only for threads that have not ended
        complete(m.cluster_barrier, ended_in_cluster());
        leave(thread);
    }
}

// From the scheduler into a fiber, until it leaves.
void resume(Thread& thread) {
    Machine& m = machine();
    m.running = &thread;
    thread.started = true;
    threadIdx.x = thread.index;
    blockIdx.x = thread.block->index;
    if (!thread.stack) {
        void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory, kPage, PROT_NONE);  // stacks grow down into this
        thread.stack = static_cast<char*>(memory) + kPage;
#if defined(__SANITIZE_THREAD__)
        thread.fiber = __tsan_create_fiber(0);
#endif
        start_at(thread.context, thread.stack, kStack, live);
    }
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(thread.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&m.host_fake_stack, thread.stack, kStack);
#endif
    switch_context(m.host, thread.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(m.host_fake_stack, nullptr, nullptr);
#endif
    m.running = nullptr;
}

void carry_out(std::size_t place) {
    Machine& m = machine();
    const Action action = std::move(m.actions[place]);
    m.actions.erase(m.actions.begin() + static_cast<std::ptrdiff_t>(place));
    m.worked = true;
    std::exception_ptr error;
#if defined(__SANITIZE_THREAD__)
    void*& fiber = m.action_fibers[m.next_action_fiber++ % std::size(m.action_fibers)];
    if (!fiber) fiber = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
    acquire(&m.started);
    acquire(action.tag.get());
#endif
    {
        Unseen unseen;
        try {
            action.act();
        } catch (...) {
            error = std::current_exception();
        }
    }
#if defined(__SANITIZE_THREAD__)
    release(&m.finished);
    __tsan_switch_to_fiber(m.host_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    if (error) std::rethrow_exception(error);
}

// A line for each run of threads that wait for the same.
std::string waiting() {
    std::ostringstream text;
    const auto state = [](const Thread& thread) {
        if (thread.ended) return std::string("have ended");
        return thread.wait ? "wait " + thread.wait->text() : std::string("look at a flag that does not change");
    };
    const auto& threads = machine().threads;
    for (std::size_t i = 0, next; i < threads.size(); i = next) {
        const std::string what = state(*threads[i]);
        for (next = i + 1; next < threads.size() && threads[next]->block == threads[i]->block; ++next)
            if (state(*threads[next]) != what) break;
        text << "\n  block " << threads[i]->block->index << ", threads " << threads[i]->index << " to "
             << threads[next - 1]->index << " " << what;
    }
    return text.str();
}

// Lets the threads of one cluster run until all have ended.
void run_threads() {
    Machine& m = machine();
    std::vector<Thread*> order = m.threads;
    std::size_t live = order.size();
    for (int idle = 0; live;) {
        bool ran = false, skipped = false;
        m.worked = false;
        if (m.shuffled) shuffle(order);
        for (Thread* thread : order) {
            if (thread->ended || (thread->wait && !thread->wait->over())) continue;
            if (m.shuffled && next_random() % 4 == 0) {  // falls behind
                skipped = true;
                continue;
            }
            m.worked |= thread->wait != nullptr;
            thread->wait = nullptr;
            resume(*thread);
            ran = true;
            live -= thread->ended;
            if (m.error) std::rethrow_exception(m.error);
        }
        for (std::size_t i = 0; i < m.actions.size();)
            if (m.actions[i].turns-- == 0) carry_out(i);
            else ++i;
        if (!live || ran || skipped) {
            idle = m.worked || skipped ? 0 : idle + 1;
            if (idle < kPatience) continue;
        } else if (!m.actions.empty()) {
            carry_out(0);
            continue;
        } else if (m.worked) {
            continue;  // the actions that were carried out may have ended a wait
        }
        throw CudaError("deadlock" + waiting());
    }
    if (!m.actions.empty()) throw CudaError("the block ended before " + m.actions.front().what);
}

struct Freed {
    void operator()(unsigned char* memory) const { std::free(memory); }
};

void run_cluster(std::int64_t first, const LaunchShape& shape) {
    Machine& m = machine();
    const auto blocks = static_cast<std::size_t>(shape.cluster), threads = static_cast<std::size_t>(shape.threads);
    std::vector<std::unique_ptr<unsigned char, Freed>> memory;
    m.blocks.clear();
    m.blocks.resize(blocks);
    m.threads.clear();
    m.actions.clear();
    m.cluster_barrier = {};
    m.team = (m.team + 1) % kTeams;
    for (std::size_t b = 0; b < blocks; ++b) {
        Block& block = m.blocks[b];
        void* shared = nullptr;
        if (posix_memalign(&shared, 1024, std::max<std::size_t>(shape.shared_bytes, 1))) throw std::bad_alloc();
        memory.emplace_back(static_cast<unsigned char*>(shared));
        block.index = static_cast<unsigned>(first + static_cast<std::int64_t>(b));
        block.rank = static_cast<unsigned>(b);
        block.threads = static_cast<unsigned>(threads);
        block.shared = memory.back().get();
        block.shared_bytes = shape.shared_bytes;
        block.warps.resize(threads / 32);
        const unsigned char poison[2] = {0xfb, 0xff};  // NaN in every 16-bit, 32-bit and 64-bit format, and half of e4m3
        for (std::size_t i = 0; i < shape.shared_bytes; ++i) block.shared[i] = poison[i % 2];
        for (std::size_t t = 0; t < threads; ++t) {
            const std::size_t place = (m.team * blocks + b) * threads + t;
            while (m.fibers.size() <= place) m.fibers.push_back(std::make_unique<Thread>());
            Thread& thread = *m.fibers[place];
            thread.block = &block;
            thread.index = static_cast<unsigned>(t);
            thread.wait = nullptr;
            thread.started = thread.ended = thread.fenced = false;
            thread.atomics.clear();
            m.threads.push_back(&thread);
        }
    }
    try {
        run_threads();
    } catch (...) {
        m.actions.clear();
        m.abandoning = true;
        for (Thread* thread : m.threads)
            if (thread->started && !thread->ended) resume(*thread);
        m.abandoning = false;
        throw;
    }
}

}  // namespace

Block& block() { return *machine().running->block; }
std::vector<Block>& cluster() { return machine().blocks; }

void fail(const std::string& what) { throw CudaError(what); }

void wait_for(const Wait& wait) {
    Unseen unseen;
    Machine& m = machine();
    if (wait.over() && !m.shuffled) {
        m.worked = true;
        return;
    }
    Thread& thread = *m.running;
    thread.wait = &wait;
    leave(thread);
}

void yield() {
    Unseen unseen;
    leave(*machine().running);
}

void later(std::string what, std::function<void()> action) {
    Unseen unseen;
    Machine& m = machine();
    m.worked = true;
    m.actions.push_back({1 + static_cast<unsigned>(next_random() % 6), std::move(what), std::move(action), std::make_unique<char>()});
    release(m.actions.back().tag.get());
}

unsigned char* shared(std::size_t bytes) {
    Unseen unseen;
    const Block& block = emulator::block();
    if (bytes > block.shared_bytes)
        fail("shared_memory of " + std::to_string(bytes) + " bytes, of which the launch gave " +
             std::to_string(block.shared_bytes));
    return block.shared;
}

Meeting meet(const char* kind, unsigned mask, std::uint64_t value, bool orders) {
    Unseen unseen;
    Thread& thread = *machine().running;
    const unsigned lane = thread.index % 32, me = 1u << lane;
    const auto hex = [](unsigned bits) {
        std::ostringstream text;
        text << "0x" << std::hex << bits;
        return text.str();
    };
    if (!(mask & me)) fail(std::string(kind) + " of mask " + hex(mask) + " by lane " + std::to_string(lane));
    Meeting* meeting = nullptr;
    Meeting* unused = nullptr;
    for (Meeting& other : thread.block->warps[thread.index / 32]) {
        if (!other.kind) {
            unused = &other;
        } else if (other.arrived != other.mask && (other.mask & me) && (other.arrived & mask)) {
            // Some lane waits there for this one, and this one waits here for that lane.
            if (other.mask != mask || std::strcmp(other.kind, kind) != 0)
                fail(std::string(kind) + " of mask " + hex(mask) + " by lane " + std::to_string(lane) +
                     ", where lanes " + hex(other.arrived) + " wait in " + other.kind + " of mask " + hex(other.mask));
            meeting = &other;
        }
    }
    if (!meeting) {
        meeting = unused;
        *meeting = Meeting{kind, mask, 0, 0, {}};
    }
    if (orders) release(meeting);
    meeting->arrived |= me;
    meeting->value[lane] = value;

    struct Lanes final : Wait {
        const Meeting& meeting;
        explicit Lanes(const Meeting& meeting) : meeting(meeting) {}
        bool over() const override { return meeting.arrived == meeting.mask; }
        std::string text() const override {
            std::ostringstream text;
            text << "in " << meeting.kind << " of lanes 0x" << std::hex << meeting.mask << ", of which 0x"
                 << meeting.arrived << " are there";
            return text.str();
        }
    };
    wait_for(Lanes(*meeting));
    if (orders) acquire(meeting);
    const Meeting result = *meeting;
    meeting->left |= me;
    if (meeting->left == meeting->mask) meeting->kind = nullptr;
    return result;
}

namespace {

struct AtBarrier final : Wait {
    const Barrier& barrier;
    const std::uint64_t generation;
    const std::string name;
    AtBarrier(const Barrier& barrier, std::string name)
        : barrier(barrier), generation(barrier.generation), name(std::move(name)) {}
    bool over() const override { return barrier.generation != generation; }
    std::string text() const override {
        return "at " + name + " for " + std::to_string(barrier.threads) + " threads, of which " +
               std::to_string(barrier.arrived) + " have arrived";
    }
};

void arrive(Barrier& barrier, unsigned threads, unsigned absent, const std::string& name) {
    if (barrier.arrived && barrier.threads != threads)
        fail(name + " for " + std::to_string(threads) + " threads, where others wait for " +
             std::to_string(barrier.threads));
    barrier.threads = threads;
    machine().worked = true;
    release(&barrier.ordered_by[barrier.generation % 2]);
    ++barrier.arrived;
    complete(barrier, absent);
}

}  // namespace

void barrier(int id, unsigned threads, bool waits) {
    Unseen unseen;
    Block& block = emulator::block();
    const bool whole = id == 0;
    if (!whole && (id < 1 || id > 15 || threads == 0 || threads % 32 != 0 || threads > block.threads))
        fail("barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads");
    Barrier& barrier = block.barriers[id];
    const AtBarrier wait(barrier, whole ? "__syncthreads" : "barrier " + std::to_string(id));
    arrive(barrier, threads, whole ? block.ended : 0, wait.name);
    if (!waits) return;
    wait_for(wait);
    acquire(&barrier.ordered_by[wait.generation % 2]);
}

void cluster_barrier() {
    Unseen unseen;
    Barrier& barrier = machine().cluster_barrier;
    const AtBarrier wait(barrier, "cluster_sync");
    arrive(barrier, static_cast<unsigned>(machine().threads.size()), ended_in_cluster(), wait.name);
    wait_for(wait);
    acquire(&barrier.ordered_by[wait.generation % 2]);
}

void atomic_begins(const void* address, std::size_t bytes) {
    Unseen unseen;
    if (reinterpret_cast<std::uintptr_t>(address) % bytes) fail("an atomic at no multiple of its size");
    yield();
}

void atomic_ends(const void* address, bool polls) {
    Unseen unseen;
    machine().worked |= !polls;
#if defined(__SANITIZE_THREAD__)
    if (machine().running->fenced) release(address);
    auto& atomics = machine().running->atomics;
    if (std::find(atomics.begin(), atomics.end(), address) == atomics.end()) atomics.push_back(address);
#else
    (void)address;
#endif
}

void run(const char* name, const LaunchShape& shape, const std::function<void()>& thread) {
    const auto refuse = [name](const std::string& why) { throw CudaError(std::string("kernel ") + name + ": " + why); };
    if (shape.blocks < 0 || shape.blocks > 0x7fffffff)
        refuse("up to 2^31 - 1 blocks, not " + std::to_string(shape.blocks));
    if (shape.threads < 32 || shape.threads > 1024 || shape.threads % 32)
        refuse("a multiple of 32 threads up to 1024, not " + std::to_string(shape.threads));
    if (shape.shared_bytes > shared_memory_limit())
        refuse(std::to_string(shape.shared_bytes) + " bytes of shared memory; a block can have " +
               std::to_string(shared_memory_limit()));
    if (shape.cluster < 1 || shape.cluster > 8 || shape.blocks % shape.cluster)
        refuse("clusters of " + std::to_string(shape.cluster) + " of " + std::to_string(shape.blocks) + " blocks");

    Machine& m = machine();
    const std::lock_guard<std::mutex> lock(m.one_launch);
    Unseen unseen;
    const char* seed = std::getenv("SPARSEKERN_EMULATOR_ORDER");
    m.shuffled = seed && *seed;
    m.random = m.shuffled ? std::strtoull(seed, nullptr, 10) : 0;
    m.body = &thread;
    m.error = nullptr;
    m.failed = nullptr;
    blockDim.x = static_cast<unsigned>(shape.threads);
    gridDim.x = static_cast<unsigned>(shape.blocks);
#if defined(__SANITIZE_THREAD__)
    m.host_fiber = __tsan_get_current_fiber();
#endif
    release(&m.started);
    std::vector<std::int64_t> firsts(static_cast<std::size_t>(shape.blocks / shape.cluster));
    for (std::size_t i = 0; i < firsts.size(); ++i) firsts[i] = static_cast<std::int64_t>(i) * shape.cluster;
    if (m.shuffled) shuffle(firsts);
    for (const std::int64_t first : firsts) {
        try {
            run_cluster(first, shape);
        } catch (const std::exception& error) {
            std::ostringstream where;
            acquire(&m.finished);
            if (m.failed) where << "block " << m.failed->block->index << ", thread " << m.failed->index << ": ";
            refuse(where.str() + error.what());
        }
    }
    acquire(&m.finished);
}

namespace {

void ignore() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}

void ignore_no_more() {
#if defined(__SANITIZE_THREAD__)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

}  // namespace

Unseen::Unseen() { ignore(); }
Unseen::~Unseen() { ignore_no_more(); }

#if defined(__SANITIZE_THREAD__)
void acquire(const void* tag) { __tsan_acquire(const_cast<void*>(tag)); }
void release(const void* tag) { __tsan_release(const_cast<void*>(tag)); }

// Within the one Unseen of carry_out().
void reads(const void* from, std::size_t bytes) {
    ignore_no_more();
    __tsan_read_range(const_cast<void*>(from), bytes);
    ignore();
}

void writes(void* to, std::size_t bytes) {
    ignore_no_more();
    __tsan_write_range(to, bytes);
    ignore();
}
#else
void acquire(const void*) {}
void release(const void*) {}
void reads(const void*, std::size_t) {}
void writes(void*, std::size_t) {}
#endif

}  // namespace emulator

void __syncwarp(unsigned mask) {
    emulator::meet("__syncwarp", mask, 0, true);
}

void __threadfence() {
    using namespace emulator;
    Unseen unseen;
    Thread& thread = *machine().running;
    for (const void* address : thread.atomics) acquire(address);
    thread.atomics.clear();
    thread.fenced = true;
}

void __nanosleep(unsigned) { emulator::yield(); }

}  // namespace sparsekern::cuda
