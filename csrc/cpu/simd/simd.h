// The vector seam: picks the instruction set that the including file is compiled for and completes what its header
// leaves out. Each isa_<name>.cpp includes it once, after naming its namespace FLASHDECPP_ISA. Everything here lives in
// that namespace, so code compiled for one instruction set never serves another.
//
// What <instruction set>.h defines; T is float, bf16 or fp16:
//   kLanes, kManyRegisters      floats per vector; whether there are 32 vector registers rather than 16
//   Vec, Pair                   kLanes floats; two Vecs
//   set1, + - * /, fma, abs     lane by lane
//   max(a, b), min(a, b)        b if either operand is NaN
//   round(x)                    to the nearest integer, ties to even, for |x| < 2^22
//   where_less, where_equal     (a, b, x, y): x in lanes where a < b or a == b, else y; NaN compares false
//   scale_by_power(x, n)        x * 2^n for integral n
//   load(p), store(p, x)        kLanes consecutive numbers of type T
//   load(p, n), store(p, x, n)  the first n < kLanes of them, touching no other memory; the rest load as zero
//   load_pair(p), (p, n)        2 * kLanes numbers of type T or fp8, in an order that depends on the type alone: enough
//                               for dot products of arrays loaded the same way, and cheaper for bfloat16, whose odd and
//                               even numbers become floats by a mask and a shift
//   kFp8LoadScale               the factor from an fp8 that load_pair loaded to its true value
//   store_in_order(p, pair, T)  stores what load_pair<T> loaded in memory order
//   sum_each(x[kLanes])         lane i is the sum of the lanes of x[i], added in an order that is the same for every i
//   sum(x), max_lane(x)         over the lanes
// and for quantized weights:
//   load_bytes(p)               kLanes signed bytes as floats
//   Nibbles, load_nibbles       4 * kLanes bytes
//   spread_nibbles(p)           kLanes bytes, one per 32 bits: nibbles 0 and 1 are its low and its high one
//   nibble<i>(x)                nibble i of every 32 bits, minus 8, as floats
//   LaneIndices, load_indices   the indices of `select`
//   select(p, index)            lane l is p[index[l]], for indices below kLanes / 4
#pragma once

#ifndef FLASHDECPP_ISA
#error "define FLASHDECPP_ISA before including simd.h"
#endif

#if defined(__AVX512F__)
#include "cpu/simd/avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/avx2.h"
#elif defined(__aarch64__) && !defined(FLASHDECPP_PORTABLE)
#include "cpu/simd/neon.h"
#else
#include "cpu/simd/portable.h"
#endif
#if !defined(__AVX2__)
#include "cpu/simd/nibbles_4_lanes.h"
#endif

namespace flashdecpp::cpu::FLASHDECPP_ISA {

template <class T>
FLASHDECPP_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
FLASHDECPP_INLINE void store_pair(float* p, Pair x) {
  store(p, x.first);
  store(p + kLanes, x.second);
}
template <class T>
FLASHDECPP_INLINE void store_in_order(float* p, Pair x, T) {
  store_pair(p, x);
}

// Keeps the compiler from folding one load into every instruction that uses it: load ports are the bottleneck.
template <class T>
FLASHDECPP_INLINE void keep_in_register(T& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  (void)x;
#endif
}
FLASHDECPP_INLINE void keep_in_register(Pair& x) {
  keep_in_register(x.first.v);
  keep_in_register(x.second.v);
}

}  // namespace flashdecpp::cpu::FLASHDECPP_ISA

#if !defined(__AVX512F__)
#include "cpu/simd/unmasked.h"
#endif
#include "cpu/simd/functions.h"
