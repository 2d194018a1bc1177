// Memory that kernels use while they run and keep for the next call: fresh pages cost a large kernel several percent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace sparsekern {

// Hands out arrays that live until it is destroyed. The first of a process keeps its memory for its successors; others
// that live at the same time have memory of their own.
class Workspace {
public:
    Workspace() : lock_(kept_mutex(), std::try_to_lock) {}
    Workspace(const Workspace&) = delete;

    // `count` uninitialised elements, aligned to a cache line.
    template <class T>
    T* take(std::int64_t count) {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T) + 64;
        std::vector<Block>& blocks = lock_.owns_lock() ? kept() : own_;
        if (used_ == blocks.size()) blocks.emplace_back();
        Block& block = blocks[used_++];
        if (block.bytes < bytes) {
            block.memory.reset();  // first, so that both do not exist at one time
            block.memory.reset(new std::byte[bytes]);
            block.bytes = bytes;
        }
        const auto address = reinterpret_cast<std::uintptr_t>(block.memory.get());
        return reinterpret_cast<T*>((address + 63) / 64 * 64);
    }

private:
    struct Block {
        std::unique_ptr<std::byte[]> memory;
        std::size_t bytes = 0;
    };
    static std::mutex& kept_mutex() {
        static std::mutex mutex;
        return mutex;
    }
    static std::vector<Block>& kept() {
        static std::vector<Block> blocks;
        return blocks;
    }

    std::unique_lock<std::mutex> lock_;
    std::vector<Block> own_;
    std::size_t used_ = 0;
};

}  // namespace sparsekern
