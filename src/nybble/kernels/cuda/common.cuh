// What the decoder's kernels share. NVRTC compiles them without any header, so the types stand here.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 ALL_LANES = 0xffffffffu;

// Programmatic dependent launch (compute capability 9.0): a kernel may start while the one before it still runs. Before
// `wait_for_previous` it may read only what no kernel of the same graph writes; every block calls it, so that order is transitive.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Two float32 as bf16, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float first, float second) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
__device__ __forceinline__ u16 to_bf16(float value) { return (u16)pack_bf16(value, 0.f); }
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// One adapter of one projection: y += scale * B t, where t = A x stands in `rank` columns of the product's T.
struct Adapter {
  const u16* b;  // (outputs, rank) bf16; rank is a multiple of 8, filled with zeros
  int column;
  int rank;
  float scale;
  int unused;
};

// The output of a product, (chunks, m, columns) float32: a sum over chunks in their order, so that two runs agree bit for bit.
struct Parts {
  const float* data;
  int chunks;
  int columns;
  u64 chunk_stride;
};
// The first four chunks are loaded by `load`, so that a thread has several loads under way before it waits for one.
template <typename T> struct Chunks {
  T own[4];
  __device__ __forceinline__ static T nothing();
  __device__ __forceinline__ static void add(T& total, const T& other);
  __device__ __forceinline__ void load(const Parts& parts, int row, int column, bool there) {
    const float* at = parts.data + (u64)row * parts.columns + column;
#pragma unroll
    for (int i = 0; i < 4; i++) own[i] = there && i < parts.chunks ? *(const T*)(at + i * parts.chunk_stride) : nothing();
  }
  // In the order of the chunks.
  __device__ __forceinline__ T sum(const Parts& parts, int row, int column, bool there) const {
    T total = own[0];
#pragma unroll
    for (int i = 1; i < 4; i++) add(total, own[i]);
    const float* at = parts.data + (u64)row * parts.columns + column;
    if (there)
#pragma unroll 4
      for (int i = 4; i < parts.chunks; i++) add(total, *(const T*)(at + i * parts.chunk_stride));
    return total;
  }
};
template <> __device__ __forceinline__ float Chunks<float>::nothing() { return 0.f; }
template <> __device__ __forceinline__ void Chunks<float>::add(float& total, const float& other) { total += other; }
template <> __device__ __forceinline__ float4 Chunks<float4>::nothing() { return make_float4(0.f, 0.f, 0.f, 0.f); }
template <> __device__ __forceinline__ void Chunks<float4>::add(float4& total, const float4& other) {
  total.x += other.x; total.y += other.y; total.z += other.z; total.w += other.w;
}

__device__ __forceinline__ float dot8(const uint4& pairs, const float* ranks) {
  const float4 low = *(const float4*)ranks, high = *(const float4*)(ranks + 4);
  return low_bf16(pairs.x) * low.x + high_bf16(pairs.x) * low.y + low_bf16(pairs.y) * low.z + high_bf16(pairs.y) * low.w +
         low_bf16(pairs.z) * high.x + high_bf16(pairs.z) * high.y + low_bf16(pairs.w) * high.z + high_bf16(pairs.w) * high.w;
}

constexpr int MAX_ADAPTERS = 16;
constexpr int MAX_RANK = 256;

// Adapters of PROJECTIONS projections, in the kernel's own argument. Compiled with ADAPTERS (0, 1, or 2 for several): of one it is
// known where B is before it is known which rows have it, so that no load waits for another.
template <int PROJECTIONS> struct Adapters {
  Adapter table[MAX_ADAPTERS * PROJECTIONS];
  const int* rows;  // (m,) each row's adapter, -1 for none
  u64 unused;
  // What a row has, -1 for none.
  __device__ __forceinline__ int of(int row) const { return ADAPTERS > 0 ? rows[row] : -1; }
  // The adapter whose B may be loaded; it counts only where the row has one.
  __device__ __forceinline__ const Adapter& guess(int own, int projection) const {
    return table[(ADAPTERS > 1 ? max(own, 0) : 0) * PROJECTIONS + projection];
  }
};

// Rows of B for OUTPUTS outputs of a thread: the first 16 ranks are loaded ahead.
constexpr int AHEAD = 16;
template <int OUTPUTS> struct RowsOfB {
  uint4 ahead[OUTPUTS][2];
  __device__ __forceinline__ void load(const Adapter& adapter, int i, int output, bool there) {
    const u16* b = adapter.b + (u64)output * adapter.rank;
    ahead[i][0] = there && adapter.rank > 0 ? __ldg((const uint4*)b) : make_uint4(0, 0, 0, 0);
    ahead[i][1] = there && adapter.rank > 8 ? __ldg((const uint4*)b + 1) : make_uint4(0, 0, 0, 0);
  }
  // One output of B t; `ranks` has zeros up to AHEAD.
  __device__ __forceinline__ float dot(const Adapter& adapter, int i, int output, const float* ranks) const {
    float total = dot8(ahead[i][0], ranks) + dot8(ahead[i][1], ranks + 8);
    const u16* b = adapter.b + (u64)output * adapter.rank;
#pragma unroll 4
    for (int r = AHEAD; r < adapter.rank; r += 8) total += dot8(__ldg((const uint4*)(b + r)), ranks + r);
    return total;
  }
};

// t of one adapter, scaled, in shared memory, with zeros up to AHEAD. Eight threads sum a rank's parts, which are four times as
// many as those of the rest of the output (product.cu); the first 32 are loaded by `load`.
struct Ranks {
  float own[4];
  __device__ __forceinline__ void load(const Parts& parts, int row, const Adapter& adapter, int first = 0) {
    const int r = first + threadIdx.x / 8, part = threadIdx.x % 8;
    const float* at = parts.data + (u64)row * parts.columns + adapter.column + r;
#pragma unroll
    for (int i = 0; i < 4; i++) own[i] = r < adapter.rank && part + 8 * i < parts.chunks ? at[(part + 8 * i) * parts.chunk_stride] : 0.f;
  }
  __device__ __forceinline__ void store(const Parts& parts, int row, const Adapter& adapter, float* ranks) {
    for (int first = 0; first < max(adapter.rank, AHEAD); first += blockDim.x / 8) {
      if (first > 0) load(parts, row, adapter, first);
      float total = (own[0] + own[1]) + (own[2] + own[3]);
      const int r = first + threadIdx.x / 8;
      if (r < adapter.rank)
        for (int part = 32 + threadIdx.x % 8; part < parts.chunks; part += 8)
          total += parts.data[part * parts.chunk_stride + (u64)row * parts.columns + adapter.column + r];
#pragma unroll
      for (int d = 1; d < 8; d <<= 1) total += __shfl_xor_sync(ALL_LANES, total, d);
      if (threadIdx.x % 8 == 0) ranks[r] = adapter.scale * total;
    }
  }
};
