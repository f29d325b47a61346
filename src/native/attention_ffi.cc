// Paged attention as XLA calls it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "attention.h"
#include "float_mode.h"
#include "instruction_set.h"
#include "parallel.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tenfold {
namespace {

constexpr int64_t kBlockRows = 96;         // rows of a block: with a chunk of keys they fit the second-level cache
constexpr int64_t kSerialCost = 1 << 18;   // multiply-adds below which other threads would come too late
constexpr int64_t kSerialWrite = 1 << 15;  // elements, likewise
constexpr int64_t kWriteTokens = 32;       // of one task
constexpr const char* kPages =
    "pages must be [P, J, K / u, B, u] and [P, J, B / u, K, u] of float32, bfloat16, int8 or float8_e4m3fn";

const AttentionKernels& kernels() { return TENFOLD_CHOOSE(attention); }

ffi::Error invalid(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

// --- arguments -------------------------------------------------------------------------------------------------------

std::optional<Element> element_of(ffi::DataType type) {
  if (type == ffi::F32) return Element::kF32;
  if (type == ffi::BF16) return Element::kBF16;
  if (type == ffi::S8) return Element::kInt8;
  if (type == ffi::F8E4M3FN) return Element::kFp8;
  return std::nullopt;
}

bool has_shape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  return std::equal(dims.begin(), dims.end(), shape.begin(), shape.end());
}

// Takes the buffers that are left of a call's, one by one.
class Buffers {
 public:
  explicit Buffers(const ffi::RemainingArgs& args) : args_(args) {}

  std::optional<ffi::AnyBuffer> next() {
    if (done()) return std::nullopt;
    auto buffer = args_.get<ffi::AnyBuffer>(next_++);
    return buffer.has_value() ? std::optional(*buffer) : std::nullopt;
  }

  bool done() const { return next_ == args_.size(); }

 private:
  const ffi::RemainingArgs& args_;
  size_t next_ = 0;
};

// The rows of a step, as the host lists them.
struct Rows {
  int64_t T, S;
  const int32_t* kv_lens;
  const int32_t* starts;
  int64_t count;
};

ffi::Error read_rows(const Attention& a, const ffi::AnyBuffer& kv_lens, const ffi::AnyBuffer& starts,
                     const ffi::AnyBuffer& num_seqs, Rows& rows) {
  if (kv_lens.element_type() != ffi::S32 || starts.element_type() != ffi::S32 || num_seqs.element_type() != ffi::S32 ||
      !has_shape(kv_lens, {rows.S}) || !has_shape(starts, {rows.S + 1}) || !has_shape(num_seqs, {})) {
    return invalid("kv_lens, query_starts and num_seqs must be int32, of S, S + 1 and no elements");
  }
  rows.kv_lens = static_cast<const int32_t*>(kv_lens.untyped_data());
  rows.starts = static_cast<const int32_t*>(starts.untyped_data());
  rows.count = *static_cast<const int32_t*>(num_seqs.untyped_data());
  if (rows.count < 0 || rows.count > rows.S) return invalid("num_seqs must be within the rows of the block tables");
  if (rows.starts[0] != 0) return invalid("query_starts must begin with 0");
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t queries = int64_t{rows.starts[r + 1]} - rows.starts[r];
    if (queries < 0 || rows.starts[r + 1] > rows.T) return invalid("query_starts must ascend to at most T");
    if (queries > 0 && (rows.kv_lens[r] < queries || rows.kv_lens[r] > a.N * a.B)) {
      return invalid("kv_lens must be between a row's queries and what its block table holds");
    }
  }
  return ffi::Error::Success();
}

ffi::Error read_queries(const ffi::AnyBuffer& q, ffi::AnyBuffer& out, Attention& a, Rows& rows) {
  const auto dims = q.dimensions();
  const auto type = element_of(q.element_type());
  if (dims.size() != 3 || !type || (*type != Element::kF32 && *type != Element::kBF16)) {
    return invalid("q must be [T, H, K] of float32 or bfloat16");
  }
  if (out.element_type() != q.element_type() || !has_shape(out, {dims[0], dims[1], dims[2]})) {
    return invalid("the output must be like q");
  }
  rows.T = dims[0];
  a.H = dims[1];
  a.K = dims[2];
  a.query_type = *type;
  a.queries = q.untyped_data();
  a.out = out.untyped_data();
  return ffi::Error::Success();
}

ffi::Error read_cache(Buffers& buffers, Attention& a) {
  const auto keys = buffers.next(), values = buffers.next();
  if (!keys || !values) return invalid("the pages of keys and values are missing");
  const auto dims = keys->dimensions();
  const auto type = element_of(keys->element_type());
  if (dims.size() != 5 || !type || values->element_type() != keys->element_type()) {
    return invalid(kPages);
  }
  const int64_t u = *type == Element::kF32 ? 1 : *type == Element::kBF16 ? 2 : 4;
  a.cache_type = *type;
  a.P = dims[0];
  a.J = dims[1];
  a.B = dims[3];
  if (a.P < 1 || a.J < 1 || a.B < 1 || a.K < 1 || a.K > 1024 || a.H < 1 || a.H % a.J || a.K % u || a.B % u) {
    return invalid("K and B must be multiples of u = 4 / (bytes of an element), H one of J, and K at most 1024");
  }
  if (!has_shape(*keys, {a.P, a.J, a.K / u, a.B, u}) || !has_shape(*values, {a.P, a.J, a.B / u, a.K, u})) {
    return invalid(kPages);
  }
  a.keys = keys->untyped_data();
  a.values = values->untyped_data();
  for (float** of : {&a.key_scales, &a.value_scales}) {
    if (!a.scaled()) break;
    const auto scales = buffers.next();
    if (!scales || scales->element_type() != ffi::F32 || !has_shape(*scales, {a.P, a.J, a.B})) {
      return invalid("pages of 8 bits need float32 scales [P, J, B] of keys and of values");
    }
    *of = static_cast<float*>(scales->untyped_data());
  }
  return ffi::Error::Success();
}

// --- work ------------------------------------------------------------------------------------------------------------

// A block of queries; one split of it, or all.
struct Task {
  QueryBlock block;
  int64_t split;  // -1: all
  int64_t shared;  // of `Shared`, if one split
};

// What the tasks of one block have in common.
struct Shared {
  int64_t first, count;  // splits
  int64_t at;            // floats into the partial states
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<Shared> shared;
  int64_t floats = 0;  // of partial states
  int64_t cost = 0;
};

// Multiply-adds per element of a head, and the reading of the keys.
int64_t cost_of(const Attention& a, const QueryBlock& block) {
  return (block.position + block.count - a.first_key(block.position)) * (block.count * a.group() + 4) * block.heads;
}

// Calls body(block) for each block of queries, with all heads, the longest ones first within a row.
template <typename Body>
void for_blocks(const Attention& a, const Rows& rows, const Body& body) {
  const int64_t most = std::max<int64_t>(1, kBlockRows / a.group());
  for (int64_t r = rows.count - 1; r >= 0; --r) {
    const int64_t queries = rows.starts[r + 1] - rows.starts[r], past = rows.kv_lens[r] - queries;
    for (int64_t b = (queries + most - 1) / most - 1; b >= 0; --b) {
      const int64_t skipped = b * most, count = std::min(most, queries - skipped);
      body(QueryBlock{r, rows.starts[r] + skipped, count, past + skipped, rows.kv_lens[r], 0, a.J});
    }
  }
}

// The splits of a block's keys, from the first to before the last.
struct Splits {
  int64_t first, end;
  Splits(const Attention& a, const QueryBlock& block)
      : first(a.first_key(block.position) / kSplit), end((block.position + block.count - 1) / kSplit + 1) {}
};

// Heads lie beside each other in a page, and memory is slow where reading jumps. So a task takes as many as its scratch
// has rows for, and as leave every thread some tasks.
int64_t heads_together(const Attention& a, const QueryBlock& block, int64_t threads, int64_t cost) {
  const Splits splits(a, block);
  const int64_t most = std::max<int64_t>(1, kBlockRows / a.group() / block.count);
  const int64_t of_head = cost_of(a, block) / (block.heads * (splits.end - splits.first)) + 1;
  return std::clamp<int64_t>(cost / (threads * 2 * of_head), 1, std::min(most, a.J));
}

// Blocks are tasks. What would keep one thread busy for long after the others is cut into splits as well.
void make_plan(const Attention& a, const Rows& rows, int64_t threads, Plan& plan) {
  plan.tasks.clear();
  plan.shared.clear();
  plan.floats = plan.cost = 0;
  for_blocks(a, rows, [&](const QueryBlock& block) { plan.cost += cost_of(a, block); });
  const auto add = [&](const QueryBlock& block) {
    const auto [first, end] = Splits(a, block);
    if (end - first == 1 || cost_of(a, block) * threads * 4 <= plan.cost) {
      plan.tasks.push_back({block, -1, -1});
      return;
    }
    for (int64_t split = first; split < end; ++split) {
      plan.tasks.push_back({block, split, static_cast<int64_t>(plan.shared.size())});
    }
    plan.shared.push_back({first, end - first, plan.floats});
    plan.floats += (end - first) * block.rows(a) * a.state_floats();
  };
  for_blocks(a, rows, [&](QueryBlock block) {
    const int64_t heads = heads_together(a, block, threads, plan.cost);
    for (; block.head < a.J; block.head += heads) {
      block.heads = std::min(heads, a.J - block.head);
      add(block);
    }
  });
  plan.cost *= a.K;
}

// All splits of a block in one go.
void run_block(const AttentionKernels& k, const Attention& a, const QueryBlock& block, float* work) {
  const int64_t rows = block.rows(a), floats = rows * a.state_floats();
  float* state = scratch<kState>(2 * floats);
  k.clear(a, rows, state);
  const auto [first, end] = Splits(a, block);
  for (int64_t split = first; split < end; ++split) {
    k.attend(a, block, split, work, state + floats);
    k.merge(a, rows, state + floats, state);
  }
  k.finish(a, block, state);
}

void merge_splits(const AttentionKernels& k, const Attention& a, const QueryBlock& block, int64_t splits,
                  const float* partials) {
  const int64_t rows = block.rows(a), floats = rows * a.state_floats();
  float* state = scratch<kState>(floats);
  k.clear(a, rows, state);
  for (int64_t split = 0; split < splits; ++split) k.merge(a, rows, partials + split * floats, state);
  k.finish(a, block, state);
}

void run_attention(ffi::ThreadPool& pool, const Attention& a, const Rows& rows) {
  const AttentionKernels& k = kernels();
  const int64_t row_bytes = a.H * a.K * (a.query_type == Element::kF32 ? 4 : 2);
  const int64_t used = rows.count ? rows.starts[rows.count] : 0;
  std::memset(static_cast<char*>(a.out) + used * row_bytes, 0, static_cast<size_t>((rows.T - used) * row_bytes));

  static thread_local Plan plan;
  Plan& mine = plan;  // other threads have one of their own
  make_plan(a, rows, pool.num_threads(), mine);
  float* const partials = scratch<kCall>(mine.floats);
  const auto left = std::make_unique<std::atomic<int64_t>[]>(mine.shared.size());
  for (size_t i = 0; i < mine.shared.size(); ++i) left[i] = mine.shared[i].count;
  const int64_t work_floats = k.scratch_floats(a, std::max<int64_t>(1, kBlockRows / a.group()) * a.group());
  const auto run = [&](int64_t i) {
    const FlushSubnormals mode;
    const Task& task = mine.tasks[static_cast<size_t>(i)];
    float* work = scratch<kTask>(work_floats);
    if (task.split < 0) return run_block(k, a, task.block, work);
    const size_t shared = static_cast<size_t>(task.shared);
    const Shared& of = mine.shared[shared];
    const int64_t floats = task.block.rows(a) * a.state_floats();
    k.attend(a, task.block, task.split, work, partials + of.at + (task.split - of.first) * floats);
    if (left[shared].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      merge_splits(k, a, task.block, of.count, partials + of.at);
    }
  };
  const int64_t tasks = static_cast<int64_t>(mine.tasks.size());
  if (mine.cost < kSerialCost) {
    for (int64_t i = 0; i < tasks; ++i) run(i);
  } else {
    parallel_for(pool, tasks, run);
  }
}

void run_writes(ffi::ThreadPool& pool, const Attention& a, const Rows& rows, const void* keys, const void* values) {
  const AttentionKernels& k = kernels();
  std::vector<NewTokens> tasks;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t queries = rows.starts[r + 1] - rows.starts[r], past = rows.kv_lens[r] - queries;
    for (int64_t i = 0; i < queries; i += kWriteTokens) {
      tasks.push_back({keys, values, r, rows.starts[r] + i, std::min(kWriteTokens, queries - i), past + i});
    }
  }
  const auto run = [&](int64_t i) {
    const FlushSubnormals mode;
    k.write(a, tasks[static_cast<size_t>(i)]);
  };
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (rows.T * a.J * a.K < kSerialWrite) {
    for (int64_t i = 0; i < count; ++i) run(i);
  } else {
    parallel_for(pool, count, run);
  }
}

// --- handlers --------------------------------------------------------------------------------------------------------

// What both handlers are given alike.
struct Call {
  Attention a{};
  Rows rows{};
};

ffi::Error read_call(float scale, int64_t window, int64_t chunk, float softcap, const ffi::AnyBuffer& q,
                     const ffi::AnyBuffer& tables, const ffi::AnyBuffer& kv_lens, const ffi::AnyBuffer& starts,
                     const ffi::AnyBuffer& num_seqs, Buffers& buffers, ffi::AnyBuffer& out, Call& call) {
  Attention& a = call.a;
  if (!std::isfinite(scale) || !(softcap >= 0) || !std::isfinite(softcap) || window < 0 || chunk < 0) {
    return invalid("scale must be finite, and window, chunk and softcap at least 0, which means none");
  }
  a.scale = scale;
  a.window = window;
  a.chunk = chunk;
  a.softcap = softcap;
  if (auto error = read_queries(q, out, a, call.rows); error.failure()) return error;
  if (auto error = read_cache(buffers, a); error.failure()) return error;
  if (!buffers.done()) {
    const auto sinks = buffers.next();
    if (!sinks || sinks->element_type() != ffi::F32 || !has_shape(*sinks, {a.H}) || !buffers.done()) {
      return invalid("what follows the cache must be float32 sinks [H]");
    }
    a.sinks = static_cast<const float*>(sinks->untyped_data());
  }
  if (tables.element_type() != ffi::S32 || tables.dimensions().size() != 2) {
    return invalid("block tables must be int32 [S, N]");
  }
  call.rows.S = tables.dimensions()[0];
  a.N = tables.dimensions()[1];
  a.tables = static_cast<const int32_t*>(tables.untyped_data());
  return read_rows(a, kv_lens, starts, num_seqs, call.rows);
}

ffi::Error paged_attention(ffi::ThreadPool pool, float scale, int64_t window, int64_t chunk, float softcap,
                           ffi::AnyBuffer q, ffi::AnyBuffer tables, ffi::AnyBuffer kv_lens, ffi::AnyBuffer starts,
                           ffi::AnyBuffer num_seqs, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out) {
  Call call;
  Buffers buffers(args);
  if (auto error = read_call(scale, window, chunk, softcap, q, tables, kv_lens, starts, num_seqs, buffers, *out, call);
      error.failure()) {
    return error;
  }
  run_attention(pool, call.a, call.rows);
  return ffi::Error::Success();
}

// Stores k and v in the cache, which the results alias, and attends to it.
ffi::Error paged_attention_update(ffi::ThreadPool pool, float scale, int64_t window, int64_t chunk, float softcap,
                                  ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer tables,
                                  ffi::AnyBuffer kv_lens, ffi::AnyBuffer starts, ffi::AnyBuffer num_seqs,
                                  ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out, ffi::RemainingRets rets) {
  Call call;
  Buffers buffers(args);
  if (auto error = read_call(scale, window, chunk, softcap, q, tables, kv_lens, starts, num_seqs, buffers, *out, call);
      error.failure()) {
    return error;
  }
  const Attention& a = call.a;
  for (const ffi::AnyBuffer& x : {k, v}) {
    if (x.element_type() != q.element_type() || !has_shape(x, {call.rows.T, a.J, a.K})) {
      return invalid("k and v must be [T, J, K] of q's type");
    }
  }
  const void* cache[] = {a.keys, a.values, a.key_scales, a.value_scales};
  if (rets.size() != (a.scaled() ? 4 : 2)) {
    return invalid("the results must be the output and the cache");
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto ret = rets.get<ffi::AnyBuffer>(i);
    if (!ret.has_value() || (*ret)->untyped_data() != cache[i]) return invalid("the results must alias the cache");
  }
  run_writes(pool, a, call.rows, k.untyped_data(), v.untyped_data());
  run_attention(pool, a, call.rows);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tenfold

#define TENFOLD_PUBLIC extern "C" __attribute__((visibility("default")))

TENFOLD_PUBLIC XLA_FFI_Error* tenfold_paged_attention(XLA_FFI_CallFrame*);
TENFOLD_PUBLIC XLA_FFI_Error* tenfold_paged_attention_update(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_paged_attention, tenfold::paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk")
                                  .Attr<float>("softcap")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_paged_attention_update, tenfold::paged_attention_update,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk")
                                  .Attr<float>("softcap")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets());
