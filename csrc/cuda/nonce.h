// A number that no earlier launch used, so that flags left in a workspace by another launch do not look like this
// one's.
#pragma once

#include <chrono>
#include <cstdint>

namespace flashdecpp {

inline uint64_t new_nonce(const void* workspace) {
  uint64_t x = static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()) ^
               reinterpret_cast<uint64_t>(workspace) << 20;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;  // splitmix64's finalizer
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return (x ^ (x >> 31)) | 1;  // not zero, which a flag is reset to
}

}  // namespace flashdecpp
