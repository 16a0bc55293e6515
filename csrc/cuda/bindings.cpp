// Python's door to the GPU's ops. Each takes the CUDA stream to launch on as its last argument.
#include "../bindings.h"

#include <string>

namespace py = pybind11;

namespace {

using pk::view;
using pk::views;

pk::Stream stream_at(uintptr_t address) { return reinterpret_cast<pk::Stream>(address); }

// Runs a call without the interpreter lock; what the CUDA runtime objects to becomes an exception.
template <class Call>
void run(const Call& call) {
  pk::Status status;
  {
    const py::gil_scoped_release unlocked;
    status = call();
  }
  if (status.code != 0) throw std::runtime_error("CUDA error " + std::to_string(status.code) + ": " + status.message);
}

// form, x, r, mask.
pk::cuda::SeparableCall separable_call(const py::tuple& tensors, const py::tuple& dropout) {
  return {view(tensors[0]), view(tensors[1]), view(tensors[2]), view(tensors[3]), pk::dropout_of(dropout)};
}

// Whether by tensor cores it is the kernels for few channels that run.
bool few_channels(const pk::cuda::SeparableCall& call) { return call.x.size(-1) <= 4; }

// (d_out, reference, delta).
pk::SeparableQuerySaved query_saved(const py::tuple& saved) { return {view(saved[0]), view(saved[1]), view(saved[2])}; }

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of perceiver_kernels; call them through perceiver_kernels.ops.";
#if defined(EMULATED_ARCH)
  module.attr("emulated") = true;  // the tests' build of the same sources for the host
  module.attr("archs") = std::to_string(EMULATED_ARCH / 10);
#else
  module.attr("emulated") = false;
  module.attr("archs") = PERCEIVER_KERNELS_CUDA_ARCHS;  // as setup.py was asked for them: "80;90a;100"
#endif
  module.def("probe", [] {
    int64_t shared_memory = 0;
    run([&] { return pk::cuda::probe(shared_memory); });
    return shared_memory;
  });

  module.def("fourier_encode_grid", [](const py::handle& tables, const std::vector<int64_t>& sections,
                                       const py::handle& data, const py::handle& out, uintptr_t stream) {
    const pk::FourierTables features{views(tables), sections};
    const auto data_view = view(data), out_view = view(out);
    run([&] { return pk::cuda::fourier_encode_grid(features, data_view, out_view, stream_at(stream)); });
  });
  module.def("fourier_encode_points",
             [](const py::handle& frequencies, double largest, bool grouped, bool concat_pos, bool sine_only,
                const py::handle& positions, const py::handle& out, uintptr_t stream) {
               const pk::FourierBands bands{{}, grouped, concat_pos, sine_only};
               const auto frequencies_view = view(frequencies), positions_view = view(positions), out_view = view(out);
               run([&] {
                 return pk::cuda::fourier_encode_points(bands, frequencies_view, largest, positions_view, out_view,
                                                        stream_at(stream));
               });
             });

  module.def("latent_attention_fwd",
             [](const py::tuple& inputs, double scale, const py::tuple& outputs, uintptr_t stream) {
               const pk::LatentInputs latent{view(inputs[0]), view(inputs[1]), view(inputs[2]), scale, {}};
               const pk::LatentOutputs results{view(outputs[0]), view(outputs[1])};
               run([&] { return pk::cuda::latent_attention_fwd(latent, results, stream_at(stream)); });
             });
  module.def("latent_attention_bwd", [](const py::tuple& inputs, double scale, const py::tuple& saved,
                                        const py::handle& d_out, const py::handle& statistics,
                                        const py::tuple& gradients, uintptr_t stream) {
    const pk::LatentInputs latent{view(inputs[0]), view(inputs[1]), view(inputs[2]), scale, {}};
    const pk::LatentOutputs results{view(saved[0]), view(saved[1])};
    const pk::LatentGradients d_inputs{view(gradients[0]), view(gradients[1]), view(gradients[2])};
    const auto d_out_view = view(d_out), statistics_view = view(statistics);
    run([&] {
      return pk::cuda::latent_attention_bwd(latent, results, d_out_view, statistics_view, d_inputs, stream_at(stream));
    });
  });

  module.def("separable_query_attention_fwd",
             [](const py::tuple& inputs, const std::vector<int64_t>& grid, const py::tuple& dropout,
                const py::handle& out, const py::handle& lse, uintptr_t stream) {
               const auto in = pk::separable_query_inputs(inputs, grid, dropout);
               const auto out_view = view(out), lse_view = view(lse);
               run([&] { return pk::cuda::separable_query_attention_fwd(in, out_view, lse_view, stream_at(stream)); });
             });
  module.def("separable_query_attention_bwd_rows",
             [](const py::handle& out, const py::handle& d_out, const py::handle& lse, const py::handle& reference,
                const py::handle& delta, uintptr_t stream) {
               const auto out_view = view(out), d_out_view = view(d_out), lse_view = view(lse);
               const auto reference_view = view(reference), delta_view = view(delta);
               run([&] {
                 return pk::cuda::separable_query_attention_bwd_rows(out_view, d_out_view, lse_view, reference_view,
                                                                     delta_view, stream_at(stream));
               });
             });
  module.def("separable_query_attention_bwd_queries",
             [](const py::tuple& inputs, const std::vector<int64_t>& grid, const py::tuple& dropout,
                const py::tuple& saved, const py::handle& d_x, const py::handle& d_r, uintptr_t stream) {
               const auto in = pk::separable_query_inputs(inputs, grid, dropout);
               const auto left = query_saved(saved);
               const auto d_x_view = view(d_x), d_r_view = view(d_r);
               run([&] {
                 return pk::cuda::separable_query_attention_bwd_queries(in, left, d_x_view, d_r_view,
                                                                        stream_at(stream));
               });
             });
  module.def("separable_query_attention_bwd_keys", [](const py::tuple& inputs, const std::vector<int64_t>& grid,
                                                      const py::tuple& dropout, const py::tuple& saved,
                                                      const py::tuple& results, uintptr_t stream) {
    const auto in = pk::separable_query_inputs(inputs, grid, dropout);
    const auto left = query_saved(saved);
    const pk::SeparableQueryKeyGradients out{view(results[0]), view(results[1]), view(results[2]), view(results[3])};
    run([&] { return pk::cuda::separable_query_attention_bwd_keys(in, left, out, stream_at(stream)); });
  });
  module.def("separable_query_attention_bwd_values", [](const py::tuple& inputs, const std::vector<int64_t>& grid,
                                                        const py::tuple& dropout, const py::tuple& saved,
                                                        const py::handle& d_v, uintptr_t stream) {
    const auto in = pk::separable_query_inputs(inputs, grid, dropout);
    const auto left = query_saved(saved);
    const auto d_v_view = view(d_v);
    run([&] { return pk::cuda::separable_query_attention_bwd_values(in, left, d_v_view, stream_at(stream)); });
  });

  module.def("separable_attention_workspace",
             [](const py::tuple& tensors, const py::tuple& dropout, int products, int multiprocessors) {
               const auto call = separable_call(tensors, dropout);
               if (products == 0) return pk::cuda::separable_attention_workspace(call, multiprocessors);
               if (few_channels(call))
                 return pk::cuda::separable_attention_tensor_cores_workspace(call, multiprocessors);
               return pk::cuda::separable_attention_many_channels_workspace(call, multiprocessors);
             });
  module.def("separable_attention_fwd", [](const py::tuple& tensors, const py::tuple& dropout, int products,
                                           int multiprocessors, const py::handle& workspace, const py::handle& sums,
                                           const py::handle& lse, const py::handle& total, uintptr_t stream_address) {
    using namespace pk::cuda;
    const auto call = separable_call(tensors, dropout);
    const auto memory = view(workspace), of_sums = view(sums), of_lse = view(lse), of_total = view(total);
    const auto stream = stream_at(stream_address);
    run([&] {
      if (products > 0 && !few_channels(call))
        return separable_attention_fwd_many_channels(call, products, multiprocessors, memory, of_sums, of_lse, of_total,
                                                     stream);
      const auto fwd = products > 0 ? separable_attention_fwd_tensor_cores : separable_attention_fwd;
      return fwd(call, multiprocessors, memory, of_sums, of_lse, of_total, stream);
    });
  });
  module.def("separable_attention_bwd_prepare",
             [](const py::handle& sums, const py::handle& lse, const py::handle& total, const py::handle& d_sums,
                const py::handle& d_lse, const py::handle& d_total, bool dropout, const py::handle& statistics,
                uintptr_t stream) {
               const auto of_sums = view(sums), of_lse = view(lse), of_total = view(total);
               const auto of_d_sums = view(d_sums), of_d_lse = view(d_lse), of_d_total = view(d_total);
               const auto out = view(statistics);
               run([&] {
                 return pk::cuda::separable_attention_bwd_prepare(of_sums, of_lse, of_total, of_d_sums, of_d_lse,
                                                                  of_d_total, dropout, out, stream_at(stream));
               });
             });
  module.def("separable_attention_bwd_rows", [](const py::tuple& tensors, const py::tuple& dropout, int products,
                                                int multiprocessors, const py::handle& workspace,
                                                const py::handle& d_sums, const py::handle& statistics,
                                                const py::handle& d_form, uintptr_t stream_address) {
    using namespace pk::cuda;
    const auto call = separable_call(tensors, dropout);
    const auto memory = view(workspace), upstream = view(d_sums), of_rows = view(statistics);
    const auto out = view(d_form);
    const auto stream = stream_at(stream_address);
    run([&] {
      if (products > 0 && !few_channels(call))
        return separable_attention_bwd_rows_many_channels(call, products, multiprocessors, memory, upstream, of_rows,
                                                          out, stream);
      const auto bwd = products > 0 ? separable_attention_bwd_rows_tensor_cores : separable_attention_bwd_rows;
      return bwd(call, multiprocessors, memory, upstream, of_rows, out, stream);
    });
  });
  module.def("separable_attention_bwd_tokens_workspace", [](const py::tuple& tensors, const py::tuple& dropout,
                                                            bool needs_x, bool needs_r) {
    return pk::cuda::separable_attention_bwd_tokens_workspace(separable_call(tensors, dropout), needs_x, needs_r);
  });
  module.def("separable_attention_bwd_tokens", [](const py::tuple& tensors, const py::tuple& dropout,
                                                  const py::handle& workspace, const py::handle& d_sums,
                                                  const py::handle& statistics, const py::handle& d_x,
                                                  const py::handle& d_r, uintptr_t stream) {
    const auto call = separable_call(tensors, dropout);
    const auto memory = view(workspace), upstream = view(d_sums), of_rows = view(statistics);
    const auto of_x = view(d_x), of_r = view(d_r);
    run([&] {
      return pk::cuda::separable_attention_bwd_tokens(call, memory, upstream, of_rows, of_x, of_r, stream_at(stream));
    });
  });
}
