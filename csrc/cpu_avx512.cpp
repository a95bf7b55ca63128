#include "cpu_includes.h"
#if defined(__x86_64__)
#define ZOO_INSTRUCTION_SET avx512
#define ZOO_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include "cpu_kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
