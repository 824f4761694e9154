// Store: new tokens' keys and values into their pages. A CTA takes one side of one head of as many tokens as it has warps. Keys
// under a basis are turned by all warps together, which loads the head's matrix once; then each warp encodes one token.

// Strides are in elements of the tensor; `vllm_turboquant.kernels.cuda.store` mirrors this struct.
struct Params {
  const u16 *key, *value;
  const i64 *slots;
  const i64 *positions;
  const int *key_offsets, *value_offsets;  // of a plane's words, [16 tokens][words], from PlaneLayout::OFFSETS on
  const int *key_scalars, *value_scalars;  // [16 tokens][scale groups]
  u8 *cache;
  u64 key_token, key_head, value_token, value_head, cache_block, cache_head;
  int tokens, kv_heads;
#if KEY_BASIS
  const float *matrix;                    // [KV heads][D][D], the basis's `forward`
  const float *means;                     // [KV heads][buckets][D]
  const float *offset, *normal, *middle;  // [KV heads][D]
  u32 bucket;                             // of `bucket_of`
  int buckets;
#endif
};

#define TURNED_ROW (D + 4)  // so that lanes of neighbouring tokens meet no bank of each other's

static_assert(SHARED_BYTES == WARPS * (4 * TURNED_ROW + D), "the launcher reserves what the kernel uses");

// The lane's dims of a row, brought down by PRESCALE, which is exact.
DEVICE void load_dims(const u16 *row, float *x, int lane) {
  u32 words[LANE_DIMS / 2];
  const u8 *source = (const u8 *)(row + lane * LANE_DIMS);
  if (LANE_DIMS == 2) load_page_32(source, words);
  if (LANE_DIMS == 4) load_page_64(source, words);
  if (LANE_DIMS == 8) load_page_128(source, words);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) x[i] = input_to_float((u16)(words[i / 2] >> i % 2 * 16)) * PRESCALE;
}

#if KEY_BASIS
// x = big + small, each of 11 bits, up to 2^-22 of x.
DEVICE void split(float x, u32 &big, u32 &small) {
  big = float_to_bits(x) + 0x1000u & 0xFFFFE000u;
  small = float_to_bits(x - bits_to_float(big));
}

// PRESCALE * matrix (x - mean) of the CTA's tokens to `turned` [WARPS][TURNED_ROW]: fp32's products, but for their last bits, out
// of three of tensor cores. Lane (g, t) brings dims 16 i + 4 t .. 16 i + 4 t + 3 of token g, and of rows g and g + 8 of a tile of 16.
DEVICE void turn_keys(const float *matrix, const u16 *row, const float *mean, float *turned, int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float x[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    u32 words[2] = {0, 0};
    float m[4] = {0, 0, 0, 0};
    if (row) {
      load_page_64((const u8 *)(row + 16 * i + 4 * t), words);
      load_page_128((const u8 *)(mean + 16 * i + 4 * t), (u32 *)m);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) x[i][e] = (input_to_float((u16)(words[e / 2] >> e % 2 * 16)) - m[e]) * PRESCALE;
  }
#pragma unroll 1
  for (int tile = warp; tile < D / 16; tile += WARPS) {
    float y[3][4];
#pragma unroll
    for (int j = 0; j < 3; j++) y[j][0] = y[j][1] = y[j][2] = y[j][3] = 0;
    const float *rows = matrix + (u64)(tile * 16 + g) * D + 4 * t;
#pragma unroll
    for (int first = 0; first < D / 16; first += AHEAD) {
      u32 upper[AHEAD][4], lower[AHEAD][4];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        load_page_128((const u8 *)(rows + 16 * (first + i)), upper[i]);
        load_page_128((const u8 *)(rows + 8 * D + 16 * (first + i)), lower[i]);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          u32 big[6], small[6];
          split(bits_to_float(upper[i][e]), big[0], small[0]);
          split(bits_to_float(lower[i][e]), big[1], small[1]);
          split(bits_to_float(upper[i][e + 1]), big[2], small[2]);
          split(bits_to_float(lower[i][e + 1]), big[3], small[3]);
          split(x[first + i][e], big[4], small[4]);
          split(x[first + i][e + 1], big[5], small[5]);
          mma_tf32(y[0], big[0], big[1], big[2], big[3], big[4], big[5]);
          mma_tf32(y[1], big[0], big[1], big[2], big[3], small[4], small[5]);
          mma_tf32(y[2], small[0], small[1], small[2], small[3], big[4], big[5]);
        }
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
      turned[(2 * t + e % 2) * TURNED_ROW + tile * 16 + g + 8 * (e / 2)] = y[0][e] + (y[1][e] + y[2][e]);
  }
}

// 0 for tokens that are not stored, whose positions may be anything.
DEVICE int position_bucket(const Params &p, int token) {
  if (p.buckets == 1 || token >= p.tokens || p.slots[token] < 0) return 0;
  return bucket_of((u32)(p.positions[token] >> 4), p.bucket, p.buckets);
}

// Whether the token of the warp's row is nearer to the second mean than to the first bucket's.
DEVICE bool beyond(const u16 *row, const float *normal, const float *middle, int lane) {
  float x[LANE_DIMS], sum = 0;
  load_dims(row, x, lane);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) {
    const int dim = lane * LANE_DIMS + i;
    sum += (x[i] - middle[dim] * PRESCALE) * normal[dim];
  }
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) sum += shuffle_xor(sum, step);
  return sum > 0;
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS) turboquant_store(const Params p) {
  extern __shared__ __align__(128) u8 shared[];
  float *turned = (float *)shared;
  const int lane = lane_id(), warp = shuffle(thread_id() >> 5, 0);
  const bool is_value = block_id() & 1;
  const u32 line = block_id() >> 1, head = line % p.kv_heads;
  const int first = line / p.kv_heads * WARPS, token = first + warp;
  const int near_by = first + (lane & (WARPS - 1));
  if (!any_lane(near_by < p.tokens && p.slots[near_by] >= 0)) return;
  const i64 slot = token < p.tokens ? p.slots[token] : -1;
  u8 *codes = shared + WARPS * 4 * TURNED_ROW + warp * D;
  float y[LANE_DIMS];
  bool near = false;
#if KEY_BASIS
  if (!is_value) {
    const u16 *keys = p.key + head * p.key_head;
    const int mine = first + (lane >> 2), of_mine = position_bucket(p, mine);
    turn_keys(p.matrix + (u64)head * D * D, mine < p.tokens ? keys + mine * p.key_token : nullptr,
              p.means + ((u64)head * p.buckets + of_mine) * D, turned, warp, lane);
    if (slot >= 0 && position_bucket(p, token) == 0)
      near = beyond(keys + token * p.key_token, p.normal + head * D, p.middle + head * D, lane);
    sync_block();
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) y[i] = turned[warp * TURNED_ROW + lane * LANE_DIMS + i];
    if (near) {
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i++) y[i] -= p.offset[head * D + lane * LANE_DIMS + i] * PRESCALE;
    }
  }
#endif
  if (slot < 0) return;
  if (is_value || !KEY_BASIS) {
    const u16 *row = is_value ? p.value + token * p.value_token + head * p.value_head : p.key + token * p.key_token + head * p.key_head;
    const u32 signs = lane_signs(lane);
    load_dims(row, y, lane);
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) y[i] = flipped(y[i], signs, i);
    hadamard(y, lane);
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) y[i] *= INVERSE_ROOT;
  }
  const u64 unit = (u64)slot >> 4;
  const int place = (int)slot & 15;
  u8 *bytes = p.cache + (unit >> SUB_SHIFT) * p.cache_block + head * p.cache_head + (unit & ((1 << SUB_SHIFT) - 1)) * UNIT_BYTES;
  if (is_value)
    encode_row<true>(y, false, bytes, place, p.value_offsets, p.value_scalars, codes, lane);
  else
    encode_row<false>(y, near, bytes, place, p.key_offsets, p.key_scalars, codes, lane);
}
