// Python's door to the CPU's ops.
#include "bindings.h"

#include <numeric>
#include <optional>
#include <string>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using pk::latent_inputs;
using pk::separable_inputs;
using pk::separable_outputs;
using pk::separable_query_inputs;
using pk::view;
using pk::views;

// (q, k, v, mask).
pk::CrossInputs cross_inputs(const py::tuple& inputs, double scale, const py::tuple& dropout) {
  return {latent_inputs(inputs, scale, dropout), view(inputs[3])};
}

// (frequencies, grouped, concat_pos, sine_only).
pk::FourierBands fourier_bands(const py::tuple& features) {
  return {py::cast<std::vector<double>>(features[0]), py::cast<bool>(features[1]), py::cast<bool>(features[2]),
          py::cast<bool>(features[3])};
}

// (a, x, positions, mask).
pk::AbsorbedInputs absorbed_inputs(const py::tuple& inputs, const py::tuple& features, const std::optional<double>& eps,
                                   const py::tuple& dropout) {
  return {view(inputs[0]),         view(inputs[1]), view(inputs[2]),   view(inputs[3]),
          fourier_bands(features), eps.has_value(), eps.value_or(0.0), pk::dropout_of(dropout)};
}

pk::AbsorbedState absorbed_state(const py::tuple& state) { return {view(state[0]), view(state[1]), view(state[2])}; }

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
    const auto result = pk::separable_gradients(gradients);
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

  module.def("cross_attention_fwd", [](const py::tuple& inputs, double scale, const py::tuple& dropout,
                                       const py::tuple& outputs, int threads) {
    const auto in = cross_inputs(inputs, scale, dropout);
    const pk::LatentOutputs out{view(outputs[0]), view(outputs[1])};
    run(threads, [&] { pk::cpu_ops().cross_attention_fwd(in, out); });
  });
  module.def("cross_attention_bwd",
             [](const py::tuple& inputs, double scale, const py::tuple& dropout, const py::tuple& saved,
                const py::handle& d_out, const py::tuple& gradients, int threads) {
               const auto in = cross_inputs(inputs, scale, dropout);
               const pk::LatentOutputs out{view(saved[0]), view(saved[1])};
               const auto upstream = view(d_out);
               const pk::LatentGradients result{view(gradients[0]), view(gradients[1]), view(gradients[2])};
               run(threads, [&] { pk::cpu_ops().cross_attention_bwd(in, out, upstream, result); });
             });
  module.def("separable_query_attention_fwd", [](const py::tuple& inputs, const std::vector<int64_t>& grid,
                                                 const py::tuple& dropout, const py::tuple& outputs, int threads) {
    const auto in = separable_query_inputs(inputs, grid, dropout);
    const pk::LatentOutputs out{view(outputs[0]), view(outputs[1])};
    run(threads, [&] { pk::cpu_ops().separable_query_attention_fwd(in, out); });
  });
  module.def("separable_query_attention_bwd",
             [](const py::tuple& inputs, const std::vector<int64_t>& grid, const py::tuple& dropout,
                const py::tuple& saved, const py::handle& d_out, const py::tuple& gradients, int threads) {
               const auto in = separable_query_inputs(inputs, grid, dropout);
               const pk::LatentOutputs out{view(saved[0]), view(saved[1])};
               const auto upstream = view(d_out);
               const pk::SeparableQueryGradients result{view(gradients[0]), view(gradients[1]), view(gradients[2]),
                                                        view(gradients[3]), view(gradients[4])};
               run(threads, [&] { pk::cpu_ops().separable_query_attention_bwd(in, out, upstream, result); });
             });

  module.def("absorbed_attention_fwd",
             [](const py::tuple& inputs, const py::tuple& features, const std::optional<double>& eps,
                const py::tuple& dropout, const py::tuple& outputs, int threads) {
               const auto in = absorbed_inputs(inputs, features, eps, dropout);
               const auto out = absorbed_state(outputs);
               run(threads, [&] { pk::cpu_ops().absorbed_attention_fwd(in, out); });
             });
  module.def(
      "absorbed_attention_bwd",
      [](const py::tuple& inputs, const py::tuple& features, const std::optional<double>& eps, const py::tuple& dropout,
         const py::tuple& saved, const py::tuple& upstream, const py::handle& d_a, const py::handle& d_x, int threads) {
        const auto in = absorbed_inputs(inputs, features, eps, dropout);
        const auto out = absorbed_state(saved), up = absorbed_state(upstream);
        const auto d_a_view = view(d_a), d_x_view = view(d_x);
        run(threads, [&] { pk::cpu_ops().absorbed_attention_bwd(in, out, up, d_a_view, d_x_view); });
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
