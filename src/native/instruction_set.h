// Which instruction set's operations run: the widest that the machine has, unless told otherwise.
#pragma once

#include <atomic>
#include <iterator>
#include <string_view>

namespace tenfold {

// The widest first. Sixteen lanes at a time need the products of bytes besides; those of bfloat16 came years later.
enum class InstructionSet { kAvx512Bf16, kAvx512Vnni, kAvx2, kBaseline };

constexpr const char* kInstructionSets[] = {"avx512_bf16", "avx512_vnni", "avx2", "baseline"};

inline bool supports(InstructionSet set) {
#if defined(TENFOLD_X86)
  __builtin_cpu_init();
  switch (set) {
    case InstructionSet::kAvx512Bf16:
      return supports(InstructionSet::kAvx512Vnni) && __builtin_cpu_supports("avx512bf16");
    case InstructionSet::kAvx512Vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
    case InstructionSet::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default: return true;
  }
#else
  return set == InstructionSet::kBaseline;
#endif
}

inline InstructionSet widest() {
  for (int set = 0;; ++set)
    if (supports(static_cast<InstructionSet>(set))) return static_cast<InstructionSet>(set);
}

// The one of the process.
inline std::atomic<InstructionSet>& instruction_set() {
  static std::atomic<InstructionSet> chosen{widest()};
  return chosen;
}

// Makes later calls use another one that the machine has; returns whether it does.
inline bool use(std::string_view name) {
  for (int set = 0; set < static_cast<int>(std::size(kInstructionSets)); ++set) {
    if (name == kInstructionSets[set] && supports(static_cast<InstructionSet>(set))) {
      instruction_set().store(static_cast<InstructionSet>(set));
      return true;
    }
  }
  return false;
}

template <typename T>
const T& choose(const T& baseline, const T& avx2, const T& avx512_vnni, const T& avx512_bf16) {
  switch (instruction_set().load(std::memory_order_relaxed)) {
    case InstructionSet::kAvx512Bf16: return avx512_bf16;
    case InstructionSet::kAvx512Vnni: return avx512_vnni;
    case InstructionSet::kAvx2: return avx2;
    default: return baseline;
  }
}

}  // namespace tenfold

// TENFOLD_CHOOSE(kernels): the one of baseline_kernels, avx2_kernels and so on to use.
#if defined(TENFOLD_X86)
#define TENFOLD_CHOOSE(table) \
  ::tenfold::choose(baseline_##table, avx2_##table, avx512_vnni_##table, avx512_bf16_##table)
#else
#define TENFOLD_CHOOSE(table) (baseline_##table)
#endif
