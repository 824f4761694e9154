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
static_assert(WARPS == 8, "an MMA has a column for each warp's token");

// The lane's dims of a row, as they are.
DEVICE void load_dims(const u16 *row, u32 *words, int lane) {
  const u8 *source = (const u8 *)(row + lane * LANE_DIMS);
  if (LANE_DIMS == 2) load_page_32(source, words);
  if (LANE_DIMS == 4) load_page_64(source, words);
  if (LANE_DIMS == 8) load_page_128(source, words);
}

DEVICE float dim_of(const u32 *words, int i) { return input_to_float((u16)(words[i / 2] >> i % 2 * 16)); }

#if KEY_BASIS
// x = big + small, each of 11 bits, up to 2^-22 of x.
DEVICE void split(float x, u32 &big, u32 &small) {
  big = float_to_bits(x) + 0x1000u & 0xFFFFE000u;
  small = float_to_bits(x - bits_to_float(big));
}

// Of rows g and g + 8 of a tile of 16 of a matrix, `rows` being the first's dims from 4 t on: dims 16 i + 4 t .. 16 i + 4 t + 3, for
// AHEAD steps i from `first` on.
DEVICE void load_rows(const float *rows, int first, u32 (*upper)[4], u32 (*lower)[4]) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    load_page_128((const u8 *)(rows + 16 * (first + i)), upper[i]);
    load_page_128((const u8 *)(rows + 8 * D + 16 * (first + i)), lower[i]);
  }
}

// PRESCALE * matrix (x - mean) of the CTA's tokens to `turned` [WARPS][TURNED_ROW]: fp32's products, but for their last bits, out
// of three of tensor cores. Lane (g, t) brings `words`, dims 16 i + 4 t .. 16 i + 4 t + 3 of token g, and `load_rows`, of which the
// first are loaded already.
DEVICE void turn_keys(const float *matrix, const u32 (*words)[2], const float *mean, u32 (*upper)[4], u32 (*lower)[4], float *turned,
                      int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float x[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; i++) load_page_128((const u8 *)(mean + 16 * i + 4 * t), (u32 *)x[i]);
#pragma unroll
  for (int i = 0; i < D / 16; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) x[i][e] = (dim_of(words[i], e) - x[i][e]) * PRESCALE;
#pragma unroll 1
  for (int tile = warp; tile < D / 16; tile += WARPS) {
    float y[3][4];
#pragma unroll
    for (int j = 0; j < 3; j++) y[j][0] = y[j][1] = y[j][2] = y[j][3] = 0;
#pragma unroll
    for (int first = 0; first < D / 16; first += AHEAD) {
      if (first || tile != warp) load_rows(matrix + (u64)(tile * 16 + g) * D + 4 * t, first, upper, lower);
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

// Whether the warp's key, its dims `words`, is nearer to the second mean than to the first bucket's.
DEVICE bool beyond(const u32 *words, const float *normal, const float *middle, int lane) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) {
    const int dim = lane * LANE_DIMS + i;
    sum += (dim_of(words, i) - middle[dim]) * PRESCALE * normal[dim];
  }
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) sum += shuffle_xor(sum, step);
  return sum > 0;
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS) turboquant_store(const Params p) {
  extern __shared__ __align__(128) u8 shared[];
  const int lane = lane_id(), warp = shuffle(thread_id() >> 5, 0), g = lane >> 2, t = lane & 3;
  const bool is_value = block_id() & 1;
  const u32 line = block_id() >> 1, head = line % p.kv_heads;
  const int first = line / p.kv_heads * WARPS, token = first + warp;
  const u16 *side = is_value ? p.value + head * p.value_head : p.key + head * p.key_head;
  const u64 stride = is_value ? p.value_token : p.key_token;
  // All that can be loaded is, before any of it is looked at.
  u32 words[LANE_DIMS / 2] = {};
  if (token < p.tokens) load_dims(side + token * stride, words, lane);
#if KEY_BASIS
  // Of the lane's token as a column of the matrix's product, which is not the warp's.
  const int column = first + g;
  const float *matrix = p.matrix + (u64)head * D * D;
  u32 column_words[D / 16][2] = {}, upper[AHEAD][4], lower[AHEAD][4];
  if (!is_value) {
    if (warp < D / 16) load_rows(matrix + (u64)(warp * 16 + g) * D + 4 * t, 0, upper, lower);
#pragma unroll
    for (int i = 0; i < D / 16; i++)
      if (column < p.tokens) load_page_64((const u8 *)(side + column * stride + 16 * i + 4 * t), column_words[i]);
  }
  const i64 position = p.buckets > 1 && column < p.tokens ? p.positions[column] : 0;
#endif
  const i64 column_slot = first + g < p.tokens ? p.slots[first + g] : -1;
  const i64 slot = token < p.tokens ? p.slots[token] : -1;
  if (!any_lane(column_slot >= 0)) return;
  u8 *codes = shared + WARPS * 4 * TURNED_ROW + warp * D;
  float y[LANE_DIMS];
  bool near = false;
#if KEY_BASIS
  if (!is_value) {
    float *turned = (float *)shared;
    // Tokens that are not stored may have any position.
    const int bucket = column_slot >= 0 ? bucket_of((u32)(position >> 4), p.bucket, p.buckets) : 0;
    turn_keys(matrix, column_words, p.means + ((u64)head * p.buckets + bucket) * D, upper, lower, turned, warp, lane);
    if (shuffle(bucket, warp * 4) == 0) near = beyond(words, p.normal + head * D, p.middle + head * D, lane);
    sync_block();
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) {
      y[i] = turned[warp * TURNED_ROW + lane * LANE_DIMS + i];
      if (near) y[i] -= p.offset[head * D + lane * LANE_DIMS + i] * PRESCALE;
    }
  }
#endif
  if (slot < 0) return;
  if (is_value || !KEY_BASIS) {
    const u32 signs = lane_signs(lane);
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) y[i] = flipped(dim_of(words, i) * PRESCALE, signs, i);
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
