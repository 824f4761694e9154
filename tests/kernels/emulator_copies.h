// Asynchronous copies of ptx.cuh, as late as the machine allows: a target is 0xFF bytes, NaN, from the moment its copy starts
// until a thread has waited for it. Who reads too early, or starts a copy over what others still read, computes NaN.

#include <vector>

namespace machine {
struct Copy {
  u32 target;
  const u8 *source;
  u32 bytes, until;  // until: the barrier, or the thread's group, that tells of its end
};
struct Arrival {
  bool ready = false, armed = false;
  u32 phases = 0, expected = 0;  // phases that are over; bytes of the open one
};
std::vector<Copy> bulk, own[THREADS];
u32 groups[THREADS];
Arrival arrivals[SHARED_BYTES / 8 + 1];

void start(std::vector<Copy> &copies, u32 target, const u8 *source, u32 bytes, u32 until) {
  if (target % 16 || (u64)source % 16 || bytes % 16 || target + bytes > SHARED_BYTES) abort();
  memset(shared + target, 0xFF, bytes);
  copies.push_back({target, source, bytes, until});
}

template <class Ended> u32 land(std::vector<Copy> &copies, Ended ended) {
  u32 bytes = 0;
  std::vector<Copy> left;
  for (const Copy &copy : copies) {
    if (!ended(copy)) {
      left.push_back(copy);
      continue;
    }
    memcpy(shared + copy.target, copy.source, copy.bytes);
    bytes += copy.bytes;
  }
  copies = left;
  return bytes;
}

Arrival &arrival(u32 barrier) {
  Arrival &a = arrivals[barrier / 8];
  if (barrier % 8 || !a.ready) abort();
  return a;
}

void begin_cta() {
  memset(shared, 0xFF, SHARED_BYTES);
  memset(groups, 0, sizeof groups);
  for (Arrival &a : arrivals) a = Arrival();
}

// Aborts where copies would write to memory that is another CTA's by then.
void end_cta() {
  if (!bulk.empty()) abort();
  for (const auto &copies : own)
    if (!copies.empty()) abort();
}
}  // namespace machine

DEVICE void barrier_init(u32 barrier) { machine::arrivals[barrier / 8].ready = true; }
DEVICE void barrier_init_done() {}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  machine::Arrival &a = machine::arrival(barrier);
  if (a.armed) abort();  // the one arrival of this phase was there already
  a.armed = true;
  a.expected = bytes;
}
DEVICE void copy_bulk(u32 target, const u8 *source, u32 bytes, u32 barrier) {
  if (!machine::arrival(barrier).armed) abort();
  machine::start(machine::bulk, target, source, bytes, barrier);
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  machine::Arrival &a = machine::arrival(barrier);
  for (int turns = 0; (a.phases & 1) == parity; turns++) {
    if (a.armed) {
      if (machine::land(machine::bulk, [&](const machine::Copy &c) { return c.until == barrier; }) != a.expected) abort();
      a.armed = false;
      a.phases++;
    } else {
      if (turns > 1000000) abort();  // nobody will arrive
      swapcontext(&machine::fibers[machine::current], &machine::scheduler);
    }
  }
}

DEVICE void copy_16(u32 target, const u8 *source) {
  machine::start(machine::own[machine::current], target, source, 16, machine::groups[machine::current]);
}
DEVICE void copies_commit() { machine::groups[machine::current]++; }
template <int PENDING> DEVICE void copies_wait() {
  u32 committed = machine::groups[machine::current];
  machine::land(machine::own[machine::current], [=](const machine::Copy &c) { return c.until + PENDING < committed; });
}
