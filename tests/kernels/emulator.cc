// Runs the kernel above it, `blocks` CTAs one after another.

static const Params *launched;

static void thread_main() {
  ENTRY(*launched);
  machine::done[machine::current] = true;
}

extern "C" void run(const Params *params, u32 blocks) {
  using namespace machine;
  launched = params;
  machine::blocks = blocks;
  for (block = 0; block < blocks; block++) {
    begin_cta();
    for (int i = 0; i < THREADS; i++) {
      done[i] = false;
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks[i];
      fibers[i].uc_stack.ss_size = STACK;
      fibers[i].uc_link = &scheduler;
      makecontext(&fibers[i], thread_main, 0);
    }
    for (int live = THREADS; live;) {
      live = 0;
      for (int i = 0; i < THREADS; i++) {
        if (done[i]) continue;
        live++;
        current = i;
        swapcontext(&scheduler, &fibers[i]);
      }
    }
    end_cta();
  }
}
