// What several kernels do with numbers and positions.

#define INVERSE_ROOT (D == 64 ? 0.125f : D == 128 ? 0.08838834764831845f : 0.0625f)  // 1 / sqrt(D)

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

// The bucket of positions whose mean a unit's keys are relative to. `inverse`: 2^31 over the units in a bucket, rounded up, which
// is exact while unit times those is below 2^31.
DEVICE int bucket_of(u32 unit, u32 inverse, int buckets) {
  const int bucket = (int)((u64)unit * inverse >> 31);
  return bucket < buckets ? bucket : buckets - 1;
}
