// Ranges of cached tokens, decoded into the model's own basis: a warp takes one side of one unit of 16 tokens and one head.

// Strides are in elements of the tensor; `vllm_turboquant.kernels.cuda.context` mirrors this struct.
struct Params {
  u16 *key, *value;
  const u8 *cache;
  const int *block_table;
  const int *first;
  const int *start_loc;
  u64 out_token, out_head, cache_block, cache_head, table_request;
  int kv_heads;
  int tiles;  // CTAs a request and head
#if KEY_BASIS
  const u8 *basis;  // of `vllm_turboquant.kernels.cuda.fragments.key_fragments`
  u64 basis_head;   // bytes
  u32 bucket;       // of `bucket_of`
  int buckets;
#endif
};

// Codes of a side's unit, as a lane holds them.
template <bool VALUE> struct Codes;

template <> struct Codes<false> {
  KeyRow rows[2][PANELS];

  DEVICE_MEMBER void load(const u8 *unit, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int panel = 0; panel < PANELS; panel++)
        load_key_row(unit, half * 8 + (lane >> 2), lane & 3, panel, rows[half][panel]);
  }

  DEVICE_MEMBER void levels(int half, const Levels &table, u32 (*y)[2]) const {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
      for (int o = 0; o < KEY_OCTETS; o += 2) {
        u32 even[4], odd[4];
        key_levels(rows[half][panel], o, table, even);
        key_levels(rows[half][panel], o + 1, table, odd);
#pragma unroll
        for (int n = 0; n < 8; n++)
          y[D == 64 ? n & 3 : panel * 8 + n][D == 64 ? n >> 2 : o >> 1] = prmt(even[n / 2], odd[n / 2], n & 1 ? 0x7632 : 0x5410);
      }
  }
};

template <> struct Codes<true> {
  ValueHalf halves[2];

  DEVICE_MEMBER void load(const u8 *unit, int lane) {
    load_value_half(unit, lane, 0, halves[0]);
    load_value_half(unit, lane, 1, halves[1]);
  }

  // Pairs of tokens a lane become pairs of dims: the eighths 2t and 2t + 1 of token g.
  DEVICE_MEMBER void levels(int half, const Levels &table, u32 (*y)[2]) const {
#pragma unroll
    for (int o = 0; o < VALUE_OCTETS; o++)
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        u32 pairs[4];
        value_levels(halves[half], o, odd, table, pairs);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int n = 2 * i + odd;
          y[D == 64 ? n & 3 : n | (o >> 1) << 3][D == 64 ? n >> 2 : o & 1] = transpose_tile(pairs[i]);
        }
      }
  }
};

// `token`: the unit's first. Tokens outside begin .. end - 1 are decoded, for a warp works together, and not stored.
template <bool VALUE>
DEVICE void decode_unit(const Params &p, const u8 *unit, int token, int begin, int end, u16 *out, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const Levels keys = {KEY_LEVELS}, values = {VALUE_LEVELS};
  Codes<VALUE> codes;
  codes.load(unit, lane);
  u32 scales[SCALES][4];  // [token 2t, 2t + 1][side], both halves in a word
#pragma unroll
  for (int group = 0; group < SCALES; group++)
    load_page_128(unit + SCALE_BASE + group * SCALE_GROUP_BYTES + t * 16, scales[group]);
  u32 hadamard[4];
  hadamard_operand<VALUE>(g, t, hadamard);
  const u32 signs = lane_signs<VALUE>(g);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float scale[SCALES][2], x[STEPS][4];
#pragma unroll
    for (int group = 0; group < SCALES; group++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        u32 both = scales[group][2 * e + VALUE];
        scale[group][e] = (half ? f16_high(both) : f16_low(both)) * INVERSE_ROOT;
      }
    u32 y[STEPS][2];
    codes.levels(half, VALUE ? values : keys, y);
    unrotate<VALUE>(hadamard, y, scale, x);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int n = token + half * 8 + 2 * t + e;
      bool live = n >= begin && n < end;
      u16 *row = out + (n - begin) * p.out_token;
#pragma unroll
      for (int j = 0; j < OCTETS; j++) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float low = x[step_of<VALUE>(j, 2 * i)][part_of<VALUE>(j, 2 * i) * 2 + e];
          float high = x[step_of<VALUE>(j, 2 * i + 1)][part_of<VALUE>(j, 2 * i + 1) * 2 + e];
          u32 pair = OUTPUT_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
          words[i] = pair ^ (signs << (4 * j + i) & 0x80008000u);
        }
        if (live) store_128(row + octet_of<VALUE>(g, j) * 8, words);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS) turboquant_context(const Params p) {
  const int lane = lane_id(), warp = shuffle(thread_id() >> 5, 0);
  const u32 tile = block_id() % p.tiles, line = block_id() / p.tiles;
  const u32 head = line % p.kv_heads, request = line / p.kv_heads;
  const int start = p.start_loc[request], begin = p.first[request];
  const int end = begin + p.start_loc[request + 1] - start;
  const u32 index = (u32)(begin >> 4) + tile * (WARPS / 2) + (warp >> 1);
  const int token = (int)index * 16;
  if (begin >= end || token >= end) return;
  const u64 block = p.block_table[request * p.table_request + (index >> SUB_SHIFT)];
  const u8 *unit = p.cache + block * p.cache_block + head * p.cache_head;
  unit += (index & ((1 << SUB_SHIFT) - 1)) * UNIT_BYTES;
  const u64 target = start * p.out_token + head * p.out_head;
  if (warp & 1)
    decode_unit<true>(p, unit, token, begin, end, p.value + target, lane);
  else
#if KEY_BASIS
    decode_keys(unit, p.basis + head * p.basis_head, bucket_of(index, p.bucket, p.buckets), token, begin, end, p.key + target,
                p.out_token, lane);
#else
    decode_unit<false>(p, unit, token, begin, end, p.key + target, lane);
#endif
}
