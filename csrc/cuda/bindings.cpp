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

  module.def("latent_attention_fwd", [](const py::tuple& inputs, double scale, const py::tuple& outputs,
                                        uintptr_t stream) {
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
}
