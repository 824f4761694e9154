// One warp's attention over pairs of units: scores, online softmax and weighted values, all in registers.

#if INPUT_BF16
// bf16 weights span fp32's range, so any fp16 scale fits into them.
#define WEIGHTS_F16 0
#define pack_weights pack_bf16
#define mma_values mma_bf16
#else
// fp16 keeps three more bits; value scales are taken relative to a power of two that no scale so far exceeds.
#define WEIGHTS_F16 1
#define pack_weights pack_f16
#define mma_values mma_f16
#endif

#define HIDDEN -1e38f  // below any score: the weight becomes exactly 0

struct State {
  u32 query[TILES][D / 8];  // MMA operands
  float factor[TILES][2];   // of this lane's columns
  float sum[TILES][D / 16][4], peak[TILES][2], weight[TILES][2];
#if WEIGHTS_F16
  float value_top;  // the power of two that `sum` and value scales are relative to
#endif
};

// What bounds a tile's visible tokens.
struct Bounds {
  int end;             // tokens from here on are not this segment's or not of the request
  int all_see;         // every query sees tokens before this one ...
  int all_see_from;    // ... and from this one on
  int oldest;          // no query sees tokens before this one
  const int *limits;   // [COLUMNS], first token that a column does not see
};

DEVICE void begin_state(State &a, const u16 *queries, const float *factors, int g, int t) {
#pragma unroll
  for (int n = 0; n < TILES; n++) {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
      for (int o = 0; o < KEY_OCTETS; o++)
        load_shared_128(shared_address(queries + (n * 8 + g) * D + panel * 128 + t * KEY_RUN + o * 8),
                        a.query[n] + 4 * (panel * KEY_OCTETS + o));
#pragma unroll
    for (int e = 0; e < 2; e++) {
      a.factor[n][e] = factors[n * 8 + 2 * t + e];
      a.peak[n][e] = NO_MAXIMUM;
      a.weight[n][e] = 0;
    }
#pragma unroll
    for (int j = 0; j < D / 16; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) a.sum[n][j][e] = 0;
  }
#if WEIGHTS_F16
  a.value_top = 0x1p-24f;
#endif
}

DEVICE float cap_score(float score, float cap) {
  // cap * tanh(score / cap); both are in base 2, so e^(2x) is 2^(2x log2 e)
  return cap - 2 * divide(cap, 1 + exp2_fast(score * (2 * LOG2E / cap)));
}

// Log2 scores of a unit's 16 tokens: [tile][e], token g + 8 * (e / 2), column 2t + e % 2. Also the value scales.
DEVICE void score_unit(const Params &p, const State &a, const Levels &table, u32 unit, int g, int t, float (*score)[4],
                       float (*value_scale)[2]) {
#pragma unroll
  for (int panel = 0; panel < PANELS; panel++) {
    KeyRow upper, lower;
    load_key_row(unit, g, t, panel, upper);
    load_key_row(unit, g + 8, t, panel, lower);
    u32 scales[2];
    load_shared_64(unit + SCALE_BASE + panel * SCALE_GROUP_BYTES + g * 8, scales);
    float dot[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; n++) dot[n][0] = dot[n][1] = dot[n][2] = dot[n][3] = 0;
#pragma unroll
    for (int o = 0; o < KEY_OCTETS; o++) {
      u32 x[4], y[4];
      key_levels(upper, o, table, x);
      key_levels(lower, o, table, y);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const u32 *q = a.query[n] + 4 * (panel * KEY_OCTETS + o);
        mma_f16(dot[n], x[0], y[0], x[1], y[1], q[0], q[1]);
        mma_f16(dot[n], x[2], y[2], x[3], y[3], q[2], q[3]);
      }
    }
    float key_scale[2] = {f16_low(scales[0]), f16_high(scales[0])};
    value_scale[panel][0] = f16_low(scales[1]);
    value_scale[panel][1] = f16_high(scales[1]);
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float part = dot[n][e] * (key_scale[e / 2] * a.factor[n][e % 2]);
        score[n][e] = panel ? score[n][e] + part : part;
      }
  }
  if (SOFT_CAP)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) score[n][e] = cap_score(score[n][e], p.soft_cap);
}

// Hides what a column does not see. Returns a bit for each score that is hidden: (unit * TILES + tile) * 4 + e. Value scales
// of tokens that no column sees become 0, for they may be NaN.
DEVICE u32 hide(const Params &p, const Bounds &b, int token, int g, int t, float (*score)[TILES][4],
                float (*value_scale)[PANELS][2]) {
  u32 hidden = 0;
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int n = token + u * 16 + half * 8 + g;
      bool unseen = n >= b.end || (WINDOW && n < b.oldest);
#pragma unroll
      for (int panel = 0; panel < PANELS; panel++)
        if (unseen) value_scale[u][panel][half] = 0;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          bool gone = unseen;
          if (MULTI) {
            int limit = b.limits[tile * 8 + 2 * t + e];
            gone = gone || n >= limit || (WINDOW && n < limit - p.window);
          }
          if (gone) {
            score[u][tile][half * 2 + e] = HIDDEN;
            hidden |= 1u << ((u * TILES + tile) * 4 + half * 2 + e);
          }
        }
    }
  return hidden;
}

// Raises the running maxima where a score exceeds them, to 3 above the score: an eighth is left for later scores, so that
// this stays rare.
DEVICE void raise_peaks(State &a, const float (*score)[TILES][4], const float (*value_scale)[PANELS][2]) {
  float top[TILES][2];
  bool need = false;
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      top[n][e] = fmaxf(fmaxf(score[0][n][e], score[0][n][e + 2]), fmaxf(score[1][n][e], score[1][n][e + 2]));
      need |= top[n][e] > a.peak[n][e];
    }
#if WEIGHTS_F16
  float value_top = 0;
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
      value_top = fmaxf(value_top, fmaxf(value_scale[u][panel][0], value_scale[u][panel][1]));
  need |= value_top > a.value_top;
#endif
  if (!any_lane(need)) return;
  float shrink = 1;
#if WEIGHTS_F16
#pragma unroll
  for (int step = 4; step < 32; step <<= 1) value_top = fmaxf(value_top, shuffle_xor(value_top, step));
  if (value_top > a.value_top) {
    float power = bits_to_float(float_to_bits(value_top) + 0x7FFFFFu & 0xFF800000u);
    shrink = a.value_top / power;
    a.value_top = power;
  }
#endif
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float x = top[n][e];
#pragma unroll
      for (int step = 4; step < 32; step <<= 1) x = fmaxf(x, shuffle_xor(x, step));
      float peak = x > a.peak[n][e] ? x + 3 : a.peak[n][e];
      float factor = exp2_fast(a.peak[n][e] - peak);
      a.peak[n][e] = peak;
      a.weight[n][e] *= factor;
      factor *= shrink;
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        a.sum[n][j][e] *= factor;
        a.sum[n][j][e + 2] *= factor;
      }
    }
}

// Weights times value scales as MMA operands, [unit][tile][panel][2]. A hidden weight is 0 even where the scale is NaN.
template <bool SELECT>
DEVICE void weigh(State &a, const float (*score)[TILES][4], const float (*value_scale)[PANELS][2], u32 hidden,
                  u32 (*weights)[TILES][PANELS][2]) {
  float scale[2][PANELS][2];
#if WEIGHTS_F16
  float inverse = 1 / a.value_top;
#else
  const float inverse = 1;
#endif
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
      for (int half = 0; half < 2; half++) scale[u][panel][half] = value_scale[u][panel][half] * inverse;
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; e++) x[e] = exp2_fast(score[u][n][e] - a.peak[n][e % 2]);
      a.weight[n][0] += x[0] + x[2];
      a.weight[n][1] += x[1] + x[3];
#pragma unroll
      for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float y[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            y[e] = x[half * 2 + e] * scale[u][panel][half];
            if (SELECT && hidden >> ((u * TILES + n) * 4 + half * 2 + e) & 1) y[e] = 0;
          }
          weights[u][n][panel][half] = transpose_tile(pack_weights(y[0], y[1]));
        }
    }
}

#if PANELS == 1
DEVICE void add_values(State &a, const Levels &table, u32 slot, int lane, const u32 (*weights)[TILES][PANELS][2]) {
#pragma unroll
  for (int u = 0; u < 2; u++) {
    ValueHalf first, second;
    load_value_half(slot + u * UNIT_BYTES, lane, 0, first);
    load_value_half(slot + u * UNIT_BYTES, lane, 1, second);
#pragma unroll
    for (int part = 0; part < D / 32; part++) {  // even, then odd dims of an octet: two MMAs
      u32 x[4], y[4];
      value_levels(first, part / 2, part % 2, table, x);
      value_levels(second, part / 2, part % 2, table, y);
#pragma unroll
      for (int k = 0; k < 2; k++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
          mma_values(a.sum[n][2 * part + k], x[2 * k], x[2 * k + 1], y[2 * k], y[2 * k + 1], weights[u][n][0][0],
                     weights[u][n][0][1]);
    }
  }
}
#else
// Lanes with g < 4 hold dims of the first scale group, the others of the second, while the weights of an MMA are common to
// its rows: both products are formed, and each lane keeps its own, once for both units.
DEVICE void add_values(State &a, const Levels &table, u32 slot, int lane, const u32 (*weights)[TILES][PANELS][2]) {
  ValueHalf first[2], second[2];
#pragma unroll
  for (int u = 0; u < 2; u++) {
    load_value_half(slot + u * UNIT_BYTES, lane, 0, first[u]);
    load_value_half(slot + u * UNIT_BYTES, lane, 1, second[u]);
  }
#pragma unroll
  for (int part = 0; part < D / 32; part++) {
    u32 x[2][4], y[2][4];
#pragma unroll
    for (int u = 0; u < 2; u++) {
      value_levels(first[u], part / 2, part % 2, table, x[u]);
      value_levels(second[u], part / 2, part % 2, table, y[u]);
    }
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        float *sum = a.sum[n][2 * part + k], other[4] = {sum[0], sum[1], sum[2], sum[3]};
#pragma unroll
        for (int u = 0; u < 2; u++) {
          const u32(*w)[2] = weights[u][n];
          mma_values(sum, x[u][2 * k], x[u][2 * k + 1], y[u][2 * k], y[u][2 * k + 1], w[0][0], w[0][1]);
          mma_values(other, x[u][2 * k], x[u][2 * k + 1], y[u][2 * k], y[u][2 * k + 1], w[1][0], w[1][1]);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) sum[e] = lane < 16 ? sum[e] : other[e];
      }
  }
}
#endif

// Attends to the two units in `slot`, whose first token is `token`.
DEVICE void attend_pair(const Params &p, State &a, const Bounds &b, const Levels &keys, const Levels &values, u32 slot, int token,
                        int lane) {
  const int g = lane >> 2, t = lane & 3;
  float score[2][TILES][4], value_scale[2][PANELS][2];
  u32 weights[2][TILES][PANELS][2], hidden = 0;
#pragma unroll
  for (int u = 0; u < 2; u++) score_unit(p, a, keys, slot + u * UNIT_BYTES, g, t, score[u], value_scale[u]);
  const bool edge = token + 32 > b.all_see || (WINDOW && token < b.all_see_from);
  if (edge) hidden = hide(p, b, token, g, t, score, value_scale);
  raise_peaks(a, score, value_scale);
  if (MULTI && edge)
    weigh<true>(a, score, value_scale, hidden, weights);
  else
    weigh<false>(a, score, value_scale, 0, weights);
  add_values(a, values, slot, lane, weights);
}

// The warp's part of MMA tile `n` into shared memory.
DEVICE void leave_part(State &a, const Parts &parts, int n, int warp, int g, int t) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float weight = a.weight[n][e];
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) weight += shuffle_xor(weight, step);
    const int column = 2 * t + e, part = warp * MERGE_ROWS + column;
    if (column < MERGE_ROWS) {
#if WEIGHTS_F16
      const float top = a.value_top;
#else
      const float top = 1;
#endif
      float *out = parts.sums + part * D + g * (D / 8);
#pragma unroll
      for (int o = 0; o < VALUE_OCTETS; o++)
#pragma unroll
        for (int k = 0; k < 4; k++)  // rows g and g + 8 of the k-th MMA: dims 0 2, 4 6, 1 3, 5 7
#pragma unroll
          for (int odd = 0; odd < 2; odd++)
            out[8 * o + (k & 1) * 4 + (k >> 1) + 2 * odd] = a.sum[n][4 * o + k][e + 2 * odd] * top;
      if (g == 0) {
        parts.peaks[part * 2] = a.peak[n][e];
        parts.peaks[part * 2 + 1] = weight;
      }
    }
  }
}
