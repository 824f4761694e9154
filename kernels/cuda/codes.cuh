// Codes to fp16 levels, in registers.
//
// A byte permute looks up four levels at once: nibbles of the selector pick bytes of an 8-entry table. Levels have two
// bytes, so there are two tables, and two more permutes interleave what they gave; where an instruction widens e4m3, in which
// all levels are exact, one table does. Signs of 4-bit codes are merged into the high bytes, where kernels/format.py has put
// their bits; 2- and 3-bit codes index signed levels directly.

struct Levels {
  u32 high0, high1, low0, low1;
  u32 e4m3_0, e4m3_1;
};

// Four codes to halves (dim 0, dim 1) and (dim 2, dim 3). `signs`: at bits 7, 15, 23, 31, none of other bits counts.
template <bool SIGNED> DEVICE void four_levels(u32 codes, u32 signs, const Levels &table, u32 *out) {
#if WIDENS_E4M3
  u32 bytes = prmt(table.e4m3_0, table.e4m3_1, codes);
  widen_e4m3(SIGNED ? and_or(signs, 0x80808080u, bytes) : bytes, out);
#else
  u32 high = prmt(table.high0, table.high1, codes), low = prmt(table.low0, table.low1, codes);
  if (SIGNED) high = and_or(signs, 0x80808080u, high);
  out[0] = prmt(low, high, 0x5140);
  out[1] = prmt(low, high, 0x7362);
#endif
}

// Eight codes, one a nibble, to four pairs of levels; `signs_high` holds the signs of codes 4..7.
DEVICE void signed_levels(u32 word, u32 signs_high, const Levels &table, u32 *out) {
  u32 magnitudes = word & 0x77777777u;
  four_levels<true>(magnitudes, word, table, out);
  four_levels<true>(magnitudes >> 16, signs_high, table, out + 2);
}

// Eight whole codes below 8, one a nibble.
DEVICE void whole_levels(u32 word, const Levels &table, u32 *out) {
  four_levels<false>(word, 0, table, out);
  four_levels<false>(word >> 16, 0, table, out + 2);
}

DEVICE u32 shifted(u32 x, int by) { return by >= 0 ? x << by : x >> -by; }

// A unit lies in shared memory, by its address there, or in a page, by pointer.
template <int WORDS> DEVICE void load_words(u32 address, u32 *words) {
  if (WORDS == 4) load_shared_128(address, words);
  if (WORDS == 2) load_shared_64(address, words);
  if (WORDS == 1) load_shared_32(address, words);
}
template <int WORDS> DEVICE void load_words(const u8 *address, u32 *words) {
  if (WORDS == 4) load_page_128(address, words);
  if (WORDS == 2) load_page_64(address, words);
  if (WORDS == 1) load_page_32(address, words);
}
DEVICE void load_half_word(u32 address, u32 *word) { load_shared_16(address, word); }
DEVICE void load_half_word(const u8 *address, u32 *word) { load_page_16(address, word); }

// ---- keys: lane (g, t) holds KEY_RUN consecutive dims of rows g and g + 8 in every panel of 128 dims

#define KEY_RUN (D >= 128 ? 32 : 16)
#define KEY_OCTETS (KEY_RUN / 8)
#define PANELS (D >= 128 ? D / 128 : 1)

struct KeyRow {
#if KEY_BITS == 4
  u32 words[KEY_OCTETS];
#else
  u32 words[KEY_RUN / 16];
  u32 top;
#endif
};

template <typename Unit> DEVICE void load_key_row(Unit unit, int row, int t, int panel, KeyRow &r) {
#if KEY_BITS == 4
  load_words<KEY_OCTETS>(unit + KEY0_BASE + panel * KEY0_PANEL + row * KEY0_TOKEN + t * (KEY_RUN / 2), r.words);
#else
  load_words<KEY_RUN / 16>(unit + KEY0_BASE + panel * KEY0_PANEL + row * KEY0_TOKEN + t * (KEY_RUN / 4), r.words);
#endif
#if KEY_BITS == 3
  // A word of the 1-bit plane holds 32 dims: where a lane has 16, two lanes share it.
  load_words<1>(unit + KEY1_BASE + panel * KEY1_PANEL + row * KEY1_TOKEN + t * KEY_RUN / 32 * 4, &r.top);
  r.top >>= t * KEY_RUN % 32 / 8;
#endif
}

// Dims 8 * octet .. 8 * octet + 7 of the lane's run: four pairs in order.
DEVICE void key_levels(const KeyRow &r, int octet, const Levels &table, u32 *out) {
#if KEY_BITS == 4
  u32 word = r.words[octet];
  signed_levels(word, word << 4, table, out);
#else
  u32 code = r.words[octet / 2] >> (2 * (octet & 1)) & 0x33333333u;
#if KEY_BITS == 3
  code |= shifted(r.top, 2 - octet) & 0x44444444u;
#endif
  whole_levels(code, table, out);
#endif
}

// ---- values: lane (g, t) holds the g-th eighth of tokens 2t, 2t + 1 (half 0) and 2t + 8, 2t + 9 (half 1)

#define VALUE_OCTETS (D / 64)

// Nibbles of two words, even and odd token, interleaved: x = [E0 O0 E2 O2 E4 O4 E6 O6], y = [E1 O1 E3 O3 E5 O5 E7 O7].
DEVICE void interleave(u32 even, u32 odd, u32 &x, u32 &y) {
  x = select_bits(even, odd << 4, 0x0F0F0F0Fu);
  y = select_bits(even >> 4, odd, 0x0F0F0F0Fu);
}

// The same for 16-bit words, even token below odd: [E0 O0 E2 O2] in the low half, [E1 O1 E3 O3] in the high half.
DEVICE u32 interleave_16(u32 both) {
  return (both & 0xF0F00F0Fu) | (both >> 12 & 0x0000F0F0u) | (both << 12 & 0x0F0F0000u);
}

// Planes of the lane's dims for one half of the unit.
struct ValueHalf {
#if VALUE_BITS == 4
  u32 even[VALUE_OCTETS], odd[VALUE_OCTETS];
#else
  u32 low[D == 256 ? 4 : D == 128 ? 2 : 1];  // 2-bit words, even then odd token; d = 64: both tokens in one
  u32 top[D == 256 ? 2 : 1];                 // 1-bit words, even then odd token; d <= 128: both tokens in one
#endif
};

// Steps in which the decode loads a half: 256 dims at once would fill the registers.
#define VALUE_STEPS (D == 256 && (VALUE_BITS == 4 || TIGHT_REGISTERS) ? 2 : 1)

// With two STEPS, which 256 dims may have, each brings half of the dims.
template <int STEPS = 1, typename Unit> DEVICE void load_value_half(Unit unit, int lane, int half, ValueHalf &r, int step = 0) {
#if VALUE_BITS == 4
  Unit base = unit + VALUE0_BASE;
#if D == 256
  const int words = 4 / STEPS;
  load_words<words>(base + (2 * half) * 512 + lane * 16 + step * 4 * words, r.even + step * words);
  load_words<words>(base + (2 * half + 1) * 512 + lane * 16 + step * 4 * words, r.odd + step * words);
#else
  u32 words[2 * VALUE_OCTETS];
  load_words<2 * VALUE_OCTETS>(base + half * (256 * VALUE_OCTETS) + lane * (8 * VALUE_OCTETS), words);
#pragma unroll
  for (int i = 0; i < VALUE_OCTETS; i++) r.even[i] = words[i], r.odd[i] = words[VALUE_OCTETS + i];
#endif
#else
  Unit base = unit + VALUE0_BASE + half * (2 * D) + lane * (D / 16);
  if constexpr (STEPS == 1) {
    load_words<D / 64>(base, r.low);
  } else {
    load_words<1>(base + 4 * step, r.low + step);
    load_words<1>(base + 8 + 4 * step, r.low + 2 + step);
  }
#if VALUE_BITS == 3
  if (step > 0) return;
  Unit top = unit + VALUE1_BASE + half * D + lane * (D / 32);
  if (D == 256) load_words<2>(top, r.top);
  if (D == 128) load_words<1>(top, r.top);
  if (D == 64) load_half_word(top, r.top);
#endif
#endif
}

#if VALUE_BITS == 3
// The codes' highest bits at bit 2 of each nibble, in the order of `interleave`.
DEVICE void value_top_bits(const ValueHalf &r, int octet, u32 &x, u32 &y) {
#if D == 256
  interleave(r.top[0], r.top[1], x, y);
  x = shifted(x, 2 - octet);
  y = shifted(y, 2 - octet);
#elif D == 128
  u32 both = interleave_16(r.top[0]);
  u32 low = shifted(both, 2 - 2 * octet), high = shifted(both, 1 - 2 * octet);
  x = prmt(low, high, 0x5410);
  y = prmt(low, high, 0x7632);
#else
  u32 c = r.top[0];
  u32 z = (c & 0xF00Fu) | (c >> 4 & 0x00F0u) | (c << 4 & 0x0F00u);
  u32 low = prmt(z << 2, z << 1, 0x5140), high = prmt(z, z >> 1, 0x5140);
  x = prmt(low, high, 0x5410);
  y = prmt(low, high, 0x7632);
#endif
}
#endif

// Half of the dims n = 8 * octet .. 8 * octet + 7 of the lane's eighth: pairs (even token, odd token) of n0 n2 n4 n6, with
// `odd_dims` of n1 n3 n5 n7.
DEVICE void value_levels(const ValueHalf &r, int octet, bool odd_dims, const Levels &table, u32 *out) {
#if VALUE_BITS == 4
  u32 even = r.even[octet], odd = r.odd[octet];
  u32 x = odd_dims ? select_bits(even >> 4, odd, 0x0F870F87u) : select_bits(even, odd << 4, 0x078F078Fu);
  signed_levels(x, odd_dims ? rotate_left(x, 12) : x << 4, table, out);
#else
  u32 x, y;
#if D == 64
  u32 both = interleave_16(r.low[0]);
  x = prmt(both, both >> 2, 0x5410);
  y = prmt(both, both >> 2, 0x7632);
#else
  interleave(r.low[octet / 2], r.low[octet / 2 + D / 128], x, y);
#endif
  u32 code = (odd_dims ? y : x) >> (D == 64 ? 0 : 2 * (octet & 1)) & 0x33333333u;
#if VALUE_BITS == 3
  u32 top_x, top_y;
  value_top_bits(r, octet, top_x, top_y);
  code = and_or(odd_dims ? top_y : top_x, 0x44444444u, code);
#endif
  whole_levels(code, table, out);
#endif
}

// Queries in shared memory, fp16 [columns][D], as operands of MMA tile `n`: two words a step, in the order in which a lane holds
// a row of keys.
DEVICE void load_operands(u32 *operands, const u16 *queries, int n, int g, int t) {
#pragma unroll
  for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
    for (int o = 0; o < KEY_OCTETS; o++)
      load_shared_128(shared_address(queries + (n * 8 + g) * D + panel * 128 + t * KEY_RUN + o * 8),
                      operands + 4 * (panel * KEY_OCTETS + o));
}
