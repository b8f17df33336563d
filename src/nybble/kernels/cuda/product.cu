// y = x W^T for 1 to 64 rows of x: W in NF4 as bitsandbytes holds it, below it rows in bf16 (the adapters' A).
//
// Tensor cores even for one row: mma.m16n8k16 takes 16 rows of W (a slab) as A and up to 8 rows of x as B. A quantisation block of 64
// is four mma, whose float32 result is scaled afterwards, so that scales stay in float32 and only the 16 values of NF4 are rounded.
// A byte of two codes becomes two bf16 by one look-up in a table with a copy for each lane (32 KB, no bank conflicts).
// Each warp has KI blocks of K and a ring of ST stages of its own in shared memory, filled by cp.async in whole lines of 128 bytes;
// 16-byte units are swapped by row (XOR), so that reading them meets no bank conflict. Warps meet only to sum a slab, in their order.
//
// Compiled with NT (tiles of 8 rows of x), KI (2 or 4), WARPS, MIN_BLOCKS (resident on a multiprocessor), STAGES, WEIGHTS (1 to 3),
// NESTED (whether scales are quantised themselves) and EXACT (whether slabs and warps divide all shapes).

constexpr int THREADS = WARPS * 32;
constexpr int SLAB_OUTPUTS = 128 * NT;
constexpr int SPLIT = THREADS >= 4 * SLAB_OUTPUTS ? 4 : (THREADS >= 2 * SLAB_OUTPUTS ? 2 : 1);
constexpr int PER_WARP = 32 / SPLIT;
constexpr int SUM_STRIDE = SLAB_OUTPUTS + PER_WARP;
constexpr int STAGE_WORDS = KI * 128;

struct Weight {  // one projection of those that share x
  const u8* codes;
  const u8* scales;         // one byte a block where they are quantised themselves, else float32
  const float* scales2;     // of 256 scales each
  const float* offset;      // of all scales
  int rows;
  int first_slab;
  int column;               // of its first output
  int unused;
};
struct Product {
  Weight weights[3];
  const float* code;        // 16 values
  const float* code2;       // 256 values of a scale's byte; null where scales are float32
  const u16* below;         // (16 * below_slabs, K) bf16
  const u16* x;             // (m, K) bf16
  const float* squares;     // (square_parts, m), sums of squares whose root divides the result; null for none
  float* y;                 // (chunks, m, columns)
  float* t;                 // (chunks * KI, m, 16 * below_slabs)
  u64 chunk_stride;
  int quantised_slabs, below_slabs;
  int m, blocks, chunks, chunk_blocks, columns, square_parts;
  float eps;
  int unused;
};

__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool there) {
  if constexpr (EXACT) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
  } else {
    const int bytes = there ? 16 : 0;  // what is not there becomes zeros
    asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  }
}
// Eight codes to four pairs of bf16.
__device__ __forceinline__ void decode(const u32* table, u32 lane4, u32 codes, u32* pairs) {
  const char* own = (const char*)table;
  pairs[0] = *(const u32*)(own + (((codes << 7) & 0x7f80u) | lane4));
  pairs[1] = *(const u32*)(own + (((codes >> 1) & 0x7f80u) | lane4));
  pairs[2] = *(const u32*)(own + (((codes >> 9) & 0x7f80u) | lane4));
  pairs[3] = *(const u32*)(own + (((codes >> 17) & 0x7f80u) | lane4));
}

extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS) void product(const __grid_constant__ Product a) {
  extern __shared__ __align__(128) u32 shared[];
  u32* table = shared;                                     // 256 x 32
  u32* rings = table + 8192;                               // WARPS x STAGES x STAGE_WORDS
  float* code2 = (float*)(rings + WARPS * STAGES * STAGE_WORDS);  // 256
  float* sums = code2 + 256;                               // 2 x WARPS x SUM_STRIDE
  float* row_scale = sums + 2 * WARPS * SUM_STRIDE;        // 8 x NT
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const u32 lane4 = lane * 4;
  const int chunk = blockIdx.x % a.chunks, stride = gridDim.x / a.chunks, first = blockIdx.x / a.chunks;
  const int chunk_start = chunk * a.chunk_blocks, chunk_end = min(a.blocks, chunk_start + a.chunk_blocks);
  const int start = chunk_start + warp * KI;               // this warp's first block of K
  const bool has_work = start < chunk_end;
  u32* ring = rings + warp * STAGES * STAGE_WORDS;
  const u32 ring_address = (u32)__cvta_generic_to_shared(ring);

  auto weight_of = [&](int slab) -> const Weight& {
    const int w = (WEIGHTS > 1 && slab >= a.weights[1].first_slab) + (WEIGHTS > 2 && slab >= a.weights[2].first_slab);
    return a.weights[w];
  };
  // A warp copies 32 units of 16 bytes at once: LINES rows, of which this lane has a half of one block.
  constexpr int LINES = 16 / KI;
  const int line = lane / (2 * KI), block = lane % (2 * KI) / 2, half = lane & 1;
  const int swapped_block = KI == 4 ? block ^ (line & 3) : block ^ ((line >> 1) & 1);
  const u32 row_bytes = a.blocks * 32, unit_offset = (start + block) * 32 + half * 16;
  const u32 unit_target = line * KI * 32 + swapped_block * 32 + half * 16;
  auto fetch = [&](int slab, int stage) {
    if (has_work && slab < a.quantised_slabs) {
      const Weight& weight = weight_of(slab);
      const int first_row = (slab - weight.first_slab) * 16;
      const u8* from = weight.codes + (u64)(first_row + line) * row_bytes + unit_offset;
#pragma unroll
      for (int q = 0; q < KI; q++) {
        const bool there = EXACT || (first_row + q * LINES + line < weight.rows && start + block < a.blocks);
        copy_async(ring_address + stage * STAGE_WORDS * 4 + unit_target + q * LINES * KI * 32,
                   there ? from + q * LINES * row_bytes : weight.codes, there);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  // Scales of the row `lane & 15` and of two blocks: the first two for lanes below 16, of KI = 4 the others for those above.
  u32 scale_bytes = 0;
  float scale[2] = {0.f, 0.f}, offset = 0.f;
  auto load_scales = [&](int slab) {
    if (!has_work || slab >= a.quantised_slabs) return;
    const Weight& weight = weight_of(slab);
    const int wanted = (slab - weight.first_slab) * 16 + (lane & 15), row = EXACT ? wanted : min(wanted, weight.rows - 1);
    const int left = start + (KI == 4 ? (lane >> 4) * 2 : 0);
    const u64 at = (u64)row * a.blocks + (EXACT ? left : min(left, a.blocks - 1));
    const u64 next = EXACT ? at + 1 : (u64)row * a.blocks + min(left + 1, a.blocks - 1);
    if (!NESTED) {
      scale[0] = __ldg((const float*)weight.scales + at);
      scale[1] = __ldg((const float*)weight.scales + next);
      return;
    }
    offset = __ldg(weight.offset);
    if (EXACT || (a.blocks & 1) == 0) {  // two blocks are neighbours, and of one scale of scales
      scale_bytes = __ldg((const u16*)(weight.scales + (EXACT ? at : at & ~1ull)));
      scale[0] = scale[1] = __ldg(weight.scales2 + (at >> 8));
    } else {
      scale_bytes = (u32)__ldg(weight.scales + at) | (u32)__ldg(weight.scales + next) << 8;
      scale[0] = __ldg(weight.scales2 + (at >> 8));
      scale[1] = __ldg(weight.scales2 + (next >> 8));
    }
  };

  // A slab of the rows below is four times as many bytes, so it is cut into KI units: one block of K for each warp, and a part of
  // T of its own. They go to the blocks that have fewest slabs of the weights; the first is loaded before the wait.
  uint4 below[4];
  int unit = stride - 1 - first;
  auto load_below = [&]() {
    const int at = start + unit % KI;
    const bool there = has_work && at < chunk_end;
    const u16* upper = a.below + ((u64)(unit / KI * 16 + g) * a.blocks + at) * 64 + t * 16;
    const u16* lower = upper + (u64)8 * a.blocks * 64;
#pragma unroll
    for (int q = 0; q < 2; q++) {
      below[q] = there ? __ldg((const uint4*)upper + q) : make_uint4(0, 0, 0, 0);
      below[2 + q] = there ? __ldg((const uint4*)lower + q) : make_uint4(0, 0, 0, 0);
    }
  };

  allow_next();
  if (unit < a.below_slabs * KI) load_below();
#pragma unroll
  for (int s = 0; s < STAGES; s++) fetch(first + s * stride, s);
  load_scales(first);
  for (int e = thread; e < 2048; e += THREADS) {
    const int byte = e >> 3;
    const u32 pair = pack_bf16(__ldg(a.code + (byte >> 4)), __ldg(a.code + (byte & 15)));
    *(uint4*)(table + e * 4) = make_uint4(pair, pair, pair, pair);
  }
  if (NESTED)
    for (int e = thread; e < 256; e += THREADS) code2[e] = __ldg(a.code2 + e);
  wait_for_previous();

  u32 x[NT][KI][8];
#pragma unroll
  for (int j = 0; j < NT; j++) {
#pragma unroll
    for (int i = 0; i < KI; i++) {
      const int row = j * 8 + g;
      uint4 low = make_uint4(0, 0, 0, 0), high = low;
      if (row < a.m && has_work && start + i < chunk_end) {
        const uint4* from = (const uint4*)(a.x + ((u64)row * a.blocks + start + i) * 64 + t * 16);
        low = from[0];
        high = from[1];
      }
      x[j][i][0] = low.x; x[j][i][1] = low.y; x[j][i][2] = low.z; x[j][i][3] = low.w;
      x[j][i][4] = high.x; x[j][i][5] = high.y; x[j][i][6] = high.z; x[j][i][7] = high.w;
    }
  }
  for (int n = thread; n < 8 * NT; n += THREADS) {
    float total = 0.f;
    if (n < a.m && a.squares != nullptr)
      for (int p = 0; p < a.square_parts; p++) total += a.squares[p * a.m + n];
    row_scale[n] = a.squares == nullptr ? 1.f : rsqrtf(total / (a.blocks * 64) + a.eps);
  }
  __syncthreads();

  float* y = a.y + chunk * a.chunk_stride;
  int turn = 0;
  // The warps' parts of a slab, summed in their order.
  auto finish = [&](const float (&acc)[NT][4], float* to, int columns, int first_row, int rows, int column) {
    float* own_sums = sums + turn * WARPS * SUM_STRIDE;
#pragma unroll
    for (int j = 0; j < NT; j++)
      *(float4*)(own_sums + warp * SUM_STRIDE + j * 128 + lane * 4) = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
    __syncthreads();
#pragma unroll
    for (int base = 0; base < SLAB_OUTPUTS; base += WARPS * PER_WARP) {
      if (base + warp * PER_WARP < SLAB_OUTPUTS) {
        const int output = base + warp * PER_WARP + lane % PER_WARP, part = lane / PER_WARP;
        float value = 0.f;
#pragma unroll
        for (int k = 0; k < (WARPS + SPLIT - 1) / SPLIT; k++)
          if (part + k * SPLIT < WARPS) value += own_sums[(part + k * SPLIT) * SUM_STRIDE + output];
#pragma unroll
        for (int d = PER_WARP; d < 32; d <<= 1) value += __shfl_xor_sync(ALL_LANES, value, d);
        const int from = (output & 127) >> 2, c = output & 3;
        const int row = first_row + (from >> 2) + (c >> 1) * 8, n = (output >> 7) * 8 + (from & 3) * 2 + (c & 1);
        if (part == 0 && n < a.m && row < rows)
          to[(u64)n * columns + column + row] = value * row_scale[n];
      }
    }
    turn ^= 1;
  };

  for (; unit < a.below_slabs * KI; unit += stride) {
    if (unit >= stride) load_below();
    float acc[NT][4];
    const u32 *wa = (const u32*)below, *wb = wa + 8;
#pragma unroll
    for (int j = 0; j < NT; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
#pragma unroll
    for (int i = 0; i < KI; i++)
      if (i == unit % KI)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int q = 0; q < 4; q++)
            mma(acc[j], wa[2 * q], wb[2 * q], wa[2 * q + 1], wb[2 * q + 1], x[j][i][2 * q], x[j][i][2 * q + 1]);
    const int columns = a.below_slabs * 16;
    finish(acc, a.t + (u64)(chunk * KI + unit % KI) * a.m * columns, columns, unit / KI * 16, columns, 0);
  }

  int stage = 0;
  for (int slab = first; slab < a.quantised_slabs; slab += stride, stage = stage + 1 == STAGES ? 0 : stage + 1) {
    float own_scale[2] = {scale[0], scale[1]};
    if (NESTED) {
      const u32 own_bytes = scale_bytes;
#pragma unroll
      for (int q = 0; q < 2; q++) own_scale[q] = __fadd_rn(__fmul_rn(code2[(own_bytes >> (8 * q)) & 255], scale[q]), offset);
    }
    load_scales(slab + stride);
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
    float acc[NT][4];
#pragma unroll
    for (int j = 0; j < NT; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
    if (has_work) {
      const char* staged = (const char*)(ring + stage * STAGE_WORDS);
#pragma unroll
      for (int i = 0; i < KI; i++) {
        const int swapped = KI == 4 ? i ^ (g & 3) : i ^ ((g >> 1) & 1);
        const uint2 upper = *(const uint2*)(staged + g * KI * 32 + swapped * 32 + t * 8);
        const uint2 lower = *(const uint2*)(staged + (g + 8) * KI * 32 + swapped * 32 + t * 8);
        const int holder = KI == 4 ? (i >> 1) * 16 + g : g;
        const float upper_scale = __shfl_sync(ALL_LANES, own_scale[i & 1], holder);
        const float lower_scale = __shfl_sync(ALL_LANES, own_scale[i & 1], holder + 8);
        u32 wa[8], wb[8];
        decode(table, lane4, upper.x, wa);
        decode(table, lane4, upper.y, wa + 4);
        decode(table, lane4, lower.x, wb);
        decode(table, lane4, lower.y, wb + 4);
#pragma unroll
        for (int j = 0; j < NT; j++) {
          float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
          for (int q = 0; q < 4; q++) mma(c, wa[2 * q], wb[2 * q], wa[2 * q + 1], wb[2 * q + 1], x[j][i][2 * q], x[j][i][2 * q + 1]);
          acc[j][0] += upper_scale * c[0]; acc[j][1] += upper_scale * c[1];
          acc[j][2] += lower_scale * c[2]; acc[j][3] += lower_scale * c[3];
        }
      }
    }
    __syncwarp();
    fetch(slab + STAGES * stride, stage);
    const Weight& weight = weight_of(slab);
    finish(acc, y, a.columns, (slab - weight.first_slab) * 16, weight.rows, weight.column);
  }
}
