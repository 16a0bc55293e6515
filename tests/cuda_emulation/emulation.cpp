// What tests set from outside.
#include "cuda_runtime.h"

extern "C" __attribute__((visibility("default"))) void emulation_shuffle(unsigned seed) {
  emulation::state().shuffle = seed;
}
