// Python's door to the native ops. Tensors arrive as (address, dtype code, sizes, strides); see backends/native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>
#include <string>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace py = pybind11;

namespace {

using pk::TensorList;
using pk::TensorView;

TensorView view(const py::handle& described) {
  TensorView result;
  if (described.is_none()) return result;
  const auto fields = py::cast<py::tuple>(described);
  const auto sizes = py::cast<py::tuple>(fields[2]), strides = py::cast<py::tuple>(fields[3]);
  if (sizes.size() > pk::kMaxDims) throw std::invalid_argument("a tensor has more dimensions than native ops take");
  result.data = reinterpret_cast<void*>(py::cast<uintptr_t>(fields[0]));
  result.dtype = static_cast<pk::DType>(py::cast<int>(fields[1]));
  result.dims = static_cast<int>(sizes.size());
  for (int i = 0; i < result.dims; ++i) {
    result.sizes[i] = py::cast<int64_t>(sizes[static_cast<size_t>(i)]);
    result.strides[i] = py::cast<int64_t>(strides[static_cast<size_t>(i)]);
  }
  return result;
}

TensorList views(const py::handle& described) {
  TensorList result;
  for (const auto& item : py::cast<py::sequence>(described)) result.push_back(view(item));
  return result;
}

pk::SeparableInputs separable_inputs(const py::tuple& inputs, const py::tuple& dropout) {
  return {
      view(inputs[0]), views(inputs[1]),
      view(inputs[2]), view(inputs[3]),
      view(inputs[4]), {py::cast<double>(dropout[0]), py::cast<uint64_t>(dropout[1]), py::cast<uint32_t>(dropout[2])}};
}

pk::SeparableOutputs separable_outputs(const py::tuple& outputs) {
  return {view(outputs[0]), views(outputs[1]), view(outputs[2]), view(outputs[3])};
}

pk::LatentInputs latent_inputs(const py::tuple& inputs, double scale, const py::tuple& dropout) {
  return {view(inputs[0]),
          view(inputs[1]),
          view(inputs[2]),
          scale,
          {py::cast<double>(dropout[0]), py::cast<uint64_t>(dropout[1]), py::cast<uint32_t>(dropout[2])}};
}

pk::LinearEpilogue linear_epilogue(const py::handle& bias, int activation, bool gated) {
  return {view(bias), static_cast<pk::Activation>(activation), gated};
}

// Runs a kernel without the interpreter lock, on as many threads as torch would use.
template <class Kernel>
void run(int threads, const Kernel& kernel) {
  const py::gil_scoped_release unlocked;
  pk::set_num_threads(threads);
  kernel();
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of perceiver_kernels; call them through perceiver_kernels.ops.";

  module.def("separable_attention_fwd",
             [](const py::tuple& inputs, const py::tuple& dropout, const py::tuple& outputs, int threads) {
               const auto in = separable_inputs(inputs, dropout);
               const auto out = separable_outputs(outputs);
               run(threads, [&] { pk::cpu_ops().separable_attention_fwd(in, out); });
             });
  module.def("separable_attention_bwd", [](const py::tuple& inputs, const py::tuple& dropout, const py::tuple& saved,
                                           const py::tuple& upstream, const py::tuple& gradients, int threads) {
    const auto in = separable_inputs(inputs, dropout);
    const auto out = separable_outputs(saved);
    const auto up = separable_outputs(upstream);
    const pk::SeparableGradients result{view(gradients[0]), views(gradients[1]), view(gradients[2]),
                                        view(gradients[3])};
    run(threads, [&] { pk::cpu_ops().separable_attention_bwd(in, out, up, result); });
  });
  module.def("separable_layer_norm",
             [](const py::handle& x, const py::handle& sums, const py::handle& squares, const py::handle& scale,
                const py::handle& shift, int64_t feature_channels, double eps, const py::handle& r, int threads) {
               const auto x_view = view(x), scale_view = view(scale), shift_view = view(shift), r_view = view(r);
               const auto sums_views = views(sums), squares_views = views(squares);
               run(threads, [&] {
                 pk::cpu_ops().separable_layer_norm(x_view, sums_views, squares_views, scale_view, shift_view,
                                                    feature_channels, eps, r_view);
               });
             });

  module.def("fourier_encode_grid", [](const py::handle& tables, const std::vector<int64_t>& sections,
                                       const py::handle& data, const py::handle& out, int threads) {
    const pk::FourierTables features{views(tables), sections};
    const auto data_view = view(data), out_view = view(out);
    run(threads, [&] { pk::cpu_ops().fourier_encode_grid(features, data_view, out_view); });
  });
  module.def("fourier_encode_points",
             [](const py::handle& positions, const std::vector<double>& frequencies, bool grouped, bool concat_pos,
                bool sine_only, const py::handle& out, int threads) {
               const pk::FourierBands bands{frequencies, grouped, concat_pos, sine_only};
               const auto positions_view = view(positions), out_view = view(out);
               run(threads, [&] { pk::cpu_ops().fourier_encode_points(bands, positions_view, out_view); });
             });

  module.def("latent_attention_fwd", [](const py::tuple& inputs, double scale, const py::tuple& dropout,
                                        const py::tuple& outputs, int threads) {
    const auto in = latent_inputs(inputs, scale, dropout);
    const pk::LatentOutputs out{view(outputs[0]), view(outputs[1])};
    run(threads, [&] { pk::cpu_ops().latent_attention_fwd(in, out); });
  });
  module.def("latent_attention_bwd",
             [](const py::tuple& inputs, double scale, const py::tuple& dropout, const py::tuple& saved,
                const py::handle& d_out, const py::tuple& gradients, int threads) {
               const auto in = latent_inputs(inputs, scale, dropout);
               const pk::LatentOutputs out{view(saved[0]), view(saved[1])};
               const auto upstream = view(d_out);
               const pk::LatentGradients result{view(gradients[0]), view(gradients[1]), view(gradients[2])};
               run(threads, [&] { pk::cpu_ops().latent_attention_bwd(in, out, upstream, result); });
             });

  module.def("linear_epilogue_fwd", [](const py::handle& bias, int activation, bool gated, const py::handle& product,
                                       const py::handle& residual, const py::handle& out, int threads) {
    const auto epilogue = linear_epilogue(bias, activation, gated);
    const auto product_view = view(product), residual_view = view(residual), out_view = view(out);
    run(threads, [&] { pk::cpu_ops().linear_epilogue_fwd(epilogue, product_view, residual_view, out_view); });
  });
  module.def("linear_epilogue_bwd", [](const py::handle& bias, int activation, bool gated, const py::handle& product,
                                       const py::handle& d_out, const py::handle& d_product, const py::handle& d_bias,
                                       int threads) {
    const auto epilogue = linear_epilogue(bias, activation, gated);
    const auto product_view = view(product), d_out_view = view(d_out);
    const auto d_product_view = view(d_product), d_bias_view = view(d_bias);
    run(threads,
        [&] { pk::cpu_ops().linear_epilogue_bwd(epilogue, product_view, d_out_view, d_product_view, d_bias_view); });
  });

  module.def(
      "prefer_huge_pages",
      [](uintptr_t address, int64_t bytes) { pk::prefer_huge_pages(reinterpret_cast<void*>(address), bytes); },
      "Asks for huge pages under memory that is about to be filled.");
  module.def("isa", [] { return std::string(pk::cpu_ops().name); }, "Instruction set in use.");
  module.def(
      "isa_levels",
      [] {
        std::vector<std::string> names;
        for (const char* name : pk::cpu_levels()) names.emplace_back(name);
        return names;
      },
      "Instruction sets that this build has and this processor runs, from the plainest to the best.");
  module.def("threading", [] { return std::string(pk::threading()); }, "Thread pool in use.");
  module.def(
      "exp_rate",
      [](double seconds, int threads) {
        std::vector<double> rates(static_cast<size_t>(threads));
        run(threads, [&] {
          pk::parallel_for(threads,
                           [&](int64_t i) { rates[static_cast<size_t>(i)] = pk::cpu_ops().exp_rate(seconds); });
        });
        return std::accumulate(rates.begin(), rates.end(), 0.0);
      },
      py::arg("seconds") = 0.05, py::arg("threads") = 1,
      "Bare vector exponentials per second of so many threads together, operands in L1.");
}
