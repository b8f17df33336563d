// What stands between the products: residual and norm, SwiGLU. Each sums its product's chunks and adds the adapter's B t.
//
// Compiled with ADAPTERS (common.cuh).

constexpr int THREADS = 128;  // each has four columns

struct AddNorm {
  float* residual;        // (m, h), added to in place
  Parts parts;            // of the product before; no chunks for none
  Parts ranks;            // its T
  const float* weight;    // (h,) of the norm that follows
  u16* out;               // (m, h) bf16: residual times weight; the next product divides by the root of the mean square
  float* squares;         // (blocks of columns, m)
  int h, m;
  Adapters<1> adapters;   // of the product before
};

extern "C" __global__ __launch_bounds__(THREADS) void add_norm(const __grid_constant__ AddNorm a) {
  __shared__ __align__(16) float ranks[MAX_RANK];
  __shared__ float warp_sums[THREADS / 32];
  const int row = blockIdx.y, column = (blockIdx.x * THREADS + threadIdx.x) * 4;
  const bool there = column < a.h;
  allow_next();
  const int own = a.adapters.of(row);
  const Adapter& adapter = a.adapters.guess(own, 0);
  RowsOfB<4> b;
  if (ADAPTERS > 0)
#pragma unroll
    for (int i = 0; i < 4; i++) b.load(adapter, i, column + i, there);
  const float4 weight = there ? __ldg((const float4*)(a.weight + column)) : make_float4(0.f, 0.f, 0.f, 0.f);
  wait_for_previous();
  Chunks<float4> update;
  update.load(a.parts, row, column, there);
  float value[4] = {0.f, 0.f, 0.f, 0.f};
  if (there) *(float4*)value = *(const float4*)(a.residual + (u64)row * a.h + column);
  if (ADAPTERS > 0) {
    Ranks t;
    t.load(a.ranks, row, adapter);
    t.store(a.ranks, row, adapter, ranks);
    __syncthreads();
  }
  const float4 added = update.sum(a.parts, row, column, there);
  value[0] += added.x; value[1] += added.y; value[2] += added.z; value[3] += added.w;
  if (ADAPTERS > 0 && own >= 0 && adapter.rank > 0 && there)
#pragma unroll
    for (int i = 0; i < 4; i++) value[i] += b.dot(adapter, i, column + i, ranks);
  if (there) {
    *(float4*)(a.residual + (u64)row * a.h + column) = *(float4*)value;
    *(uint2*)(a.out + (u64)row * a.h + column) =
        make_uint2(pack_bf16(value[0] * weight.x, value[1] * weight.y), pack_bf16(value[2] * weight.z, value[3] * weight.w));
  }
  float square = (value[0] * value[0] + value[1] * value[1]) + (value[2] * value[2] + value[3] * value[3]);
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) square += __shfl_xor_sync(ALL_LANES, square, d);
  if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = square;
  __syncthreads();
  if (threadIdx.x == 0) a.squares[blockIdx.x * a.m + row] = (warp_sums[0] + warp_sums[1]) + (warp_sums[2] + warp_sums[3]);
}

struct SwiGlu {
  Parts parts;            // gate's outputs, then up's
  Parts ranks;            // T of both
  u16* out;               // (m, width) bf16
  int width, m;
  Adapters<2> adapters;   // of gate and up
};

__device__ __forceinline__ float silu(float value) { return value / (1.f + __expf(-value)); }

extern "C" __global__ __launch_bounds__(THREADS) void swiglu(const __grid_constant__ SwiGlu a) {
  __shared__ __align__(16) float ranks[2][MAX_RANK];
  const int row = blockIdx.y, column = (blockIdx.x * THREADS + threadIdx.x) * 4;
  const bool there = column < a.width;
  allow_next();
  const int own = a.adapters.of(row);
  const Adapter &gate = a.adapters.guess(own, 0), &up = a.adapters.guess(own, 1);
  RowsOfB<4> b_gate, b_up;
  if (ADAPTERS > 0)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      b_gate.load(gate, i, column + i, there);
      b_up.load(up, i, column + i, there);
    }
  wait_for_previous();
  Chunks<float4> gates, ups;
  gates.load(a.parts, row, column, there);
  ups.load(a.parts, row, a.width + column, there);
  if (ADAPTERS > 0) {
    Ranks t_gate, t_up;
    t_gate.load(a.ranks, row, gate);
    t_up.load(a.ranks, row, up);
    t_gate.store(a.ranks, row, gate, ranks[0]);
    t_up.store(a.ranks, row, up, ranks[1]);
    __syncthreads();
  }
  if (!there) return;
  float g[4], u[4];
  *(float4*)g = gates.sum(a.parts, row, column, there);
  *(float4*)u = ups.sum(a.parts, row, a.width + column, there);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (ADAPTERS > 0 && own >= 0 && gate.rank > 0) g[i] += b_gate.dot(gate, i, column + i, ranks[0]);
    if (ADAPTERS > 0 && own >= 0 && up.rank > 0) u[i] += b_up.dot(up, i, column + i, ranks[1]);
    g[i] = silu(g[i]) * u[i];
  }
  *(uint2*)(a.out + (u64)row * a.width + column) = make_uint2(pack_bf16(g[0], g[1]), pack_bf16(g[2], g[3]));
}
