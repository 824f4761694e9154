// Keys under a key basis, back in the model's: inverse y + mean, dense on the tensor cores. The head's record is
// `vllm_turboquant.kernels.cuda.fragments.key_fragments`: MATRIX_PARTS fp16 matrices whose sum is the inverse, the factor that
// they are short of, the mean, and for each scale group by how much its keys around the second mean are farther on.

#if KEY_BASIS
#define MATRIX_TILES (D / 16)
#define MATRIX_BYTES (MATRIX_PARTS * 2 * D * D)

// Rows 16 * tile .. of the inverse times the scale group's levels, for the unit's two halves: [half][MMA's result].
DEVICE void multiply_rows(const u8 *basis, int tile, int group, const u32 (*y)[D / 8], int lane, float (*sum)[4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) sum[half][0] = sum[half][1] = sum[half][2] = sum[half][3] = 0;
#pragma unroll
  for (int part = 0; part < MATRIX_PARTS; part++)
#pragma unroll
    for (int i = 0; i < MATRIX_TILES / SCALES; i++) {
      const int step = group * (MATRIX_TILES / SCALES) + i;
      u32 rows[4];
      load_page_128(basis + ((part * MATRIX_TILES + tile) * MATRIX_TILES + step) * 512 + lane * 16, rows);
#pragma unroll
      for (int half = 0; half < 2; half++)
        mma_f16(sum[half], rows[0], rows[1], rows[2], rows[3], y[half][2 * step], y[half][2 * step + 1]);
    }
}

// As `decode_unit` of keys is without a basis.
DEVICE void decode_keys(const u8 *unit, const u8 *basis, int bucket, int token, int begin, int end, u16 *out, u64 out_token,
                        int lane) {
  const int g = lane >> 2, t = lane & 3;
  const Levels table = {KEY_LEVELS};
  u32 y[2][D / 8];
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
      KeyRow row;
      load_key_row(unit, half * 8 + g, t, panel, row);
#pragma unroll
      for (int o = 0; o < KEY_OCTETS; o++) key_levels(row, o, table, y[half] + 4 * (panel * KEY_OCTETS + o));
    }
  const float factor = *(const float *)(basis + MATRIX_BYTES);
  const u8 *means = basis + MATRIX_BYTES + 16;
  // Of tokens 2t and 2t + 1, both halves in a word, in fp16 to save registers; negative: relative to the second mean.
  u32 scales[SCALES][2];
#pragma unroll
  for (int group = 0; group < SCALES; group++) {
    u32 words[4];
    load_page_128(unit + SCALE_BASE + group * SCALE_GROUP_BYTES + t * 16, words);
    scales[group][0] = words[0];
    scales[group][1] = words[2];
  }
  // Four tiles give a lane eight consecutive dims: rows g and g + 8 of the i-th are its dims 2i and 2i + 1.
#pragma unroll 1
  for (int j = 0; j < D / 64; j++) {
    float x[2][4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 mean[2];
      load_page_64(means + (64 * j + 8 * g + 2 * i + (1 + bucket) * D) * 4, mean);
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[half][i][e] = bits_to_float(mean[e >> 1]);
#pragma unroll
      for (int group = 0; group < SCALES; group++) {
        float sum[2][4];
        multiply_rows(basis, 4 * j + i, group, y, lane, sum);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            u32 both = scales[group][e & 1];
            x[half][i][e] += sum[half][e] * (fabsf(half ? f16_high(both) : f16_low(both)) * factor);
          }
      }
      if ((scales[0][0] | scales[0][1]) & 0x80008000u) {
        u32 farther[2];
        load_page_64(means + (64 * j + 8 * g + 2 * i) * 4, farther);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (scales[0][e & 1] >> (half ? 31 : 15) & 1) x[half][i][e] += bits_to_float(farther[e >> 1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int n = token + half * 8 + 2 * t + e;
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float low = x[half][i][e], high = x[half][i][e + 2];
          words[i] = OUTPUT_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
        }
        if (n >= begin && n < end) store_128(out + (n - begin) * out_token + 64 * j + 8 * g, words);
      }
  }
}
#endif
