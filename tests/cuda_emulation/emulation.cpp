// What tests set and ask from outside.
#include "cuda_runtime.h"

extern "C" __attribute__((visibility("default"))) void emulation_shuffle(unsigned seed) {
  emulation::state().shuffle = seed;
}

extern "C" __attribute__((visibility("default"))) bool emulation_launched(const void* kernel) {
  return emulation::state().launched.count(kernel) != 0;
}
