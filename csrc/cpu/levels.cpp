// Chooses the instruction set at load time: every kernel file is compiled once per level, this one for the plainest
// processor.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../ops.h"

#define PK_DECLARE_LEVEL(level)                                                                                     \
  namespace level {                                                                                                 \
  void separable_attention_fwd(const SeparableInputs&, const SeparableOutputs&);                                    \
  void separable_attention_bwd(const SeparableInputs&, const SeparableOutputs&, const SeparableOutputs&,            \
                               const SeparableGradients&);                                                          \
  void separable_layer_norm(const TensorView&, const TensorList&, const TensorList&, const TensorView&,             \
                            const TensorView&, int64_t, double, const TensorView&);                                 \
  void fourier_encode_grid(const FourierTables&, const TensorView&, const TensorView&);                             \
  void fourier_encode_points(const FourierBands&, const TensorView&, const TensorView&);                            \
  void latent_attention_fwd(const LatentInputs&, const LatentOutputs&);                                             \
  void latent_attention_bwd(const LatentInputs&, const LatentOutputs&, const TensorView&, const LatentGradients&);  \
  void cross_attention_fwd(const CrossInputs&, const LatentOutputs&);                                               \
  void cross_attention_bwd(const CrossInputs&, const LatentOutputs&, const TensorView&, const LatentGradients&);    \
  void absorbed_attention_fwd(const AbsorbedInputs&, const AbsorbedState&);                                         \
  void absorbed_attention_bwd(const AbsorbedInputs&, const AbsorbedState&, const AbsorbedState&, const TensorView&, \
                              const TensorView&);                                                                   \
  void separable_query_attention_fwd(const SeparableQueryInputs&, const LatentOutputs&);                            \
  void separable_query_attention_bwd(const SeparableQueryInputs&, const LatentOutputs&, const TensorView&,          \
                                     const SeparableQueryGradients&);                                               \
  void linear_epilogue_fwd(const LinearEpilogue&, const TensorView&, const TensorView&, const TensorView&);         \
  void linear_epilogue_bwd(const LinearEpilogue&, const TensorView&, const TensorView&, const TensorView&,          \
                           const TensorView&);                                                                      \
  double exp_rate(double);                                                                                          \
  constexpr CpuOps ops(const char* name, int vector_bytes) {                                                        \
    return {name,                                                                                                   \
            vector_bytes,                                                                                           \
            separable_attention_fwd,                                                                                \
            separable_attention_bwd,                                                                                \
            separable_layer_norm,                                                                                   \
            fourier_encode_grid,                                                                                    \
            fourier_encode_points,                                                                                  \
            latent_attention_fwd,                                                                                   \
            latent_attention_bwd,                                                                                   \
            cross_attention_fwd,                                                                                    \
            cross_attention_bwd,                                                                                    \
            absorbed_attention_fwd,                                                                                 \
            absorbed_attention_bwd,                                                                                 \
            separable_query_attention_fwd,                                                                          \
            separable_query_attention_bwd,                                                                          \
            linear_epilogue_fwd,                                                                                    \
            linear_epilogue_bwd,                                                                                    \
            exp_rate};                                                                                              \
  }                                                                                                                 \
  }

namespace pk {

PK_DECLARE_LEVEL(generic)
#if defined(__x86_64__)
PK_DECLARE_LEVEL(avx2)
PK_DECLARE_LEVEL(avx512)
#endif

namespace {

struct Level {
  CpuOps ops;
  bool runs;
};

// From the plainest to the best.
const std::vector<Level>& levels() {
  static const std::vector<Level> all = {
      {generic::ops("generic", 16), true},
#if defined(__x86_64__)
      {avx2::ops("avx2", 32), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {avx512::ops("avx512", 64), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")},
#endif
  };
  return all;
}

const CpuOps& choose() {
  const char* forced = std::getenv("PERCEIVER_KERNELS_CPU_ISA");
  const CpuOps* best = nullptr;
  std::string names;
  for (const Level& level : levels()) {
    if (!level.runs) continue;
    names += std::string(names.empty() ? "" : ", ") + level.ops.name;
    if (!forced || !*forced || std::string(forced) == level.ops.name) best = &level.ops;
  }
  if (!best) {
    throw std::invalid_argument(std::string("PERCEIVER_KERNELS_CPU_ISA is '") + forced +
                                "', but this processor runs: " + names);
  }
  return *best;
}

}  // namespace

const CpuOps& cpu_ops() {
  static const CpuOps& chosen = choose();
  return chosen;
}

std::vector<const char*> cpu_levels() {
  std::vector<const char*> names;
  for (const Level& level : levels()) {
    if (level.runs) names.push_back(level.ops.name);
  }
  return names;
}

}  // namespace pk
