// One token for each row: rotate q and k, append k and v to the cache, attend over the row's pages; the last block of a head merges.
//
// A block attends with the GROUP query heads of one key-value head to one share of the pages, so keys and values are read once
// for the group. Pages of 64 tokens: each warp takes 16 positions of a page, LANES lanes to a position, WIDTH numbers to a lane.
// Shares are merged in their order: two runs of one batch give the same bits. How many there are depends on the number of rows.
//
// Where several rows are tokens of one sequence, each must see those before it: `append` stores all keys and values first, and
// `attention`, compiled with APPENDED, finds its own among them.
//
// Compiled with HEAD (size of a head, a multiple of 16), GROUP (query heads of a block) and SUBGROUPS (blocks that share a
// key-value head: more than four query heads do not fit into a thread's registers), APPENDED, ADAPTERS (common.cuh) and FP8
// (whether the cache is in e4m3, which cards before 8.9 have no instructions for: bits are moved instead).

constexpr int PAGE = 64;
constexpr int THREADS = 128, WARPS = 4;
constexpr int WIDTH = HEAD <= 64 && HEAD % 8 == 0 && (HEAD & (HEAD - 1)) == 0 ? HEAD / 8 : 16;
constexpr int LANES = HEAD / WIDTH <= 8 ? 8 : 16;
constexpr int AT_ONCE = 32 / LANES;       // positions of a warp's load
constexpr int TURNS = PAGE / WARPS / AT_ONCE;
constexpr int UNITS = WIDTH / 8;          // 16-byte loads of a lane
constexpr int HALF = HEAD / 2;
constexpr float NEVER = -1e30f;

#if FP8
typedef u8 Cached;
typedef uint2 Unit;  // eight numbers
#else
typedef u16 Cached;
typedef uint4 Unit;
#endif

// As the cache holds a number: bf16, or e4m3 rounded to nearest even and cut off at 448.
__device__ __forceinline__ Cached to_cached(float value) {
#if FP8
  const u32 sign = __float_as_uint(value) >> 24 & 0x80u;
  const float size = fminf(fabsf(value), 448.f);
  if (!(size >= 0.015625f)) return (u8)(sign | (u32)rintf(size * 512.f));  // below 2^-6 in steps of 2^-9
  const u32 bits = __float_as_uint(size);
  return (u8)(sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3)));
#else
  return to_bf16(value);
#endif
}
// Eight numbers as four pairs of bf16, the first in the low half.
__device__ __forceinline__ void to_pairs(const Unit& unit, u32* pairs) {
#if FP8
  const u32 words[2] = {unit.x, unit.y};
#pragma unroll
  for (int w = 0; w < 2; w++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 spread = __byte_perm(words[w], 0, half ? 0x4342 : 0x4140);  // a byte in each half of a word
      const u32 tiny = (spread & 0x00800080u) << 8 | (spread & 0x007f007fu) << 4;  // the number times 2^-120
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pairs[2 * w + half]) : "r"(tiny), "r"(0x7b807b80u), "r"(0x80008000u));
    }
#else
  pairs[0] = unit.x; pairs[1] = unit.y; pairs[2] = unit.z; pairs[3] = unit.w;
#endif
}

struct Attention {
  Parts parts;              // q, k, v of the product
  Parts ranks;              // T of all three
  const int* positions;     // (m,) of the token; -1 for a row that stands idle
  const int* pages;         // (m, max_pages)
  Cached* keys;             // (pages, kv_heads, 64, HEAD)
  Cached* values;
  const float* cosine;      // (positions, HEAD / 2)
  const float* sine;
  u16* out;                 // (m, heads * HEAD) bf16
  float* partial;           // (m, heads, shares, HEAD + 2): sums, their maximum, their total
  int* counts;              // (m, kv_heads * SUBGROUPS), zero between launches
  int max_pages, kv_heads;
  float scale;              // of the scores, times log2(e)
  int unused;
  Adapters<3> adapters;     // of q, k and v
};

__device__ __forceinline__ float power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rotate k, and append k and v to the cache: one block for each row and key-value head.
extern "C" __global__ __launch_bounds__(THREADS) void append(const __grid_constant__ Attention a) {
  __shared__ __align__(16) float ranks[2][MAX_RANK];
  __shared__ float raw[2 * HEAD];
  const int kv_head = blockIdx.x, row = blockIdx.y, thread = threadIdx.x;
  const int first = a.kv_heads * SUBGROUPS * GROUP * HEAD;  // column of k
  allow_next();
  const int own = a.adapters.of(row);
  const int position = a.positions[row];
  wait_for_previous();
  if (position < 0) return;
  if (ADAPTERS > 0) {
    Ranks t[2];
#pragma unroll
    for (int p = 0; p < 2; p++) t[p].load(a.ranks, row, a.adapters.guess(own, p + 1));
#pragma unroll
    for (int p = 0; p < 2; p++) t[p].store(a.ranks, row, a.adapters.guess(own, p + 1), ranks[p]);
    __syncthreads();
  }
  for (int e = thread; e < 2 * HEAD; e += THREADS) {
    const int which = e / HEAD, output = kv_head * HEAD + e % HEAD, column = first + which * a.kv_heads * HEAD + output;
    Chunks<float> chunks;
    chunks.load(a.parts, row, column, true);
    float number = chunks.sum(a.parts, row, column, true);
    const Adapter& adapter = a.adapters.guess(own, which + 1);
    RowsOfB<1> b;
    if (ADAPTERS > 0 && own >= 0 && adapter.rank > 0) {
      b.load(adapter, 0, output, true);
      number += b.dot(adapter, 0, output, ranks[which]);
    }
    raw[e] = number;
  }
  __syncthreads();
  const int page = a.pages[row * a.max_pages + position / PAGE];
  const u64 at = (((u64)page * a.kv_heads + kv_head) * PAGE + position % PAGE) * HEAD;
  for (int d = thread; d < HEAD; d += THREADS) {
    const u64 pair = (u64)position * HALF + (d < HALF ? d : d - HALF);
    const float c = __ldg(a.cosine + pair), s = __ldg(a.sine + pair);
    a.keys[at + d] = to_cached(d < HALF ? raw[d] * c - raw[d + HALF] * s : raw[d] * c + raw[d - HALF] * s);
    a.values[at + d] = to_cached(raw[HEAD + d]);
  }
}

extern "C" __global__ __launch_bounds__(THREADS, GROUP == 1 && HEAD <= 128 ? 4 : 1) void attention(const __grid_constant__ Attention a) {
  __shared__ __align__(16) float ranks[3][MAX_RANK];
  __shared__ __align__(16) float raw[(GROUP + 2) * HEAD];   // q heads, k, v before rotation
  __shared__ __align__(16) float query[GROUP * HEAD];
  __shared__ float cosine[HALF], sine[HALF];
  __shared__ __align__(16) Cached new_key[HEAD], new_value[HEAD];
  __shared__ float warp_out[WARPS][HEAD], warp_max[WARPS][GROUP], warp_sum[WARPS][GROUP];
  __shared__ bool is_last;
  const int share = blockIdx.x, shares = gridDim.x, kv_head = blockIdx.y / SUBGROUPS, row = blockIdx.z;
  const int first_head = blockIdx.y * GROUP, heads = a.kv_heads * SUBGROUPS * GROUP;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int from = (lane % LANES) * WIDTH, which = lane / LANES;
  const bool in_head = from < HEAD;
  allow_next();
  const int own = a.adapters.of(row);
  const int position = a.positions[row];
  const int used = position < 0 ? 0 : position / PAGE + 1;
  const int per_share = (used + shares - 1) / shares;
  const int active = per_share > 0 ? (used + per_share - 1) / per_share : 0;
  if (share >= active) {
    wait_for_previous();
    return;
  }
  const int first = share * per_share, end = min(used, first + per_share);
  const bool is_owner = !APPENDED && end == used;

  Unit key[TURNS][UNITS], value[TURNS][UNITS];
  auto load = [&](int page) {
    const u64 base = ((u64)a.pages[row * a.max_pages + page] * a.kv_heads + kv_head) * PAGE * HEAD + from;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int slot = warp * (PAGE / WARPS) + i * AT_ONCE + which;
      const bool there = in_head && page * PAGE + slot < position + APPENDED;
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        key[i][u] = there ? *(const Unit*)(a.keys + base + slot * HEAD + u * 8) : Unit();
        value[i][u] = there ? *(const Unit*)(a.values + base + slot * HEAD + u * 8) : Unit();
      }
    }
  };
  if (!APPENDED) load(first);  // what this step appends is not among it
  constexpr int ITEMS = ((GROUP + 2) * HEAD + THREADS - 1) / THREADS;  // outputs of a thread: q of the group, k, v
  const int needed = (is_owner ? GROUP + 2 : GROUP) * HEAD;            // k and v only where the new token's page is here
  RowsOfB<ITEMS> b;
  auto kind_of = [&](int e) { return e < GROUP * HEAD ? 0 : (e < (GROUP + 1) * HEAD ? 1 : 2); };
  auto output_of = [&](int e) { return e < GROUP * HEAD ? first_head * HEAD + e : kv_head * HEAD + e % HEAD; };
  if (ADAPTERS > 0)
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int e = thread + i * THREADS;
      b.load(a.adapters.guess(own, kind_of(e)), i, output_of(e), e < needed);
    }
  for (int pair = thread; pair < HALF; pair += THREADS) {
    cosine[pair] = __ldg(a.cosine + (u64)position * HALF + pair);
    sine[pair] = __ldg(a.sine + (u64)position * HALF + pair);
  }
  wait_for_previous();
  if (APPENDED) load(first);

  Chunks<float> chunks[ITEMS];
  auto column_of = [&](int e) { return output_of(e) + (kind_of(e) == 0 ? 0 : (heads + (kind_of(e) - 1) * a.kv_heads) * HEAD); };
#pragma unroll
  for (int i = 0; i < ITEMS; i++) chunks[i].load(a.parts, row, column_of(thread + i * THREADS), thread + i * THREADS < needed);
  if (ADAPTERS > 0) {
    Ranks t[3];
#pragma unroll
    for (int p = 0; p < 3; p++) t[p].load(a.ranks, row, a.adapters.guess(own, p));
#pragma unroll
    for (int p = 0; p < 3; p++) t[p].store(a.ranks, row, a.adapters.guess(own, p), ranks[p]);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int e = thread + i * THREADS;
    if (e < needed) {
      float number = chunks[i].sum(a.parts, row, column_of(e), true);
      const Adapter& adapter = a.adapters.guess(own, kind_of(e));
      if (ADAPTERS > 0 && own >= 0 && adapter.rank > 0) number += b.dot(adapter, i, output_of(e), ranks[kind_of(e)]);
      raw[e] = number;
    }
  }
  __syncthreads();
  for (int e = thread; e < (is_owner ? GROUP + 1 : GROUP) * HEAD; e += THREADS) {
    const int d = e % HEAD, pair = d < HALF ? d : d - HALF;
    const float c = cosine[pair], s = sine[pair];
    const float rotated = d < HALF ? raw[e] * c - raw[e + HALF] * s : raw[e] * c + raw[e - HALF] * s;
    if (e < GROUP * HEAD) query[e] = rotated * a.scale;
    else new_key[d] = to_cached(rotated);
  }
  if (is_owner)
    for (int d = thread; d < HEAD; d += THREADS) new_value[d] = to_cached(raw[(GROUP + 1) * HEAD + d]);
  __syncthreads();
  if (is_owner && blockIdx.y % SUBGROUPS == 0) {
    const u64 at = (((u64)a.pages[row * a.max_pages + used - 1] * a.kv_heads + kv_head) * PAGE + position % PAGE) * HEAD;
    for (int d = thread; d < HEAD; d += THREADS) {
      a.keys[at + d] = new_key[d];
      a.values[at + d] = new_value[d];
    }
  }

  float out[GROUP][WIDTH], maximum[GROUP], total[GROUP];
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    maximum[h] = NEVER;
    total[h] = 0.f;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) out[h][e] = 0.f;
  }
  for (int page = first; page < end; page++) {
    if (page > first) load(page);
    bool seen[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int at = page * PAGE + warp * (PAGE / WARPS) + i * AT_ONCE + which;
      seen[i] = at <= position;
      if (!APPENDED && at == position && in_head)
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
          key[i][u] = *(const Unit*)(new_key + from + u * 8);
          value[i][u] = *(const Unit*)(new_value + from + u * 8);
        }
    }
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
      float q[WIDTH];
#pragma unroll
      for (int e = 0; e < WIDTH; e += 4) *(float4*)(q + e) = in_head ? *(const float4*)(query + h * HEAD + from + e) : make_float4(0, 0, 0, 0);
      float score[TURNS], highest = maximum[h];
#pragma unroll
      for (int i = 0; i < TURNS; i++) {
        u32 pairs[WIDTH / 2];
#pragma unroll
        for (int u = 0; u < UNITS; u++) to_pairs(key[i][u], pairs + 4 * u);
        float dot = 0.f;
#pragma unroll
        for (int e = 0; e < WIDTH / 2; e++) dot += q[2 * e] * low_bf16(pairs[e]) + q[2 * e + 1] * high_bf16(pairs[e]);
#pragma unroll
        for (int d = 1; d < LANES; d <<= 1) dot += __shfl_xor_sync(ALL_LANES, dot, d);
        score[i] = seen[i] ? dot : NEVER;
        highest = fmaxf(highest, score[i]);
      }
#pragma unroll
      for (int d = LANES; d < 32; d <<= 1) highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, d));
      const float shrink = power2(maximum[h] - highest);
      maximum[h] = highest;
      total[h] *= shrink;
#pragma unroll
      for (int e = 0; e < WIDTH; e++) out[h][e] *= shrink;
#pragma unroll
      for (int i = 0; i < TURNS; i++) {
        const float weight = seen[i] ? power2(score[i] - highest) : 0.f;
        u32 pairs[WIDTH / 2];
#pragma unroll
        for (int u = 0; u < UNITS; u++) to_pairs(value[i][u], pairs + 4 * u);
        total[h] += weight;
#pragma unroll
        for (int e = 0; e < WIDTH / 2; e++) {
          out[h][2 * e] += weight * low_bf16(pairs[e]);
          out[h][2 * e + 1] += weight * high_bf16(pairs[e]);
        }
      }
    }
  }

  // Positions of a warp, then the warps, then the shares.
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
#pragma unroll
    for (int d = LANES; d < 32; d <<= 1) {
      total[h] += __shfl_xor_sync(ALL_LANES, total[h], d);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) out[h][e] += __shfl_xor_sync(ALL_LANES, out[h][e], d);
    }
    if (lane == 0) {
      warp_max[warp][h] = maximum[h];
      warp_sum[warp][h] = total[h];
    }
  }
  const u64 head = (u64)row * heads + first_head;
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    __syncthreads();
    if (which == 0 && in_head)
#pragma unroll
      for (int e = 0; e < WIDTH; e++) warp_out[warp][from + e] = out[h][e];
    __syncthreads();
    float highest = NEVER, sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, warp_max[w][h]);
    float shrink[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      shrink[w] = power2(warp_max[w][h] - highest);
      sum += shrink[w] * warp_sum[w][h];
    }
    for (int d = thread; d < HEAD; d += THREADS) {
      float merged = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) merged += shrink[w] * warp_out[w][d];
      if (active == 1) a.out[(head + h) * HEAD + d] = to_bf16(merged / sum);
      else a.partial[((head + h) * shares + share) * (HEAD + 2) + d] = merged;
    }
    if (active > 1 && thread == 0) {
      a.partial[((head + h) * shares + share) * (HEAD + 2) + HEAD] = highest;
      a.partial[((head + h) * shares + share) * (HEAD + 2) + HEAD + 1] = sum;
    }
  }
  if (active == 1) return;
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    is_last = atomicAdd(a.counts + row * gridDim.y + blockIdx.y, 1) == active - 1;
    if (is_last) a.counts[row * gridDim.y + blockIdx.y] = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int h = 0; h < GROUP; h++) {
    const volatile float* own = a.partial + (head + h) * shares * (HEAD + 2);
    float highest = NEVER, sum = 0.f;
    for (int s = 0; s < active; s++) highest = fmaxf(highest, own[s * (HEAD + 2) + HEAD]);
    for (int s = 0; s < active; s++) sum += power2(own[s * (HEAD + 2) + HEAD] - highest) * own[s * (HEAD + 2) + HEAD + 1];
    for (int d = thread; d < HEAD; d += THREADS) {
      float merged = 0.f;
      for (int s = 0; s < active; s++) merged += power2(own[s * (HEAD + 2) + HEAD] - highest) * own[s * (HEAD + 2) + d];
      a.out[(head + h) * HEAD + d] = to_bf16(merged / sum);
    }
  }
}
