// Queries under a key basis, turned by their KV head's own matrix to meet stored keys, before the decode, which would do so anew
// for every segment. A CTA takes one KV head and COLUMNS of its query rows; its warps share the matrix's rows and the means.
//
// A query row's record: [D] fp16, the factor that turns its products with levels into log2 scores, padding to 16 bytes, then
// what scores gain where keys are relative to a mean, fp32 [MEAN_ROWS]: the second mean, then bucket 1, 2, ...

// Strides are in elements of the tensor; `vllm_turboquant.kernels.cuda.turn` mirrors this struct.
struct Params {
  const u16 *query;
  u8 *turned;       // [tokens][query heads][RECORD_BYTES]
  const u8 *basis;  // [KV heads][BASIS_BYTES], of `vllm_turboquant.kernels.cuda.fragments.query_fragments`
  u64 query_token, query_head;
  int rows, kv_heads, group;  // rows: of a KV head, tokens * group
  float score_scale;          // softmax scale * log2(e)
};

#define COLUMNS 16
#define TILES (COLUMNS / 8)
#define MATRIX_TILES (D / 16)
#define MEAN_TILES (MEAN_ROWS / 16)
#define BASIS_BYTES (2 * D * D + 16 + 4 * MEAN_ROWS * D)

static_assert(SHARED_BYTES == COLUMNS * (2 * D + 4), "the launcher reserves what the kernel uses");

// The lane's operands of 16 rows for ROW_MMAS MMAs from `first` on: the warp's 512 consecutive bytes an MMA.
DEVICE void load_rows(const u8 *tile, int first, int lane, u32 (*rows)[4]) {
#pragma unroll
  for (int i = 0; i < ROW_MMAS; i++) load_page_128(tile + (first + i) * 512 + lane * 16, rows[i]);
}

// Where 16 rows lie: of the matrix, then of the means' halves of fp16, `part` 1 being what the other rounded off.
DEVICE const u8 *tile_of(const u8 *basis, int tile, int part) {
  if (tile < MATRIX_TILES) return basis + tile * (MATRIX_TILES * 512);
  return basis + 2 * D * D + 16 + (part * MEAN_TILES + tile - MATRIX_TILES) * (MATRIX_TILES * 512);
}

// Adds the products of 16 rows with all queries to `y`. `rows`: their first operands, already loaded.
DEVICE void multiply_rows(const u8 *tile, u32 (*rows)[4], const u32 (*operands)[D / 8], int lane, float (*y)[4]) {
#pragma unroll
  for (int first = 0; first < MATRIX_TILES; first += ROW_MMAS) {
    if (first) load_rows(tile, first, lane, rows);
#pragma unroll
    for (int i = 0; i < ROW_MMAS; i++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const u32 *q = operands[n] + 2 * (first + i);
        mma_f16(y[n], rows[i][0], rows[i][1], rows[i][2], rows[i][3], q[0], q[1]);
      }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS) turboquant_turn(const Params p) {
  extern __shared__ __align__(128) u8 shared[];
  launch_dependents();
  u16 *queries = (u16 *)shared;
  float *factors = (float *)(queries + COLUMNS * D);
  const int lane = lane_id(), warp = shuffle(thread_id() >> 5, 0), g = lane >> 2, t = lane & 3;
  const int head = block_id() % p.kv_heads, begin = block_id() / p.kv_heads * COLUMNS;
  const u8 *basis = p.basis + (u64)head * BASIS_BYTES;
  u32 rows[ROW_MMAS][4];
  if (warp < MATRIX_TILES + MEAN_TILES) load_rows(tile_of(basis, warp, 0), 0, lane, rows);  // they fly while queries are loaded
  const float score_scale = p.score_scale * *(const float *)(basis + 2 * D * D);
  const float mean_scale = *(const float *)(basis + 2 * D * D + 4);
  for (int column = warp; column < COLUMNS; column += WARPS) {
    const int row = begin + column, token = row / p.group;
    u16 *target = queries + column * D;
    float factor = 0;
    if (row < p.rows) {
      const int query_head = head * p.group + row - token * p.group;
      factor = scale_query(p.query + token * p.query_token + query_head * p.query_head, target, score_scale, lane);
    } else {
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i += 2) *(u32 *)(target + lane * LANE_DIMS + i) = 0;
    }
    if (lane == 0) factors[column] = factor;
  }
  sync_block();
  u32 operands[TILES][D / 8];
  u8 *records[TILES][2];
#pragma unroll
  for (int n = 0; n < TILES; n++) {
    load_operands(operands[n], queries, n, g, t);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int row = begin + n * 8 + 2 * t + e, token = row / p.group;
      const u64 record = (u64)token * (p.kv_heads * p.group) + head * p.group + row - token * p.group;
      records[n][e] = row < p.rows ? p.turned + record * RECORD_BYTES : nullptr;
    }
  }
#pragma unroll 1
  for (int tile = warp; tile < MATRIX_TILES + MEAN_TILES; tile += WARPS) {
    const bool of_means = tile >= MATRIX_TILES;
    float y[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; n++) y[n][0] = y[n][1] = y[n][2] = y[n][3] = 0;
#pragma unroll 1
    for (int part = 0; part < 1 + of_means; part++) {
      const u8 *source = tile_of(basis, tile, part);
      if (part || tile != warp) load_rows(source, 0, lane, rows);
      multiply_rows(source, rows, operands, lane, y);
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        u8 *record = records[n][e];
        if (!record) continue;
        const float factor = factors[n * 8 + 2 * t + e];
        if (of_means) {
          float *gains = (float *)(record + 2 * D + 16) + (tile - MATRIX_TILES) * 16;
#pragma unroll
          for (int half = 0; half < 2; half++)
            gains[g + 8 * half] = fminf(fmaxf(y[n][e + 2 * half] * (factor * mean_scale), -1e30f), 1e30f);
        } else {  // rows g and g + 8: dims 2g and 2g + 1
          *(u32 *)(record + (tile * 16 + 2 * g) * 2) = pack_f16(y[n][e], y[n][e + 2]);
          if (tile == 0 && g == 0) *(float *)(record + 2 * D) = factor;
        }
      }
  }
}
