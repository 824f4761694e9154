// A segment's queries as stored keys are read by them: rotated, or turned by their KV head's own matrix.

#define MATRIX_TILES (D / 16)
#define ROW_MMAS (D == 64 ? 4 : 8)  // whose operands are loaded at once
#define ROWS_AHEAD (D < 256)        // heads of 256 dims have no registers left, and most of a warp's rows come later anyway
#define BASIS_BYTES (2 * D * D + 16 + 4 * D)

#if KEY_BASIS
// Some of the lane's operands of 16 rows of a matrix, from MMA `first` on: the warp's 512 consecutive bytes an MMA.
DEVICE void load_rows(const u8 *matrix, int tile, int first, int lane, u32 (*rows)[4]) {
#pragma unroll
  for (int i = 0; i < ROW_MMAS; i++)
    load_page_128(matrix + (tile * MATRIX_TILES + first + i) * 512 + lane * 16, rows[i]);
}

// Queries in shared memory become matrix times query; a warp computes 16 dims of all columns at a time. `rows`: its first, if
// ROWS_AHEAD.
DEVICE void turn_queries(const u8 *matrix, u32 (*rows)[4], u16 *queries, int warp, int lane) {
  const int g = lane >> 2, t = lane & 3;
  u32 operands[TILES][D / 8];
#pragma unroll
  for (int n = 0; n < TILES; n++) load_operands(operands[n], queries, n, g, t);
  sync_block();  // all warps have read what is overwritten now
#pragma unroll 1
  for (int tile = warp; tile < MATRIX_TILES; tile += WARPS) {
    float y[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; n++) y[n][0] = y[n][1] = y[n][2] = y[n][3] = 0;
#pragma unroll
    for (int first = 0; first < MATRIX_TILES; first += ROW_MMAS) {
      if (!ROWS_AHEAD || first || tile != warp) load_rows(matrix, tile, first, lane, rows);
#pragma unroll
      for (int i = 0; i < ROW_MMAS; i++)
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          const u32 *q = operands[n] + 2 * (first + i);
          mma_f16(y[n], rows[i][0], rows[i][1], rows[i][2], rows[i][3], q[0], q[1]);
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)  // rows g and g + 8: dims 2g and 2g + 1
        *(u32 *)(queries + (n * 8 + 2 * t + e) * D + tile * 16 + 2 * g) = pack_f16(y[n][e], y[n][e + 2]);
  }
}
#endif

#if KEY_BASIS
// What a row's log2 scores gain where a key is relative to the second mean. `query`: the lane's dims as `scale_query` left
// them, which `factor` brings back, bounds and all.
DEVICE float meet_second_mean(const u16 *query, const u8 *mean, float factor, int lane) {
  float dot = 0;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i += 2) {
    u32 words[2], pair = *(const u32 *)(query + lane * LANE_DIMS + i);
    load_page_64(mean + (lane * LANE_DIMS + i) * 4, words);
    dot += f16_low(pair) * bits_to_float(words[0]) + f16_high(pair) * bits_to_float(words[1]);
  }
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) dot += shuffle_xor(dot, step);
  return fminf(fmaxf(dot * factor, -1e30f), 1e30f);
}
#endif

// The columns' queries, their factors and causal limits, to shared memory.
DEVICE void load_queries(const Params &p, const Segment &s, u16 *queries, float *factors, int *limits, float *seconds, u32 signs,
                         int warp, int lane) {
  float score_scale = p.score_scale;
#if KEY_BASIS
  const int column_tiles = (p.group * p.max_query_len + COLUMNS - 1) / COLUMNS;
  const u8 *matrix = p.basis + (u64)(s.head / column_tiles) * BASIS_BYTES;
  u32 rows[ROW_MMAS][4];
  // They fly while queries are loaded. On a condition of the warp's, registers of `rows` would stay taken all the time.
  if (ROWS_AHEAD) load_rows(matrix, warp % MATRIX_TILES, 0, lane, rows);
  const float power = *(const float *)(matrix + 2 * D * D);
  score_scale *= power;
#endif
  for (int column = warp; column < COLUMNS; column += WARPS) {
    Row row = row_of(p, s.request, s.head, column);
    u16 *target = queries + column * D;
    float factor = 0;
#if KEY_BASIS
    float second = 0;
#endif
    if (row.live) {
      factor = scale_query(p.query + row.token * p.query_token + row.head * p.query_head, target, signs, score_scale, lane);
#if KEY_BASIS
      second = meet_second_mean(target, matrix + 2 * D * D + 16, factor / power, lane);
#endif
    } else {
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i += 2) *(u32 *)(target + lane * LANE_DIMS + i) = 0;
    }
    if (lane == 0) {
      factors[column] = factor;
#if KEY_BASIS
      seconds[column] = second;
#endif
      limits[column] = row.live ? s.request.length - s.request.rows + (row.token - s.request.start) + 1 : 0;
    }
  }
  sync_block();
#if KEY_BASIS
  turn_queries(matrix, rows, queries, warp, lane);
  sync_block();
#endif
}
