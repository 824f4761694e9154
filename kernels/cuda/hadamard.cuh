// Rows of the model's 16-bit numbers and their Hadamard transform. One warp turns one row, LANE_DIMS consecutive dims a lane.

#define LANE_DIMS (D / 32)

// Unnormalised fast Walsh-Hadamard transform of the warp's row; the factor 1 / sqrt(D) is in the launch's scales.
DEVICE void hadamard(float *x, int lane) {
#pragma unroll
  for (int step = 1; step < LANE_DIMS; step <<= 1)
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++)
      if (!(i & step)) {
        float a = x[i], b = x[i | step];
        x[i] = a + b;
        x[i | step] = a - b;
      }
#pragma unroll
  for (int step = 1; step < 32; step <<= 1)
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) {
      float other = shuffle_xor(x[i], step);
      x[i] = lane & step ? other - x[i] : x[i] + other;
    }
}

// Bit i: the rotation flips the sign of the lane's dim i.
DEVICE u32 lane_signs(int lane) {
  constexpr u32 words[D / 32] = {SIGNS};
  u32 word = words[0];
#pragma unroll
  for (int i = 1; i < D / 32; i++) word = lane * LANE_DIMS / 32 == i ? words[i] : word;
  return word >> (lane * LANE_DIMS % 32);
}

DEVICE float flipped(float x, u32 signs, int i) { return bits_to_float(float_to_bits(x) ^ (signs >> i & 1) << 31); }

DEVICE float input_to_float(u16 x) { return INPUT_BF16 ? bits_to_float((u32)x << 16) : f16_low(x); }
