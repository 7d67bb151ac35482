// The Python module _native: the launch API, structs with keyword arguments, addresses as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "lowrank.h"

namespace py = pybind11;
using namespace subzero;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::string shape(const Matrix& matrix) {
  return "(" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.columns) + ")";
}

std::string shapes(const AddNoise& args) {
  return "y (" + std::to_string(args.y.groups) + ", " + std::to_string(args.y.rows) + ", " +
         std::to_string(args.y.columns) + ")";
}

std::string shapes(const NoiseOuter& args) {
  return "out " + shape(args.out) + ", a " + shape(args.a);
}

std::string shapes(const LowRankEmbedding& args) {
  return "ids (" + std::to_string(args.groups) + ", " + std::to_string(args.tokens) + "), w " +
         shape(args.w) + ", u " + shape(args.u) + ", v " + shape(args.v);
}

std::string shapes(const LowRankLinear& args) {
  return "x " + shape(args.x) + ", w " + shape(args.w) + ", u " + shape(args.u) + ", v " +
         shape(args.v);
}

std::string shapes(const LowRank& item) {
  return "w " + shape(item.w) + ", u " + shape(item.u) + ", v " + shape(item.v);
}

std::string shapes(const Dense& item) {
  return "w " + shape(item.w);
}

std::string shapes(const Core& item) {
  const std::string rank = std::to_string(item.rank);
  return "core (" + rank + ", " + rank + ")";
}

// Of hundreds the first shows what they are like.
template <class Item>
std::string shapes(const std::vector<Item>& items) {
  const std::string count = std::to_string(items.size()) + " tensors";
  return items.empty() ? count : count + ", the first: " + shapes(items[0]);
}

void check(const Status& status, const char* op, const std::string& on) {
  if (!status.ok) throw std::runtime_error(std::string(op) + ": " + status.message + ", on " + on);
}

Launch threads_of(int threads) {
  return {threads, 0, nullptr};
}

py::dict build_info() {
  py::list variants;
  for (const char* const* name = cpu::isas(); *name; ++name) variants.append(*name);
  py::dict info;
  info["compiler"] = SUBZERO_COMPILER;
  info["isas_built"] = SUBZERO_ISAS;
  info["isas"] = variants;
  info["isa"] = cpu::isa();
  info["cuda_compiler"] = SUBZERO_CUDA_COMPILER;
  info["cuda_architectures"] = SUBZERO_CUDA_ARCHITECTURES;
  return info;
}

void bind_structs(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  py::enum_<Rounding>(m, "Rounding")
      .value("nearest", Rounding::nearest)
      .value("stochastic", Rounding::stochastic);
  py::class_<Matrix>(m, "Matrix")
      .def(py::init([](uintptr_t data, int64_t rows, int64_t columns, int64_t stride, Dtype dtype) {
             return Matrix{pointer<void>(data), rows, columns, stride, dtype};
           }),
           py::kw_only(), py::arg("data"), py::arg("rows"), py::arg("columns"), py::arg("stride"),
           py::arg("dtype"));
  py::class_<Slabs>(m, "Slabs")
      .def(py::init([](uintptr_t data, int64_t groups, int64_t rows, int64_t columns,
                       int64_t group_stride, int64_t row_stride, Dtype dtype) {
             return Slabs{pointer<void>(data), groups,     rows, columns,
                          group_stride,        row_stride, dtype};
           }),
           py::kw_only(), py::arg("data"), py::arg("groups"), py::arg("rows"), py::arg("columns"),
           py::arg("group_stride"), py::arg("row_stride"), py::arg("dtype"));
  py::class_<Queries>(m, "Queries")
      .def(py::init([](uintptr_t coeff, int64_t count, uintptr_t rng) {
             return Queries{pointer<float>(coeff), count, pointer<int64_t>(rng)};
           }),
           py::kw_only(), py::arg("coeff"), py::arg("count"), py::arg("rng"));
  py::class_<LowRank>(m, "LowRank")
      .def(py::init<Matrix, Matrix, Matrix, uint32_t>(), py::kw_only(), py::arg("w"), py::arg("u"),
           py::arg("v"), py::arg("stream"));
  py::class_<Dense>(m, "Dense")
      .def(py::init<Matrix, uint32_t>(), py::kw_only(), py::arg("w"), py::arg("stream"));
  py::class_<Core>(m, "Core").def(
      py::init([](uintptr_t out, uintptr_t base, int64_t rank, uint32_t stream, double mu) {
        return Core{pointer<float>(out), pointer<float>(base), rank, stream,
                    static_cast<float>(mu)};
      }),
      py::kw_only(), py::arg("out"), py::arg("base"), py::arg("rank"), py::arg("stream"),
      py::arg("mu"));
  py::class_<AddNoise>(m, "AddNoise")
      .def(py::init([](const Slabs& y, uintptr_t scale, uintptr_t query, uintptr_t row,
                       uintptr_t rng, uint32_t stream) {
             return AddNoise{y,
                             pointer<float>(scale),
                             pointer<int64_t>(query),
                             pointer<int64_t>(row),
                             pointer<int64_t>(rng),
                             stream};
           }),
           py::kw_only(), py::arg("y"), py::arg("scale"), py::arg("query"), py::arg("row"),
           py::arg("rng"), py::arg("stream"));
  py::class_<NoiseOuter>(m, "NoiseOuter")
      .def(py::init([](const Matrix& out, const Matrix& a, const Queries& queries, uintptr_t row,
                       uint32_t stream, double beta) {
             return NoiseOuter{out, a, queries, pointer<int64_t>(row), stream, beta};
           }),
           py::kw_only(), py::arg("out"), py::arg("a"), py::arg("queries"), py::arg("row"),
           py::arg("stream"), py::arg("beta"));
  py::class_<LowRankEmbedding>(m, "LowRankEmbedding")
      .def(
          py::init([](uintptr_t ids, bool ids_wide, int64_t groups, int64_t tokens, const Matrix& w,
                      const Matrix& u, const Matrix& v, uintptr_t core, uintptr_t out) {
            return LowRankEmbedding{
                pointer<void>(ids),   ids_wide,          groups, tokens, w, u, v,
                pointer<float>(core), pointer<void>(out)};
          }),
          py::kw_only(), py::arg("ids"), py::arg("ids_wide"), py::arg("groups"), py::arg("tokens"),
          py::arg("w"), py::arg("u"), py::arg("v"), py::arg("core"), py::arg("out"));
  py::class_<LowRankLinear>(m, "LowRankLinear")
      .def(py::init([](const Matrix& x, const Matrix& w, const Matrix& bias, const Matrix& u,
                       const Matrix& v, uintptr_t core, int64_t groups, uintptr_t scratch,
                       uintptr_t y) {
             return LowRankLinear{x,
                                  w,
                                  bias,
                                  u,
                                  v,
                                  pointer<float>(core),
                                  groups,
                                  pointer<void>(scratch),
                                  pointer<void>(y)};
           }),
           py::kw_only(), py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("u"), py::arg("v"),
           py::arg("core"), py::arg("groups"), py::arg("scratch"), py::arg("y"));
}

using NoGil = py::call_guard<py::gil_scoped_release>;

// perturb_many_ on the same matrices again and again, without passing them again.
class PerturbPlan {
 public:
  explicit PerturbPlan(std::vector<LowRank> items) : items_(std::move(items)) {}

  void perturb_(const Queries& queries, Rounding rounding, int threads) const {
    const auto count = static_cast<int64_t>(items_.size());
    check(cpu::perturb_many_({items_.data(), count, queries, rounding}, threads_of(threads)),
          "perturb_many_", shapes(items_));
  }

 private:
  std::vector<LowRank> items_;
};

void bind_cpu(py::module_ m) {
  m.def(
      "philox4x32",
      [](uintptr_t counter, uintptr_t key, uintptr_t words, int64_t count, int threads) {
        check(cpu::philox4x32({pointer<int64_t>(counter), pointer<int64_t>(key),
                               pointer<int64_t>(words), count},
                              threads_of(threads)),
              "philox4x32", std::to_string(count) + " counters");
      },
      NoGil(), py::kw_only(), py::arg("counter"), py::arg("key"), py::arg("words"),
      py::arg("count"), py::arg("threads"));
  m.def(
      "normal_",
      [](const Matrix& out, uintptr_t rng, uint32_t stream, int threads) {
        check(cpu::normal_({out, pointer<int64_t>(rng), stream}, threads_of(threads)), "normal_",
              shape(out));
      },
      NoGil(), py::kw_only(), py::arg("out"), py::arg("rng"), py::arg("stream"),
      py::arg("threads"));
  m.def(
      "perturb_",
      [](const LowRank& item, const Queries& queries, Rounding rounding, int threads) {
        check(cpu::perturb_({item, queries, rounding}, threads_of(threads)), "perturb_",
              shapes(item));
      },
      NoGil(), py::kw_only(), py::arg("item"), py::arg("queries"), py::arg("rounding"),
      py::arg("threads"));
  py::class_<PerturbPlan>(m, "PerturbPlan")
      .def(py::init<std::vector<LowRank>>(), py::arg("items"))
      .def("perturb_", &PerturbPlan::perturb_, NoGil(), py::kw_only(), py::arg("queries"),
           py::arg("rounding"), py::arg("threads"));
  m.def(
      "perturb_dense_",
      [](const std::vector<Dense>& items, const Queries& queries, Rounding rounding, int threads) {
        const auto count = static_cast<int64_t>(items.size());
        check(cpu::perturb_dense_({items.data(), count, queries, rounding}, threads_of(threads)),
              "perturb_dense_", shapes(items));
      },
      NoGil(), py::kw_only(), py::arg("items"), py::arg("queries"), py::arg("rounding"),
      py::arg("threads"));
  m.def(
      "core_noise_",
      [](const std::vector<Core>& items, int64_t groups, const Queries& queries, int threads) {
        const auto count = static_cast<int64_t>(items.size());
        check(cpu::core_noise_({items.data(), count, groups, queries}, threads_of(threads)),
              "core_noise_", shapes(items));
      },
      NoGil(), py::kw_only(), py::arg("items"), py::arg("groups"), py::arg("queries"),
      py::arg("threads"));
  m.def(
      "fold_",
      [](const LowRank& item, uintptr_t core, double decay, Rounding rounding, uintptr_t rng,
         int threads) {
        check(cpu::fold_({item, pointer<float>(core), decay, rounding, pointer<int64_t>(rng)},
                         threads_of(threads)),
              "fold_", shapes(item));
      },
      NoGil(), py::kw_only(), py::arg("item"), py::arg("core"), py::arg("decay"),
      py::arg("rounding"), py::arg("rng"), py::arg("threads"));
  m.def(
      "add_noise_",
      [](const AddNoise& args, int threads) {
        check(cpu::add_noise_(args, threads_of(threads)), "add_noise_", shapes(args));
      },
      NoGil(), py::kw_only(), py::arg("args"), py::arg("threads"));
  m.def(
      "noise_outer_",
      [](const NoiseOuter& args, int threads) {
        check(cpu::noise_outer_(args, threads_of(threads)), "noise_outer_", shapes(args));
      },
      NoGil(), py::kw_only(), py::arg("args"), py::arg("threads"));
  m.def(
      "ln",
      [](int64_t first, int64_t count, uintptr_t out) {
        check(cpu::ln(first, count, pointer<float>(out)), "ln", "");
      },
      NoGil(), py::kw_only(), py::arg("first"), py::arg("count"), py::arg("out"));
  m.def(
      "sincos_turns",
      [](int64_t first, int64_t count, uintptr_t sin, uintptr_t cos) {
        check(cpu::sincos_turns(first, count, pointer<float>(sin), pointer<float>(cos)),
              "sincos_turns", "");
      },
      NoGil(), py::kw_only(), py::arg("first"), py::arg("count"), py::arg("sin"), py::arg("cos"));
  m.def(
      "select_isa",
      [](const std::string& name) {
        if (cpu::select_isa(name.c_str())) return;
        std::string known;
        for (const char* const* isa = cpu::isas(); *isa; ++isa) known += std::string(" ") + *isa;
        throw std::invalid_argument("isa: expected one of" + known + ", got " + name);
      },
      py::arg("name"));
}

#if defined(SUBZERO_CUDA)
// perturb_, perturb_many_ or fold_: errors bear the name of `op`.
class CudaLowRankPlan {
 public:
  CudaLowRankPlan(std::string op, const std::vector<LowRank>& items, int device)
      : item_(items.empty() ? LowRank{} : items[0]),
        op_(std::move(op)),
        shapes_(items.size() == 1 ? shapes(items[0]) : shapes(items)),
        device_(device) {
    check(plan_.prepare(items.data(), static_cast<int64_t>(items.size()), device), op_.c_str(),
          shapes_);
  }

  int64_t scratch_bytes(int64_t queries) const { return plan_.scratch_bytes(queries); }

  void perturb_(uintptr_t coeff, int64_t queries, uintptr_t rng, Rounding rounding,
                uintptr_t scratch, uintptr_t stream) const {
    check(plan_.perturb_({pointer<float>(coeff), queries, pointer<int64_t>(rng)}, rounding,
                         pointer<void>(scratch), {1, device_, pointer<void>(stream)}),
          op_.c_str(), shapes_);
  }

  void fold_(uintptr_t core, double decay, Rounding rounding, uintptr_t rng, uintptr_t scratch,
             uintptr_t stream) const {
    check(plan_.fold_({item_, pointer<float>(core), decay, rounding, pointer<int64_t>(rng)},
                      pointer<void>(scratch), {1, device_, pointer<void>(stream)}),
          op_.c_str(), shapes_);
  }

 private:
  LowRank item_;  // the first
  std::string op_, shapes_;
  int device_;
  cuda::LowRankPlan plan_;
};

void bind_cuda(py::module_ m) {
  py::class_<Launch>(m, "Launch")
      .def(py::init([](int device, uintptr_t stream) {
             return Launch{1, device, pointer<void>(stream)};
           }),
           py::kw_only(), py::arg("device"), py::arg("stream"));
  m.def(
      "philox4x32",
      [](uintptr_t counter, uintptr_t key, uintptr_t words, int64_t count, const Launch& launch) {
        check(cuda::philox4x32({pointer<int64_t>(counter), pointer<int64_t>(key),
                                pointer<int64_t>(words), count},
                               launch),
              "philox4x32", std::to_string(count) + " counters");
      },
      NoGil(), py::kw_only(), py::arg("counter"), py::arg("key"), py::arg("words"),
      py::arg("count"), py::arg("launch"));
  m.def(
      "normal_",
      [](const Matrix& out, uintptr_t rng, uint32_t stream, const Launch& launch) {
        check(cuda::normal_({out, pointer<int64_t>(rng), stream}, launch), "normal_", shape(out));
      },
      NoGil(), py::kw_only(), py::arg("out"), py::arg("rng"), py::arg("stream"), py::arg("launch"));
  py::class_<CudaLowRankPlan>(m, "LowRankPlan")
      .def(py::init<std::string, const std::vector<LowRank>&, int>(), py::kw_only(), py::arg("op"),
           py::arg("items"), py::arg("device"))
      .def("scratch_bytes", &CudaLowRankPlan::scratch_bytes, py::arg("queries"))
      .def("perturb_", &CudaLowRankPlan::perturb_, NoGil(), py::kw_only(), py::arg("coeff"),
           py::arg("queries"), py::arg("rng"), py::arg("rounding"), py::arg("scratch"),
           py::arg("stream"))
      .def("fold_", &CudaLowRankPlan::fold_, NoGil(), py::kw_only(), py::arg("core"),
           py::arg("decay"), py::arg("rounding"), py::arg("rng"), py::arg("scratch"),
           py::arg("stream"));
  m.def(
      "perturb_dense_",
      [](const std::vector<Dense>& items, const Queries& queries, Rounding rounding,
         const Launch& launch) {
        const auto count = static_cast<int64_t>(items.size());
        check(cuda::perturb_dense_({items.data(), count, queries, rounding}, launch),
              "perturb_dense_", shapes(items));
      },
      NoGil(), py::kw_only(), py::arg("items"), py::arg("queries"), py::arg("rounding"),
      py::arg("launch"));
  m.def(
      "core_noise_",
      [](const std::vector<Core>& items, int64_t groups, const Queries& queries,
         const Launch& launch) {
        const auto count = static_cast<int64_t>(items.size());
        check(cuda::core_noise_({items.data(), count, groups, queries}, launch), "core_noise_",
              shapes(items));
      },
      NoGil(), py::kw_only(), py::arg("items"), py::arg("groups"), py::arg("queries"),
      py::arg("launch"));
  m.def(
      "add_noise_",
      [](const AddNoise& args, const Launch& launch) {
        check(cuda::add_noise_(args, launch), "add_noise_", shapes(args));
      },
      NoGil(), py::kw_only(), py::arg("args"), py::arg("launch"));
  m.def(
      "noise_outer_",
      [](const NoiseOuter& args, uintptr_t scratch, const Launch& launch) {
        check(cuda::noise_outer_(args, pointer<void>(scratch), launch), "noise_outer_",
              shapes(args));
      },
      NoGil(), py::kw_only(), py::arg("args"), py::arg("scratch"), py::arg("launch"));
  m.def("noise_outer_scratch_bytes", &cuda::noise_outer_scratch_bytes, py::kw_only(),
        py::arg("args"));
  m.def(
      "lowrank_embedding",
      [](const LowRankEmbedding& args, const Launch& launch) {
        check(cuda::lowrank_embedding(args, launch), "lowrank_embedding", shapes(args));
      },
      NoGil(), py::kw_only(), py::arg("args"), py::arg("launch"));
  m.def(
      "lowrank_linear",
      [](const LowRankLinear& args, const Launch& launch, int choice) {
        check(cuda::lowrank_linear(args, launch, choice), "lowrank_linear", shapes(args));
      },
      NoGil(), py::kw_only(), py::arg("args"), py::arg("launch"), py::arg("choice") = -1);
  m.def("lowrank_linear_scratch_bytes", &cuda::lowrank_linear_scratch_bytes, py::kw_only(),
        py::arg("rows"), py::arg("rank"), py::arg("groups"));
  m.def(
      "noise_outer_sum",
      [](uintptr_t sum, const Queries& queries, int64_t weight_stride, uintptr_t row, int64_t rows,
         int64_t columns, uint32_t stream, const Launch& launch) {
        check(cuda::noise_outer_sum({pointer<float>(sum), queries, weight_stride,
                                     pointer<int64_t>(row), rows, columns, stream},
                                    launch),
              "noise_outer_", std::to_string(rows) + " rows of " + std::to_string(columns));
      },
      NoGil(), py::kw_only(), py::arg("sum"), py::arg("queries"), py::arg("weight_stride"),
      py::arg("row"), py::arg("rows"), py::arg("columns"), py::arg("stream"), py::arg("launch"));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The launch API of csrc/lowrank.h.";
  bind_structs(m);
  bind_cpu(m.def_submodule("cpu"));
#if defined(SUBZERO_CUDA)
  bind_cuda(m.def_submodule("cuda"));
#endif
  m.def("build_info", &build_info);
}
