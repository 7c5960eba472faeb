// A GPU on one processor: kernels as ordinary C++, a fiber for each thread of a block, blocks in turn, but for those of
// a team, which run side by side. Finds wrong indices, missing or divergent barriers and reads of what nobody wrote; no
// races, as fibers only change where they wait.
//
// Shared memory is NaN until somebody in the block writes it, and so is global memory around a tensor, where nobody may
// write: what lies beyond its end, and a page before it, may not be touched at all.
//
// A fiber runs until it waits for its warp (a collective operation), its block (__syncthreads) or its team; a warp,
// picked at random, as far as it gets without the others, and any of its lanes first. Where all wait and nothing comes,
// or lanes of a warp are in different operations, the program ends with an error.
#pragma once

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __shared__ static thread_local  // to be found together: see poison_declared_shared()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? a : b;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) > static_cast<T>(b) ? a : b;
}
using std::isnan;
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::rint(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  const T before = *p;
  *p += value;
  return before;
}
inline void __threadfence() {}

namespace simulated {

inline constexpr int kWarp = FLASHDECPP_SIMULATED_WARP;
inline constexpr int kMaxBytes = 512;  // that a lane hands to its warp at once
inline constexpr size_t kStackBytes = 256 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::printf("simulated GPU: %s\n", what);
  std::fflush(stdout);
  std::_Exit(2);
}

struct Bytes {
  unsigned char* data;
  size_t size;
};

// What kernels declare __shared__: this program has no other variables of threads.
inline Bytes declared_shared() {
  Bytes found{nullptr, 0};
  const auto find = [](dl_phdr_info* program, size_t, void* result) {
    for (int i = 0; i < program->dlpi_phnum; ++i) {
      const auto& part = program->dlpi_phdr[i];
      if (part.p_type == PT_TLS && program->dlpi_tls_data) {
        *static_cast<Bytes*>(result) = {static_cast<unsigned char*>(program->dlpi_tls_data), part.p_memsz};
      }
    }
    return 1;  // the first is the program itself
  };
  dl_iterate_phdr(find, &found);
  return found;
}

struct Warp {
  alignas(64) unsigned char lanes[2][kWarp][kMaxBytes];
  const char* operation[2];
  int size = 0, arrived = 0;
  unsigned generation = 0;
};

struct CopyOf {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStackBytes);
  bool done = false;
  unsigned thread = 0;
  const char* waits = nullptr;
  std::vector<std::vector<CopyOf>> copies;  // groups that are under way; the last one is still open
};

struct Block {
  dim3 index;
  std::vector<unsigned char> shared, declared;  // `declared` while another block of the team runs
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned at_barrier = 0, barrier_generation = 0;
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  dim3 block_size, grid_size;

  const Block& block() const { return *block_; }
  unsigned thread() const { return running_->thread; }
  Fiber& fiber() { return *running_; }
  Warp& warp() { return block_->warps[running_->thread / kWarp]; }

  void launch(dim3 grid, unsigned block, size_t shared_bytes, const std::function<void()>& kernel, unsigned team = 1) {
    grid_size = grid;
    block_size = {block};
    kernel_ = &kernel;
    while (team_.size() < team) team_.push_back(std::make_unique<Block>());
    team_.resize(team);
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += team) {
        for (unsigned rank = 0; rank < team; ++rank) prepare(*team_[rank], {x + rank, y, 0}, shared_bytes);
        run_team();
      }
    }
  }

  void wait(const char* what) {
    running_->waits = what;
    swapcontext(&running_->context, &scheduler_);
  }

  void barrier() { meet(block_->at_barrier, block_->barrier_generation, block_size.x, "__syncthreads"); }
  void team_barrier() {
    meet(at_team_, team_generation_, block_size.x * static_cast<unsigned>(team_.size()), "cluster_sync");
  }

  // What is at p, in the running block's shared memory, in that of another of its team.
  template <class V>
  V* map_shared_rank(V* p, int rank) {
    Block& other = *team_.at(rank);
    if (&other == block_) return p;
    const Bytes declared = declared_shared(), own{block_->shared.data(), block_->shared.size()};
    auto* const byte = reinterpret_cast<unsigned char*>(p);
    const auto in = [&](const Bytes& bytes) { return byte >= bytes.data && byte < bytes.data + bytes.size; };
    if (in(declared)) return reinterpret_cast<V*>(other.declared.data() + (byte - declared.data));
    if (in(own)) return reinterpret_cast<V*>(other.shared.data() + (byte - own.data));
    fail("map_shared_rank: not in shared memory");
  }

  // All lanes' values, once all have come here.
 template <class T>
 const unsigned char (*exchange(const T& value, const char* operation)) [kMaxBytes] {
   static_assert(sizeof(T) <= kMaxBytes);
   Warp& w = warp();
   const unsigned generation = w.generation;
   const int buffer = generation % 2;
   if (w.arrived == 0) w.operation[buffer] = operation;
   if (w.operation[buffer] != operation) fail("lanes of a warp are in different operations");
   std::memcpy(w.lanes[buffer][thread() % kWarp], &value, sizeof(T));
   progress_ = true;
   if (++w.arrived == w.size) {
     w.arrived = 0;
     ++w.generation;
   } else {
     while (w.generation == generation) wait(operation);
   }
   return w.lanes[buffer];
 }

 private : static void entry() {
    instance().run_thread();
  }

  void run_thread() {
    (*kernel_)();
    running_->done = true;
    progress_ = true;
    swapcontext(&running_->context, &scheduler_);
  }

  void meet(unsigned& arrived, unsigned& generation, unsigned all, const char* what) {
    progress_ = true;
    const unsigned before = generation;
    if (++arrived == all) {
      arrived = 0;
      ++generation;
      return;
    }
    while (generation == before) wait(what);
  }

  // All memory is NaN in every format: nobody wrote it.
  void prepare(Block& block, dim3 index, size_t shared_bytes) {
    const unsigned threads = block_size.x;
    block.index = index;
    block.shared.assign(shared_bytes + 1024, 0xff);
    block.declared.assign(declared_shared().size, 0xff);
    block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
    block.fibers.resize(threads);
    block.at_barrier = 0;
    for (unsigned t = 0; t < threads; ++t) {
      if (!block.fibers[t]) block.fibers[t] = std::make_unique<Fiber>();
      Fiber& fiber = *block.fibers[t];
      fiber.done = false;
      fiber.thread = t;
      fiber.copies.assign(1, {});
      ++block.warps[t / kWarp].size;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
    }
  }

  void run_team() {
    at_team_ = 0;
    for (bool alive = true; alive;) {
      alive = false;
      bool any_progress = false;
      for (const auto& block : team_) {
        enter(*block);
        alive |= run_block(any_progress);
        leave();
      }
      if (alive && !any_progress) fail(running_->waits);
    }
    for (const auto& block : team_) {
      if (block->at_barrier > 0) fail("a thread ended while others wait in __syncthreads");
    }
    if (at_team_ > 0) fail("a thread ended while others wait in cluster_sync");
  }

  void enter(Block& block) {
    block_ = &block;
    const Bytes declared = declared_shared();
    std::memcpy(declared.data, block.declared.data(), declared.size);
  }
  void leave() {
    const Bytes declared = declared_shared();
    std::memcpy(block_->declared.data(), declared.data, declared.size);
  }

  // Every warp until it waits; whether some are not done.
  bool run_block(bool& any_progress) {
    bool alive = false;
    const unsigned first = random_(), warps = static_cast<unsigned>(block_->warps.size());
    for (unsigned w = 0; w < warps; ++w) {
      do {
        progress_ = false;
        alive |= run_warp((first + w) % warps);
        any_progress |= progress_;
      } while (progress_);
    }
    return alive;
  }

  // Every lane until it waits, any of them first; whether some are not done.
  bool run_warp(unsigned warp) {
    bool alive = false;
    const unsigned first = random_();
    for (unsigned l = 0; l < kWarp; ++l) {
      const unsigned thread = warp * kWarp + (first + l) % kWarp;
      if (thread >= block_size.x || block_->fibers[thread]->done) continue;
      alive = true;
      running_ = block_->fibers[thread].get();
      swapcontext(&scheduler_, &running_->context);
    }
    return alive;
  }

  ucontext_t scheduler_;
  std::minstd_rand random_;
  std::vector<std::unique_ptr<Block>> team_;
  Block* block_ = nullptr;
  Fiber* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  unsigned at_team_ = 0, team_generation_ = 0;
  bool progress_ = false;
};

inline Machine& machine() { return Machine::instance(); }

inline int lane() { return static_cast<int>(machine().thread() % kWarp); }

// What a lane handed to exchange().
template <class T>
T of_lane(const unsigned char (*lanes)[kMaxBytes], int source) {
  T value;
  std::memcpy(&value, lanes[source], sizeof(T));
  return value;
}
// Every lane's value for the lane that asks for it.
template <class T>
T take_from(const T& value, int source, const char* operation) {
  return of_lane<T>(machine().exchange(value, operation), source);
}

// bfloat16, rounded to the nearest, the even one of two.
inline uint16_t bfloat16_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float of_bfloat16_bits(uint16_t bits) { return __uint_as_float(unsigned{bits} << 16); }

inline unsigned char* aligned_shared() {
  const auto address = reinterpret_cast<uintptr_t>(machine().block().shared.data());
  return reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
}

inline dim3 thread_index() { return {machine().thread(), 0, 0}; }

// What lies between tensors and the pages before them.
inline std::vector<std::pair<const unsigned char*, const unsigned char*>>& margins() {
  static std::vector<std::pair<const unsigned char*, const unsigned char*>> all;
  return all;
}
inline bool margins_are_untouched() {
  for (const auto& [begin, end] : margins()) {
    for (const unsigned char* p = begin; p < end; ++p) {
      if (*p != 0xff) return false;
    }
  }
  return true;
}

// Global memory: `count` elements that end where a page that nobody may touch begins, and start after another.
template <class T>
class Tensor {
 public:
  explicit Tensor(size_t count) : count_(count) {
    const size_t bytes = (count * sizeof(T) + 15) / 16 * 16, page = 4096, inner = (bytes + page - 1) / page * page;
    unsigned char* pages =
        static_cast<unsigned char*>(mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages == MAP_FAILED || mprotect(pages + page, inner, PROT_READ | PROT_WRITE)) fail("no memory");
    data_ = reinterpret_cast<T*>(pages + page + inner - bytes);
    std::memset(pages + page, 0xff, inner);
    margins().emplace_back(pages + page, pages + page + inner - bytes);
  }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) const {
    if (i >= count_) fail("an index of the test is out of bounds");
    return data_[i];
  }

 private:
  T* data_;
  size_t count_;
};

}  // namespace simulated

#define threadIdx (simulated::thread_index())
#define blockIdx (simulated::machine().block().index)
#define blockDim (simulated::machine().block_size)
#define gridDim (simulated::machine().grid_size)
#define __syncthreads() simulated::machine().barrier()
