// float16 as CUDA names it; the conversions are those of csrc/rows.h, which are tested on every value.
#pragma once

#include <cstdint>

struct __half {
    uint16_t bits;
};
float __half2float(__half value);
__half __float2half_rn(float value);
