// ptx.cuh on the CPU, asynchronous copies apart: each CUDA thread is a fiber, warp primitives exchange values through memory.
// CTAs run one after another. Shared memory starts as 0xFF bytes: what was never copied is NaN.

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static inline
#define DEVICE_MEMBER inline
#define __global__
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)

alignas(128) u8 shared[SHARED_BYTES];

namespace machine {
const int THREADS = WARPS * 32, STACK = 1 << 16;
struct Barrier {
  int waiting = 0;
  u32 generation = 0;
};
ucontext_t scheduler, fibers[THREADS];
char stacks[THREADS][STACK];
bool done[THREADS];
int current;
u32 block, blocks;
Barrier warp_barriers[WARPS], block_barrier;
u32 exchanged[2][THREADS][6];

void meet(Barrier &b, int count) {
  u32 mine = b.generation;
  if (++b.waiting == count) {
    b.waiting = 0;
    b.generation++;
    return;
  }
  while (b.generation == mine) swapcontext(&fibers[current], &scheduler);
}

// Gives `n` words, returns the warp's [32][6]. Two buffers in turn, so that one meeting suffices.
const u32 (*exchange(const u32 *words, int n))[6] {
  int warp = current / 32;
  u32 buffer = warp_barriers[warp].generation & 1;
  for (int i = 0; i < n; i++) exchanged[buffer][current][i] = words[i];
  meet(warp_barriers[warp], 32);
  return exchanged[buffer] + warp * 32;
}
}  // namespace machine

DEVICE float bits_to_float(u32 x) {
  float r;
  memcpy(&r, &x, 4);
  return r;
}
DEVICE u32 float_to_bits(float x) {
  u32 r;
  memcpy(&r, &x, 4);
  return r;
}
DEVICE u32 f16_bits(float x) {
  _Float16 h = (_Float16)x;
  u16 r;
  memcpy(&r, &h, 2);
  return r;
}
DEVICE u32 bf16_bits(float x) {
  u32 b = float_to_bits(x);
  return x != x ? 0x7FFFu : (b + 0x7FFFu + (b >> 16 & 1)) >> 16;
}
DEVICE float f16_low(u32 pair) {
  u16 b = (u16)pair;
  _Float16 h;
  memcpy(&h, &b, 2);
  return (float)h;
}
DEVICE float f16_high(u32 pair) { return f16_low(pair >> 16); }
DEVICE u32 pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
DEVICE u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float log2_fast(float x) { return log2f(x); }
DEVICE float divide(float a, float b) { return a / b; }

DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 pick = selector >> (4 * i) & 15, byte = (u32)(bytes >> (8 * (pick & 7))) & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
    r |= byte << (8 * i);
  }
  return r;
}
#define WIDENS_E4M3 BULK
#define TIGHT_REGISTERS !BULK
DEVICE float e4m3_to_float(u32 x) {
  float magnitude = x & 0x78 ? ldexpf(8 + (x & 7), (int)(x >> 3 & 15) - 10) : ldexpf(x & 7, -9);
  return x & 0x80 ? -magnitude : magnitude;
}
DEVICE void widen_e4m3(u32 x, u32 *out) {
  for (int i = 0; i < 2; i++) out[i] = pack_f16(e4m3_to_float(x >> 16 * i & 0xFF), e4m3_to_float(x >> (16 * i + 8) & 0xFF));
}
DEVICE u32 select_bits(u32 a, u32 b, u32 mask) { return (a & mask) | (b & ~mask); }
DEVICE u32 and_or(u32 a, u32 mask, u32 b) { return (a & mask) | b; }
DEVICE u32 rotate_left(u32 x, u32 n) { return x << n | x >> (32 - n); }

DEVICE int thread_id() { return machine::current; }
DEVICE int lane_id() { return machine::current & 31; }
DEVICE u32 block_id() { return machine::block; }
DEVICE u32 block_count() { return machine::blocks; }
DEVICE void sync_warp() { machine::meet(machine::warp_barriers[machine::current / 32], 32); }
DEVICE void sync_block() { machine::meet(machine::block_barrier, machine::THREADS); }
DEVICE u32 from_lane(u32 x, int lane) { return machine::exchange(&x, 1)[lane][0]; }
DEVICE int shuffle(int x, int lane) { return (int)from_lane((u32)x, lane); }
DEVICE int shuffle_up(int x, int step) {
  int lane = lane_id();
  return (int)from_lane((u32)x, lane >= step ? lane - step : lane);
}
DEVICE int shuffle_xor(int x, int mask) { return (int)from_lane((u32)x, lane_id() ^ mask); }
DEVICE float shuffle_xor(float x, int mask) { return bits_to_float(from_lane(float_to_bits(x), lane_id() ^ mask)); }
DEVICE u32 ballot(bool x) {
  u32 word = x, r = 0;
  const u32(*all)[6] = machine::exchange(&word, 1);
  for (int i = 0; i < 32; i++) r |= all[i][0] << i;
  return r;
}
DEVICE bool any_lane(bool x) { return ballot(x) != 0; }
DEVICE int first_bit(u32 x) { return __builtin_ctz(x); }

DEVICE u32 transpose_tile(u32 x) {
  const u32(*all)[6] = machine::exchange(&x, 1);
  int g = lane_id() >> 2, t = lane_id() & 3;
  u32 low = all[4 * (2 * t) + g / 2][0], high = all[4 * (2 * t + 1) + g / 2][0];
  return (low >> (g & 1) * 16 & 0xFFFF) | (high >> (g & 1) * 16 & 0xFFFF) << 16;
}

DEVICE void mma_f16(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 operands[6] = {a0, a1, a2, a3, b0, b1};
  const u32(*all)[6] = machine::exchange(operands, 6);
  int g = lane_id() >> 2, t = lane_id() & 3;
  for (int e = 0; e < 4; e++) {
    double sum = c[e];
    for (int k = 0; k < 16; k++) {
      int pair = k % 8 / 2, shift = k % 2 * 16;
      u32 a = all[4 * g + pair][e / 2 + 2 * (k / 8)] >> shift & 0xFFFF;
      u32 b = all[4 * (2 * t + e % 2) + pair][4 + k / 8] >> shift & 0xFFFF;
      sum += (double)f16_low(a) * f16_low(b);
    }
    c[e] = (float)sum;
  }
}
DEVICE void mma_tf32(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 operands[6] = {a0, a1, a2, a3, b0, b1};
  const u32(*all)[6] = machine::exchange(operands, 6);
  int g = lane_id() >> 2, t = lane_id() & 3;
  for (int e = 0; e < 4; e++) {
    double sum = c[e];
    for (int k = 0; k < 8; k++) {
      u32 a = all[4 * g + k % 4][e / 2 + 2 * (k / 4)], b = all[4 * (2 * t + e % 2) + k % 4][4 + k / 4];
      sum += (double)bits_to_float(a & 0xFFFFE000u) * bits_to_float(b & 0xFFFFE000u);
    }
    c[e] = (float)sum;
  }
}

DEVICE u32 shared_address(const void *p) { return (u32)((const u8 *)p - shared); }
DEVICE void load_shared(u32 address, u32 *r, int bytes) {
  if (address % bytes || address + bytes > SHARED_BYTES) abort();
  r[0] = 0;
  memcpy(r, shared + address, bytes);
}
DEVICE void load_shared_128(u32 address, u32 *r) { load_shared(address, r, 16); }
DEVICE void load_shared_64(u32 address, u32 *r) { load_shared(address, r, 8); }
DEVICE void load_shared_32(u32 address, u32 *r) { load_shared(address, r, 4); }
DEVICE void load_shared_16(u32 address, u32 *r) { load_shared(address, r, 2); }

DEVICE void load_page(const u8 *p, u32 *r, int bytes) {
  if ((u64)p % bytes) abort();
  r[0] = 0;
  memcpy(r, p, bytes);
}
DEVICE void load_page_128(const u8 *p, u32 *r) { load_page(p, r, 16); }
DEVICE void load_page_64(const u8 *p, u32 *r) { load_page(p, r, 8); }
DEVICE void load_page_32(const u8 *p, u32 *r) { load_page(p, r, 4); }
DEVICE void load_page_16(const u8 *p, u32 *r) { load_page(p, r, 2); }
DEVICE void store_128(u16 *p, const u32 *r) {
  if ((u64)p % 16) abort();
  memcpy(p, r, 16);
}

DEVICE float load_remote(const float *p) { return *p; }
DEVICE void load_remote_128(const float *p, float *r) { memcpy(r, p, 16); }
DEVICE void load_remote_64(const float *p, float *r) { memcpy(r, p, 8); }
DEVICE int arrive(int *p) { return (*p)++; }

DEVICE void launch_dependents() {}
DEVICE void wait_for_launcher() {}
