// Who does what. All units of the batch stand in one line, by request, then head (and column tile), then position; CTA i
// takes units i * quota .. (i + 1) * quota - 1. The grid never depends on lengths, which are read here, on the device.

struct Request {
  int length, start, rows;  // rows: query tokens
#if RECENT
  int end;  // tokens from here on are left out
#define END_OF(request) (request).end
#else
#define END_OF(request) (request).length
#endif
  int first, units;         // first unit of 16 tokens that a query can see, and how many there are; 0: no work
};

DEVICE Request load_request(const Params &p, int index) {
  Request r;
  r.length = p.seq_lens[index];
  r.start = p.query_start_loc[index];
  r.rows = smaller(p.query_start_loc[index + 1] - r.start, p.max_query_len);
#if RECENT
  r.end = smaller(r.length, p.ends[index]);
#endif
  r.first = WINDOW ? larger(r.length - r.rows - p.window + 1, 0) >> 4 : 0;
  r.units = r.length > 0 && r.rows > 0 ? ((END_OF(r) + 15) >> 4) - r.first : 0;
  if (RECENT) r.units = larger(r.units, 0);  // where a window begins behind the end
  return r;
}

DEVICE int units_of(const Params &p, int index) { return index < p.requests ? load_request(p, index).units : 0; }

// A run of units of one request and virtual head (head * column tiles + column tile).
struct Segment {
  Request request;
  int index, head;
  int begin, count;  // units, from the request's first
  u32 before;        // units of earlier requests, of one head
  u32 position;      // in the line of all units
};

struct Share {
  u32 quota, begin, end;
};

DEVICE int warp_sum(int x) {
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) x += shuffle_xor(x, step);
  return x;
}

DEVICE int warp_max(int x) {
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) x = larger(x, shuffle_xor(x, step));
  return x;
}

// Equal shares of all units. Where all requests are equally long, a share that ends with a (request, head) instead of
// straddling two is worth up to an eighth more units: it saves a partial result and its merge.
DEVICE Share share_work(const Params &p, u32 heads, int lane) {
  int sum = 0, most = 0, negative_least = -0x7FFFFFFF;
#pragma unroll 2
  for (int i = lane; i < p.requests; i += 32) {
    int units = units_of(p, i);
    sum += units;
    most = larger(most, units);
    negative_least = larger(negative_least, -units);
  }
  u32 total = (u32)warp_sum(sum) * heads;
  u32 longest = warp_max(most), shortest = -warp_max(negative_least);
  u32 quota = larger((total + block_count() - 1) / block_count(), MIN_UNITS);
  if (longest == shortest && longest > 0) {
    u32 even = quota;
    if (quota < longest) {
      u32 splits = longest / quota, part = (longest + splits - 1) / splits;
      if (splits * part == longest) even = part;
    } else {
      even = (quota + longest - 1) / longest * longest;
    }
    if (even * 8 <= quota * 9) quota = even;
  }
  Share share = {quota, block_id() * quota, block_id() * quota + quota};
  if (share.end > total) share.end = total;
  return share;
}

// The segment that holds unit `share.begin`, which exists.
DEVICE Segment first_segment(const Params &p, const Share &share, u32 heads, int lane) {
  Segment s;
  s.index = 0;
  s.before = 0;
  for (int base = 0; base < p.requests; base += 32) {
    int units = units_of(p, base + lane), sum = units;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      int other = shuffle_up(sum, step);
      if (lane >= step) sum += other;
    }
    u32 reached = ballot((s.before + sum) * heads > share.begin);
    if (reached) {
      int found = first_bit(reached);
      s.index = base + found;
      s.before += shuffle(sum - units, found);
      break;
    }
    s.before += shuffle(sum, 31);
  }
  s.request = load_request(p, s.index);
  u32 inside = share.begin - s.before * heads;
  s.head = inside / s.request.units;
  s.begin = inside - s.head * s.request.units;
  s.position = share.begin;
  s.count = smaller(share.end - share.begin, s.request.units - s.begin);
  return s;
}

// The segment after `s`, which exists.
DEVICE Segment next_segment(const Params &p, const Segment &s, const Share &share, u32 heads) {
  Segment n = s;
  n.position = s.position + s.count;
  n.begin = 0;
  if (s.head + 1 < (int)heads) {
    n.head = s.head + 1;
  } else {
    n.head = 0;
    n.before += s.request.units;
    do n.request = load_request(p, ++n.index);
    while (n.request.units == 0);
  }
  n.count = smaller(share.end - n.position, n.request.units);
  return n;
}
