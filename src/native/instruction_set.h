// Which instruction set's operations run: the widest that the machine has, unless told otherwise.
#pragma once

#include <atomic>
#include <string_view>

namespace tenfold {

enum class InstructionSet { kAvx512, kAvx2, kBaseline };  // widest first

constexpr const char* kInstructionSets[] = {"avx512", "avx2", "baseline"};

inline bool supports(InstructionSet set) {
#if defined(TENFOLD_X86)
  __builtin_cpu_init();
  if (set == InstructionSet::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
  }
  if (set == InstructionSet::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return set == InstructionSet::kBaseline;
}

inline InstructionSet widest() {
  if (supports(InstructionSet::kAvx512)) return InstructionSet::kAvx512;
  return supports(InstructionSet::kAvx2) ? InstructionSet::kAvx2 : InstructionSet::kBaseline;
}

// The one of the process.
inline std::atomic<InstructionSet>& instruction_set() {
  static std::atomic<InstructionSet> chosen{widest()};
  return chosen;
}

// Makes later calls use another one that the machine has; returns whether it does.
inline bool use(std::string_view name) {
  for (InstructionSet set : {InstructionSet::kAvx512, InstructionSet::kAvx2, InstructionSet::kBaseline}) {
    if (name == kInstructionSets[static_cast<int>(set)] && supports(set)) {
      instruction_set().store(set);
      return true;
    }
  }
  return false;
}

template <typename T>
const T& choose(const T& baseline, const T& avx2, const T& avx512) {
  switch (instruction_set().load(std::memory_order_relaxed)) {
    case InstructionSet::kAvx512: return avx512;
    case InstructionSet::kAvx2: return avx2;
    default: return baseline;
  }
}

}  // namespace tenfold

// TENFOLD_CHOOSE(kernels): the one of baseline_kernels, avx2_kernels and avx512_kernels to use.
#if defined(TENFOLD_X86)
#define TENFOLD_CHOOSE(table) ::tenfold::choose(baseline_##table, avx2_##table, avx512_##table)
#else
#define TENFOLD_CHOOSE(table) (baseline_##table)
#endif
