// The operations as XLA calls them.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "instruction_set.h"
#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tenfold {
namespace {

const Kernels& kernels() { return TENFOLD_CHOOSE(kernels); }
const NormKernels& norms() { return TENFOLD_CHOOSE(norms); }
const GateKernels& gates() { return TENFOLD_CHOOSE(gates); }

constexpr int64_t kRows = 192;        // rows of one task: their sums stay in the first-level cache
constexpr int64_t kTasks = 8;         // of a thread, where that leaves each task a good many bytes to read in a row
constexpr int64_t kFewestBytes = 1 << 16, kMostBytes = 1 << 18;

// Memory of one thread that calls keep between them; XLA's threads live as long as the process.
template <typename T>
T* scratch(size_t size) {
  thread_local std::vector<T> memory;
  if (memory.size() < size) memory.resize(size);
  return memory.data();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A weight, or one of each group, and where its product goes.
struct Product {
  const uint8_t* data;
  const float* scales;
  const float* mins;
  ffi::AnyBuffer out;
  int64_t columns;
  int64_t panels;  // of one group
  int64_t panel_bytes;
  int64_t panel_scales;  // floats
  int64_t first;         // of its panels, counted over all weights of the call
};

// Rows of one group, which share its weights.
struct Rows {
  int64_t group;
  int64_t first;
  int64_t count;
};

// The rows of a call, cut into parts of at most `kRows`. Without group sizes, all are of one group.
struct Parts {
  std::vector<Rows> rows;
  int64_t groups = 1;
  int64_t most = 1;  // rows of a part

  void add(int64_t group, int64_t first, int64_t count) {
    const int64_t parts = ceil_div(count, kRows), each = parts ? ceil_div(count, parts) : 1;
    for (int64_t row = 0; row < count; row += each) {
      rows.push_back({group, first + row, std::min(each, count - row)});
      most = std::max(most, rows.back().count);
    }
  }
};

ffi::Error invalid(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

// Reads how many rows each group has: int32, of all rows together M.
ffi::Error read_groups(const ffi::AnyBuffer& sizes, int64_t M, Parts& parts) {
  if (sizes.element_type() != ffi::S32 || sizes.dimensions().size() != 1) {
    return invalid("group sizes must be int32 [E]");
  }
  parts.groups = sizes.dimensions()[0];
  int64_t first = 0;
  for (int64_t group = 0; group < parts.groups; ++group) {
    const int64_t count = static_cast<const int32_t*>(sizes.untyped_data())[group];
    if (count < 0 || count > M - first) return invalid("group sizes must add up to the rows");
    parts.add(group, first, count);
    first += count;
  }
  return first == M ? ffi::Error::Success() : invalid("group sizes must add up to the rows");
}

// Cuts all panels of a call, times the parts of its rows, into tasks, and runs `compute(product, panel, rows, acc)` for
// each; the panel is counted over the groups.
template <typename Compute>
void run_products(ffi::ThreadPool& pool, const std::vector<Product>& products, const Parts& parts,
                  const Compute& compute) {
  const Kernels& k = kernels();
  const int64_t panels = products.back().first + products.back().panels;
  const int64_t panel_bytes = std::max<int64_t>(1, products[0].panel_bytes * parts.most);
  const int64_t bytes = std::clamp(panels * panel_bytes / (kTasks * pool.num_threads()), kFewestBytes, kMostBytes);
  const int64_t per_task = std::max<int64_t>(1, bytes / panel_bytes);
  const int64_t count_parts = static_cast<int64_t>(parts.rows.size());
  parallel_for(pool, ceil_div(panels, per_task) * count_parts, [&](int64_t task) {
    const int64_t first = task / count_parts * per_task;
    const Rows& rows = parts.rows[static_cast<size_t>(task % count_parts)];
    float* acc = scratch<float>(static_cast<size_t>(parts.most * kPanel));
    for (int64_t panel = first; panel < std::min(first + per_task, panels); ++panel) {
      const Product& p = *std::find_if(products.rbegin(), products.rend(),
                                       [panel](const Product& each) { return each.first <= panel; });
      const int64_t at = panel - p.first, column = at * kPanel;
      compute(p, rows.group * p.panels + at, rows, acc);
      const int64_t columns = std::min(kPanel, p.columns - column);
      void* base = p.out.untyped_data();
      const int64_t corner = rows.first * p.columns + column;
      if (p.out.element_type() == ffi::F32) {
        k.store_f32(acc, rows.count, columns, static_cast<float*>(base) + corner, p.columns);
      } else {
        k.store_bf16(acc, rows.count, columns, static_cast<uint16_t*>(base) + corner, p.columns);
      }
    }
  });
}

bool is_float(ffi::DataType type) { return type == ffi::F32 || type == ffi::BF16; }

// Outputs, one for each weight, in `products`; `per_weight` arguments belong to each.
ffi::Error collect(ffi::RemainingArgs& args, ffi::RemainingRets& rets, int64_t M, int64_t groups, size_t per_weight,
                   std::vector<Product>& products) {
  if (rets.size() == 0 || args.size() != rets.size() * per_weight) return invalid("a product has no output or weight");
  int64_t first = 0;
  for (size_t i = 0; i < rets.size(); ++i) {
    auto out = rets.get<ffi::AnyBuffer>(i);
    auto weight = args.get<ffi::AnyBuffer>(i * per_weight);
    if (!out.has_value() || !weight.has_value()) return invalid("a product's buffer cannot be read");
    const auto dims = (*out)->dimensions();
    if (dims.size() != 2 || dims[0] != M || !is_float((*out)->element_type())) return invalid("a product's output does not match");
    const int64_t panels = ceil_div(dims[1], kPanel);
    const int64_t all = panels * groups;
    if (all == 0 || static_cast<int64_t>(weight->size_bytes()) % all) {
      return invalid("a weight does not have its output's panels");
    }
    Product p{static_cast<const uint8_t*>(weight->untyped_data()), nullptr, nullptr, **out, dims[1], panels,
              static_cast<int64_t>(weight->size_bytes()) / all, 0, first};
    for (size_t extra = 1; extra < per_weight; ++extra) {
      auto scales = args.get<ffi::AnyBuffer>(i * per_weight + extra);
      if (!scales.has_value() || scales->element_type() != ffi::F32) return invalid("scales must be float32");
      (extra == 1 ? p.scales : p.mins) = scales->typed_data<float>();
      const int64_t floats = static_cast<int64_t>(scales->element_count()) / all;
      if (extra == 2 && floats != p.panel_scales) return invalid("there must be as many mins as scales");
      p.panel_scales = floats;
    }
    products.push_back(p);
    first += panels;
  }
  return ffi::Error::Success();
}

// The parts of x's rows, which are those of `sizes` where there are groups.
ffi::Error read_rows(const ffi::AnyBuffer& x, const ffi::AnyBuffer* sizes, Parts& parts) {
  if (x.dimensions().size() != 2 || !is_float(x.element_type())) return invalid("x must be a matrix of floats");
  const int64_t M = x.dimensions()[0];
  if (sizes) return read_groups(*sizes, M, parts);
  parts.add(0, 0, M);
  return ffi::Error::Success();
}

ffi::Error multiply(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer* sizes,
                    ffi::RemainingArgs& args, ffi::RemainingRets& rets) {
  Parts parts;
  if (auto error = read_rows(x, sizes, parts); error.failure()) return error;
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  std::vector<Product> products;
  if (auto error = collect(args, rets, M, parts.groups, 1, products); error.failure()) return error;
  const bool wide_x = x.element_type() == ffi::F32;
  const int64_t narrow = (K + K % 2) * kPanel * 2, wide = K * kPanel * 4;
  const bool wide_weights = args.get<ffi::AnyBuffer>(0)->element_type() == ffi::F32;
  if (wide_weights && !wide_x) return invalid("float32 weights need float32 activations");
  for (size_t i = 0; i < products.size(); ++i) {
    if (args.get<ffi::AnyBuffer>(i)->element_type() != (wide_weights ? ffi::F32 : ffi::BF16)) {
      return invalid("weights of one call must be all float32 or all bfloat16");
    }
    if (products[i].panel_bytes != (wide_weights ? wide : narrow)) return invalid("a weight's panels have the wrong size");
  }
  const Kernels& k = kernels();
  run_products(pool, products, parts, [&](const Product& p, int64_t panel, const Rows& rows, float* acc) {
    const uint8_t* w = p.data + panel * p.panel_bytes;
    if (!wide_x) {
      const uint16_t* from = static_cast<const uint16_t*>(x.untyped_data()) + rows.first * K;
      k.product_bf16(from, K, rows.count, K, reinterpret_cast<const uint16_t*>(w), acc);
    } else if (wide_weights) {
      const float* from = static_cast<const float*>(x.untyped_data()) + rows.first * K;
      k.product_f32(from, K, rows.count, K, reinterpret_cast<const float*>(w), acc);
    } else {
      const float* from = static_cast<const float*>(x.untyped_data()) + rows.first * K;
      k.product_f32_bf16(from, K, rows.count, K, reinterpret_cast<const uint16_t*>(w), acc);
    }
  });
  return ffi::Error::Success();
}

// How the weights of a call are quantised.
struct Format {
  int64_t bits;
  int64_t group;
  int64_t zero;
  bool affine;
};

ffi::Error multiply_quantized(ffi::ThreadPool& pool, const Format& format, const ffi::AnyBuffer& x,
                              const ffi::AnyBuffer* sizes, ffi::RemainingArgs& args, ffi::RemainingRets& rets) {
  const auto [bits, group, zero, affine] = format;
  if ((bits != 4 && bits != 8) || group <= 0 || group % 8) return invalid("the weights' format is unknown");
  Parts parts;
  if (auto error = read_rows(x, sizes, parts); error.failure()) return error;
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  std::vector<Product> products;
  if (auto error = collect(args, rets, M, parts.groups, affine ? 3 : 2, products); error.failure()) return error;
  // Activations share a scale with at most 128 neighbours, within one group of weights.
  const int64_t shared = std::min<int64_t>(group, 128);
  if (group % shared) return invalid("a group above 128 must be a multiple of 128");
  const int64_t inputs = ceil_div(K, shared) * shared, groups = inputs / shared;
  for (const Product& p : products) {
    if (p.panel_bytes != inputs * kPanel * bits / 8) return invalid("a weight's panels have the wrong size");
    if (p.panel_scales != ceil_div(inputs, group) * kPanel) return invalid("a weight has the wrong number of scales");
  }
  const Kernels& k = kernels();
  int8_t* codes = scratch<int8_t>(static_cast<size_t>(M * inputs));
  std::vector<float> scales(static_cast<size_t>(M * groups));
  std::vector<int32_t> sums(static_cast<size_t>(M * groups));
  const int64_t rows_per_task = std::max<int64_t>(1, 8192 / inputs);
  parallel_for(pool, ceil_div(M, rows_per_task), [&](int64_t task) {
    for (int64_t m = task * rows_per_task; m < std::min((task + 1) * rows_per_task, M); ++m) {
      if (x.element_type() == ffi::F32) {
        k.quantize_f32(static_cast<const float*>(x.untyped_data()) + m * K, K, shared, codes + m * inputs,
                       scales.data() + m * groups, sums.data() + m * groups);
      } else {
        k.quantize_bf16(static_cast<const uint16_t*>(x.untyped_data()) + m * K, K, shared, codes + m * inputs,
                        scales.data() + m * groups, sums.data() + m * groups);
      }
    }
  });
  run_products(pool, products, parts, [&](const Product& p, int64_t panel, const Rows& rows, float* acc) {
    const int64_t row = rows.first;
    const QuantizedRows from{codes + row * inputs, scales.data() + row * groups, sums.data() + row * groups, shared};
    const QuantizedPanel to{p.data + panel * p.panel_bytes, p.scales + panel * p.panel_scales,
                            format.affine ? p.mins + panel * p.panel_scales : nullptr, format.group,
                            static_cast<int32_t>(format.zero), static_cast<int>(format.bits)};
    k.product_quantized(from, rows.count, inputs, to, acc);
  });
  return ffi::Error::Success();
}

// --- handlers --------------------------------------------------------------------------------------------------------

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return multiply(pool, x, nullptr, args, rets);
}

// Rows that are sorted by group, times the weights of their groups.
ffi::Error grouped_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer sizes, ffi::RemainingArgs args,
                          ffi::RemainingRets rets) {
  return multiply(pool, x, &sizes, args, rets);
}

ffi::Error matmul_quantized(ffi::ThreadPool pool, int64_t bits, int64_t group, int64_t zero, bool affine,
                            ffi::AnyBuffer x, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return multiply_quantized(pool, {bits, group, zero, affine}, x, nullptr, args, rets);
}

ffi::Error grouped_matmul_quantized(ffi::ThreadPool pool, int64_t bits, int64_t group, int64_t zero, bool affine,
                                    ffi::AnyBuffer x, ffi::AnyBuffer sizes, ffi::RemainingArgs args,
                                    ffi::RemainingRets rets) {
  return multiply_quantized(pool, {bits, group, zero, affine}, x, &sizes, args, rets);
}

constexpr int64_t kNormTask = 4096;  // values that one task normalises at least

// Whether x, what scales and shifts its rows, and the output are all float32 or all bfloat16.
bool alike(ffi::AnyBuffer x, std::initializer_list<ffi::DataType> others) {
  return is_float(x.element_type()) && std::all_of(others.begin(), others.end(), [&](ffi::DataType other) {
           return other == x.element_type();
         });
}

// Runs `normalise(row, first value of the row)` for all rows of D values.
template <typename Normalise>
void run_rows(ffi::ThreadPool& pool, int64_t rows, int64_t D, const Normalise& normalise) {
  const int64_t per_task = std::max<int64_t>(1, kNormTask / D);
  parallel_for(pool, ceil_div(rows, per_task), [&](int64_t task) {
    for (int64_t row = task * per_task; row < std::min(rows, (task + 1) * per_task); ++row) normalise(row, row * D);
  });
}

ffi::Error rms_norm(ffi::ThreadPool pool, float eps, float offset, bool weight_last, ffi::AnyBuffer x,
                    ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> out) {
  if (!alike(x, {weight.element_type(), out->element_type()})) {
    return invalid("x, weight and output must be all float32 or all bfloat16");
  }
  const int64_t D = static_cast<int64_t>(weight.element_count());
  const int64_t total = static_cast<int64_t>(x.element_count());
  if (D == 0 || total % D || static_cast<int64_t>(out->element_count()) != total) {
    return invalid("the weight does not match the last dim of x");
  }
  const NormKernels& k = norms();
  run_rows(pool, total / D, D, [&](int64_t, int64_t at) {
    if (x.element_type() == ffi::F32) {
      k.rms_norm_f32(x.typed_data<float>() + at, weight.typed_data<float>(), D, eps, offset, weight_last,
                     out->typed_data<float>() + at);
    } else {
      k.rms_norm_bf16(static_cast<const uint16_t*>(x.untyped_data()) + at,
                      static_cast<const uint16_t*>(weight.untyped_data()), D, eps, offset, weight_last,
                      static_cast<uint16_t*>(out->untyped_data()) + at);
    }
  });
  return ffi::Error::Success();
}

// The weight and bias have one row for all, or one for each of the N rows that x repeats (its heads).
ffi::Error layer_norm(ffi::ThreadPool pool, float eps, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer bias,
                      ffi::Result<ffi::AnyBuffer> out) {
  if (!alike(x, {weight.element_type(), bias.element_type(), out->element_type()})) {
    return invalid("x, weight, bias and output must be all float32 or all bfloat16");
  }
  const int64_t D = x.dimensions().size() == 0 ? 0 : x.dimensions().back();
  const int64_t total = static_cast<int64_t>(x.element_count()), scaled = static_cast<int64_t>(weight.element_count());
  if (D == 0 || scaled == 0 || scaled % D || total % scaled || bias.element_count() != weight.element_count() ||
      static_cast<int64_t>(out->element_count()) != total) {
    return invalid("the weight and bias do not match the last dims of x");
  }
  const NormKernels& k = norms();
  run_rows(pool, total / D, D, [&](int64_t row, int64_t at) {
    const int64_t own = row % (scaled / D) * D;
    if (x.element_type() == ffi::F32) {
      k.layer_norm_f32(x.typed_data<float>() + at, weight.typed_data<float>() + own, bias.typed_data<float>() + own, D,
                       eps, out->typed_data<float>() + at);
    } else {
      k.layer_norm_bf16(static_cast<const uint16_t*>(x.untyped_data()) + at,
                        static_cast<const uint16_t*>(weight.untyped_data()) + own,
                        static_cast<const uint16_t*>(bias.untyped_data()) + own, D, eps,
                        static_cast<uint16_t*>(out->untyped_data()) + at);
    }
  });
  return ffi::Error::Success();
}

constexpr int64_t kGateTask = 8192;  // values of one task

ffi::Error gate(ffi::ThreadPool pool, bool silu, ffi::AnyBuffer x, ffi::AnyBuffer up,
                ffi::Result<ffi::AnyBuffer> out) {
  const int64_t total = static_cast<int64_t>(x.element_count());
  if (!alike(x, {up.element_type(), out->element_type()}) || static_cast<int64_t>(up.element_count()) != total ||
      static_cast<int64_t>(out->element_count()) != total) {
    return invalid("gate, up and output must have one shape, and be all float32 or all bfloat16");
  }
  const GateKernels& k = gates();
  parallel_for(pool, ceil_div(total, kGateTask), [&](int64_t task) {
    const int64_t at = task * kGateTask, count = std::min(kGateTask, total - at);
    if (x.element_type() == ffi::F32) {
      (silu ? k.silu_f32 : k.gelu_f32)(x.typed_data<float>() + at, up.typed_data<float>() + at, count,
                                       out->typed_data<float>() + at);
    } else {
      (silu ? k.silu_bf16 : k.gelu_bf16)(static_cast<const uint16_t*>(x.untyped_data()) + at,
                                         static_cast<const uint16_t*>(up.untyped_data()) + at, count,
                                         static_cast<uint16_t*>(out->untyped_data()) + at);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tenfold

#define TENFOLD_PUBLIC extern "C" __attribute__((visibility("default")))

TENFOLD_PUBLIC XLA_FFI_Error* tenfold_matmul(XLA_FFI_CallFrame*);
TENFOLD_PUBLIC XLA_FFI_Error* tenfold_matmul_quantized(XLA_FFI_CallFrame*);
TENFOLD_PUBLIC XLA_FFI_Error* tenfold_grouped_matmul(XLA_FFI_CallFrame*);
TENFOLD_PUBLIC XLA_FFI_Error* tenfold_grouped_matmul_quantized(XLA_FFI_CallFrame*);
TENFOLD_PUBLIC XLA_FFI_Error* tenfold_rms_norm(XLA_FFI_CallFrame*);
TENFOLD_PUBLIC XLA_FFI_Error* tenfold_layer_norm(XLA_FFI_CallFrame*);
TENFOLD_PUBLIC XLA_FFI_Error* tenfold_gate(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    tenfold_matmul, tenfold::matmul,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_matmul_quantized, tenfold::matmul_quantized,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("zero")
                                  .Attr<bool>("affine")
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_grouped_matmul, tenfold::grouped_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_grouped_matmul_quantized, tenfold::grouped_matmul_quantized,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("zero")
                                  .Attr<bool>("affine")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_rms_norm, tenfold::rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset")
                                  .Attr<bool>("weight_last")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_gate, tenfold::gate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("silu")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_layer_norm, tenfold::layer_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

TENFOLD_PUBLIC const char* tenfold_instruction_set() {
  return tenfold::kInstructionSets[static_cast<int>(tenfold::instruction_set().load())];
}

// Makes later calls use another instruction set that the machine has; returns whether it does.
TENFOLD_PUBLIC bool tenfold_use(const char* name) { return tenfold::use(name); }
