"""One thread a process: these tests are many small operations, and busy machines punish spinning threads."""

import torch

torch.set_num_threads(1)
