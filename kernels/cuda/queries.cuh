// A segment's queries, as stored keys are read by them, to shared memory.

// The columns' queries, their factors and causal limits; under a key basis as turn.cu left them, with what scores gain by means.
DEVICE void load_queries(const Params &p, const Segment &s, u16 *queries, float *factors, int *limits, float *gains, int warp,
                         int lane) {
  for (int column = warp; column < COLUMNS; column += WARPS) {
    Row row = row_of(p, s.request, s.head, column);
    u16 *target = queries + column * D;
    float factor = 0;
#if KEY_BASIS
    // Loads come first: a record is far away.
    const u8 *record = p.turned + ((u64)row.token * (p.kv_heads * p.group) + row.head) * RECORD_BYTES;
    float words[LANE_DIMS / 2], gain[(MEAN_ROWS + 31) / 32];
#pragma unroll
    for (int i = 0; i < LANE_DIMS / 2; i++) words[i] = row.live ? load_remote((const float *)record + lane * (LANE_DIMS / 2) + i) : 0;
#pragma unroll
    for (int i = 0; i < (MEAN_ROWS + 31) / 32; i++)
      gain[i] = row.live && i * 32 + lane < MEAN_ROWS ? load_remote((const float *)(record + 2 * D + 16) + i * 32 + lane) : 0;
    if (row.live) factor = load_remote((const float *)(record + 2 * D));
#pragma unroll
    for (int i = 0; i < LANE_DIMS / 2; i++) ((float *)target)[lane * (LANE_DIMS / 2) + i] = words[i];
#pragma unroll
    for (int i = 0; i < (MEAN_ROWS + 31) / 32; i++) {
      const int mean = i * 32 + lane;
      if (mean < MEAN_ROWS) gains[(mean ? mean + 1 : 0) * COLUMNS + column] = gain[i];
    }
    if (lane == 0) gains[COLUMNS + column] = 0;  // the first bucket's
#else
    if (row.live) {
      factor = scale_query(p.query + row.token * p.query_token + row.head * p.query_head, target, p.score_scale, lane);
    } else {
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i += 2) *(u32 *)(target + lane * LANE_DIMS + i) = 0;
    }
#endif
    if (lane == 0) {
      factors[column] = factor;
      limits[column] = row.live ? s.request.length - s.request.rows + (row.token - s.request.start) + 1 : 0;
    }
  }
  sync_block();
}
