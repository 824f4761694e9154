// What one launch is given. Strides are in elements of the tensor; `vllm_turboquant.kernels.cuda.launch` mirrors this struct.

struct Params {
  const u16 *query;
  u16 *out;
  const u8 *cache;
  const int *block_table;
  const int *seq_lens;
  const int *query_start_loc;
  const void *sinks;
  float *partial;  // [2 * CTAs][ROWS * (D + 4)]
  int *counters;   // [CTAs], zero before and after
  u64 query_token, query_head, out_token, out_head, cache_block, cache_head, table_request;
  int requests, kv_heads, group, max_query_len, window;
  float score_scale;  // softmax scale * log2(e), the rotation's 1 / sqrt(D) included where queries are rotated
  float out_scale;    // the rotation's 1 / sqrt(D)
  float soft_cap;     // * log2(e)
#if KEY_BASIS || RECENT
  const u8 *turned;  // [tokens][query heads][RECORD_BYTES], of turn.cu
  u32 bucket;  // of `bucket_of`
  int buckets;
#endif
#if RECENT
  const int *ends;  // [requests], tokens from there on are left out
  float *lse;       // [tokens][query heads], natural logarithms
#endif
};

#define COLUMNS (ROWS > 8 ? 16 : 8)  // query rows in MMA columns
#define TILES (COLUMNS / 8)
#define MERGE_ROWS (ROWS > 8 ? 8 : ROWS)  // rows merged at once
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
