// One warp's online softmax and weighted values over pairs of units, all in registers.

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
  float value_top = 0;
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
      value_top = fmaxf(value_top, fmaxf(value_scale[u][panel][0], value_scale[u][panel][1]));
  need |= value_top > a.value_top;
  if (!any_lane(need)) return;
  float shrink = 1;
#pragma unroll
  for (int step = 4; step < 32; step <<= 1) value_top = fmaxf(value_top, shuffle_xor(value_top, step));
  if (value_top > a.value_top) {
    float power = bits_to_float(float_to_bits(value_top) + 0x7FFFFFu & 0xFF800000u);
    shrink = a.value_top / power;
    a.value_top = power;
  }
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
  // Of a power of two, times 2^12: weights and relative scales are at most 1, and far smaller ones should stay normal.
  const float inverse = bits_to_float(0x7F000000u + (12u << 23) - float_to_bits(a.value_top));
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
          weights[u][n][panel][half] = transpose_tile(pack_f16(y[0], y[1]));
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
          mma_f16(a.sum[n][2 * part + k], x[2 * k], x[2 * k + 1], y[2 * k], y[2 * k + 1], weights[u][n][0][0],
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
  for (int part = 0; part < D / 32; part++) {
    const int step = part / (D / 32 / VALUE_STEPS);
    if (part % (D / 32 / VALUE_STEPS) == 0) {
      if (step) sync_warp();  // the compiler would join the steps' loads
#pragma unroll
      for (int u = 0; u < 2; u++) {
        load_value_half<VALUE_STEPS>(slot + u * UNIT_BYTES, lane, 0, first[u], step);
        load_value_half<VALUE_STEPS>(slot + u * UNIT_BYTES, lane, 1, second[u], step);
      }
    }
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
          mma_f16(sum, x[u][2 * k], x[u][2 * k + 1], y[u][2 * k], y[u][2 * k + 1], w[0][0], w[0][1]);
          mma_f16(other, x[u][2 * k], x[u][2 * k + 1], y[u][2 * k], y[u][2 * k + 1], w[1][0], w[1][1]);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) sum[e] = lane < 16 ? sum[e] : other[e];
      }
  }
}
#endif

// Attends to the two units in `slot`, whose first token is `token`. `queries`: as `load_operands` reads them.
DEVICE void attend_pair(const Params &p, State &a, const Bounds &b, const Levels &keys, const Levels &values, const u16 *queries,
                        u32 slot, int token, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float score[2][TILES][4], value_scale[2][PANELS][2];
  u32 weights[2][TILES][PANELS][2], hidden = 0, key_scales[2];
  if (!QUERIES_STAY)
#pragma unroll
    for (int n = 0; n < TILES; n++) load_operands(a.query[n], queries, n, g, t);
#pragma unroll
  for (int u = 0; u < 2; u++) {
    const float *gains = b.gains;
#if BUCKETED
    gains += (1 + bucket_of((token >> 4) + u, p.bucket, p.buckets)) * COLUMNS;
#endif
    score_unit(a, keys, slot + u * UNIT_BYTES, gains, g, t, score[u], value_scale[u], key_scales[u]);
  }
#if KEY_BASIS
  if (any_lane((key_scales[0] | key_scales[1]) & 0x80008000u)) meet_second_means(b, key_scales, t, score);
#endif
  if (SOFT_CAP)
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) score[u][n][e] = cap_score(score[u][n][e], p.soft_cap);
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
      const float top = a.value_top * 0x1p-12f;
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
