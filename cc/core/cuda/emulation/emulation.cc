// The fibers, their schedule and what they wait for. Compiled without sanitizers, whatever the test is compiled with:
// what fibers do here is the machine's work, not the kernel's.

#include "cc/core/cuda/emulation/emulation.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <utility>
#include <vector>

// Null where the program is not linked with that sanitizer.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __tsan_read_range(void* address, unsigned long bytes);
__attribute__((weak)) void __tsan_write_range(void* address, unsigned long bytes);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t bytes);
}

dim3 threadIdx, blockIdx, blockDim;

namespace tf_agc {
namespace core {
namespace cuda {
namespace emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kNaN = 0xff;  // A byte of which NaN of every type consists.

// Clusters alive at once, so that blocks of different clusters run between each other.
constexpr int64_t kResidentClusters = 2;

constexpr size_t kStackBytes = 256 * 1024;  // Touched in part: AddressSanitizer's frames are large.

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Orders what came before a release before what comes after an acquire.
void Acquire(void* address) {
  if (__tsan_acquire != nullptr) __tsan_acquire(address);
}
void Release(void* address) {
  if (__tsan_release != nullptr) __tsan_release(address);
}

// An access of the running thread that the sanitizer would not see.
void NoteRead(void* address, size_t bytes) {
  if (__tsan_read_range != nullptr) __tsan_read_range(address, bytes);
}
void NoteWrite(void* address, size_t bytes) {
  if (__tsan_write_range != nullptr) __tsan_write_range(address, bytes);
}

// The scheduler's own accesses, allocations included, are no thread's of the kernel.
class Unseen {
 public:
  Unseen() {
    if (AnnotateIgnoreReadsBegin == nullptr) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (AnnotateIgnoreReadsBegin == nullptr) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

struct Block;
struct Fiber;
struct Grid;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t batch;
};

// A barrier of `size` threads. Two addresses for the sanitizer, in turn: whoever is late at one barrier must not be
// ordered after those who have already come to the next.
struct Barrier {
  int size = 0;
  int arrived = 0;
  int64_t completed = 0;
  char order[2];
  std::vector<Fiber*> waiting;
};

// A barrier in shared memory. A phase ends when all have arrived and as many bytes have come as they expect.
struct ByteBarrier {
  int arrivals = 0;  // Of a phase.
  int pending = 0;   // Arrivals.
  int64_t bytes = 0;
  int64_t completed = 0;
  bool fenced = false;  // Known to the cluster.
  Fiber* owner = nullptr;
  char order[2];  // As Barrier's.
  std::vector<Fiber*> waiting;
};

// Into a block's shared memory, on its way.
struct AsyncStore {
  Block* block;
  size_t offset;
  unsigned char value[16];
  size_t bytes;
  ByteBarrier* barrier;
};

struct Cluster {
  Grid* grid;
  Barrier barrier;
  char reads;   // For the sanitizer: what came before a relaxed arrival.
  char fences;  // For the sanitizer: initialised barriers.
  int live_blocks = 0;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Block {
  Cluster* cluster;
  unsigned index;
  unsigned rank;  // In the cluster.
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int live_threads = 0;
  char ended;  // For the sanitizer.
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<Fiber*> lanes;                    // By thread.
  std::map<size_t, ByteBarrier> byte_barriers;  // By their offset in shared memory.
};

struct Fiber {
  ucontext_t start;
  void* resume[5];  // __builtin_setjmp's.
  bool started = false;
  void* sanitizer_fiber = nullptr;

  // Of the thread that it runs.
  Block* block = nullptr;
  unsigned thread = 0;
  uint64_t priority = 0;
  int64_t shuffles = 0;
  double shuffled[2];
  int64_t cluster_arrivals = 0;
  int barriers = 0;  // That it has come to.
  bool skips_cluster_wait = false;
  bool waits_for_reads = false;  // Since its last arrival, a relaxed one.
  bool waited_for_reads = false;
  std::vector<Copy> copies;  // In flight.
  size_t batches = 0;        // Of copies that were committed.
};

struct ByKey {
  bool operator()(const std::pair<uint64_t, Fiber*>& a, const std::pair<uint64_t, Fiber*>& b) const {
    return a.first > b.first;
  }
};

// A launch.
struct Grid {
  std::function<void()> run;
  int64_t clusters;
  unsigned cluster_size;
  int threads;
  size_t shared_bytes;
  Schedule schedule;
  int launch;    // Since SetSchedule().
  size_t count;  // Since TakeStatistics().

  std::mt19937_64 random;
  bool by_priority = false;
  std::priority_queue<std::pair<uint64_t, Fiber*>, std::vector<std::pair<uint64_t, Fiber*>>, ByKey> ready;
  std::vector<int64_t> order;  // In which clusters start.
  size_t next = 0;
  std::vector<std::unique_ptr<Cluster>> live;
  std::vector<AsyncStore> stores;
  Grid* before = nullptr;       // A dependent launch: the one that it depends on, until that is done.
  std::vector<Fiber*> waiting;  // For that one.
  char begun, ended;            // For the sanitizer.
  char* before_ended = nullptr;
};

struct Machine {
  Schedule schedule;
  int launches = 0;  // Since SetSchedule().
  Statistics statistics;
  std::map<const void*, int> shared_limits;

  std::vector<std::unique_ptr<Fiber>> fibers;  // All that were ever made.
  std::vector<Fiber*> idle;
  Fiber* running = nullptr;
  void* scheduler_resume[5];
  void* scheduler_fiber = nullptr;

  std::unique_ptr<Grid> queued;  // Launched, and not run yet.
};
Machine machine;

// ---- Switching ----

void SwitchSanitizer(void* fiber) {
  constexpr unsigned kNoOrder = 1;  // Switching is the machine's work: it orders nothing.
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(fiber, kNoOrder);
}

// swapcontext() would do, but asks the operating system each time.
__attribute__((noinline)) void Jump(void** to) { __builtin_longjmp(to, 1); }

void RunThreads();

__attribute__((noinline)) void SwitchToFiber(Fiber* fiber) {
  machine.running = fiber;
  threadIdx = dim3(fiber->thread);
  blockIdx = dim3(fiber->block->index);
  blockDim = dim3(static_cast<unsigned>(fiber->block->cluster->grid->threads));
  if (__builtin_setjmp(machine.scheduler_resume) != 0) return;
  SwitchSanitizer(fiber->sanitizer_fiber);
  if (machine.running->started) Jump(machine.running->resume);
  machine.running->started = true;
  setcontext(&machine.running->start);
}

__attribute__((noinline)) void SwitchToScheduler() {
  if (__builtin_setjmp(machine.running->resume) != 0) return;
  SwitchSanitizer(machine.scheduler_fiber);
  Jump(machine.scheduler_resume);
}

Fiber* NewFiber() {
  machine.fibers.push_back(std::make_unique<Fiber>());
  Fiber* fiber = machine.fibers.back().get();
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, page, PROT_NONE) != 0) Fail("no memory for a stack");
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = stack;
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, &RunThreads, 0);
  if (__tsan_create_fiber != nullptr) fiber->sanitizer_fiber = __tsan_create_fiber(0);
  return fiber;
}

Grid* GridOf(const Fiber* fiber) { return fiber->block->cluster->grid; }

void MakeReady(Fiber* fiber) {
  Grid* grid = GridOf(fiber);
  grid->ready.push({grid->by_priority ? fiber->priority : grid->random(), fiber});
}

// ---- Barriers ----

// Returns whether this is the barrier to leave out.
bool IsMissing(Fiber* fiber) {
  const Grid& grid = *GridOf(fiber);
  const bool here = grid.schedule.missing_launch < 0 || grid.schedule.missing_launch == grid.launch;
  return fiber->barriers++ == grid.schedule.missing_barrier && here;
}

void Complete(Barrier* barrier) {
  barrier->arrived = 0;
  ++barrier->completed;
  for (Fiber* fiber : barrier->waiting) MakeReady(fiber);
  barrier->waiting.clear();
}

void Arrive(Barrier* barrier) {
  const Unseen unseen;
  if (++barrier->arrived == barrier->size) Complete(barrier);
}

// Until `phase` barriers are complete.
void WaitFor(Barrier* barrier, int64_t phase) {
  if (barrier->completed > phase) return;
  const Unseen unseen;
  barrier->waiting.push_back(machine.running);
  SwitchToScheduler();
}

// ---- Barriers that count bytes ----

// The offset in the running block's shared memory.
size_t OffsetOf(const void* shared, size_t bytes) {
  const Block& block = *machine.running->block;
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > block.shared_bytes) Fail("not an address in shared memory");
  return static_cast<size_t>(offset);
}

Block* BlockOfRank(int rank) {
  const auto& blocks = machine.running->block->cluster->blocks;
  if (rank < 0 || static_cast<size_t>(rank) >= blocks.size()) Fail("a cluster has no block of that rank");
  return blocks[static_cast<size_t>(rank)].get();
}

ByteBarrier* FindBarrier(Block* block, const uint64_t* barrier) {
  const auto found = block->byte_barriers.find(OffsetOf(barrier, sizeof *barrier));
  if (found == block->byte_barriers.end()) Fail("a barrier is used before it is initialised");
  NoteRead(block->shared + found->first, sizeof *barrier);
  return &found->second;
}

void CompleteIfDue(ByteBarrier* barrier) {
  if (barrier->pending > 0) return;
  if (barrier->bytes < 0) Fail("more bytes came than a barrier expects");
  if (barrier->bytes > 0) return;
  ++barrier->completed;
  barrier->pending = barrier->arrivals;
  for (Fiber* fiber : std::exchange(barrier->waiting, {})) MakeReady(fiber);
}

void Deliver(Grid* grid) {
  std::swap(grid->stores[grid->random() % grid->stores.size()], grid->stores.back());
  const AsyncStore store = grid->stores.back();
  grid->stores.pop_back();
  std::memcpy(store.block->shared + store.offset, store.value, store.bytes);
  store.barrier->bytes -= static_cast<int64_t>(store.bytes);
  CompleteIfDue(store.barrier);
}

// Whether a store comes now: half of the seeds wait until nothing else can go on.
bool DeliveryIsDue(Grid* grid) {
  if (grid->stores.empty()) return false;
  return grid->ready.empty() || (grid->schedule.seed / 2 % 2 == 1 && grid->random() % 4 == 0);
}

void CheckNothingComes(const Grid& grid, const Block& block) {
  for (const AsyncStore& store : grid.stores) {
    if (store.block == &block) Fail("a block ended before all came that is stored to it");
  }
  for (const auto& [offset, barrier] : block.byte_barriers) {
    if (barrier.bytes != 0 || barrier.pending != barrier.arrivals) {
      Fail("a block ended while a barrier of its expects arrivals or bytes, or has had too many");
    }
  }
}

bool SomebodyWaitsForBytes(const Grid& grid) {
  for (const auto& cluster : grid.live) {
    for (const auto& block : cluster->blocks) {
      for (const auto& [offset, barrier] : block->byte_barriers) {
        if (!barrier.waiting.empty()) return true;
      }
    }
  }
  return false;
}

// ---- Blocks and their threads ----

void StartCluster(Grid* grid, int64_t index) {
  const unsigned size = grid->cluster_size;
  const int threads = grid->threads;
  grid->live.push_back(std::make_unique<Cluster>());
  Cluster* cluster = grid->live.back().get();
  cluster->grid = grid;
  cluster->barrier.size = static_cast<int>(size) * threads;
  cluster->live_blocks = static_cast<int>(size);
  for (unsigned rank = 0; rank < size; ++rank) {
    cluster->blocks.push_back(std::make_unique<Block>());
    Block* block = cluster->blocks.back().get();
    block->cluster = cluster;
    block->index = static_cast<unsigned>(index) * size + rank;
    block->rank = rank;
    block->live_threads = threads;
    block->barrier.size = threads;
    block->warps.resize(static_cast<size_t>((threads + kWarp - 1) / kWarp));
    for (Barrier& warp : block->warps) warp.size = kWarp;
    block->shared_bytes = grid->shared_bytes;
    block->shared = static_cast<unsigned char*>(std::malloc(block->shared_bytes));
    std::memset(block->shared, kNaN, block->shared_bytes);
    // Whole blocks, then whole warps, before or behind others.
    const uint64_t block_priority = grid->random() >> 44;
    uint64_t warp_priority = 0;
    for (int thread = 0; thread < threads; ++thread) {
      if (thread % kWarp == 0) warp_priority = grid->random() >> 44;
      if (machine.idle.empty()) machine.idle.push_back(NewFiber());
      Fiber* fiber = machine.idle.back();
      machine.idle.pop_back();
      block->lanes.push_back(fiber);
      fiber->block = block;
      fiber->thread = static_cast<unsigned>(thread);
      fiber->priority = block_priority << 40 | warp_priority << 20 | grid->random() >> 44;
      fiber->shuffles = 0;
      fiber->cluster_arrivals = 0;
      fiber->waited_for_reads = false;
      fiber->barriers = 0;
      MakeReady(fiber);
    }
  }
}

// In the context of the thread that ends.
void EndThread(Fiber* fiber) {
  if (!fiber->copies.empty()) Fail("a thread ended without waiting for its copies");
  Block* block = fiber->block;
  Grid* grid = block->cluster->grid;
  {
    const Unseen unseen;
    std::vector<int>& barriers = machine.statistics.barriers;
    if (barriers.size() <= grid->count) barriers.resize(grid->count + 1);
    barriers[grid->count] = std::max(barriers[grid->count], fiber->barriers);
  }
  // What the others have read is free to go; what they have written would not be visible.
  if (fiber->waited_for_reads) Acquire(&block->cluster->reads);
  Release(&grid->ended);
  Release(&block->ended);
  if (block->barrier.arrived > 0 || block->warps[fiber->thread / kWarp].arrived > 0) {
    Fail("a thread ended while others of its block wait for it");
  }
  if (--block->live_threads > 0) return;
  Acquire(&block->ended);
  CheckNothingComes(*grid, *block);
  std::memset(block->shared, kNaN, block->shared_bytes);  // Whoever reads it from here on is wrong.
  if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(block->shared, block->shared_bytes);
  --block->cluster->live_blocks;
}

// What every fiber does, one thread after the other.
void RunThreads() {
  for (;;) {
    Grid* grid = GridOf(machine.running);
    Acquire(&grid->begun);
    grid->run();
    EndThread(machine.running);
    const Unseen unseen;
    machine.idle.push_back(machine.running);
    SwitchToScheduler();
  }
}

void FreeEndedClusters(Grid* grid) {
  auto ended = [](const std::unique_ptr<Cluster>& cluster) {
    if (cluster->live_blocks > 0) return false;
    for (const auto& block : cluster->blocks) {
      if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(block->shared, block->shared_bytes);
      std::free(block->shared);
    }
    return true;
  };
  grid->live.erase(std::remove_if(grid->live.begin(), grid->live.end(), ended), grid->live.end());
}

// Runs a launch until it is done, or until all that lives of it waits for the launch before.
void Run(Grid* grid) {
  const Unseen unseen;
  if (__tsan_get_current_fiber != nullptr) machine.scheduler_fiber = __tsan_get_current_fiber();
  for (;;) {
    FreeEndedClusters(grid);
    while (grid->next < grid->order.size() && static_cast<int64_t>(grid->live.size()) < kResidentClusters) {
      StartCluster(grid, grid->order[grid->next++]);
    }
    if (grid->live.empty()) break;
    auto live = [](const std::unique_ptr<Cluster>& cluster) { return cluster->live_blocks > 0; };
    while (std::all_of(grid->live.begin(), grid->live.end(), live)) {
      if (DeliveryIsDue(grid)) {
        Deliver(grid);
        continue;
      }
      if (grid->ready.empty()) {
        if (!grid->waiting.empty()) return;
        if (SomebodyWaitsForBytes(*grid)) Fail("a thread waits for bytes that never come");
        Fail("every thread waits at a barrier that the others never reach");
      }
      Fiber* fiber = grid->ready.top().second;
      grid->ready.pop();
      SwitchToFiber(fiber);
    }
  }
}

void RunQueued() {
  if (machine.queued == nullptr) return;
  const Unseen unseen;
  Run(machine.queued.get());
  Acquire(&machine.queued->ended);
  machine.queued = nullptr;
}

// What a dependent launch does before its threads wait comes before all that the launch before it does.
void RunDependent(std::unique_ptr<Grid> grid) {
  const Unseen unseen;
  Run(grid.get());
  Run(machine.queued.get());
  grid->before = nullptr;
  for (Fiber* fiber : std::exchange(grid->waiting, {})) MakeReady(fiber);
  Run(grid.get());
  Acquire(&grid->ended);
  RunQueued();  // It is done: only to end it.
}

}  // namespace

unsigned char* SharedMemory() { return machine.running->block->shared; }

int ClusterRank() { return static_cast<int>(machine.running->block->rank); }

void InitBarrier(uint64_t* barrier, int arrivals) {
  Fiber* fiber = machine.running;
  const size_t offset = OffsetOf(barrier, sizeof *barrier);
  if (offset % sizeof *barrier != 0) Fail("a misaligned barrier");
  NoteWrite(barrier, sizeof *barrier);
  const Unseen unseen;
  const auto [entry, is_new] = fiber->block->byte_barriers.emplace(offset, ByteBarrier{});
  if (!is_new) Fail("a barrier is initialised twice");
  entry->second.arrivals = entry->second.pending = arrivals;
  entry->second.owner = fiber;
}

// For the sanitizer it publishes more: all that the thread has done. Kernels have done nothing else by then.
void FenceBarrierInit() {
  Fiber* fiber = machine.running;
  for (auto& [offset, barrier] : fiber->block->byte_barriers) barrier.fenced |= barrier.owner == fiber;
  Release(&fiber->block->cluster->fences);
}

void ArriveAndExpect(uint64_t* barrier, int64_t bytes) {
  ByteBarrier* found = FindBarrier(machine.running->block, barrier);
  Release(&found->order[found->completed % 2]);
  const Unseen unseen;
  found->bytes += bytes;
  --found->pending;
  CompleteIfDue(found);
}

void StoreAsync(void* to, int rank, const void* value, size_t bytes, uint64_t* barrier) {
  const size_t offset = OffsetOf(to, bytes);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || offset % bytes != 0) Fail("a misaligned asynchronous store");
  Block* block = BlockOfRank(rank);
  if (block->live_threads == 0) Fail("an asynchronous store to a block that has ended");
  ByteBarrier* found = FindBarrier(block, barrier);
  if (!found->fenced) Fail("an asynchronous store to a barrier that the cluster does not know of");
  // Whoever reads or writes there without having waited is wrong, whenever it arrives.
  NoteWrite(block->shared + offset, bytes);
  Release(&found->order[found->completed % 2]);
  const Unseen unseen;
  AsyncStore store{block, offset, {}, bytes, found};
  std::memcpy(store.value, value, bytes);
  GridOf(machine.running)->stores.push_back(store);
}

void WaitForParity(uint64_t* barrier, int parity) {
  Fiber* fiber = machine.running;
  if (IsMissing(fiber)) return;
  ByteBarrier* found = FindBarrier(fiber->block, barrier);
  while (found->completed % 2 == parity) {
    const Unseen unseen;
    found->waiting.push_back(fiber);
    SwitchToScheduler();
  }
  Acquire(&found->order[parity]);
}

void WaitForLaunchBefore() {
  Fiber* fiber = machine.running;
  if (IsMissing(fiber)) return;
  Grid* grid = GridOf(fiber);
  if (grid->before != nullptr) {
    const Unseen unseen;
    grid->waiting.push_back(fiber);
    SwitchToScheduler();
  }
  if (grid->before_ended != nullptr) Acquire(grid->before_ended);
}

void SetSchedule(const Schedule& schedule) {
  machine.schedule = schedule;
  machine.launches = 0;
}

Statistics TakeStatistics() { return std::exchange(machine.statistics, Statistics{}); }

cudaError_t LaunchKernel(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> run) {
  constexpr unsigned kMostThreads = 1024, kMostCluster = 8, kMostBlocks = 0x7fffffff;
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  unsigned cluster = 1;
  bool dependent = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = attribute.val.clusterDim.x;
    } else {
      dependent = attribute.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  const auto limit = machine.shared_limits.find(kernel);
  const size_t most_shared =
      limit == machine.shared_limits.end() ? kSharedWithoutAsking : static_cast<size_t>(limit->second);
  if (config.gridDim.x == 0 || config.gridDim.x > kMostBlocks || config.blockDim.x == 0 ||
      config.blockDim.x > kMostThreads || cluster == 0 || cluster > kMostCluster || config.gridDim.x % cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > most_shared) return cudaErrorInvalidValue;

  if (!dependent) RunQueued();
  auto grid = std::make_unique<Grid>();
  grid->run = std::move(run);
  grid->clusters = config.gridDim.x / cluster;
  grid->cluster_size = cluster;
  grid->threads = static_cast<int>(config.blockDim.x);
  grid->shared_bytes = config.dynamicSmemBytes;
  grid->schedule = machine.schedule;
  grid->launch = machine.launches++;
  grid->count = static_cast<size_t>(machine.statistics.launches++);
  grid->random.seed(machine.schedule.seed);
  grid->by_priority = machine.schedule.seed % 2 == 1;
  for (int64_t i = 0; i < grid->clusters; ++i) grid->order.push_back(i);
  std::shuffle(grid->order.begin(), grid->order.end(), grid->random);
  Release(&grid->begun);
  if (dependent) ++machine.statistics.dependent_launches;
  if (machine.queued == nullptr) {
    machine.queued = std::move(grid);
  } else {
    grid->before = machine.queued.get();
    grid->before_ended = &machine.queued->ended;
    RunDependent(std::move(grid));
  }
  return cudaSuccess;
}

}  // namespace emulation
}  // namespace cuda
}  // namespace core
}  // namespace tf_agc

using tf_agc::core::cuda::emulation::Acquire;
using tf_agc::core::cuda::emulation::Arrive;
using tf_agc::core::cuda::emulation::Barrier;
using tf_agc::core::cuda::emulation::Block;
using tf_agc::core::cuda::emulation::Cluster;
using tf_agc::core::cuda::emulation::Copy;
using tf_agc::core::cuda::emulation::Fail;
using tf_agc::core::cuda::emulation::Fiber;
using tf_agc::core::cuda::emulation::IsMissing;
using tf_agc::core::cuda::emulation::kWarp;
using tf_agc::core::cuda::emulation::machine;
using tf_agc::core::cuda::emulation::Release;
using tf_agc::core::cuda::emulation::RunQueued;
using tf_agc::core::cuda::emulation::Unseen;
using tf_agc::core::cuda::emulation::WaitFor;

void __syncthreads() {
  Fiber* fiber = machine.running;
  if (IsMissing(fiber)) return;
  Barrier* barrier = &fiber->block->barrier;
  if (fiber->block->live_threads < barrier->size) Fail("a thread ended before a barrier that others wait at");
  const int64_t phase = barrier->completed;
  char* order = &barrier->order[phase % 2];
  Release(order);
  Arrive(barrier);
  WaitFor(barrier, phase);
  Acquire(order);
}

// Orders no memory.
double __shfl_xor_sync(unsigned mask, double value, int lane_mask) {
  if (mask != 0xffffffffu || blockDim.x % kWarp != 0) Fail("a shuffle of less than a warp");
  Fiber* fiber = machine.running;
  const int64_t turn = fiber->shuffles++ % 2;
  fiber->shuffled[turn] = value;
  Block* block = fiber->block;
  Barrier* barrier = &block->warps[fiber->thread / kWarp];
  const int64_t phase = barrier->completed;
  Arrive(barrier);
  WaitFor(barrier, phase);
  return block->lanes[fiber->thread ^ static_cast<unsigned>(lane_mask)]->shuffled[turn];
}

namespace {

void ArriveAtCluster(bool relaxed) {
  Fiber* fiber = machine.running;
  fiber->skips_cluster_wait = IsMissing(fiber);
  if (fiber->skips_cluster_wait) return;
  Cluster* cluster = fiber->block->cluster;
  Barrier* barrier = &cluster->barrier;
  if (fiber->cluster_arrivals > barrier->completed) Fail("a thread arrived twice at a cluster's barrier");
  fiber->waits_for_reads = relaxed;
  Release(relaxed ? &cluster->reads : &barrier->order[fiber->cluster_arrivals % 2]);
  ++fiber->cluster_arrivals;
  Arrive(barrier);
}

}  // namespace

void __cluster_barrier_arrive() { ArriveAtCluster(/*relaxed=*/false); }
void __cluster_barrier_arrive_relaxed() { ArriveAtCluster(/*relaxed=*/true); }

void __cluster_barrier_wait() {
  Fiber* fiber = machine.running;
  if (fiber->skips_cluster_wait) return;
  Barrier* barrier = &fiber->block->cluster->barrier;
  const int64_t phase = fiber->cluster_arrivals - 1;
  if (phase < 0) Fail("a thread waits at a cluster's barrier without having arrived");
  WaitFor(barrier, phase);
  Acquire(&fiber->block->cluster->fences);
  if (fiber->waits_for_reads) {
    fiber->waited_for_reads = true;
  } else {
    Acquire(&barrier->order[phase % 2]);
  }
}

void* __cluster_map_shared_rank(const void* shared, unsigned rank) {
  const Block& block = *machine.running->block;
  const ptrdiff_t offset = static_cast<const unsigned char*>(shared) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) >= block.shared_bytes) Fail("not an address in shared memory");
  if (rank >= block.cluster->blocks.size()) Fail("a cluster has no block of that rank");
  return block.cluster->blocks[rank]->shared + offset;
}

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) Fail("an asynchronous copy takes 4, 8 or 16 bytes");
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) {
    Fail("a misaligned asynchronous copy");
  }
  const Unseen unseen;
  machine.running->copies.push_back({to, from, bytes, machine.running->batches});
}
void __pipeline_commit() { ++machine.running->batches; }
void __pipeline_wait_prior(size_t batches) {
  if (batches > 7) Fail("waiting for all but more than 7 batches of copies");
  std::vector<Copy> later;
  for (const Copy& copy : machine.running->copies) {
    if (copy.batch + batches < machine.running->batches) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      const Unseen unseen;
      later.push_back(copy);
    }
  }
  const Unseen unseen;
  machine.running->copies.swap(later);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) machine.shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  RunQueued();
  return cudaSuccess;
}

// ---- 16-bit floats ----

float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);
  // As a float's bits it is the value times 2^-112.
  return std::copysign(__uint_as_float(magnitude << 13) * 0x1p112f, __uint_as_float(sign | 0x3f800000u));
}

__half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits & 0x80000000u) >> 16);
  uint32_t half;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x47800000u) {  // 65536 and above.
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // Denormal: 0.5 is added, whose last place is that of half's denormals.
    half = __float_as_uint(std::fabs(value) + 0.5f) - 0x3f000000u;
  } else {  // Carries into the exponent where rounding does, up to infinity.
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

__nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
