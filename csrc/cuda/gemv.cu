#include "gemv_kernel.cuh"
#include "linear.h"

namespace flashdecpp {
namespace {

constexpr int kMaxRows = 8;  // rows of x that one launch takes

template <class T, int m>
void launch(const Launcher& launcher, const LinearParams& p) {
  const int64_t groups = (p.n + kGemvRows - 1) / kGemvRows;
  const int32_t wave_size = launcher.wave_size();
  const int64_t loads_per_lane = (p.k / 8 + wave_size - 1) / wave_size;
  const int32_t waves = choose_gemv_waves(launcher.properties(), m, groups, loads_per_lane);
  const int64_t groups_per_block = kGemvThreads / wave_size / waves;
  const int64_t blocks = std::min<int64_t>((groups + groups_per_block - 1) / groups_per_block, INT32_MAX);
  launcher(gemv_kernel<T, m>, static_cast<unsigned>(blocks), kGemvThreads, 0, p, static_cast<int>(waves));
}

template <class T>
void launch(const Launcher& launcher, const LinearParams& p) {
  switch (p.m) {
    case 1: return launch<T, 1>(launcher, p);
    case 2: return launch<T, 2>(launcher, p);
    case 3: return launch<T, 3>(launcher, p);
    case 4: return launch<T, 4>(launcher, p);
    case 5: return launch<T, 5>(launcher, p);
    case 6: return launch<T, 6>(launcher, p);
    case 7: return launch<T, 7>(launcher, p);
    default: return launch<T, kMaxRows>(launcher, p);
  }
}

Tensor gemv(Tensor x, Tensor weight, OptionalTensor bias) {
  contract::Linear call = contract::linear("gemv", x, weight, bias);
  require_vector_rows("gemv", call);
  return run_gemv(Launcher("gemv", call.x_view.device), call);
}

}  // namespace

Tensor run_gemv(const Launcher& launcher, const contract::Linear& call) {
  LinearParams p = call.params;
  Tensor result = contract::new_like_rows(call.x_view, p.n);
  if (p.m == 0 || p.n == 0) return result;
  p.out = View(result).data;

  arch::with_half_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t first = 0; first < call.params.m; first += kMaxRows) {
      LinearParams part = p;
      part.m = std::min<int64_t>(kMaxRows, call.params.m - first);
      part.x = static_cast<const T*>(p.x) + first * p.x_stride;
      part.out = static_cast<T*>(p.out) + first * p.n;
      launch<T>(launcher, part);
    }
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(flashdecpp, CUDA, m)
{
  m.impl("gemv", TORCH_BOX(&gemv));
}

}  // namespace flashdecpp
