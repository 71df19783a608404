// What the kernels of a decode step of several sequences have in common; it stands in front of each.
//   IN        1: bfloat16, 2: float16 - the type of parameters, inputs and outputs
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef u16 in_t;

#define FULL ~0u
#define LOG2E 1.4426950408889634f

__device__ __forceinline__ float ex2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float rcp(float v) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
#if IN == 1
__device__ __forceinline__ float widen(in_t v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ in_t narrow(float v) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
#else
__device__ __forceinline__ float widen(in_t v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v)); return r; }
__device__ __forceinline__ in_t narrow(float v) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r; }
#endif
__device__ __forceinline__ float sigmoid(float v) { return rcp(1.f + ex2(-v * LOG2E)); }

// A kernel may begin when the one in front of it has called `let_next_begin`, and reads what that one writes after
// `wait_for_previous`. Each lets the next one begin after it has waited itself. So all but the one in front of it has
// ended when a kernel begins: what older ones have written, weights and states, it reads at once.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
