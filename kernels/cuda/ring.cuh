// Each warp's own ring of STAGES slots in shared memory, two units a slot, filled ahead of use across segments. A bulk copy
// brings a whole unit (sm_90 and later); elsewhere the lanes copy it 16 bytes at a time.

#define SLOT_BYTES (2 * UNIT_BYTES)
#define SUB_MASK ((1 << SUB_SHIFT) - 1)

struct Ring {
  u32 slots, barriers;  // shared addresses of this warp's slots and barriers
  u32 filling;          // slot that the next copy goes to
  const u8 *head;       // the KV head's first page
  const int *table;     // the request's block table
  int unit, count;      // first unit and units of the open segment
  int step, steps;      // pairs of units of this warp: next to copy, and all
  int pages;            // block numbers of the next 16 pairs, one unit a lane

  DEVICE_MEMBER void open(const Params &p, const Segment &s, int column_tiles, int warp) {
    head = p.cache + (u64)(s.head / column_tiles) * p.cache_head;
    table = p.block_table + (u64)s.index * p.table_request;
    unit = s.request.first + s.begin;
    count = s.count;
    step = 0;
    steps = larger((count - 2 * warp + 2 * WARPS - 1) / (2 * WARPS), 0);
  }

  DEVICE_MEMBER void copy_unit(u32 target, const u8 *source, u32 barrier, int lane) {
#if BULK
    if (lane == 0) copy_bulk(target, source, UNIT_BYTES, barrier);
#else
#pragma unroll
    for (int i = 0; i < (UNIT_BYTES + 511) / 512; i++)
      if (i * 512 + 512 <= UNIT_BYTES || i * 512 + lane * 16 < UNIT_BYTES)
        copy_16(target + i * 512 + lane * 16, source + i * 512 + lane * 16);
#endif
  }

  // Starts copying this warp's next pair of units, if there is one. Block numbers past the segment are never read.
  DEVICE_MEMBER void advance(const Params &p, int warp, int lane) {
    if (step < steps) {
      if ((step & 15) == 0) {
        int ahead = 2 * (warp + WARPS * (step + (lane >> 1))) + (lane & 1);
        pages = ahead < count ? table[(unit + ahead) >> SUB_SHIFT] : -1;
      }
      int page0 = shuffle(pages, (step & 15) * 2), page1 = shuffle(pages, (step & 15) * 2 + 1);
      int at = 2 * (warp + WARPS * step);
      bool both = at + 1 < count;
      u32 barrier = barriers + filling * 8, target = slots + filling * SLOT_BYTES;
      if (BULK && lane == 0) barrier_expect(barrier, both ? 2 * UNIT_BYTES : UNIT_BYTES);
      copy_unit(target, head + (u64)(u32)page0 * p.cache_block + (unit + at & SUB_MASK) * UNIT_BYTES, barrier, lane);
      if (both)
        copy_unit(target + UNIT_BYTES, head + (u64)(u32)page1 * p.cache_block + (unit + at + 1 & SUB_MASK) * UNIT_BYTES,
                  barrier, lane);
      filling = filling + 1 == STAGES ? 0 : filling + 1;
    }
    // One group a call, empty or not: waiting counts groups.
    if (!BULK) copies_commit();
    step++;
  }

  DEVICE_MEMBER void wait(u32 slot, u32 phase) {
    if (BULK) {
      barrier_wait(barriers + slot * 8, phase);
    } else {
      copies_wait<STAGES - 1>();
      sync_warp();
    }
  }
};
