// The inner loop of gated feed-forwards; compiled once per instruction set.
#include "functions.h"
#include "kernels.h"
#include "lanes.h"
#include "vector.h"

#ifndef TENFOLD_INSTRUCTION_SET
#error "TENFOLD_INSTRUCTION_SET names what this is compiled for, such as avx2"
#endif

namespace tenfold {
namespace {

template <typename T>
void silu(const T* gate, const T* up, int64_t n, T* out) {
  for_lanes(n, out, [](T* to, F32x16 g, F32x16 u) { narrow(to, silu(g) * u); }, gate, up);
}

template <typename T>
void gelu(const T* gate, const T* up, int64_t n, T* out) {
  for_lanes(n, out, [](T* to, F32x16 g, F32x16 u) { narrow(to, gelu(g) * u); }, gate, up);
}

}  // namespace

#define TENFOLD_JOIN_(a, b) a##b
#define TENFOLD_JOIN(a, b) TENFOLD_JOIN_(a, b)

const GateKernels TENFOLD_JOIN(TENFOLD_INSTRUCTION_SET, _gates) = {silu<float>, silu<uint16_t>, gelu<float>,
                                                                 gelu<uint16_t>};

}  // namespace tenfold
