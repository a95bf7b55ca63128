// All that cpu_kernels.inl includes, to be compiled for the oldest processor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_kernels.h"
