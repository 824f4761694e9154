// A segment's queries as stored keys are read by them: rotated, or turned by their KV head's own matrix.

#define MATRIX_TILES (D / 16)
#define ROW_MMAS (D == 64 ? 4 : 8)  // whose operands are loaded at once
#define ROWS_AHEAD (D < 256)        // heads of 256 dims have no registers left, and most of a warp's rows come later anyway
#define MEAN_TILES (MEAN_ROWS / 16)
#define BASIS_BYTES (2 * D * D + 16 + 4 * MEAN_ROWS * D)

#if KEY_BASIS
// Some of the lane's operands of 16 rows of a matrix, from MMA `first` on: the warp's 512 consecutive bytes an MMA.
template <int COUNT> DEVICE void load_rows(const u8 *matrix, int tile, int first, int lane, u32 (*rows)[4]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) load_page_128(matrix + (tile * MATRIX_TILES + first + i) * 512 + lane * 16, rows[i]);
}

// Adds their products with the queries' operands.
template <int COUNT>
DEVICE void multiply_rows(const u32 (*rows)[4], const u32 (*operands)[D / 8], int first, float (*y)[4]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const u32 *q = operands[n] + 2 * (first + i);
      mma_f16(y[n], rows[i][0], rows[i][1], rows[i][2], rows[i][3], q[0], q[1]);
    }
}

// The pieces of a head's means that a segment needs: of the tile with the second mean, and of those with its buckets; a piece
// is one of a tile's two halves of fp16, what the other rounded off.
struct MeanPieces {
  const u8 *means;
  int first, count;  // tile of the segment's buckets other than 0, and all pieces

  DEVICE_MEMBER int tile(int piece) const { return piece < 2 ? 0 : first + (piece >> 1) - 1; }
  // Its place in the record, in tiles.
  DEVICE_MEMBER int place(int piece) const { return (piece & 1) * MEAN_TILES + tile(piece); }
};

DEVICE MeanPieces mean_pieces(const Params &p, const Segment &s, const u8 *matrix) {
  MeanPieces m = {matrix + 2 * D * D + 16, 1, 2};
#if BUCKETED
  const int unit = s.request.first + s.begin;
  m.first = larger(bucket_of(unit, p.bucket, p.buckets) >> 4, 1);
  m.count += 2 * larger((bucket_of(unit + s.count - 1, p.bucket, p.buckets) >> 4) - m.first + 1, 0);
#endif
  return m;
}

// Adds what log2 scores gain where keys are relative to a mean, one piece's share of it for its 16 rows and all columns, to
// `gains`, whose first row is that of the second mean and the others the buckets'; the first bucket's stays 0, as the record has
// the second mean in its place. `scale` undoes what the record divides rows by, and what the factors undo of its division of the
// matrix. Each gain has two addends, whose order does not matter.
DEVICE void meet_means(const MeanPieces &m, int piece, const u32 (*operands)[D / 8], const float *factors, float scale,
                       float *gains, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float y[TILES][4];
#pragma unroll
  for (int n = 0; n < TILES; n++) y[n][0] = y[n][1] = y[n][2] = y[n][3] = 0;
#pragma unroll
  for (int first = 0; first < MATRIX_TILES; first += ROW_MMAS) {
    u32 rows[ROW_MMAS][4];
    load_rows<ROW_MMAS>(m.means, m.place(piece), first, lane, rows);
    multiply_rows<ROW_MMAS>(rows, operands, first, y);
  }
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int row = m.tile(piece) * 16 + g + 8 * (e / 2), column = n * 8 + 2 * t + e % 2;
      const float gain = fminf(fmaxf(y[n][e] * (factors[column] * scale), -1e30f), 1e30f);
      add_shared(gains + (row ? row + 1 : 0) * COLUMNS + column, gain);
    }
}

// Queries in shared memory become matrix times query; a warp computes 16 dims of all columns at a time. `rows`: its first, if
// ROWS_AHEAD. Also the gains by the means, which are 0 before.
DEVICE void turn_queries(const u8 *matrix, const MeanPieces &m, u32 (*rows)[4], u16 *queries, const float *factors, float *gains,
                         int warp, int lane) {
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
      if (!ROWS_AHEAD || first || tile != warp) load_rows<ROW_MMAS>(matrix, tile, first, lane, rows);
      multiply_rows<ROW_MMAS>(rows, operands, first, y);
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)  // rows g and g + 8: dims 2g and 2g + 1
        *(u32 *)(queries + (n * 8 + 2 * t + e) * D + tile * 16 + 2 * g) = pack_f16(y[n][e], y[n][e + 2]);
  }
  const float scale = *(const float *)(matrix + 2 * D * D + 4);
  // The warps after those with the last rows of the matrix.
#pragma unroll 1
  for (int piece = (warp + WARPS * MATRIX_TILES - MATRIX_TILES) % WARPS; piece < m.count; piece += WARPS)
    meet_means(m, piece, operands, factors, scale, gains, lane);
}
#endif

// The columns' queries, their factors and causal limits, to shared memory.
DEVICE void load_queries(const Params &p, const Segment &s, u16 *queries, float *factors, int *limits, float *gains, u32 signs,
                         int warp, int lane) {
  float score_scale = p.score_scale;
#if KEY_BASIS
  const int column_tiles = (p.group * p.max_query_len + COLUMNS - 1) / COLUMNS;
  const u8 *matrix = p.basis + (u64)(s.head / column_tiles) * BASIS_BYTES;
  const MeanPieces pieces = mean_pieces(p, s, matrix);
  u32 rows[ROW_MMAS][4];
  // They fly while queries are loaded. On a condition of the warp's, registers of `rows` would stay taken all the time.
  if (ROWS_AHEAD) load_rows<ROW_MMAS>(matrix, warp % MATRIX_TILES, 0, lane, rows);
  for (int i = thread_id(); i < (1 + MEAN_ROWS) * COLUMNS; i += WARPS * 32) gains[i] = 0;
  score_scale *= *(const float *)(matrix + 2 * D * D);
#endif
  for (int column = warp; column < COLUMNS; column += WARPS) {
    Row row = row_of(p, s.request, s.head, column);
    u16 *target = queries + column * D;
    float factor = 0;
    if (row.live) {
      factor = scale_query(p.query + row.token * p.query_token + row.head * p.query_head, target, signs, score_scale, lane);
    } else {
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i += 2) *(u32 *)(target + lane * LANE_DIMS + i) = 0;
    }
    if (lane == 0) {
      factors[column] = factor;
      limits[column] = row.live ? s.request.length - s.request.rows + (row.token - s.request.start) + 1 : 0;
    }
  }
  sync_block();
#if KEY_BASIS
  turn_queries(matrix, pieces, rows, queries, factors, gains, warp, lane);
  sync_block();
#endif
}
