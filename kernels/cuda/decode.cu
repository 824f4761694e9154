// Decode attention over TurboQuant pages in one launch. Work in units of 16 tokens is spread evenly over a fixed grid; the
// CTAs that share a (request, head) leave partial results, and whichever is last merges them.

// What scores gain by the mean that keys are relative to, padding of the record's last tile included.
#define GAINS (KEY_BASIS ? (1 + MEAN_ROWS) * COLUMNS : 0)

static_assert(SHARED_BYTES == WARPS * STAGES * SLOT_BYTES + WARPS * MERGE_ROWS * (D + 2) * 4 + COLUMNS * (2 * D + 8) +
                                  GAINS * 4 + WARPS * STAGES * 8 + 16,
              "the launcher reserves what the kernel uses");

// Padded requests, and requests all of whose tokens are left out: their rows become 0.
DEVICE void clear_dead_rows(const Params &p) {
  for (int index = block_id(); index < p.requests; index += block_count()) {
    if (RECENT ? units_of(p, index) > 0 : p.seq_lens[index] > 0) continue;
    int start = p.query_start_loc[index], rows = smaller(p.query_start_loc[index + 1] - start, p.max_query_len);
    for (int i = thread_id(); i < rows * p.kv_heads * p.group * (D / 2); i += WARPS * 32) {
      int head = i / (D / 2) % (p.kv_heads * p.group), row = i / (D / 2) / (p.kv_heads * p.group);
      *(u32 *)(p.out + (start + row) * p.out_token + head * p.out_head + i % (D / 2) * 2) = 0;
#if RECENT
      if (i % (D / 2) == 0) leave_lse(p, start + row, head, sink_of(p, head), SINK_BITS ? 1 : 0);
#endif
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_CTAS) turboquant_decode(const Params p) {
  extern __shared__ __align__(128) u8 shared[];
  const int lane = lane_id(), warp = shuffle(thread_id() >> 5, 0), g = lane >> 2, t = lane & 3;
  const Parts parts = {(float *)(shared + WARPS * STAGES * SLOT_BYTES),
                       (float *)(shared + WARPS * STAGES * SLOT_BYTES) + WARPS * MERGE_ROWS * D};
  u16 *queries = (u16 *)(parts.peaks + WARPS * MERGE_ROWS * 2);
  float *factors = (float *)(queries + COLUMNS * D);
  int *limits = (int *)(factors + COLUMNS);
  float *gains = (float *)(limits + COLUMNS);
  u64 *barriers = (u64 *)(gains + GAINS);
  int *last = (int *)(barriers + WARPS * STAGES);
  const Levels keys = {KEY_LEVELS}, values = {VALUE_LEVELS};

  Ring ring;
  ring.slots = shared_address(shared) + warp * STAGES * SLOT_BYTES;
  ring.barriers = shared_address(barriers) + warp * STAGES * 8;
  ring.filling = 0;
  ring.pages = 0;
#if BULK
  if (lane < STAGES) barrier_init(ring.barriers + lane * 8);
  barrier_init_done();
  sync_warp();
#endif
  const int column_tiles = (p.group * p.max_query_len + COLUMNS - 1) / COLUMNS;
  const u32 heads = p.kv_heads * column_tiles;
  const Share share = share_work(p, heads, lane);
  if (share.begin >= share.end) {
    if (KEY_BASIS) wait_for_launcher();
    clear_dead_rows(p);
    return;
  }
  Segment next = first_segment(p, share, heads, lane);
  ring.open(p, next, column_tiles, warp);
#pragma unroll
  for (int i = 0; i < STAGES; i++) ring.advance(p, warp, lane);
  clear_dead_rows(p);
  // Turned queries are another kernel's, which this one may have overtaken; pages were written before that one began.
  if (KEY_BASIS) wait_for_launcher();
  u32 slot = 0, phase = 0;
  while (true) {
    const Segment s = next;
    load_queries(p, s, queries, factors, limits, gains, warp, lane);
    State state;
    begin_state(state, queries, factors, g, t);
    const int first_token = (s.request.first + s.begin) * 16;
    Bounds bounds;
    bounds.end = smaller(END_OF(s.request), first_token + s.count * 16);
    bounds.all_see = smaller(s.request.length - s.request.rows + 1, bounds.end);
    bounds.all_see_from = s.request.length - p.window;
    bounds.oldest = s.request.length - s.request.rows + 1 - p.window;
    bounds.limits = limits;
    bounds.gains = gains;
    const int steps = ring.steps;
    int token = first_token + warp * 32;
#pragma unroll 1
    for (int i = 0; i < steps; i++, token += WARPS * 32) {
      ring.wait(slot, phase);
      attend_pair(p, state, bounds, keys, values, queries, ring.slots + slot * SLOT_BYTES, token, lane);
      sync_warp();
      ring.advance(p, warp, lane);
      if (slot + 1 == STAGES) {
        slot = 0;
        phase ^= 1;
      } else {
        slot++;
      }
    }
    // The next segment's first copies fly while this one is merged.
    const bool more = s.position + s.count < share.end;
    if (more) {
      next = next_segment(p, s, share, heads);
      ring.open(p, next, column_tiles, warp);
#pragma unroll
      for (int i = 0; i < STAGES; i++) ring.advance(p, warp, lane);
    }
    const bool whole = s.count == s.request.units;
    const u32 mine = 2 * block_id() + (s.position != share.begin);
    float *partial = whole ? nullptr : p.partial + (u64)mine * (ROWS * (D + 4));
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      if (n) sync_block();
      leave_part(state, parts, n, warp, g, t);
      sync_block();
      merge_warps(p, s, parts, n * 8, partial, warp, lane);
    }
    if (!whole) {
      const u32 begin = heads * s.before + s.head * s.request.units;
      Partials partials = {p.partial, begin / share.quota, (begin + s.request.units - 1) / share.quota, false};
      partials.inside = begin != partials.first * share.quota;
      sync_block();
      // One counter a CTA is enough: at most one shared (request, head) begins in each.
      if (thread_id() == 0) {
        int *counter = p.counters + partials.first;
        *last = arrive(counter) == (int)(partials.last - partials.first);
        if (*last) *counter = 0;
      }
      sync_block();
      if (*last) {
#pragma unroll 1
        for (int n = 0; n < TILES; n++) {
          fold_partials(partials, parts, n * 8, warp, lane);
          sync_block();
          merge_warps(p, s, parts, n * 8, nullptr, warp, lane);
          sync_block();
        }
      }
    }
    if (!more) break;
    sync_block();
  }
}
