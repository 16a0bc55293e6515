// Every native op, declared once, for CPUs and for GPUs.
#pragma once

#include "tensor.h"

namespace pk {

// Counter-based dropout: the decision for (batch, row, token) depends on these numbers alone.
struct Dropout {
  double p = 0.0;
  uint64_t seed = 0;
  uint32_t offset = 0;
};

// Inputs of separable attention, docs/separable_attention.md "The core operator". Absent r and mask are undefined
// views.
struct SeparableInputs {
  TensorView a;       // [B|1, R, c]
  TensorList tables;  // per axis [B|1, R, S_k]
  TensorView x;       // [B, S_1, ..., S_A, c]
  TensorView r;       // [B, S_1, ..., S_A]
  TensorView mask;    // [B, S_1, ..., S_A], boolean
  Dropout dropout;
};

struct SeparableOutputs {
  TensorView acc;        // [B, R, c]
  TensorList marginals;  // per axis [B, R, S_k]
  TensorView lse;        // [B, R]
  TensorView total;      // [B, R]
};

// Gradients of a and the tables keep the batch dimension B even where the inputs have batch 1: the caller sums.
struct SeparableGradients {
  TensorView a;       // [B, R, c]
  TensorList tables;  // per axis [B, R, S_k]
  TensorView x;       // [B, S_1, ..., S_A, c], undefined when not needed
  TensorView r;       // [B, S_1, ..., S_A], undefined when not needed
};

// Fourier features of a grid. Every table consists of column sections of these widths; the output has section after
// section, and within a section axis after axis.
struct FourierTables {
  TensorList tables;  // per axis [S_k, sum of sections], in the dtype of the output, columns contiguous
  std::vector<int64_t> sections;
};

// Fourier features of free positions: sin(pi f x), cos(pi f x), x; grouped: [x | sin | cos], each axis after axis.
struct FourierBands {
  std::vector<double> frequencies;  // f, axis after axis, as many for each
  bool grouped = false, concat_pos = true, sine_only = false;
};

// Inputs of latent attention, softmax(scale * q k^T) v head by head. A dropout row is head * N + query.
struct LatentInputs {
  TensorView q;  // [B, H, N, D]
  TensorView k;  // [B, H, M, D]
  TensorView v;  // [B, H, M, Dv]
  double scale = 1.0;
  Dropout dropout;
};

// Inputs of absorbed attention: a token is [x ; features of its position]. With LayerNorm its mean is a further
// channel: the last one of a, of acc and of their gradients in backward (but not of the saved acc) belongs to it.
struct AbsorbedInputs {
  TensorView a;          // [B, R, C], any strides: 0 for one that all inputs share
  TensorView x;          // [B, M, c] or undefined
  TensorView positions;  // [B, M, A] or undefined
  TensorView mask;       // [B, M], boolean, or undefined
  FourierBands bands;
  bool normalises = false;  // by LayerNorm, with this eps
  double eps = 0;
  Dropout dropout;
};

struct AbsorbedState {
  TensorView acc;    // [B, R, C], channels contiguous
  TensorView lse;    // [B, R], float64
  TensorView total;  // [B, R]
};

// Inputs of separable_query_attention, all but x contiguous; on CPUs v and r have any strides, too. Keys that nothing
// attends to are zeros in form and v. A dropout row is head * M + query, M the grid's size.
struct SeparableQueryInputs {
  TensorView form;  // [B|1, H, c + sum of S_k, N]: k, then the tables
  TensorView v;     // [B, H, N, Dv]
  TensorView bias;  // [B|1, H, N] or undefined: h in powers of two, -inf where nothing attends to the key
  TensorView x;     // [B|1, M, c] or undefined
  TensorView r;     // [B|1, M] or undefined
  std::vector<int64_t> grid;
  Dropout dropout;
};

// What its backward needs besides, contiguous.
struct SeparableQuerySaved {
  TensorView d_out;      // [B, M, H, Dv]
  TensorView reference;  // [B, H, M], lse in powers of two, 0 where it is -inf
  TensorView delta;      // [B, H, M], d_out . out
};

// Sums of column_parts * outer_parts parts of the queries, which the caller adds up; data and outer are zeros to begin
// with. slots: column_parts for two axes, else all parts.
struct SeparableQueryKeyGradients {
  TensorView data;   // [B, H, parts, c, N]
  TensorView outer;  // [B, H, slots, sum of S_k but the last, N]
  TensorView table;  // [B, H, outer_parts, last S_k, N]
  TensorView h;      // [B, H, parts, N]
};

// Gradients of separable_query_attention on CPUs, contiguous and summed over the queries of one batch entry: the caller
// adds those up where an input has batch 1. Undefined where not needed.
struct SeparableQueryGradients {
  TensorView form;  // [B, H, c + sum of S_k, N]
  TensorView v;     // [B, H, N, Dv]
  TensorView h;     // [B, H, N]
  TensorView x;     // [B, M, c]
  TensorView r;     // [B, M]
};

struct LatentOutputs {
  TensorView out;  // [B, H, N, Dv], channels contiguous
  TensorView lse;  // [B, H, N], contiguous
};

struct LatentGradients {
  TensorView q, k, v;  // as the inputs, channels contiguous
};

// Cross-attention is the same of the keys that a mask leaves. Gradients of the others are never written.
struct CrossInputs : LatentInputs {
  TensorView mask;  // [B, M], boolean, or undefined
};

// What follows the product x @ weight^T: out = f(product + bias) + residual. Gated: the product's first half times f of
// its second half.
enum class Activation : int { none, gelu, gelu_tanh };

struct LinearEpilogue {
  TensorView bias;  // [N] or undefined; float64 for a float64 product, else float32
  Activation activation = Activation::none;
  bool gated = false;
};

struct CpuOps {
  const char* name;
  int vector_bytes;
  void (*separable_attention_fwd)(const SeparableInputs&, const SeparableOutputs&);
  void (*separable_attention_bwd)(const SeparableInputs&, const SeparableOutputs& saved,
                                  const SeparableOutputs& upstream, const SeparableGradients&);
  // r = 1 / sqrt(variance of [scale * x + shift ; features] + eps), docs/separable_attention.md "LayerNorm statistics
  // are separable too". sums and squares: per axis [S_k], the sums of the features of a position and of their squares.
  void (*separable_layer_norm)(const TensorView& x, const TensorList& sums, const TensorList& squares,
                               const TensorView& scale, const TensorView& shift, int64_t feature_channels, double eps,
                               const TensorView& r);
  // out [B, S_1, ..., S_A, c + E]: data [B, S_1, ..., S_A, c], of the same dtype or undefined, then the features.
  void (*fourier_encode_grid)(const FourierTables&, const TensorView& data, const TensorView& out);
  // out [P, E] for positions [P, A]. Channels of out are contiguous in both.
  void (*fourier_encode_points)(const FourierBands&, const TensorView& positions, const TensorView& out);
  void (*latent_attention_fwd)(const LatentInputs&, const LatentOutputs&);
  void (*latent_attention_bwd)(const LatentInputs&, const LatentOutputs& saved, const TensorView& d_out,
                               const LatentGradients&);
  void (*cross_attention_fwd)(const CrossInputs&, const LatentOutputs&);
  void (*cross_attention_bwd)(const CrossInputs&, const LatentOutputs& saved, const TensorView& d_out,
                              const LatentGradients&);
  void (*absorbed_attention_fwd)(const AbsorbedInputs&, const AbsorbedState&);
  // d_a [B, R, C] and d_x [B, M, c], channels contiguous, undefined where not needed; masked tokens are not written.
  void (*absorbed_attention_bwd)(const AbsorbedInputs&, const AbsorbedState& saved, const AbsorbedState& upstream,
                                 const TensorView& d_a, const TensorView& d_x);
  // Of queries on a grid; the outputs are as latent attention's.
  void (*separable_query_attention_fwd)(const SeparableQueryInputs&, const LatentOutputs&);
  void (*separable_query_attention_bwd)(const SeparableQueryInputs&, const LatentOutputs& saved,
                                        const TensorView& d_out, const SeparableQueryGradients&);
  // product [M, N], residual and out [M, N or N / 2], each of any floating dtype but float64 only for a float64
  // product; columns contiguous. out may be the product or the residual itself.
  void (*linear_epilogue_fwd)(const LinearEpilogue&, const TensorView& product, const TensorView& residual,
                              const TensorView& out);
  // d_product [M, N], and d_bias [N] in the bias's dtype or undefined: its column sums, the same on any number of
  // threads.
  void (*linear_epilogue_bwd)(const LinearEpilogue&, const TensorView& product, const TensorView& d_out,
                              const TensorView& d_product, const TensorView& d_bias);
  double (*exp_rate)(double seconds);
};

// --- on a GPU ---

// What came of a call: code 0, or the CUDA runtime's error and its description.
struct Status {
  int code = 0;
  const char* message = "";
};

// Each call launches its kernels on a stream, a cudaStream_t, and returns without waiting for them. What they work in
// is the caller's memory on the device. The arguments mean what they mean in CpuOps.
using Stream = void*;

namespace cuda {

// Whether the current GPU runs the kernels: it does not where there is no code for it, or too old a driver. Then also
// the bytes of shared memory that a block may have.
Status probe(int64_t& shared_memory);

Status fourier_encode_grid(const FourierTables&, const TensorView& data, const TensorView& out, Stream);
// frequencies [2, A * K]: 2 f in float32 and what rounding it left over, in place of the bands' list; largest |f|.
Status fourier_encode_points(const FourierBands&, const TensorView& frequencies, double largest,
                             const TensorView& positions, const TensorView& out, Stream);

// Of 16 bits, head_dim 64 or 128 for all, channels contiguous, rows at multiples of 16 bytes.
Status latent_attention_fwd(const LatentInputs&, const LatentOutputs&, Stream);
// statistics: [B, H, N rounded up to a multiple of 64, 2], float32, to work in.
Status latent_attention_bwd(const LatentInputs&, const LatentOutputs& saved, const TensorView& d_out,
                            const TensorView& statistics, const LatentGradients&, Stream);

// out [B, M, H, Dv], lse [B, H, M].
Status separable_query_attention_fwd(const SeparableQueryInputs&, const TensorView& out, const TensorView& lse, Stream);
// reference and delta [B, H, M], of lse and of out and d_out [B, M, H, Dv].
Status separable_query_attention_bwd_rows(const TensorView& out, const TensorView& d_out, const TensorView& lse,
                                          const TensorView& reference, const TensorView& delta, Stream);
// d_x [groups, M, c], zeros to begin with, and d_r [groups, M], or undefined: B / groups entries of the batch share
// them.
Status separable_query_attention_bwd_queries(const SeparableQueryInputs&, const SeparableQuerySaved&,
                                             const TensorView& d_x, const TensorView& d_r, Stream);
Status separable_query_attention_bwd_keys(const SeparableQueryInputs&, const SeparableQuerySaved&,
                                          const SeparableQueryKeyGradients&, Stream);
// d_v [B, H, column_parts, outer_parts, N, Dv], float32: sums of parts of the queries.
Status separable_query_attention_bwd_values(const SeparableQueryInputs&, const SeparableQuerySaved&,
                                            const TensorView& d_v, Stream);

// Separable attention where a and the tables are one array, the form [B|1, c + S_1 + ... + S_A, R]. It and all arrays
// below are contiguous unless strides are spoken of; x, r, mask and dropout are as in SeparableInputs, float64
// excluded.
struct SeparableCall {
  TensorView form, x, r, mask;
  Dropout dropout;
};

// How many floats separable_attention_fwd and separable_attention_bwd_rows work in.
int64_t separable_attention_workspace(const SeparableCall&, int multiprocessors);
// sums [B, c + S_1 + ... + S_A, R], lse [B, R] in float64, total [B, R].
Status separable_attention_fwd(const SeparableCall&, int multiprocessors, const TensorView& workspace,
                               const TensorView& sums, const TensorView& lse, const TensorView& total, Stream);
// statistics [B, 4, padded R], what backward's kernels need of a row besides forms; d_lse (float64) and d_total have
// any strides.
Status separable_attention_bwd_prepare(const TensorView& sums, const TensorView& lse, const TensorView& total,
                                       const TensorView& d_sums, const TensorView& d_lse, const TensorView& d_total,
                                       bool dropout, const TensorView& statistics, Stream);
// d_form, of the form's shape: the sum over the batch where that is 1.
Status separable_attention_bwd_rows(const SeparableCall&, int multiprocessors, const TensorView& workspace,
                                    const TensorView& d_sums, const TensorView& statistics, const TensorView& d_form,
                                    Stream);
// d_x [B, S_1, ..., S_A, c] in x's dtype and d_r [B, S_1, ..., S_A], each undefined where it is not wanted. d_sums has
// the form's entries; statistics [B, 4, padded R]: log2(e) lse rounded, the factor f that this took from the weights,
// f delta, f d_total.
Status separable_attention_bwd_tokens(const SeparableCall&, const TensorView& workspace, const TensorView& d_sums,
                                      const TensorView& statistics, const TensorView& d_x, const TensorView& d_r,
                                      Stream);
// How many floats it works in, perhaps none.
int64_t separable_attention_bwd_tokens_workspace(const SeparableCall&, bool needs_x, bool needs_r);

// Forward and the gradients of the rows by TensorFloat-32 products, for two axes, up to three channels, no mask and no
// dropout; the statistics are those of separable_attention_bwd_prepare.
int64_t separable_attention_tensor_cores_workspace(const SeparableCall&, int multiprocessors);
Status separable_attention_fwd_tensor_cores(const SeparableCall&, int multiprocessors, const TensorView& workspace,
                                            const TensorView& sums, const TensorView& lse, const TensorView& total,
                                            Stream);
Status separable_attention_bwd_rows_tensor_cores(const SeparableCall&, int multiprocessors, const TensorView& workspace,
                                                 const TensorView& d_sums, const TensorView& statistics,
                                                 const TensorView& d_form, Stream);

// The same for 5 to 128 channels and no dropout. `products` of TensorFloat-32 numbers make one of float32: 3, or 2
// where x has no more digits than these, or 1 where their own accuracy is enough.
int64_t separable_attention_many_channels_workspace(const SeparableCall&, int multiprocessors);
Status separable_attention_fwd_many_channels(const SeparableCall&, int products, int multiprocessors,
                                             const TensorView& workspace, const TensorView& sums, const TensorView& lse,
                                             const TensorView& total, Stream);
Status separable_attention_bwd_rows_many_channels(const SeparableCall&, int products, int multiprocessors,
                                                  const TensorView& workspace, const TensorView& d_sums,
                                                  const TensorView& statistics, const TensorView& d_form, Stream);

}  // namespace cuda

// --- on a CPU ---

// The level in use: the best the processor runs, or the one named by PERCEIVER_KERNELS_CPU_ISA.
const CpuOps& cpu_ops();
std::vector<const char*> cpu_levels();

}  // namespace pk
