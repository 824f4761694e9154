// Algorithm 1 on one row a warp, LANE_DIMS consecutive dims a lane: the scale's search, codes, and their bytes in a unit.

#define GROUP (D < 128 ? D : 128)  // dims that share a scale
#define GROUP_LANES (GROUP / LANE_DIMS)
#define TRIALS 8  // scale candidates

static_assert(GROUP_LANES >= 2 * TRIALS, "each lane ends with one candidate");

// One plane of a side's codes, of `vllm_turboquant.kernels.tables.PlaneLayout`.
#define PLANE(NAME)                                                                            \
  struct NAME {                                                                                \
    static constexpr int WORDS = NAME##_WORDS, DIMS = NAME##_DIMS, BYTES = NAME##_BYTES;       \
    static constexpr int OFFSETS = NAME##_OFFSETS, MASK0 = NAME##_MASK0, MASK1 = NAME##_MASK1; \
    static constexpr int PLACE0 = NAME##_PLACE0, PLACE1 = NAME##_PLACE1;                       \
    DEVICE_MEMBER static int shift(int field, bool odd, int n) {                               \
      constexpr int shifts[] = {NAME##_SHIFTS};                                                \
      return odd ? shifts[(2 * field + 1) * DIMS + n] : shifts[2 * field * DIMS + n];          \
    }                                                                                          \
  };
PLANE(KEY0)
PLANE(VALUE0)
#if KEY_BITS == 3
PLANE(KEY1)
#else
typedef KEY0 KEY1;
#endif
#if VALUE_BITS == 3
PLANE(VALUE1)
#else
typedef VALUE0 VALUE1;
#endif

template <bool VALUE> struct Codebook;
template <> struct Codebook<false> {
  static constexpr int COUNT = 1 << (KEY_BITS - 1), PLANES = KEY_BITS == 3 ? 2 : 1;
  typedef KEY0 First;
  typedef KEY1 Second;
  DEVICE_MEMBER static float level(int i) {
    constexpr float levels[] = {KEY_STEPS};
    return levels[i];
  }
  DEVICE_MEMBER static float per_sigma() { return KEY_PER_SIGMA; }
};
template <> struct Codebook<true> {
  static constexpr int COUNT = 1 << (VALUE_BITS - 1), PLANES = VALUE_BITS == 3 ? 2 : 1;
  typedef VALUE0 First;
  typedef VALUE1 Second;
  DEVICE_MEMBER static float level(int i) {
    constexpr float levels[] = {VALUE_STEPS};
    return levels[i];
  }
  DEVICE_MEMBER static float per_sigma() { return VALUE_PER_SIGMA; }
};

DEVICE float candidate(int i) {
  constexpr float candidates[TRIALS] = {CANDIDATES};
  return candidates[i];
}

DEVICE float group_sum(float x) {
#pragma unroll
  for (int step = 1; step < GROUP_LANES; step <<= 1) x += shuffle_xor(x, step);
  return x;
}

// Index of the level that is nearest to a magnitude over `factor`.
template <bool VALUE> DEVICE int nearest(float a, float factor, float &level) {
  typedef Codebook<VALUE> Book;
  int index = 0;
  level = Book::level(0);
#pragma unroll
  for (int n = 1; n < Book::COUNT; n++) {
    const bool up = a > factor * ((Book::level(n - 1) + Book::level(n)) * 0.5f);
    index += up;
    level = up ? Book::level(n) : level;
  }
  return index;
}

// Of TRIALS candidates the factor whose levels have the largest cosine with magnitudes `a`, and its <a, levels>.
template <bool VALUE> DEVICE float search(const float *a, float &dot_of_best, int lane) {
  float dot[TRIALS], norm[TRIALS];
#pragma unroll
  for (int c = 0; c < TRIALS; c++) {
    dot[c] = norm[c] = 0;
#pragma unroll
    for (int i = 0; i < LANE_DIMS; i++) {
      float level;
      nearest<VALUE>(a[i], candidate(c), level);
      dot[c] += a[i] * level;
      norm[c] += level * level;
    }
  }
  // Halves of the candidates go to halves of the lanes, until each lane has one.
  int step = GROUP_LANES / 2;
#pragma unroll
  for (int half = TRIALS / 2; half; half >>= 1, step >>= 1)
#pragma unroll
    for (int c = 0; c < half; c++) {
      const bool upper = lane & step;
      const float given_dot = upper ? dot[c] : dot[c + half], given_norm = upper ? norm[c] : norm[c + half];
      dot[c] = (upper ? dot[c + half] : dot[c]) + shuffle_xor(given_dot, step);
      norm[c] = (upper ? norm[c + half] : norm[c]) + shuffle_xor(given_norm, step);
    }
#pragma unroll
  for (; step; step >>= 1) {
    dot[0] += shuffle_xor(dot[0], step);
    norm[0] += shuffle_xor(norm[0], step);
  }
  int best = (lane & (GROUP_LANES - 1)) * TRIALS / GROUP_LANES;
  float score = dot[0] * dot[0] / norm[0];
#pragma unroll
  for (int step = GROUP_LANES / 2; step >= GROUP_LANES / TRIALS; step >>= 1) {
    const int other = shuffle_xor(best, step);
    const float other_score = shuffle_xor(score, step), other_dot = shuffle_xor(dot[0], step);
    const bool take = other_score > score || (other_score == score && other < best);
    best = take ? other : best;
    score = take ? other_score : score;
    dot[0] = take ? other_dot : dot[0];
  }
  dot_of_best = dot[0];
  float factor = candidate(0);
#pragma unroll
  for (int c = 1; c < TRIALS; c++) factor = best == c ? candidate(c) : factor;
  return factor;
}

// Where the lane's word of a plane goes in the unit.
template <class Plane> DEVICE int word_offset(const int *offsets, int place, int lane) {
  return lane < Plane::WORDS ? offsets[Plane::OFFSETS + place * Plane::WORDS + lane] : 0;
}

// The token's words of a plane. `codes` [D] bytes, in shared memory, of the warp.
template <class Plane> DEVICE void store_words(const u8 *codes, u8 *unit, int place, int offset, int lane) {
  if (lane >= Plane::WORDS) return;
  const bool odd = place & 1;
  u32 word = 0;
#pragma unroll
  for (int n = 0; n < Plane::DIMS; n++) {
    const u32 code = ((const u32 *)(codes + lane * Plane::DIMS))[n / 4] >> n % 4 * 8;
    word |= (code >> Plane::PLACE0 & Plane::MASK0) << Plane::shift(0, odd, n);
    if (Plane::MASK1) word |= (code >> Plane::PLACE1 & Plane::MASK1) << Plane::shift(Plane::MASK1 ? 1 : 0, odd, n);
  }
  u8 *target = unit + offset;
  if (Plane::BYTES == 4) *(u32 *)target = word;
  if (Plane::BYTES == 2) *(u16 *)target = (u16)word;
  if (Plane::BYTES == 1) *target = (u8)word;
}

// Encodes the warp's row, which is PRESCALE times what is to be stored. `near`: keys relative to the second mean. `place`: the
// token's in its unit.
template <bool VALUE>
DEVICE void encode_row(float *y, bool near, u8 *unit, int place, const int *offsets, const int *scalars, u8 *codes, int lane) {
  typedef Codebook<VALUE> Book;
  typedef typename Book::First First;
  typedef typename Book::Second Second;
  // Looked up first, for they are far away.
  const int first = word_offset<First>(offsets, place, lane), second = Book::PLANES > 1 ? word_offset<Second>(offsets, place, lane) : 0;
  const int scalar = scalars[place * (D / GROUP) + lane / GROUP_LANES];
  bool finite = true;
  float top = 0, a[LANE_DIMS], energy = 0;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) finite &= fabsf(y[i]) < bits_to_float(0x7F800000u);
  const u32 group_mask = (u32)((1ull << GROUP_LANES) - 1), mine = group_mask << (lane & ~(GROUP_LANES - 1));
  const bool broken = ballot(!finite) & mine;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) {
    y[i] = broken ? 0 : y[i];
    top = fmaxf(top, fabsf(y[i]));
  }
#pragma unroll
  for (int step = 1; step < GROUP_LANES; step <<= 1) top = fmaxf(top, shuffle_xor(top, step));
  const float safe = top > 0 ? top : 1;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) {
    a[i] = fabsf(y[i]) / safe;
    energy += a[i] * a[i];
  }
  energy = group_sum(energy);
  const float level_unit = top > 0 ? sqrtf(energy / GROUP) / Book::per_sigma() : 1;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) a[i] /= level_unit;
  float dot;
  const float factor = search<VALUE>(a, dot, lane);
  // |y|^2 / <y, levels>, in the units that were divided out
  float stored = energy / (top > 0 ? dot * level_unit : 1) * (safe * (1.0f / PRESCALE));
  stored = top > 0 ? fminf(stored, 65504.0f) : 0;
  if (near) stored = -stored;
  if (broken) stored = bits_to_float(0x7FC00000u);
#pragma unroll
  for (int i = 0; i < LANE_DIMS; i++) {
    float level;
    codes[lane * LANE_DIMS + i] = (u8)(nearest<VALUE>(a[i], factor, level) | (y[i] < 0 ? Book::COUNT : 0));
  }
  if ((lane & (GROUP_LANES - 1)) == 0)
    *(u16 *)(unit + scalar) = (u16)pack_f16(stored, 0);
  sync_warp();
  store_words<First>(codes, unit, place, first, lane);
  if (Book::PLANES > 1) store_words<Second>(codes, unit, place, second, lane);
}
