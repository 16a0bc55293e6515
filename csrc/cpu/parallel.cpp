// Finds the OpenMP runtime that torch has loaded and runs parallel_for on its threads; a pool that sleeps otherwise.
#include "parallel.h"

#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace pk {
namespace {

// One call of parallel_for: threads draw indices from a shared counter until none is left.
struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t count;
  Job(void (*job_body)(void*, int64_t), void* job_context, int64_t job_count)
      : body(job_body), context(job_context), count(job_count) {}

  std::atomic<int64_t> next{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;

  void work() {
    try {
      for (int64_t i = next++; i < count; i = next++) body(context, i);
    } catch (...) {
      next = count;
      std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInParallel = int (*)();
using KmpcForkCall = void (*)(void*, int, void (*)(int*, int*, ...), ...);
using KmpcPushThreads = void (*)(void*, int, int);
using KmpcThread = int (*)(void*);

struct Runtime {
  GompParallel gomp_parallel = nullptr;
  OmpInParallel in_parallel = nullptr;
  KmpcForkCall kmpc_fork_call = nullptr;
  KmpcPushThreads kmpc_push_threads = nullptr;
  KmpcThread kmpc_thread = nullptr;

  explicit Runtime(void* library) {
    in_parallel = reinterpret_cast<OmpInParallel>(dlsym(library, "omp_in_parallel"));
    gomp_parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
    kmpc_fork_call = reinterpret_cast<KmpcForkCall>(dlsym(library, "__kmpc_fork_call"));
    kmpc_push_threads = reinterpret_cast<KmpcPushThreads>(dlsym(library, "__kmpc_push_num_threads"));
    kmpc_thread = reinterpret_cast<KmpcThread>(dlsym(library, "__kmpc_global_thread_num"));
  }
  bool has_gomp() const { return gomp_parallel && in_parallel; }
  bool has_kmpc() const { return kmpc_fork_call && kmpc_push_threads && kmpc_thread && in_parallel; }
  bool usable() const { return has_gomp() || has_kmpc(); }
};

#if defined(__linux__)
// Names of loaded libraries that look like an OpenMP runtime.
int collect_openmp(dl_phdr_info* info, size_t, void* names) {
  const char* name = info->dlpi_name ? info->dlpi_name : "";
  for (const char* runtime : {"libgomp", "libiomp5", "libomp"}) {
    if (std::strstr(name, runtime)) static_cast<std::vector<std::string>*>(names)->push_back(name);
  }
  return 0;
}

// torch's wheels load their OpenMP runtime under a mangled file name and not always globally: look through what is
// loaded, first for the one beside torch.
Runtime loaded_runtime() {
  std::vector<std::string> names;
  dl_iterate_phdr(collect_openmp, &names);
  std::stable_partition(names.begin(), names.end(),
                        [](const std::string& name) { return name.find("torch") != std::string::npos; });
  for (const std::string& name : names) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library && Runtime(library).usable()) return Runtime(library);
  }
  return Runtime(RTLD_DEFAULT);
}
#else
Runtime loaded_runtime() { return Runtime(RTLD_DEFAULT); }
#endif

const Runtime& runtime() {
  static const Runtime instance = loaded_runtime();
  return instance;
}

// LLVM's runtime wants a source location: only the string is read.
struct KmpcIdent {
  int reserved_1 = 0, flags = 2, reserved_2 = 0, reserved_3 = 0;
  const char* source = ";perceiver_kernels;parallel_for;0;0;;";
};

// Threads for the case without OpenMP. They wait on a condition variable: an idle pool costs nothing.
class SleepingPool {
 public:
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> call(call_mutex_, std::try_to_lock);
    if (!call.owns_lock()) return job.work();  // a second Python thread computes on its own thread
    while (static_cast<int>(workers_.size()) < threads - 1) workers_.emplace_back([this] { serve(); });
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      open_ = busy_ = threads - 1;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  ~SleepingPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || open_ > 0; });
      if (stop_) return;
      --open_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex call_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int open_ = 0, busy_ = 0;
  bool stop_ = false;
};

thread_local int threads_of_call = 1;

void gomp_entry(void* job) { static_cast<Job*>(job)->work(); }

void kmpc_microtask(int*, int*, Job* job) { job->work(); }

}  // namespace

void set_num_threads(int threads) { threads_of_call = threads < 1 ? 1 : threads; }
int num_threads() { return threads_of_call; }

const char* threading() {
  if (runtime().has_gomp()) return "OpenMP (GOMP_parallel)";
  if (runtime().has_kmpc()) return "LLVM OpenMP (__kmpc_fork_call)";
  return "own (sleeping threads)";
}

void parallel_for(int64_t count, void (*body)(void*, int64_t), void* context) {
  Job job(body, context, count);
  const int threads = static_cast<int>(count < threads_of_call ? count : threads_of_call);
  const bool nested = runtime().usable() && runtime().in_parallel();
  if (threads <= 1 || nested) {
    job.work();
  } else if (runtime().has_gomp()) {
    runtime().gomp_parallel(gomp_entry, &job, static_cast<unsigned>(threads), 0);
  } else if (runtime().has_kmpc()) {
    static KmpcIdent location;  // the runtime may keep its address
    runtime().kmpc_push_threads(&location, runtime().kmpc_thread(&location), threads);
    runtime().kmpc_fork_call(&location, 1, reinterpret_cast<void (*)(int*, int*, ...)>(kmpc_microtask), &job);
  } else {
    static SleepingPool pool;
    pool.run(job, threads);
  }
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace pk
