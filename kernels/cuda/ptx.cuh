// The machine: every PTX instruction and warp primitive that the kernels use. The tests replace this file by an
// emulation of the same functions on the CPU, so nothing else may touch the hardware.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define ALL_LANES 0xFFFFFFFFu

DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// (a & mask) | (b & ~mask)
DEVICE u32 select_bits(u32 a, u32 b, u32 mask) {
  u32 r;
  asm("lop3.b32 %0,%1,%2,%3,0xE4;" : "=r"(r) : "r"(a), "r"(b), "r"(mask));
  return r;
}

// (a & mask) | b
DEVICE u32 and_or(u32 a, u32 mask, u32 b) {
  u32 r;
  asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(b));
  return r;
}

DEVICE u32 rotate_left(u32 x, u32 n) { return __funnelshift_l(x, x, n); }

DEVICE u32 pack_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

DEVICE u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

DEVICE float f16_low(u32 pair) {
  float r;
  asm("{.reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,l;}" : "=f"(r) : "r"(pair));
  return r;
}

DEVICE float f16_high(u32 pair) {
  float r;
  asm("{.reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,h;}" : "=f"(r) : "r"(pair));
  return r;
}

#define WIDENS_E4M3 (__CUDA_ARCH__ >= 890)
#define TIGHT_REGISTERS (__CUDA_ARCH__ >= 1200)  // the compiler uses more of them for the same code

#if WIDENS_E4M3
// Four e4m3 bytes as fp16: pairs of the first two and of the last two.
DEVICE void widen_e4m3(u32 x, u32 *out) {
  asm("{.reg .b16 l,h; mov.b32 {l,h},%2; cvt.rn.f16x2.e4m3x2 %0,l; cvt.rn.f16x2.e4m3x2 %1,h;}"
      : "=r"(out[0]), "=r"(out[1])
      : "r"(x));
}
#endif

DEVICE float bits_to_float(u32 x) { return __uint_as_float(x); }
DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }

DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}

DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float divide(float a, float b) { return __fdividef(a, b); }

// An 8 x 8 tile of 16-bit numbers, transposed across the warp.
DEVICE u32 transpose_tile(u32 x) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(x));
  return r;
}

DEVICE void mma_f16(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Operands are fp32, of which 11 bits count.
DEVICE void mma_tf32(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void load_shared_128(u32 address, u32 *r) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

DEVICE void load_shared_64(u32 address, u32 *r) {
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}

DEVICE void load_shared_32(u32 address, u32 *r) { asm volatile("ld.shared.u32 %0,[%1];" : "=r"(r[0]) : "r"(address)); }

DEVICE void load_shared_16(u32 address, u32 *r) {
  asm volatile("{.reg .u16 x; ld.shared.u16 x,[%1]; cvt.u32.u16 %0,x;}" : "=r"(r[0]) : "r"(address));
}

// Bytes of pages and of bases, which no kernel writes while this one runs. As C++ vectors the compiler may split loads and stores.
DEVICE void load_page_128(const u8 *p, u32 *r) {
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}

DEVICE void load_page_64(const u8 *p, u32 *r) {
  asm volatile("ld.global.nc.v2.u32 {%0,%1},[%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
}

DEVICE void load_page_32(const u8 *p, u32 *r) { asm volatile("ld.global.nc.u32 %0,[%1];" : "=r"(r[0]) : "l"(p)); }

DEVICE void load_page_16(const u8 *p, u32 *r) {
  asm volatile("{.reg .u16 x; ld.global.nc.u16 x,[%1]; cvt.u32.u16 %0,x;}" : "=r"(r[0]) : "l"(p));
}

DEVICE void store_128(u16 *p, const u32 *r) {
  asm volatile("st.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(p), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int thread_id() { return threadIdx.x; }
DEVICE u32 block_id() { return blockIdx.x; }
DEVICE u32 block_count() { return gridDim.x; }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE int shuffle(int x, int lane) { return __shfl_sync(ALL_LANES, x, lane); }
DEVICE int shuffle_up(int x, int step) { return __shfl_up_sync(ALL_LANES, x, step); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
DEVICE u32 ballot(bool x) { return __ballot_sync(ALL_LANES, x); }
DEVICE bool any_lane(bool x) { return __any_sync(ALL_LANES, x); }
DEVICE int first_bit(u32 x) { return __ffs(x) - 1; }

// Values that other CTAs wrote: past L1, which is not coherent.
DEVICE float load_remote(const float *p) { return __ldcg(p); }
DEVICE void load_remote_128(const float *p, float *r) {
  float4 x = __ldcg((const float4 *)p);
  r[0] = x.x, r[1] = x.y, r[2] = x.z, r[3] = x.w;
}
DEVICE void load_remote_64(const float *p, float *r) {
  float2 x = __ldcg((const float2 *)p);
  r[0] = x.x, r[1] = x.y;
}
// Adds 1 and returns what was there. What this CTA wrote before its last sync_block is visible to a CTA that sees the sum.
DEVICE int arrive(int *p) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0,[%1],1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}

// Programmatic dependent launch, sm_90 and later: a kernel lets the next one of its stream start, which waits for the end of the
// first and for all that it wrote. No effect where the launch did not ask for it.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_launcher() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void barrier_init(u32 barrier) { asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(barrier)); }

DEVICE void barrier_init_done() {
#if BULK
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DEVICE void barrier_expect(u32 barrier, u32 bytes) {
#if BULK
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

DEVICE void barrier_wait(u32 barrier, u32 phase) {
#if BULK
  asm volatile(
      "{.reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p,[%0],%1; @p bra done; bra again; done: }" ::"r"(barrier),
      "r"(phase)
      : "memory");
#endif
}

DEVICE void copy_bulk(u32 target, const u8 *source, u32 bytes, u32 barrier) {
#if BULK
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}

DEVICE void copy_16(u32 target, const u8 *source) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(target), "l"(source) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
