#include "cpu_includes.h"
#define ZOO_INSTRUCTION_SET portable
#define ZOO_VECTOR_BYTES 16
#include "cpu_kernels.inl"
