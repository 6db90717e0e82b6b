// out = uncond + scale * (cond - uncond), element by element, float inside.
#pragma once

#include "common.h"

namespace dualparal {

struct CombineGuidanceParams {
    const void* cond;    // [size]
    const void* uncond;  // [size]
    void* out;           // [size]
    int64_t size;
    float scale;
    DType dtype;  // of all three
};

void combine_guidance_cpu(const CombineGuidanceParams& p, int threads);
void combine_guidance_cuda(const CombineGuidanceParams& p, int device, uintptr_t stream);

}  // namespace dualparal
