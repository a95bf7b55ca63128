// The headers that cpu_kernels.inl needs. They must be compiled for the oldest processor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_kernels.h"
