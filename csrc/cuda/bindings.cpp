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

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of perceiver_kernels; call them through perceiver_kernels.ops.";
#if defined(EMULATED_ARCH)
  module.attr("emulated") = true;  // the tests' build of the same sources for the host
#else
  module.attr("emulated") = false;
#endif

  module.def("fourier_encode_grid", [](const py::handle& tables, const std::vector<int64_t>& sections,
                                       const py::handle& data, const py::handle& out, uintptr_t stream) {
    const pk::FourierTables features{views(tables), sections};
    const auto data_view = view(data), out_view = view(out);
    run([&] { return pk::cuda::fourier_encode_grid(features, data_view, out_view, stream_at(stream)); });
  });

  module.def("separable_attention_workspace",
             [](const py::tuple& tensors, const py::tuple& dropout, int multiprocessors) {
               return pk::cuda::separable_attention_workspace(separable_call(tensors, dropout), multiprocessors);
             });
  module.def("separable_attention_fwd",
             [](const py::tuple& tensors, const py::tuple& dropout, int multiprocessors, const py::handle& workspace,
                const py::handle& sums, const py::handle& lse, const py::handle& total, uintptr_t stream) {
               const auto call = separable_call(tensors, dropout);
               const auto memory = view(workspace), of_sums = view(sums), of_lse = view(lse), of_total = view(total);
               run([&] {
                 return pk::cuda::separable_attention_fwd(call, multiprocessors, memory, of_sums, of_lse, of_total,
                                                          stream_at(stream));
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
  module.def("separable_attention_bwd_rows",
             [](const py::tuple& tensors, const py::tuple& dropout, int multiprocessors, const py::handle& workspace,
                const py::handle& d_sums, const py::handle& statistics, const py::handle& d_form, uintptr_t stream) {
               const auto call = separable_call(tensors, dropout);
               const auto memory = view(workspace), upstream = view(d_sums), of_rows = view(statistics);
               const auto out = view(d_form);
               run([&] {
                 return pk::cuda::separable_attention_bwd_rows(call, multiprocessors, memory, upstream, of_rows, out,
                                                               stream_at(stream));
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

  module.def("separable_attention_tensor_cores_workspace", [](const py::tuple& tensors, const py::tuple& dropout,
                                                              int multiprocessors) {
    return pk::cuda::separable_attention_tensor_cores_workspace(separable_call(tensors, dropout), multiprocessors);
  });
  module.def("separable_attention_fwd_tensor_cores",
             [](const py::tuple& tensors, const py::tuple& dropout, int multiprocessors, const py::handle& workspace,
                const py::handle& sums, const py::handle& lse, const py::handle& total, uintptr_t stream) {
               const auto call = separable_call(tensors, dropout);
               const auto memory = view(workspace), of_sums = view(sums), of_lse = view(lse), of_total = view(total);
               run([&] {
                 return pk::cuda::separable_attention_fwd_tensor_cores(call, multiprocessors, memory, of_sums, of_lse,
                                                                       of_total, stream_at(stream));
               });
             });
  module.def("separable_attention_bwd_rows_tensor_cores",
             [](const py::tuple& tensors, const py::tuple& dropout, int multiprocessors, const py::handle& workspace,
                const py::handle& d_sums, const py::handle& statistics, const py::handle& d_form, uintptr_t stream) {
               const auto call = separable_call(tensors, dropout);
               const auto memory = view(workspace), upstream = view(d_sums), of_rows = view(statistics);
               const auto out = view(d_form);
               run([&] {
                 return pk::cuda::separable_attention_bwd_rows_tensor_cores(call, multiprocessors, memory, upstream,
                                                                            of_rows, out, stream_at(stream));
               });
             });
}
