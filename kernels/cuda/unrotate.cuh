// R^T = diag(s) H / sqrt(D) for eight tokens at once. H is a product over the bits of a dim: four bits by tensor cores, whose
// sums of levels are exact, the others by additions between a lane's registers. Another transform replaces this file and
// nothing else.
//
// `y[s]` is the B operand of an MMA, dims by tokens: lane (g, t) holds token g; slot k's bits are, from the lowest, a pair's
// half, t (two bits), and the register. Which bits of a dim they are depends on how a side is stored:
//
//                 pair   t      register   s
//   D = 64        3      4, 5   2          0, 1
//   D = 128, K    3      5, 6   4          0, 1, 2
//   D = 128, V    4      5, 6   3          0, 1, 2
//   D = 256, K    3      5, 6   4          0, 1, 2, 7
//   D = 256, V    5      6, 7   3          0, 1, 2, 4
//
// `x[s][e]` comes back for token 2t + e % 2. The MMA's row, g + 8 * (e / 2), is dim bits 3, 4, 5 and 6 (D = 64: 2 instead of
// 6; D = 256, V: 3, 5, 6 and 7), so that a store of eight dims a lane is contiguous over lanes.

#define STEPS (D / 16)
#define SCALES (D == 256 ? 2 : 1)
#define OCTETS (D / 64)  // runs of 8 dims that a lane has of a token

template <bool VALUE> DEVICE int slot_dim(int k) {
  constexpr bool wide = VALUE && D == 256, swapped = VALUE && D == 128;
  constexpr int pair = wide ? 5 : swapped ? 4 : 3, lanes = wide ? 6 : D == 64 ? 4 : 5;
  constexpr int other = D == 64 ? 2 : VALUE ? 3 : 4;
  return (k & 1) << pair | (k >> 1 & 3) << lanes | (k >> 3) << other;
}

template <bool VALUE> DEVICE int row_dim(int row) {
  if (VALUE && D == 256) return (row & 1) << 3 | (row >> 1) << 5;
  return (row & 7) << 3 | (row >> 3) << (D == 64 ? 2 : 6);
}

DEVICE u32 parity(int x) {
  x ^= x >> 4;
  x ^= x >> 2;
  return (x ^ x >> 1) & 1;
}

// An entry of H in fp16. Bit 7 tells two scales apart: the MMA passes it through.
DEVICE u32 hadamard_entry(int row_dim, int slot_dim) {
  u32 entry = 0x3C00u | parity((row_dim & slot_dim & 0x7F)) << 15;
  return (row_dim ^ slot_dim) & 0x80 ? 0 : entry;
}

// The lane's four words of the A operand.
template <bool VALUE> DEVICE void hadamard_operand(int g, int t, u32 *a) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = row_dim<VALUE>(g + 8 * (i & 1)), k = 2 * t + 8 * (i >> 1);
    a[i] = hadamard_entry(row, slot_dim<VALUE>(k)) | hadamard_entry(row, slot_dim<VALUE>(k + 1)) << 16;
  }
}

// Which run of 8 dims is the lane's `j`-th, and where in `x` its dim `n` is.
template <bool VALUE> DEVICE constexpr int octet_of(int g, int j) {
  return VALUE && D == 256 ? (g & 1) | (j & 1) << 1 | (g >> 1) << 2 | (j >> 1) << 4 : g + 8 * j;
}
template <bool VALUE> DEVICE constexpr int step_of(int j, int n) {
  return D == 64 ? n & 3 : D == 128 ? n : n | (VALUE ? j & 1 : j >> 1) << 3;
}
template <bool VALUE> DEVICE constexpr int part_of(int j, int n) {
  return D == 64 ? n >> 2 : D == 128 ? j : VALUE ? j >> 1 : j & 1;
}

// The signs s of the lane's dims: dims 2i and 2i + 1 of its j-th run at bits 15 - (4j + i) and 31 - (4j + i).
template <bool VALUE> DEVICE constexpr u32 packed_signs(int g) {
  constexpr u32 words[D / 32] = {SIGNS};
  u32 packed = 0;
  for (int j = 0; j < OCTETS; j++)
    for (int n = 0; n < 8; n++) {
      int dim = octet_of<VALUE>(g, j) * 8 + n;
      packed |= (words[dim / 32] >> dim % 32 & 1) << ((n & 1 ? 31 : 15) - (4 * j + n / 2));
    }
  return packed;
}

template <bool VALUE> DEVICE u32 lane_signs(int g) {
  constexpr u32 s0 = packed_signs<VALUE>(0), s1 = packed_signs<VALUE>(1), s2 = packed_signs<VALUE>(2);
  constexpr u32 s3 = packed_signs<VALUE>(3), s4 = packed_signs<VALUE>(4), s5 = packed_signs<VALUE>(5);
  constexpr u32 s6 = packed_signs<VALUE>(6), s7 = packed_signs<VALUE>(7);
  u32 low = g & 2 ? (g & 1 ? s3 : s2) : (g & 1 ? s1 : s0);
  u32 high = g & 2 ? (g & 1 ? s7 : s6) : (g & 1 ? s5 : s4);
  return g & 4 ? high : low;
}

DEVICE void butterfly(float &a, float &b) {
  float sum = a + b;
  b = a - b;
  a = sum;
}

// `scale`: of each group of dims and of tokens 2t and 2t + 1, the root included. All of R^T but its signs.
template <bool VALUE>
DEVICE void unrotate(const u32 *hadamard, const u32 (*y)[2], const float (*scale)[2], float (*x)[4]) {
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    x[s][0] = x[s][1] = x[s][2] = x[s][3] = 0;
    mma_f16(x[s], hadamard[0], hadamard[1], hadamard[2], hadamard[3], y[s][0], y[s][1]);
  }
#pragma unroll
  for (int step = 1; step < (D == 256 && !VALUE ? 8 : STEPS); step <<= 1)
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (!(s & step)) butterfly(x[s][e], x[s | step][e]);
#pragma unroll
  for (int s = 0; s < STEPS; s++)
#pragma unroll
    for (int e = 0; e < 4; e++) x[s][e] *= scale[D == 256 ? (VALUE ? e >> 1 : s >> 3) : 0][e & 1];
#if D == 256
#pragma unroll
  for (int s = 0; s < (VALUE ? 16 : 8); s++)
#pragma unroll
    for (int e = 0; e < (VALUE ? 2 : 4); e++) butterfly(x[s][e], VALUE ? x[s][e + 2] : x[s + 8][e]);
#endif
}
