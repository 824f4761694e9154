// Results of warps, then of CTAs, become rows. In the exponent's base 2: a part is an unnormalised sum [D], the maximum it
// is relative to, and the sum of its weights. NO_MAXIMUM marks a part that saw no token.

#define NO_MAXIMUM -1e30f

// The warps' parts in shared memory, [WARPS][MERGE_ROWS].
struct Parts {
  float *sums;   // [..][D]
  float *peaks;  // [..][maximum, weight]
};

// Where a query row of a segment lies; `live` is false for rows of no query.
struct Row {
  bool live;
  int token, head;
};

DEVICE Row row_of(const Params &p, const Request &r, int virtual_head, int column) {
  int tiles = (p.group * p.max_query_len + COLUMNS - 1) / COLUMNS;
  int row = virtual_head % tiles * COLUMNS + column, query = row / p.group;
  Row result = {query < r.rows, r.start + query, virtual_head / tiles * p.group + row - query * p.group};
  return result;
}

DEVICE float sink_of(const Params &p, int head) {
#if SINK_BITS == 32
  return ((const float *)p.sinks)[head] * LOG2E;
#elif SINK_BITS == 16
  return input_to_float(((const u16 *)p.sinks)[head]) * LOG2E;
#else
  return NO_MAXIMUM;
#endif
}

#if RECENT
// Of weights that sum up to `weight` relative to the maximum `top`.
DEVICE void leave_lse(const Params &p, int token, int head, float top, float weight) {
  p.lse[(u64)token * (p.kv_heads * p.group) + head] = weight == 0 ? NO_MAXIMUM : (top + log2_fast(weight)) * LN2;
}
#endif

// Normalises, rotates back and writes one row.
DEVICE void finish_row(const Params &p, const Row &row, float *sum, float peak, float weight, int lane) {
  if (!row.live) return;
  float scale = 1, top = peak;
  if (SINK_BITS) {
    float sink = sink_of(p, row.head);
    top = fmaxf(peak, sink);
    scale = exp2_fast(peak - top);
    weight = weight * scale + exp2_fast(sink - top);
  }
#if RECENT
  if (lane == 0) leave_lse(p, row.token, row.head, top, weight);
#endif
  // A row that sees no token is 0. NaN is not 0.
  scale = weight == 0 ? 0 : scale * p.out_scale / weight;
  rotate_back(sum, p.out + row.token * p.out_token + row.head * p.out_head, scale, lane);
}

// Merges the warps' parts of MERGE_ROWS columns from `first` on. `partial` null: into rows; else into this CTA's partial.
DEVICE void merge_warps(const Params &p, const Segment &s, const Parts &parts, int first, float *partial, int warp, int lane) {
  for (int hd = warp; hd < MERGE_ROWS; hd += WARPS) {
    float peak = NO_MAXIMUM, weight = 0, sum[LANE_DIMS];
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) sum[i] = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, parts.peaks[(w * MERGE_ROWS + hd) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      int part = w * MERGE_ROWS + hd;
      float shrink = exp2_fast(parts.peaks[part * 2] - peak);
      weight += shrink * parts.peaks[part * 2 + 1];
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i++) sum[i] += shrink * parts.sums[part * D + lane * LANE_DIMS + i];
    }
    int column = first + hd;
    if (!partial) {
      finish_row(p, row_of(p, s.request, s.head, column), sum, peak, weight, lane);
    } else {
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i++) partial[column * D + lane * LANE_DIMS + i] = sum[i];
      if (lane == 0) {
        partial[ROWS * D + column * 2] = peak;
        partial[ROWS * D + column * 2 + 1] = weight;
      }
    }
  }
}

DEVICE void load_lane(const float *source, float *x) {
  if (LANE_DIMS == 2) load_remote_64(source, x);
#pragma unroll
  for (int i = 0; i + 4 <= LANE_DIMS; i += 4) load_remote_128(source + i, x + i);
}

// Where the CTAs that share a (request, head) left their partials. A CTA has two: one of the segment that it starts with,
// one of a segment that begins inside its share and goes on beyond.
struct Partials {
  const float *base;
  u32 first, last;  // CTAs
  bool inside;      // the first CTA's segment begins inside its share

  DEVICE_MEMBER const float *of(u32 cta) const {
    return base + (u64)(2 * cta + (cta == first && inside)) * (ROWS * (D + 4));
  }
};

// Folds the CTAs' partials of MERGE_ROWS columns into one part a warp. All columns of a partial are loaded at once, so that
// their latencies overlap.
DEVICE void fold_partials(const Partials &partials, const Parts &parts, int first, int warp, int lane) {
  float peak[MERGE_ROWS], weight[MERGE_ROWS], sum[MERGE_ROWS][LANE_DIMS];
#pragma unroll
  for (int x = 0; x < MERGE_ROWS; x++) {
    peak[x] = NO_MAXIMUM;
    weight[x] = 0;
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) sum[x][i] = 0;
  }
  for (u32 cta = partials.first + warp + lane * WARPS; cta <= partials.last; cta += 32 * WARPS)
#pragma unroll
    for (int x = 0; x < MERGE_ROWS; x++)
      peak[x] = fmaxf(peak[x], load_remote(partials.of(cta) + ROWS * D + (first + x) * 2));
  sync_warp();
#pragma unroll
  for (int step = 1; step < 32; step <<= 1)
#pragma unroll
    for (int x = 0; x < MERGE_ROWS; x++) peak[x] = fmaxf(peak[x], shuffle_xor(peak[x], step));
#pragma unroll(MERGE_ROWS < 8 ? 2 : 1)
  for (u32 cta = partials.first + warp; cta <= partials.last; cta += WARPS) {
    const float *from = partials.of(cta);
#pragma unroll
    for (int x = 0; x < MERGE_ROWS; x++) {
      float part[2], y[LANE_DIMS];
      load_remote_64(from + ROWS * D + (first + x) * 2, part);
      load_lane(from + (first + x) * D + lane * LANE_DIMS, y);
      float shrink = exp2_fast(part[0] - peak[x]);
      weight[x] += shrink * part[1];
#pragma unroll
      for (int i = 0; i < LANE_DIMS; i++) sum[x][i] += shrink * y[i];
    }
  }
#pragma unroll
  for (int x = 0; x < MERGE_ROWS; x++) {
    int part = warp * MERGE_ROWS + x;
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) parts.sums[part * D + lane * LANE_DIMS + i] = sum[x][i];
    if (lane == 0) {
      parts.peaks[part * 2] = peak[x];
      parts.peaks[part * 2 + 1] = weight[x];
    }
  }
}
