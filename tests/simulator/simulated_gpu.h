// A GPU simulated on one CPU core: kernels are ordinary C++, every thread of a CTA is a fiber, and CTAs run one after
// another, except those of a cluster, which run together. It finds wrong indices, missing or divergent barriers and
// reads of uninitialized memory, but no races, as fibers switch only where they wait.
//
// Shared memory is NaN until some thread of the CTA writes it. So is the padding around a tensor in global memory,
// which must stay as it is; the pages before and after it are inaccessible.
//
// A fiber runs until it waits for its warp (a collective operation), its CTA (__syncthreads) or its cluster. The warp
// that runs next, and its first lane, are picked at random; it runs as far as it gets without the others. A deadlock,
// or lanes of a warp in different operations, end the program with an error.
#pragma once

#include <link.h>
#include <setjmp.h>
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
#define __shared__ static thread_local  // so that declared_shared() finds all of it

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
inline constexpr int kMaxBytes = 512;  // that a lane may exchange with its warp at once
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

// Everything that kernels declare __shared__, as the program has no other thread_local variables.
inline Bytes declared_shared() {
  Bytes found{nullptr, 0};
  const auto find = [](dl_phdr_info* program, size_t, void* result) {
    for (int i = 0; i < program->dlpi_phnum; ++i) {
      const auto& segment = program->dlpi_phdr[i];
      if (segment.p_type == PT_TLS && program->dlpi_tls_data) {
        *static_cast<Bytes*>(result) = {static_cast<unsigned char*>(program->dlpi_tls_data), segment.p_memsz};
      }
    }
    return 1;  // the first object is the program itself
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

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t start;  // on its own stack; from then on it continues where it waits
  jmp_buf here;
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStackBytes);
  bool started = false, done = false;
  unsigned thread = 0;
  const char* waits = nullptr;
  std::vector<std::vector<AsyncCopy>> copies;  // pending groups; the last one is still open
};

struct Cta {
  dim3 index;
  std::vector<unsigned char> shared, declared;  // `declared` is saved here while another CTA runs
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned at_barrier = 0, barrier_generation = 0;
};

class Gpu {
 public:
  static Gpu& instance() {
    static Gpu gpu;
    return gpu;
  }

  dim3 block_size, grid_size;

  const Cta& cta() const { return *cta_; }
  unsigned thread() const { return running_->thread; }
  Fiber& fiber() { return *running_; }
  Warp& warp() { return cta_->warps[running_->thread / kWarp]; }

  void launch(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel,
              unsigned cluster_size = 1) {
    grid_size = grid;
    block_size = {threads};
    kernel_ = &kernel;
    while (cluster_.size() < cluster_size) cluster_.push_back(std::make_unique<Cta>());
    cluster_.resize(cluster_size);
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster_size) {
        for (unsigned rank = 0; rank < cluster_size; ++rank) prepare(*cluster_[rank], {x + rank, y, 0}, shared_bytes);
        run_cluster();
      }
    }
  }

  void wait(const char* what) {
    running_->waits = what;
    if (!_setjmp(running_->here)) _longjmp(scheduler_, 1);
  }

  void barrier() { meet(cta_->at_barrier, cta_->barrier_generation, block_size.x, "__syncthreads"); }
  void cluster_barrier() {
    meet(at_cluster_, cluster_generation_, block_size.x * static_cast<unsigned>(cluster_.size()), "cluster_sync");
  }

  // The address of p's counterpart in the shared memory of the cluster's CTA `rank`.
  template <class V>
  V* map_shared_rank(V* p, int rank) {
    Cta& other = *cluster_.at(rank);
    if (&other == cta_) return p;
    const Bytes declared = declared_shared(), own{cta_->shared.data(), cta_->shared.size()};
    auto* const byte = reinterpret_cast<unsigned char*>(p);
    const auto in = [&](const Bytes& bytes) { return byte >= bytes.data && byte < bytes.data + bytes.size; };
    if (in(declared)) return reinterpret_cast<V*>(other.declared.data() + (byte - declared.data));
    if (in(own)) return reinterpret_cast<V*>(other.shared.data() + (byte - own.data));
    fail("map_shared_rank: not in shared memory");
  }

  // Returns all lanes' values once all lanes have called it.
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
    _longjmp(scheduler_, 1);
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

  // All bytes 0xff: NaN in every format.
  void prepare(Cta& cta, dim3 index, size_t shared_bytes) {
    const unsigned threads = block_size.x;
    cta.index = index;
    cta.shared.assign(shared_bytes + 1024, 0xff);
    cta.declared.assign(declared_shared().size, 0xff);
    cta.warps.assign((threads + kWarp - 1) / kWarp, Warp());
    cta.fibers.resize(threads);
    cta.at_barrier = 0;
    for (unsigned t = 0; t < threads; ++t) {
      if (!cta.fibers[t]) cta.fibers[t] = std::make_unique<Fiber>();
      Fiber& fiber = *cta.fibers[t];
      fiber.started = fiber.done = false;
      fiber.thread = t;
      fiber.copies.assign(1, {});
      ++cta.warps[t / kWarp].size;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.data();
      fiber.start.uc_stack.ss_size = fiber.stack.size();
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, entry, 0);
    }
  }

  void run_cluster() {
    at_cluster_ = 0;
    for (bool alive = true; alive;) {
      alive = false;
      bool any_progress = false;
      for (const auto& cta : cluster_) {
        enter(*cta);
        alive |= run_cta(any_progress);
        leave();
      }
      if (alive && !any_progress) fail(running_->waits);
    }
    for (const auto& cta : cluster_) {
      if (cta->at_barrier > 0) fail("a thread ended while others wait in __syncthreads");
    }
    if (at_cluster_ > 0) fail("a thread ended while others wait in cluster_sync");
  }

  void enter(Cta& cta) {
    cta_ = &cta;
    const Bytes declared = declared_shared();
    std::memcpy(declared.data, cta.declared.data(), declared.size);
  }
  void leave() {
    const Bytes declared = declared_shared();
    std::memcpy(cta_->declared.data(), declared.data, declared.size);
  }

  // Runs every warp until it waits. Returns whether any thread is still alive.
  bool run_cta(bool& any_progress) {
    bool alive = false;
    const unsigned first = random_(), warps = static_cast<unsigned>(cta_->warps.size());
    for (unsigned w = 0; w < warps; ++w) {
      do {
        progress_ = false;
        alive |= run_warp((first + w) % warps);
        any_progress |= progress_;
      } while (progress_);
    }
    return alive;
  }

  // Runs every lane until it waits, starting with a random one. Returns whether any is still alive.
  bool run_warp(unsigned warp) {
    bool alive = false;
    const unsigned first = random_();
    for (unsigned l = 0; l < kWarp; ++l) {
      const unsigned thread = warp * kWarp + (first + l) % kWarp;
      if (thread >= block_size.x || cta_->fibers[thread]->done) continue;
      alive = true;
      running_ = cta_->fibers[thread].get();
      resume(*running_);
    }
    return alive;
  }

  // Runs a fiber until it waits or ends. setjmp, unlike swapcontext, makes no system call.
  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  jmp_buf scheduler_;
  std::minstd_rand random_;
  std::vector<std::unique_ptr<Cta>> cluster_;
  Cta* cta_ = nullptr;
  Fiber* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  unsigned at_cluster_ = 0, cluster_generation_ = 0;
  bool progress_ = false;
};

inline Gpu& gpu() { return Gpu::instance(); }

inline int lane() { return static_cast<int>(gpu().thread() % kWarp); }

// The value that lane `source` passed to exchange().
template <class T>
T lane_value(const unsigned char (*lanes)[kMaxBytes], int source) {
  T value;
  std::memcpy(&value, lanes[source], sizeof(T));
  return value;
}
// A warp shuffle: the value of lane `source`.
template <class T>
T shuffle(const T& value, int source, const char* operation) {
  return lane_value<T>(gpu().exchange(value, operation), source);
}

// bfloat16, rounded to nearest even.
inline uint16_t to_bfloat16_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bfloat16_bits(uint16_t bits) { return __uint_as_float(unsigned{bits} << 16); }

inline unsigned char* aligned_shared() {
  const auto address = reinterpret_cast<uintptr_t>(gpu().cta().shared.data());
  return reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
}

inline dim3 thread_index() { return {gpu().thread(), 0, 0}; }

// The padding between tensors and the inaccessible pages before them.
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

// Global memory for `count` elements, which end at an inaccessible page.
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
#define blockIdx (simulated::gpu().cta().index)
#define blockDim (simulated::gpu().block_size)
#define gridDim (simulated::gpu().grid_size)
#define __syncthreads() simulated::gpu().barrier()
