// Scratch of one call that tasks take in turns: as many pieces come to be as tasks run at once. Memory that is freed
// and allocated again for every task would be handed back to the system, and each page of it be faulted in anew.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

namespace pk {
namespace {

template <class Item>
class ScratchPool {
 public:
  // body(item) on a free item, or on a new one from make(), which returns a unique_ptr.
  template <class Make, class Body>
  void with(const Make& make, const Body& body) {
    std::unique_ptr<Item> item = taken();
    if (!item) item = make();
    body(*item);
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(item));
  }

 private:
  std::unique_ptr<Item> taken() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return nullptr;
    std::unique_ptr<Item> item = std::move(free_.back());
    free_.pop_back();
    return item;
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Item>> free_;
};

}  // namespace
}  // namespace pk
