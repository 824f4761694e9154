// One warp's scores over units of 16 tokens, and what hides them.

#define HIDDEN -1e38f  // below any score: the weight becomes exactly 0
// Queries of 256 dims do not fit into registers beside values: they are loaded anew for each pair of units.
#define QUERIES_STAY (D < 256)

struct State {
  u32 query[TILES][D / 8];  // MMA operands
  float factor[TILES][2];   // of this lane's columns
  float sum[TILES][D / 16][4], peak[TILES][2], weight[TILES][2];
  // Weights are fp16. Value scales are taken relative to a power of two that no scale so far exceeds, and so is `sum`.
  float value_top;
};

// What bounds a tile's visible tokens.
struct Bounds {
  int end;             // tokens from here on are not this segment's or not of the request
  int all_see;         // every query sees tokens before this one ...
  int all_see_from;    // ... and from this one on
  int oldest;          // no query sees tokens before this one
  const int *limits;   // [COLUMNS], first token that a column does not see
  const float *gains;  // [1 + buckets][COLUMNS], of scores of keys relative to the second mean, then by bucket
};

DEVICE void begin_state(State &a, const u16 *queries, const float *factors, int g, int t) {
#pragma unroll
  for (int n = 0; n < TILES; n++) {
    if (QUERIES_STAY) load_operands(a.query[n], queries, n, g, t);
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
  a.value_top = 0x1p-24f;
}

DEVICE float cap_score(float score, float cap) {
  // cap * tanh(score / cap); both are in base 2, so e^(2x) is 2^(2x log2 e)
  return cap - 2 * divide(cap, 1 + exp2_fast(score * (2 * LOG2E / cap)));
}

// Log2 scores of a unit's 16 tokens: [tile][e], token g + 8 * (e / 2), column 2t + e % 2. Also the value scales.
// `gains`: [COLUMNS], of the unit's bucket. `key_scales`: of the lane's two tokens, in fp16.
DEVICE void score_unit(const State &a, const Levels &table, u32 unit, const float *gains, int g, int t, float (*score)[4],
                       float (*value_scale)[2], u32 &key_scales) {
#if BUCKETED
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) score[n][e] = gains[n * 8 + 2 * t + e % 2];
#endif
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
    key_scales = scales[0];
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float part = dot[n][e] * (key_scale[e / 2] * a.factor[n][e % 2]);
        score[n][e] = panel || BUCKETED ? score[n][e] + part : part;
      }
  }
}

#if KEY_BASIS
// Negative scales: the key is relative to the second mean, in the first bucket, whose own gain is 0.
DEVICE void meet_second_means(const Bounds &b, const u32 *key_scales, int t, float (*score)[TILES][4]) {
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (key_scales[u] >> (e / 2 ? 31 : 15) & 1) score[u][n][e] = b.gains[n * 8 + 2 * t + e % 2] - score[u][n][e];
}
#endif

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
