// parallel_for in the thread pool of the surrounding process: torch's own OpenMP runtime, found at run time, so that no
// second pool competes for the cores (two pools: a 3 ms kernel between two GEMMs was measured to cost twice its time).
#pragma once

#include <cstdint>

namespace pk {

// Threads one call may use; set per call from torch.get_num_threads().
void set_num_threads(int threads);
int num_threads();

// Name of the pool in use: "libgomp (GOMP_parallel)", "LLVM OpenMP (__kmpc_fork_call)" or "own (sleeping threads)".
const char* threading();

// Calls body(context, i) once for each i in [0, count), in any order, on up to num_threads() threads.
void parallel_for(int64_t count, void (*body)(void* context, int64_t index), void* context);

template <class Body>
static inline void parallel_for(int64_t count, const Body& body) {
  parallel_for(
      count, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace pk
