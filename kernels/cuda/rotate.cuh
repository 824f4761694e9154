// The rotation R = H diag(s): queries go in as R q, outputs come back as R^T o. Under a key basis queries leave here
// unrotated, and outputs come back alike.

// The row's R q / 2^e as fp16 to `target` [D] in shared memory; under a key basis q / 2^e, for queries.cuh to turn. Returns
// the factor that turns its products with levels into log2 scores. 2^e is the power of two above the largest |q|, so neither
// huge nor tiny queries leave fp16's range. Bounds on the factor keep products with any fp16 scale finite; beyond them a
// softmax is one-hot or flat to fp32's precision.
DEVICE float scale_query(const u16 *row, u16 *target, float score_scale, int lane) {
  const u32 signs = lane_signs(lane);
  float x[LANE_DIMS], peak = 0;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) {
    x[i] = input_to_float(row[lane * LANE_DIMS + i]);
    if (!KEY_BASIS) x[i] = flipped(x[i], signs, i);
    peak = fmaxf(peak, fabsf(x[i]));
  }
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) peak = fmaxf(peak, shuffle_xor(peak, step));
  int exponent = (int)(float_to_bits(peak) >> 23) - 126;  // 2^exponent > peak
  exponent = peak == 0 ? 0 : larger(smaller(exponent, 126), -126);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) x[i] *= bits_to_float((u32)(127 - exponent) << 23);
  if (!KEY_BASIS) hadamard(x, lane);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i += 2) *(u32 *)(target + lane * LANE_DIMS + i) = pack_f16(x[i], x[i + 1]);
  float factor = score_scale * bits_to_float((u32)(127 + exponent) << 23);
  return fminf(fmaxf(factor, KEY_BASIS ? 0x1p-80f : 0x1p-60f), 0x1p60f);  // a basis may turn queries 2^15 longer
}

// out = R^T x * scale, rounded to the output's type.
DEVICE void rotate_back(float *x, u16 *row, float scale, int lane) {
  const u32 signs = lane_signs(lane);
  hadamard(x, lane);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) x[i] = flipped(x[i] * scale, signs, i);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i += 2)
    *(u32 *)(row + lane * LANE_DIMS + i) = INPUT_BF16 ? pack_bf16(x[i], x[i + 1]) : pack_f16(x[i], x[i + 1]);
}
